"""Serve MaxText's checkpoints with vLLM, straight from Orbax.

    vllm serve gs://bucket/run/checkpoints --load-format maxtext --tokenizer google/gemma-4-26B-A4B-it

A checkpoint flows one way, and each folder answers one question: `checkpoint` (where is it, what is in it, read it),
`families` (what does each leaf become), `conversion` (the machinery), `huggingface` (the other file format), `engine` and
`tpu` (give it to vLLM), `tools` and `cli` (the commands).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_maxtext_loader.errors import MaxTextLoadError

if TYPE_CHECKING:
    from vllm_maxtext_loader.api import Checkpoint, open_checkpoint
    from vllm_maxtext_loader.engine.reload import reload

__all__ = ["Checkpoint", "MaxTextLoadError", "open_checkpoint", "reload"]


def __getattr__(name: str) -> Any:
    # vLLM imports this package in every process, for every model: Orbax, TensorStore and gcsfs wait until asked for.
    if name in ("Checkpoint", "open_checkpoint"):
        from vllm_maxtext_loader import api

        return getattr(api, name)
    if name == "reload":
        from vllm_maxtext_loader.engine.reload import reload

        return reload
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
