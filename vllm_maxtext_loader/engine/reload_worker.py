"""The worker's side of a reload: which step is served, which is staged, and the exchange."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_maxtext_loader import families
from vllm_maxtext_loader.checkpoint.find import locate
from vllm_maxtext_loader.checkpoint.storage.path import Location
from vllm_maxtext_loader.engine.origin import Origin, run_of
from vllm_maxtext_loader.engine.staging import Request, Staging
from vllm_maxtext_loader.errors import (
    EngineError,
    MaxTextLoadError,
    ReloadError,
    TornWeightsError,
    describe_error,
)
from vllm_maxtext_loader.options import GIB

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_maxtext_loader.tpu.swap import Slot

logger = init_logger("vllm." + __name__)


class WeightReloader:
    """Exchanges the weights of one worker's model.

    Args:
        worker: tpu-inference's TPUWorker.
        origin: how its model was loaded.

    Attributes:
        failure: why the last `update` failed; None where it did not.
    """

    def __init__(self, worker: Any, origin: Origin) -> None:
        self.failure: str | None = None
        self._worker = worker
        self._origin = origin
        self._path, self._location = origin.path, origin.location
        self._staging: Staging | None = None
        self._slots: dict[str, Slot] = {}
        self._state: dict[str, Any] | None = None
        self._torn: str | None = None

    def state(self) -> dict[str, Any]:
        """What is served, and what is staged, for JSON."""
        return {
            "path": self._path,
            "items": self._location.items.url,
            "step": self._location.step,
            "staged": None if self._staging is None else self._staging.progress(),
            "torn": self._torn is not None,
        }

    def pull(self, update_info: dict[str, Any]) -> dict[str, Any]:
        """Starts staging, or says how far it is. A pull of another step takes the place of one that is not served.

        Args:
            update_info: {"path": the run that is served unless given, "step": the newest committed one unless given,
                "checksums": file to compare with}.
        """
        try:
            if (reason := why_not(self._worker.vllm_config)) is not None:
                raise EngineError(reason)
            request = self._request(update_info)
        except MaxTextLoadError as error:
            return self._refused(update_info, error)
        staging = self._staging_of(request)
        progress = staging.progress()
        if progress["state"] in ("failed", "serving"):
            self._staging = None  # The same call starts anew.
        return progress

    def drop(self) -> None:
        """Gives staging up."""
        if self._staging is not None:
            self._staging.cancel()
            self._staging = None

    def find(self, update_info: dict[str, Any]) -> dict[str, Any]:
        """Where a requested step is; nothing of it is read.

        Raises:
            MaxTextLoadError: there is none.
        """
        request = self._request(update_info)
        location = locate(request.path, request.step)
        return {"items": location.items.url, "step": location.step, "given": request.given}

    def stage(self, update_info: dict[str, Any]) -> dict[str, Any]:
        """Returns when a step is staged, or served already.

        Raises:
            MaxTextLoadError: it cannot be; nothing has changed.
        """
        return self._stage(update_info).progress()

    def update(self, update_info: dict[str, Any]) -> dict[str, Any]:
        """Exchanges the weights for those of a step, staged or not; no step of the engine may run.

        Raises:
            TornWeightsError: some arrays are the new step's, and the rest could not be placed.
            MaxTextLoadError: it cannot be staged; nothing has changed.
        """
        staging = self._stage(update_info)
        if staging.state == "staged":
            self._exchange(staging)
        return self.state()

    def tear(self, reason: str) -> None:
        """Makes the engine refuse to answer, until a reload succeeds."""
        self._torn = reason
        self._staging = None
        logger.error("%s", reason)

        def execute_model(*_: Any, **__: Any) -> Any:
            raise TornWeightsError(reason)

        # Not the worker's own: Ray's first executor goes past that (tpu-inference 0.32.0 executors/
        # ray_distributed_executor.py `execute_model_ray`).
        vars(self._worker.model_runner)["execute_model"] = execute_model

    def _stage(self, update_info: dict[str, Any]) -> Staging:
        """The staging of a request, when it is staged, or served already."""
        if (reason := why_not(self._worker.vllm_config)) is not None:
            raise EngineError(reason)
        if self._staging is not None and self._staging.state == "failed":
            self._staging = None  # An update starts anew, too.
        request = self._request(update_info)
        if request.step is None and self._staging is not None and not self._staging.wants(request):
            # The newest step may be the one that is staged.
            request = dataclasses.replace(request, step=locate(request.path).step)
        staging = self._staging_of(request)
        try:
            staging.wait()
        finally:
            if staging.state != "staged":
                self._staging = None
        return staging

    def _exchange(self, staging: Staging) -> None:
        from vllm_maxtext_loader.tpu.swap import exchange

        location = staging.location
        assert location is not None
        started = time.perf_counter()
        try:
            exchange(self._slots, staging.arrays.items(), location.items.url)
        except TornWeightsError as error:
            self.tear(str(error))
            raise
        self._settle()
        if self._torn is not None:
            self._torn = None
            del vars(self._worker.model_runner)["execute_model"]
        before, self._location = self._location, location
        self._path = staging.request.given
        logger.info(
            "Serving %s now (step %s; before, step %s): %.3g GiB read, %d arrays exchanged, staging %.1f s, pause %.2f s.",
            location.items,
            location.step,
            before.step,
            staging.read_bytes / GIB,
            len(staging.arrays),
            staging.seconds,
            time.perf_counter() - started,
        )
        self._staging = None

    def _settle(self) -> None:
        """Writes the last step's tokens in the place of their placeholders, as a step without requests does.

        A frozen request is computed again from all its tokens; the next step would look for a placeholder that is gone
        (tpu-inference 0.32.0 runner/tpu_runner.py `_execute_model`).
        """
        runner = self._worker.model_runner
        if runner.scheduler_config.async_scheduling and runner._pre_async_results is not None:
            runner._modify_prev_results()
            runner._pre_async_results = None

    def _request(self, update_info: dict[str, Any]) -> Request:
        path, step = update_info.get("path"), update_info.get("step")
        if step is not None and (not isinstance(step, int) or isinstance(step, bool) or step < 0):
            raise ReloadError(f"step must be an integer >= 0, found {step!r}.")
        for key in ("path", "checksums"):
            value = update_info.get(key)
            if value is not None and (not isinstance(value, str) or not value):
                raise ReloadError(f"{key} must be a path or a URL, found {value!r}.")
        given = update_info.get("given") or path or self._path
        path = run_of(self._location) if path is None else Location.parse(path).url
        return Request(path, step, update_info.get("checksums"), given)

    def _staging_of(self, request: Request) -> Staging:
        """The staging of a request: what has begun, where it is the same or has found the same step; else a new one."""
        old = self._staging
        if old is not None and old.wants(request):
            return old
        if old is not None:
            old.cancel()
        self._find_slots()
        serving = self._location if self._torn is None else None
        self._staging = Staging(request, self._origin, self._slots, serving, old)
        return self._staging

    def _find_slots(self) -> None:
        """Finds the engine's arrays; their places stay the same unless somebody gives the engine another dictionary."""
        from vllm_maxtext_loader.tpu.swap import find_slots

        runner = self._worker.model_runner
        if self._state is not runner.state and self._torn is None:
            self._slots, self._state = find_slots(runner.model.model.vllm_model, runner.state), runner.state

    def _refused(self, update_info: dict[str, Any], error: MaxTextLoadError) -> dict[str, Any]:
        return {
            "host": socket.gethostname(),
            "state": "failed",
            "path": update_info.get("path") or self._path,
            "step": update_info.get("step"),
            "read_bytes": 0,
            "total_bytes": 0,
            "seconds": 0.0,
            "error": describe_error(error),
        }


