"""How vLLM starts its processes once TensorStore runs in this one.

vLLM forks by default, and TensorStore aborts a forked process that uses it. TensorStore runs here as soon as somebody has
imported it: `open_checkpoint`, Orbax, MaxText, Tunix. vLLM itself spawns for the same reason where CUDA is initialised
(0.32.0 utils/system_utils.py `_maybe_force_spawn`).

A spawned process runs the main script again, up to its guard (`if __name__ == "__main__":`). Where a script has none, the
engine of an `LLM` runs in this process instead.
"""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_maxtext_loader.errors import EngineError

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

logger = init_logger("vllm." + __name__)

METHOD_VARIABLE = "VLLM_WORKER_MULTIPROC_METHOD"
IN_PROCESS_VARIABLE = "VLLM_ENABLE_V1_MULTIPROCESSING"


def avoid_fork(args: EngineArgs, usage_context: Any) -> None:
    """Sets vLLM's variables so that no process is forked where TensorStore is loaded; says what was chosen.

    Args:
        args: of the engine that is about to start.
        usage_context: vLLM's name of the caller ("LLM_CLASS" for `LLM`), or None.

    Raises:
        EngineError: the script has no guard, and the engine needs processes of its own.
    """
    from vllm import envs

    if "tensorstore" not in sys.modules or envs.VLLM_WORKER_MULTIPROC_METHOD != "fork":
        return
    os.environ[METHOD_VARIABLE] = "spawn"
    if not envs.VLLM_ENABLE_V1_MULTIPROCESSING:
        return
    if (script := _script_without_guard()) is None:
        logger.warning(
            "TensorStore is loaded in this process, and aborts processes that are forked from it: vLLM will spawn its "
            "processes (%s=spawn).",
            METHOD_VARIABLE,
        )
        return
    if str(getattr(usage_context, "value", usage_context)) != "LLM_CLASS" or args.data_parallel_size > 1:
        raise EngineError(
            f"{script}: TensorStore is loaded in this process, so vLLM must spawn its processes ({METHOD_VARIABLE}=spawn), "
            f'and each runs this script again. Start the engine below `if __name__ == "__main__":`.'
        )
    os.environ[IN_PROCESS_VARIABLE] = "0"
    logger.warning(
        "TensorStore is loaded in this process, and aborts processes that are forked from it; %s has no "
        '`if __name__ == "__main__":`, so none can be spawned either. The engine runs in this process (%s=0).',
        script,
        IN_PROCESS_VARIABLE,
    )


def _script_without_guard() -> str | None:
    """The main script that a spawned process would run again as a whole; None where there is none."""
    path = getattr(sys.modules["__main__"], "__file__", None)
    if path is None:
        return None  # A notebook, a shell, or `python -c`: nothing is run again.
    try:
        body = ast.parse(Path(path).read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return None
    guarded = any(isinstance(node, ast.If) and _asks_for_main(node.test) for node in body)
    return None if guarded else path


def _asks_for_main(test: ast.expr) -> bool:
    names = {node.id for node in ast.walk(test) if isinstance(node, ast.Name)}
    return "__name__" in names
