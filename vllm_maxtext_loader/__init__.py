"""Serve MaxText's Gemma 4 checkpoints with vLLM, straight from Orbax.

    vllm serve gs://bucket/run/checkpoints --load-format maxtext --tokenizer google/gemma-4-26B-A4B-it

The flow, one room per question: `checkpoint.location` (where is it?), `checkpoint.tree` (what is in it?),
`conversion.layout` (which layer is what?), `conversion.gemma4` (what does it become?), `conversion.plan` (the whole list,
before a byte is read), `checkpoint.reader` and `conversion.convert` (read it), `loader` (give it to vLLM).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_maxtext_loader.errors import MaxTextLoadError

if TYPE_CHECKING:
    from vllm_maxtext_loader.api import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "MaxTextLoadError", "open_checkpoint"]


def __getattr__(name: str) -> Any:
    # vLLM imports this package in every process, for every model: Orbax, TensorStore and gcsfs wait until asked for.
    if name in ("Checkpoint", "open_checkpoint"):
        from vllm_maxtext_loader import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
