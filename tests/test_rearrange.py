"""Each transform, forward and back, and each row of the table against transformers' own model."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from vllm_maxtext_loader.conversion.rearrange import (
    Rearrange,
    fold_expert_scale,
    round_to,
    scale_embedding,
    unfold_expert_scale,
    unscale_embedding,
)
from vllm_maxtext_loader.families.gemma4 import DIMENSIONS, RULES, Dims
from vllm_maxtext_loader.huggingface.config import PRESETS, make_config

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SIZES = {name: size for size, name in enumerate(DIMENSIONS, start=2)} | {"G": 22, "F": 11, "Q": 12, "S": 2}


def _distinct(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize("pattern", sorted({rule.move.pattern for rule in RULES if rule.move.part is None}))
def test_view_is_the_inverse_of_apply(pattern: str) -> None:
    move = Rearrange(pattern)
    leaf = _distinct(move.maxtext_shape(SIZES))
    hf = move.apply(leaf, SIZES)
    assert hf.shape == move.hf_shape(SIZES)
    view = move.view(np.ascontiguousarray(hf), SIZES)
    np.testing.assert_array_equal(view, leaf)


@pytest.mark.parametrize("pattern", sorted({rule.move.pattern for rule in RULES}))
def test_view_shares_memory(pattern: str) -> None:
    move = Rearrange(pattern, part=0 if "part" in pattern else None)
    hf = np.zeros(move.hf_shape(SIZES), np.float32)
    assert np.shares_memory(move.view(hf, SIZES), hf), "a copy would swallow what is written through it"


def test_gate_comes_before_up() -> None:
    gate, up = (Rearrange("E H F -> E (part F) H", part=part) for part in (0, 1))
    sizes = {"E": 2, "H": 3, "F": 5}
    wi_0, wi_1 = _distinct((2, 3, 5)), -_distinct((2, 3, 5))
    hf = np.full(gate.hf_shape(sizes), np.nan, np.float32)
    gate.view(hf, sizes)[...] = wi_0
    up.view(hf, sizes)[...] = wi_1
    np.testing.assert_array_equal(hf, np.concatenate([wi_0, wi_1], axis=2).swapaxes(1, 2))
    np.testing.assert_array_equal(gate.apply(np.stack([wi_0, wi_1]), sizes), hf)


def test_heads_stay_together() -> None:
    kernel = _distinct((3, 2, 4))  # hidden, heads, head dim
    hf = Rearrange("H N D -> (N D) H").apply(kernel, {"H": 3, "N": 2, "D": 4})
    np.testing.assert_array_equal(hf[4:8, 1], kernel[1, 1, :])


def test_embedding_comes_back_within_an_ulp_and_scales_to_the_stored_value() -> None:
    rng = np.random.default_rng(0)
    # The hidden sizes of the published models.
    for hidden in (1536, 2560, 2816, 5376):
        embedding = rng.standard_normal((64, hidden)).astype(BFLOAT16)
        stored = scale_embedding(embedding, hidden)
        back = round_to(unscale_embedding(stored, hidden), BFLOAT16)
        ulps = np.abs(back.view(np.int16).astype(int) - embedding.view(np.int16).astype(int))
        assert ulps.max() <= 1
        # What docs/compatibility.md says.
        assert 0.08 <= np.mean(ulps == 1) <= 0.15
        assert np.mean(scale_embedding(back, hidden) == stored) >= 0.99


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


@pytest.mark.parametrize("name", PRESETS)
def test_table_names_every_tensor_of_the_published_model(name: str) -> None:
    """The full-size shapes the table demands are the ones transformers' model has (on the meta device)."""
    import torch
    from transformers import Gemma4ForCausalLM

    dims = PRESETS[name].dims()
    with torch.device("meta"):
        model = Gemma4ForCausalLM(make_config(dims, None, name))
    tensors = {
        key: tuple(value.shape) for key, value in model.state_dict().items() if key != "lm_head.weight"
    }
    assert dict(dims.hf_shapes()) == tensors


@pytest.mark.parametrize("name", PRESETS)
def test_config_round_trips_through_dimensions(name: str) -> None:
    dims = PRESETS[name].dims()
    assert Dims.from_config(make_config(dims, None, name)) == dims
