"""`reload`: another step into a running `LLM`."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from vllm_maxtext_loader.errors import ReloadError, restore_error

if TYPE_CHECKING:
    from vllm import LLM

_POLL_SECONDS = 0.05

_NO_STEP = -1


def reload(llm: LLM, step: int | None = None, path: str | os.PathLike[str] | None = None) -> int:
    """Serves another step of training, without a restart.

    The step is read into host memory first; then the weights are exchanged, and everything that was computed with the old
    ones is dropped (prefix, multimodal and encoder caches). If it cannot be read, nothing changes.

    Args:
        llm: started with load_format="maxtext", on tpu-inference.
        step: None means the newest committed one.
        path: a run, a step or an item; None means the run that is served.

    Returns:
        The step that is served now; -1 for a checkpoint whose directories name no step.

    Raises:
        MaxTextLoadError: the checkpoint cannot be read, or is of another model; or the engine cannot exchange its
            weights. The old weights are served on.
        TornWeightsError: the exchange broke off half-way; the engine answers nothing.
    """
    info: dict[str, Any] = {"path": None if path is None else os.fspath(path), "step": step}
    engine: Any = llm.llm_engine
    if engine.has_unfinished_requests():
        raise ReloadError("Requests are in progress. Let `LLM.generate` return first.")
    if "staged" in _stage(llm, info):
        # The exchange needs no room that the KV cache takes.
        llm.collective_rpc("start_weight_update", kwargs={"free_kv_cache": False})
        llm.update_weights({"update_info": info})
        llm.finish_weight_update()
        # The front end's multimodal cache knows what the engine's holds.
        engine.reset_mm_cache()
    state = llm.collective_rpc("weight_state")[0]
    return _NO_STEP if state["step"] is None else state["step"]


def _stage(llm: LLM, info: dict[str, Any]) -> set[str]:
    """Has all hosts stage a step, and waits for the last of them.

    Returns:
        The states the hosts are in: "staged", or "serving" where one has this step already.

    Raises:
        MaxTextLoadError: a host cannot stage it; the others forget it.
    """
    while True:
        pulled = llm.collective_rpc("pull_weights", kwargs={"update_info": info})
        for found in pulled:
            if found["state"] == "failed":
                llm.collective_rpc("drop_weights")
                raise restore_error(found["error"], found["host"] if len(pulled) > 1 else None)
        if "staging" not in (states := {found["state"] for found in pulled}):
            return states
        time.sleep(_POLL_SECONDS)
