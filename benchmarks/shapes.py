"""Layer shapes of published models for the benchmarks, cut to a size.

The dimensions of one layer are the published model's; layers, experts and vocabulary are cut. Dimensions are plain values,
so that they can be given to another process.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_maxtext_loader.conversion.dims import ModelDims

GIB = 1 << 30
DEVICES_OF_THE_WRITER = 16
"""As many as MaxText's converter simulates unless told otherwise (0.2.5 checkpoint_conversion/to_maxtext.py)."""

_GEMMA4: dict[str, dict[str, Any]] = {
    "26b": {
        "hidden": 2816,
        "heads": 16,
        "kv": 8,
        "global_kv": 2,
        "mlp": 2112,
        "expert_mlp": 704,
        "layers": 6,
    },
    "31b": {
        "hidden": 5376,
        "heads": 32,
        "kv": 16,
        "global_kv": 4,
        "mlp": 21504,
        "expert_mlp": 0,
        "layers": 6,
    },
}
VOCAB = 32768
_LAYERS = 6
"""Layers of a mixture of experts, whose experts are cut to the size."""

SHAPES = (*_GEMMA4, "llama3.1-8b", "qwen3-30b-a3b")


def dims_for(shapes: str, gib: float) -> dict[str, Any]:
    """Dimensions of a model of about `gib` GiB in bfloat16."""
    if shapes not in _GEMMA4:
        return _preset_dims_for(shapes, gib)
    dims = dict(_GEMMA4[shapes], vocab=VOCAB, head_dim=256, global_head_dim=512, experts=0)
    if shapes == "26b":
        expert = 3 * dims["hidden"] * dims["expert_mlp"] * 2 * dims["layers"]
        fixed = 2 * values_of(dims)
        # Experts are what the writer shards over.
        step = DEVICES_OF_THE_WRITER
        dims["experts"] = max(step, round((gib * GIB - fixed) / expert / step) * step)
    else:
        # One block of six layers is 5.3 GiB: the MLP is narrowed to the size.
        other = 2 * values_of(dict(dims, mlp=0))
        width = (gib * GIB - other) / (3 * dims["hidden"] * 2 * dims["layers"])
        dims["mlp"] = max(256, round(width / 256) * 256)
    return dims


def _preset_dims_for(name: str, gib: float) -> dict[str, Any]:
    """As many layers as make the size, or as many experts in six layers."""
    from vllm_maxtext_loader.families import find_preset

    _, preset = find_preset(name)
    dims: dict[str, Any] = {"preset": name, "layers": 0, "sizes": {"vocab": VOCAB}}
    if "experts" not in preset.dims.sizes:
        fixed, layer = values_of(dims), values_of({**dims, "layers": 1}) - values_of(dims)
        return {**dims, "layers": max(1, round((gib * GIB / 2 - fixed) / layer))}
    step = DEVICES_OF_THE_WRITER
    few, more = (
        {**dims, "layers": _LAYERS, "sizes": {"vocab": VOCAB, "experts": experts}}
        for experts in (step, 2 * step)
    )
    steps = (gib * GIB / 2 - values_of(few)) / (values_of(more) - values_of(few))
    return {**few, "sizes": {"vocab": VOCAB, "experts": step * max(1, 1 + round(steps))}}


