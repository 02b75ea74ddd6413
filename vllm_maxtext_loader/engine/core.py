"""The engine core's side of a reload: what only the process with the scheduler can see to.

Every way to an update (vLLM's routes, `LLM`, `collective_rpc`) ends in `EngineCore.collective_rpc` (vLLM 0.32.0
v1/engine/core.py). Here it is refused while requests run, workers commit only when all of them have staged the same step,
and no cache outlives its weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm_maxtext_loader.engine.worker import is_maxtext, is_ours
from vllm_maxtext_loader.errors import ReloadError, restore_error
from vllm_maxtext_loader.options import SERVED

_PINNED = "_maxtext_pinned"

_Call = Callable[..., Any]
"""`collective_rpc` of a method, on all workers."""


def extend_engine_core(module: ModuleType) -> None:
    """Lets EngineCore look after reloads of an engine that `--load-format maxtext` loaded, on tpu-inference.

    Args:
        module: vllm.v1.engine.core.
    """
    core: Any = module.EngineCore
    initialize, collective_rpc = core._initialize_kv_caches, core.collective_rpc

    @functools.wraps(initialize)
    def with_version(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        # EngineCore loads plugins in its __init__, which is too late to replace that.
        result = initialize(self, vllm_config, *args, **kwargs)
        served = vars(vllm_config.model_config).get(SERVED)
        if is_maxtext(vllm_config) and served is not None:
            self._weight_version = weight_version(served["items"], served["step"])
        return result

    @functools.wraps(collective_rpc)
    def guarded(
        self: Any, method: Any, timeout: float | None = None, args: tuple = (), kwargs: Any = None
    ) -> Any:
        info = (kwargs or {}).get("update_info", args[0] if args else None)
        if not is_maxtext(self.vllm_config) or not _on_tpu_inference():
            return collective_rpc(self, method, timeout, args, kwargs)
        call = functools.partial(_call, self, functools.partial(collective_rpc, self, timeout=timeout))
        match method:
            case "start_weight_update":
                _refuse_running(self)
                # It frees the KV cache, unless told not to: the scheduler must not find anything there.
                if (kwargs or {}).get("free_kv_cache", args[0] if args else True):
                    self.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
            case "pull_weights" if isinstance(info, dict):
                try:
                    info = _pin(self, call, info)
                except Exception:
                    # The workers say in their answers what is wrong.
                    vars(self).pop(_PINNED, None)
                return call("pull_weights", kwargs={"update_info": info})
            case "drop_weights":
                vars(self).pop(_PINNED, None)
            case "update_weights" if info is not None and is_ours(info):
                return _update(self, call, info)
        return call(method, args=args, kwargs=kwargs)

    core._initialize_kv_caches = with_version
    core.collective_rpc = guarded


_METHODS = (
    "start_weight_update",
    "update_weights",
    "finish_weight_update",
    "abort_weight_update",
    "pull_weights",
    "find_weights",
    "stage_weights",
    "weight_state",
    "drop_weights",
    "tear_weights",
)
"""Of the worker, with what `worker.extend_worker` adds."""


def _call(core: Any, collective_rpc: _Call, method: Any, args: tuple = (), kwargs: Any = None) -> Any:
    """Calls a method of all workers; where one raises, when all have answered.

    Raises:
        MaxTextLoadError: of the first worker that raised one, with its host.
    """
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    if method not in _METHODS or isinstance(core.model_executor, UniProcExecutor):
        return collective_rpc(method, args=args, kwargs=kwargs)
    answers = collective_rpc("call_and_report", args=(method, args, kwargs or {}))
    for answer in answers:
        if answer["error"] is not None:
            raise restore_error(answer["error"], answer["host"])
    return [answer["result"] for answer in answers]


def weight_version(items: str, step: int | None) -> str:
    """vLLM's `weight_version` of a step."""
    return items if step is None else f"step-{step}"


def _update(core: Any, call: _Call, info: dict[str, Any]) -> Any:
    """Stages on all workers, exchanges on all workers, and drops what was computed with the old weights."""
    try:
        _refuse_running(core)
        info = _pin(core, call, info)
        staged = call("stage_weights", kwargs={"update_info": info})
        found = {(each["path"], each["step"], each["digest"]) for each in staged}
        if len(found) > 1:
            raise ReloadError(f"The workers staged different checkpoints: {sorted(map(str, found))}.")
        results = _exchange(core, call, info)
    except Exception as error:
        call("abort_weight_update", kwargs={"reason": f"{type(error).__name__}: {error}"})
        raise
    vars(core).pop(_PINNED, None)
    # What waits was never computed; what was frozen (pause mode "keep") is computed again.
    core.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    core.reset_encoder_cache()
    core.model_executor.reset_mm_cache()
    core._weight_version = weight_version(results[0]["items"], results[0]["step"])
    return results


def _exchange(core: Any, call: _Call, info: dict[str, Any]) -> Any:
    """Exchanges the weights of all workers; where one failed and others did not, once more, and then never again."""
    try:
        return call("update_weights", kwargs={"update_info": info})
    except Exception:
        if core.vllm_config.parallel_config.world_size == 1:
            raise
    try:
        # A worker that has exchanged them has nothing to do.
        return call("update_weights", kwargs={"update_info": info})
    except Exception as error:
        call("tear_weights", kwargs={"reason": f"The workers hold different steps: {error}"})
        raise


def _pin(core: Any, call: _Call, info: dict[str, Any]) -> dict[str, Any]:
    """The same step for all workers, whatever is committed meanwhile.

    Where there are several, the first finds it; the same request means the same step until it is served or dropped.
    """
    if core.vllm_config.parallel_config.world_size == 1:
        return info
    requested, pinned = vars(core).get(_PINNED, (None, None))
    if requested == info and pinned is not None:
        return pinned
    found = call("find_weights", kwargs={"update_info": info})[0]
    pinned = {**info, "path": found["items"], "step": found["step"], "given": found["given"]}
    vars(core)[_PINNED] = (info, pinned)
    return pinned


def _refuse_running(core: Any) -> None:
    """Refuses an update while requests run: their answers would mix two steps.

    Raises:
        ReloadError: with how many.
    """
    scheduler = core.scheduler
    # Frozen requests (pause mode "keep") do not count as unfinished, nor do queued ones while the engine is paused.
    if scheduler.has_unfinished_requests():
        raise ReloadError(
            f"{scheduler.get_num_unfinished_requests()} requests are in progress. Pause first (POST /pause?mode=wait), then "
            f"update."
        )
    if scheduler.running and core.batch_queue:
        raise ReloadError("The engine's last step is not done. Update when POST /pause has returned.")


def _on_tpu_inference() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_tpu()