def why_not(config: VllmConfig) -> str | None:
    """Why the weights of such an engine cannot be exchanged; None where they can."""
    parallel, speculative = config.parallel_config, config.speculative_config
    sharding: Any = getattr(config, "sharding_config", None)
    family = families.of_model_type(config.model_config.hf_config.model_type, config.model_config.model)
    found = [
        ("LoRA (--enable-lora)", config.lora_config is not None),
        ("pipeline parallelism", parallel.pipeline_parallel_size > 1),
        ("data parallelism", parallel.data_parallel_size > 1 or getattr(sharding, "total_dp_size", 1) > 1),
        ("quantized weights", config.model_config.quantization is not None),
        ("disaggregated serving", config.kv_transfer_config is not None or bool(os.environ.get("PREFILL_SLICES"))),
        ("a separate draft model", speculative is not None and speculative.draft_model_config is not None
         and speculative.draft_model_config is not speculative.target_model_config),
        (f"{family.compiled_in}, which tpu-inference compiles into its programs", bool(family.compiled_in)),
    ]  # fmt: skip
    names = [name for name, is_used in found if is_used]
    if not names:
        return None
    return (
        f"The weights of an engine with {' and '.join(names)} cannot be exchanged while it runs. Restart it to serve "
        f"another step."
    )