def leaves(dims: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """MaxText leaves (below "params.params") and their shapes, scanned."""
    return _preset_leaves(dims) if "preset" in dims else _gemma4_leaves(dims)


def values_of(dims: dict[str, Any]) -> int:
    """Number of values of a model."""
    return sum(math.prod(shape) for shape in leaves(dims).values())


def config_of(dims: dict[str, Any], checkpoint: Path) -> Any:
    """Hugging Face configuration of a cut model: the preset's settings with its dimensions.

    Args:
        dims: from `dims_for`.
        checkpoint: of this model.
    """
    from vllm_maxtext_loader import open_checkpoint
    from vllm_maxtext_loader.families import find_preset
    from vllm_maxtext_loader.huggingface.config import make_config

    if "preset" in dims:
        name, model = dims["preset"], _model_dims(dims)
    else:
        model = open_checkpoint(checkpoint).plan.dims
        name = "gemma4-26b" if dims["experts"] else "gemma4-31b"
    experts, top_k = model.sizes.get("experts"), find_preset(name)[1].top_k
    if experts and top_k and top_k > experts:
        raise SystemExit(f"{experts} experts are too few for top-{top_k}: choose a larger --gib")
    return make_config(model, name, str(checkpoint))


def _model_dims(dims: dict[str, Any]) -> ModelDims:
    from vllm_maxtext_loader.families import find_preset

    model = find_preset(dims["preset"])[1].dims
    return dataclasses.replace(model, layers=model.layers[: dims["layers"]]).with_sizes(**dims["sizes"])


def _preset_leaves(dims: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Leaves of a model all of whose layers are stacked, along the second axis."""
    from vllm_maxtext_loader.conversion.family import Scope
    from vllm_maxtext_loader.families import by_name

    model = _model_dims({**dims, "layers": max(1, dims["layers"])})
    family = by_name(model.family)
    found: dict[str, tuple[int, ...]] = {}
    for row in family.converters:
        # Gate and up in one leaf are another way of storing the same tensor.
        if not family.demands(model, row) or "gate_up" in row.rearrange.maxtext_axes:
            continue
        shape = row.rearrange.maxtext_shape(family.sizes(model, row.scope))
        if row.scope is not Scope.LAYER:
            found[row.leaf] = shape
        elif dims["layers"]:
            found[f"decoder.layers.{row.leaf}"] = (shape[0], dims["layers"], *shape[1:])
    return found


def _gemma4_leaves(dims: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """MaxText v2 leaves ("decoder.…") and their shapes, one block of five local and one global layer."""
    hidden, heads, mlp = dims["hidden"], dims["heads"], dims["mlp"]
    moe = dims["experts"] > 0 or dims["expert_mlp"] > 0
    leaves: dict[str, tuple[int, ...]] = {
        "token_embedder.embedding": (dims["vocab"], hidden),
        "decoder.decoder_norm.scale": (hidden,),
    }
    blocks = dims["layers"] // 6
    for name, stack, kv, head in (
        ("local_layers", (blocks, 5), dims["kv"], dims["head_dim"]),
        ("global_layer", (blocks,), dims["global_kv"], dims["global_head_dim"]),
    ):
        layer: dict[str, tuple[int, ...]] = {
            "self_attention.query.kernel": (hidden, heads, head),
            "self_attention.key.kernel": (hidden, kv, head),
            "self_attention.out.kernel": (heads, head, hidden),
            "self_attention.query_norm.scale": (head,),
            "self_attention.key_norm.scale": (head,),
            "layer_scalar": (1,),
        }
        if name == "local_layers":
            layer["self_attention.value.kernel"] = (hidden, kv, head)
        for norm in ("pre_self_attention_norm", "post_self_attention_norm", "pre_ffw_norm", "post_ffw_norm"):
            layer[f"{norm}.scale"] = (hidden,)
        dense = "mlp.moe_block.shared_experts" if moe else "mlp"
        layer[f"{dense}.wi_0.kernel"] = layer[f"{dense}.wi_1.kernel"] = (hidden, mlp)
        layer[f"{dense}.wo.kernel"] = (mlp, hidden)
        if moe:
            experts, width = dims["experts"], dims["expert_mlp"]
            layer["mlp.pre_forward_scale_2"] = (hidden,)
            for norm in (
                "post_feedforward_layernorm_1",
                "post_feedforward_layernorm_2",
                "pre_feedforward_layernorm_2",
            ):
                layer[f"mlp.{norm}.scale"] = (hidden,)
            block = "mlp.moe_block.MoeBlock_0"
            layer[f"{block}.gate.kernel"] = (hidden, experts)
            layer[f"{block}.per_expert_scale"] = (experts,)
            layer[f"{block}.wi_0"] = layer[f"{block}.wi_1"] = (experts, hidden, width)
            layer[f"{block}.wo"] = (experts, width, hidden)
        for leaf, shape in layer.items():
            leaves[f"decoder.scanned_blocks.{name}.{leaf}"] = (shape[0], *stack, *shape[1:])
    return leaves
