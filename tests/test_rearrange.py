"""Each transform, forward and back, and each row of the table against transformers' own model."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from vllm_maxtext_loader.conversion.family import Family
from vllm_maxtext_loader.conversion.rearrange import Rearrange
from vllm_maxtext_loader.conversion.values import (
    DivideByRoot,
    Elementwise,
    MultiplyByRoot,
    SubtractOne,
    fold_expert_scale,
    round_to,
    unfold_expert_scale,
)
from vllm_maxtext_loader.families import FAMILIES, by_name
from vllm_maxtext_loader.huggingface.config import make_config

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
PATTERNS = sorted({row.rearrange.pattern for family in FAMILIES for row in family.converters})
PRESETS = [(family.name, preset.name) for family in FAMILIES for preset in family.presets]


def _sizes(family: Family) -> dict[str, int]:
    """A different size for every axis."""
    sizes = {name: size for size, name in enumerate(family.axes, start=2)}
    for name, (axis, factor) in family.derived.items():
        sizes[name] = sizes[axis] * (3 if isinstance(factor, str) else factor)
    return sizes


SIZES = {name: size for family in FAMILIES for name, size in _sizes(family).items()}


def _distinct(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize(
    "pattern", [pattern for pattern in PATTERNS if "part" not in re.findall(r"\w+", pattern)]
)
def test_view_is_the_inverse_of_apply(pattern: str) -> None:
    rearrange = Rearrange(pattern)
    leaf = _distinct(rearrange.maxtext_shape(SIZES))
    hf = rearrange.apply(leaf, SIZES)
    assert hf.shape == rearrange.hf_shape(SIZES)
    view = rearrange.view(np.ascontiguousarray(hf), SIZES)
    np.testing.assert_array_equal(view, leaf)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_view_shares_memory(pattern: str) -> None:
    rearrange = Rearrange(pattern, part=0 if "part" in pattern else None)
    hf = np.zeros(rearrange.hf_shape(SIZES), np.float32)
    assert np.shares_memory(rearrange.view(hf, SIZES), hf), "a copy would swallow what is written through it"


def test_gate_comes_before_up() -> None:
    gate, up = (Rearrange("experts hidden mlp -> experts (part mlp) hidden", part=part) for part in (0, 1))
    sizes = {"experts": 2, "hidden": 3, "mlp": 5}
    wi_0, wi_1 = _distinct((2, 3, 5)), -_distinct((2, 3, 5))
    hf = np.full(gate.hf_shape(sizes), np.nan, np.float32)
    gate.view(hf, sizes)[...] = wi_0
    up.view(hf, sizes)[...] = wi_1
    np.testing.assert_array_equal(hf, np.concatenate([wi_0, wi_1], axis=2).swapaxes(1, 2))
    np.testing.assert_array_equal(gate.apply(np.stack([wi_0, wi_1]), sizes), hf)


def test_heads_stay_together() -> None:
    kernel = _distinct((3, 2, 4))  # hidden, heads, head dim
    hf = Rearrange("hidden heads head_dim -> (heads head_dim) hidden").apply(
        kernel, {"hidden": 3, "heads": 2, "head_dim": 4}
    )
    np.testing.assert_array_equal(hf[4:8, 1], kernel[1, 1, :])


def test_axes_of_the_tensor_are_named() -> None:
    assert Rearrange("hidden heads head_dim -> (heads head_dim) hidden").hf_axes == (
        ("heads", "head_dim"),
        ("hidden",),
    )


def test_embedding_comes_back_within_an_ulp_and_scales_to_the_stored_value() -> None:
    rng = np.random.default_rng(0)
    scale = DivideByRoot("hidden")
    # The hidden sizes of the published models.
    for hidden in (1536, 2560, 2816, 5376):
        sizes = {"hidden": hidden}
        embedding = rng.standard_normal((64, hidden)).astype(BFLOAT16)
        stored = round_to(scale.to_maxtext(embedding, sizes), BFLOAT16)
        back = round_to(scale.to_hf(stored, sizes), BFLOAT16)
        ulps = np.abs(back.view(np.int16).astype(int) - embedding.view(np.int16).astype(int))
        assert ulps.max() <= 1
        # What docs/compatibility.md says.
        assert 0.08 <= np.mean(ulps == 1) <= 0.15
        assert np.mean(round_to(scale.to_maxtext(back, sizes), BFLOAT16) == stored) >= 0.99


@pytest.mark.parametrize(
    ("operation", "stored"),
    [
        (DivideByRoot("hidden"), lambda x: x * np.float32(4)),
        (DivideByRoot("odd", BFLOAT16), lambda x: x * np.float32(50.5)),
        (MultiplyByRoot("hidden"), lambda x: x / np.float32(4)),
        (SubtractOne(), lambda x: x + np.float32(1)),
    ],
)
def test_operations_on_values_have_an_inverse(operation: Elementwise, stored: Any) -> None:
    """`to_maxtext` is what MaxText stores, `to_hf` takes it back; both in float32."""
    values = np.linspace(-3, 3, 101, dtype=np.float32)
    # bfloat16 holds 50.5 where the root of 2560 is 50.596.
    sizes = {"hidden": 16, "odd": 2560}
    np.testing.assert_array_equal(operation.to_maxtext(values, sizes), stored(values))
    np.testing.assert_allclose(operation.to_hf(stored(values), sizes), values, rtol=1e-6, atol=1e-6)
    assert operation.to_hf(values.astype(BFLOAT16), sizes).dtype == np.float32


def test_folding_rounds_once() -> None:
    rng = np.random.default_rng(1)
    down = rng.standard_normal((4, 5, 6)).astype(BFLOAT16)
    scale = rng.uniform(0.5, 1.6, 4).astype(BFLOAT16)
    folded = fold_expert_scale(down, scale)
    assert folded.dtype == np.float32
    expected = np.stack([down[e].astype(np.float32) * np.float32(scale[e]) for e in range(4)])
    np.testing.assert_array_equal(folded, expected)
    np.testing.assert_allclose(unfold_expert_scale(folded, scale), down.astype(np.float32), rtol=1e-6)


def test_rounding_is_to_nearest_even() -> None:
    halves = np.array([1 + 2**-8, 1 + 3 * 2**-8], np.float32)  # halfway between two bfloat16 values
    np.testing.assert_array_equal(round_to(halves, BFLOAT16).astype(np.float32), [1.0, 1 + 2**-6])


@pytest.mark.parametrize(("family", "name"), PRESETS)
def test_table_names_every_tensor_of_the_published_model(family: str, name: str) -> None:
    """The full-size shapes the table demands are the ones transformers' model has (on the meta device)."""
    import torch
    from transformers import AutoModelForCausalLM

    known = by_name(family)
    dims = next(preset.dims for preset in known.presets if preset.name == name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_config(dims, name, name))
    tensors = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    if family == "mixtral":
        # transformers renames the published names while it loads.
        names = {"mlp.experts.gate_up_proj": "w13", "mlp.experts.down_proj": "w2"}
        tensors = {
            re.sub(
                r"mlp\.experts\.(\w+)$",
                lambda match: f"block_sparse_moe.experts.{names[match[0]]}",
                key.replace("mlp.gate.weight", "block_sparse_moe.gate.weight"),
            ): shape
            for key, shape in tensors.items()
        }
    assert dict(known.hf_shapes(dims)) == tensors


@pytest.mark.parametrize(("family", "name"), PRESETS)
def test_config_round_trips_through_dimensions(family: str, name: str) -> None:
    known = by_name(family)
    dims = next(preset.dims for preset in known.presets if preset.name == name)
    assert known.from_config(make_config(dims, name, name)) == dims


@pytest.mark.parametrize(
    ("pattern", "interleaved"),
    [
        ("experts hidden mlp -> experts hidden (mlp part)", True),
        ("experts hidden mlp -> experts (part mlp) hidden", False),
        ("hidden mlp -> mlp hidden", False),
    ],
)
def test_parts_that_take_turns_are_known(pattern: str, interleaved: bool) -> None:
    assert Rearrange(pattern, part=0).interleaved is interleaved
