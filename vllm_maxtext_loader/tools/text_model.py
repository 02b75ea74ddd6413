"""What the arithmetic of `fit` needs of a text model, without importing transformers (seconds)."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any
from unittest.mock import patch

from vllm_maxtext_loader import families
from vllm_maxtext_loader.api import Checkpoint
from vllm_maxtext_loader.conversion.dims import ModelDims
from vllm_maxtext_loader.errors import EngineError
from vllm_maxtext_loader.huggingface.config import choose_preset, match_presets, with_config_tags

LANES, SUBLANES = 128, 8
"""A device's memory holds the last two axes of an array in tiles of this many columns and rows."""

_ROTARY_ITEMSIZES = {"gpt_oss": 4}
"""Bytes of a value in the rotary tables, where it is not the model's dtype. Source: vLLM 0.32.0 models/gpt_oss.py."""


@dataclasses.dataclass(frozen=True)
class AttentionLayer:
    """The attention of one layer.

    Attributes:
        head_dim, kv_heads: sizes; no KV heads where another layer's keys and values serve.
        window: tokens that it looks back on; None for all.
        rope: parameters of its rotary embedding.
    """

    head_dim: int
    kv_heads: int
    window: int | None
    rope: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class TextModel:
    """A text model.

    Attributes:
        shapes: of the Hugging Face tensors, by name; of the vision tower, too.
        hidden, heads: width, and attention heads of a layer.
        layers: all of them.
        max_position_embeddings: longest context.
        has_sinks: whether attention has a sink for each head.
        rotary_itemsize: bytes of a value in the rotary tables.
    """

    shapes: Mapping[str, tuple[int, ...]]
    hidden: int
    heads: int
    layers: tuple[AttentionLayer, ...]
    max_position_embeddings: int
    has_sinks: bool
    rotary_itemsize: int

    @property
    def own_layers(self) -> tuple[AttentionLayer, ...]:
        """Layers with keys and values of their own."""
        return tuple(layer for layer in self.layers if layer.kv_heads)

    @property
    def has_experts(self) -> bool:
        """Whether there are routed experts."""
        return any(".experts" in name for name in self.shapes)

    def check(self, devices: int, *, expert_parallel: bool, sparse_core: bool) -> None:
        """Refuses what vLLM or tpu-inference would refuse after a load.

        Args:
            devices: tensor parallel size.
            expert_parallel: whether routed experts are spread whole.
            sparse_core: whether the chip has SparseCores.

        Raises:
            EngineError: attention heads cannot be spread, or there is no kernel.
        """
        if self.heads % devices:
            # vLLM 0.32.0 config/model.py, verify_with_parallel_config.
            raise EngineError(f"{self.heads} attention heads cannot be spread over {devices} devices")
        # tpu-inference 0.32.0 layers/common/attention_interface.py.
        if any(layer.head_dim == 64 for layer in self.layers if not layer.kv_heads):
            raise EngineError(
                "tpu-inference has no attention kernel for layers that share keys and values with head_dim 64"
            )
        others = sorted({layer.head_dim for layer in self.layers} - {64})
        if self.has_sinks and others:
            raise EngineError(
                f"tpu-inference has an attention kernel with sinks for head_dim 64 only, not for "
                f"{', '.join(map(str, others))}"
            )
        # tpu-inference 0.32.0 kernels/sparse_core/ragged_gather_v2.py; without SparseCores XLA gathers.
        if expert_parallel and devices > 1 and self.has_experts and sparse_core and self.hidden % LANES:
            raise EngineError(
                f"--enable-expert-parallel: tpu-inference has no kernel that gathers tokens of {self.hidden} "
                f"values, no multiple of {LANES}, on this chip; tensor parallelism needs none"
            )


def text_model(checkpoint: Checkpoint) -> TextModel:
    """The text model of a checkpoint.

    Raises:
        ConfigMismatchError: no published model, or several, have these dimensions, and no model name was given;
            or transformers cannot express the model.
    """
    dims = checkpoint.trimmed_plan().dims
    if not match_presets(dims):
        # Only published dimensions are known to be expressible.
        with _without_torch():
            checkpoint.hf_config()
    preset = choose_preset(dims, checkpoint.model_name, checkpoint.plan.where)
    dims = with_config_tags(dims, preset)
    fields = families.by_name(dims.family).config_fields(dims, preset)
    shapes = {name: target.shape for name, target in checkpoint.plan.targets.items()}
    return _of_fields(shapes, dims, fields.get("text_config", fields))


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Keeps transformers from importing torch and torchvision (seconds), which a configuration does not need."""
    hidden: Any = {} if "torch" in sys.modules else dict.fromkeys(("torch", "torchvision"))
    with (
        patch.dict(sys.modules, hidden),
        # It would say that PyTorch was not found.
        patch.dict(os.environ, {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}),
    ):
        yield


def _of_fields(
    shapes: Mapping[str, tuple[int, ...]], dims: ModelDims, fields: Mapping[str, Any]
) -> TextModel:
    """A text model of its dimensions and the fields of its config.json."""
    own = len(dims.layers) - fields.get("num_kv_shared_layers", 0)
    rope = fields["rope_parameters"]
    layers = []
    for index, layer in enumerate(dims.layers):
        sliding = "sliding" in layer.tags
        layers.append(
            AttentionLayer(
                head_dim=layer.sizes["head_dim"],
                kv_heads=layer.sizes["kv_heads"] if index < own else 0,
                window=fields["sliding_window"] if sliding else None,
                rope=rope.get("sliding_attention" if sliding else "full_attention", rope),
            )
        )
    return TextModel(
        shapes=shapes,
        hidden=dims.sizes["hidden"],
        heads=dims.sizes["heads"],
        layers=tuple(layers),
        max_position_embeddings=fields["max_position_embeddings"],
        has_sinks=any(name.endswith(".sinks") for name in shapes),
        rotary_itemsize=_ROTARY_ITEMSIZES.get(fields["model_type"], 2),
    )


def multiple(value: int, of: int) -> int:
    """`value` rounded up to a multiple."""
    return -(-value // of) * of
