"""What tpu-inference's worker learns: `pull_weights` stages a step while the engine answers, `update_weights` exchanges it.

vLLM's weight update is four calls: start_weight_update, update_weights, finish_weight_update, and resume. tpu-inference
0.32.0 has them, and its `update_weights` does nothing (worker/tpu_worker.py). Here it takes {"path": …, "step": …}. Anything
else, and every engine of another load format, goes to tpu-inference as before.
"""

from __future__ import annotations

import functools
import socket
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_maxtext_loader.errors import EngineError, MaxTextLoadError, ReloadError, describe_error
from vllm_maxtext_loader.options import LOAD_FORMAT

if TYPE_CHECKING:
    from vllm_maxtext_loader.engine.reload_worker import WeightReloader

logger = init_logger("vllm." + __name__)

_ATTRIBUTE = "_maxtext_reloader"
_KEYS = ("path", "step")


def is_ours(update_info: Any) -> bool:
    """Whether an `update_info` names a MaxText step."""
    return isinstance(update_info, dict) and any(key in update_info for key in _KEYS)


def is_maxtext(config: Any) -> bool:
    """Whether a VllmConfig is of this load format."""
    return str(config.load_config.load_format).lower() == LOAD_FORMAT


def extend_worker(module: ModuleType) -> None:
    """Gives tpu-inference's worker the methods of a reload.

    Args:
        module: tpu_inference.worker.tpu_worker.
    """
    worker_class: Any = module.TPUWorker
    start, update, finish, load = (
        worker_class.start_weight_update,
        worker_class.update_weights,
        worker_class.finish_weight_update,
        worker_class.load_model,
    )

    @functools.wraps(load)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(self, *args, **kwargs)
        except MaxTextLoadError as error:
            if _is_alone() or str(error).startswith("Host "):
                raise
            raise type(error)(f"Host {socket.gethostname()}: {error}") from error

    @functools.wraps(start)
    def start_weight_update(self: Any, *args: Any, **kwargs: Any) -> None:
        if (reloader := _find_reloader(self)) is not None:
            reloader.failure = None
        start(self, *args, **kwargs)

    @functools.wraps(update)
    def update_weights(self: Any, update_info: dict[str, Any]) -> Any:
        if not is_ours(update_info) or (reloader := _find_reloader(self)) is None:
            return update(self, update_info)
        return reloader.update(update_info)

    @functools.wraps(finish)
    def finish_weight_update(self: Any) -> None:
        reloader = _find_reloader(self)
        if reloader is not None and reloader.failure is not None:
            failure, reloader.failure = reloader.failure, None
            raise ReloadError(f"No weight update is in progress: the last one failed. {failure}")
        finish(self)

    def abort_weight_update(self: Any, reason: str) -> None:
        """Closes an update that failed: the engine serves what it served."""
        _reloader(self).failure = reason
        if self._weight_update_active:
            finish(self)  # It gives the KV cache back.

    for function in (
        load_model,
        start_weight_update,
        update_weights,
        finish_weight_update,
        abort_weight_update,
        pull_weights,
        find_weights,
        stage_weights,
        weight_state,
        drop_weights,
        tear_weights,
        call_and_report,
    ):
        setattr(worker_class, function.__name__, function)


def call_and_report(self: Any, method: str, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Calls a method of the worker; what it raises is an answer, too.

    Of several workers' answers vLLM reads none after the first error (0.32.0 v1/executor/multiproc_executor.py
    `collective_rpc`, which Ray's second executor shares): the next call would be given this one's.

    Returns:
        {"host", "result", "error": `describe_error`, or None}
    """
    answer: dict[str, Any] = {"host": socket.gethostname(), "result": None, "error": None}
    try:
        answer["result"] = getattr(self, method)(*args, **kwargs)
    except Exception as error:
        logger.exception("%s failed.", method)
        answer["error"] = describe_error(error)
    return answer


def pull_weights(self: Any, update_info: dict[str, Any]) -> dict[str, Any]:
    """See `WeightReloader.pull`; a method of the worker, as all below."""
    return _reloader(self).pull(update_info)


def find_weights(self: Any, update_info: dict[str, Any]) -> dict[str, Any]:
    """See `WeightReloader.find`."""
    return _reloader(self).find(update_info)


def stage_weights(self: Any, update_info: dict[str, Any]) -> dict[str, Any]:
    """See `WeightReloader.stage`."""
    return _reloader(self).stage(update_info)


def weight_state(self: Any) -> dict[str, Any]:
    """See `WeightReloader.state`."""
    return _reloader(self).state()


def drop_weights(self: Any) -> None:
    """See `WeightReloader.drop`."""
    _reloader(self).drop()


def tear_weights(self: Any, reason: str) -> None:
    """See `WeightReloader.tear`."""
    _reloader(self).tear(reason)


def _is_alone() -> bool:
    """Whether this process has all of the engine's devices."""
    import jax

    return jax.process_count() == 1


def _reloader(worker: Any) -> WeightReloader:
    if (found := _find_reloader(worker)) is None:
        raise EngineError(
            "This engine was not started with --load-format maxtext: its weights cannot be exchanged for a MaxText step."
        )
    return found


def _find_reloader(worker: Any) -> WeightReloader | None:
    """The worker's reloader, made when it is first asked for; None for an engine of another load format."""
    if not is_maxtext(worker.vllm_config):
        return None
    if _ATTRIBUTE not in vars(worker):
        # Imported here: TensorStore is for those who load a checkpoint.
        from vllm_maxtext_loader.engine.origin import Origin
        from vllm_maxtext_loader.engine.reload_worker import WeightReloader

        if (origin := Origin.of(worker.model_runner.model.model.vllm_model)) is None:
            return None
        vars(worker)[_ATTRIBUTE] = WeightReloader(worker, origin)
    return vars(worker)[_ATTRIBUTE]
