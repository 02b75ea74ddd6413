"""Bad input: each kind has its own error, and its message names the path, the leaf, expected, found, and what to do.

All of it is decided from metadata; the checkpoints are written by Orbax itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.checkpoints import EXPORT_ONLY, Tree, cases, write_orbax
from vllm_maxtext_loader import MaxTextLoadError, open_checkpoint
from vllm_maxtext_loader.errors import (
    ConfigMismatchError,
    CorruptMetadataError,
    LayoutError,
    MissingLeafError,
    OptionError,
    UnknownLeafError,
    UnknownModelError,
    UnsupportedDtypeError,
    WrongShapeError,
)

Edited = Callable[..., Path]


def _message(kind: type[MaxTextLoadError], path: Path | str, **kwargs: Any) -> str:
    with pytest.raises(kind) as caught:
        open_checkpoint(path, **kwargs)
    assert str(path) in str(caught.value)
    return str(caught.value)


def _local(params: Tree) -> Tree:
    return params["decoder"]["scanned_blocks"]["local_layers"]


@pytest.mark.parametrize(
    ("path", "hf"),
    [
        (("self_attention", "query", "kernel"), "self_attn.q_proj.weight"),
        (("self_attention", "value", "kernel"), "self_attn.v_proj.weight"),
        (("layer_scalar",), "layer_scalar"),
        (("mlp", "moe_block", "MoeBlock_0", "wo"), "experts.down_proj"),
        (("mlp", "moe_block", "MoeBlock_0", "wi_1"), "experts.gate_up_proj"),
        (("mlp", "moe_block", "MoeBlock_0", "gate", "kernel"), "router.proj.weight"),
        (("mlp", "moe_block", "shared_experts", "wo", "kernel"), "mlp.down_proj.weight"),
    ],
)
def test_missing_leaf(edited: Edited, path: tuple[str, ...], hf: str) -> None:
    """vLLM itself accepts most of these in silence."""

    def drop(params: Tree) -> None:
        node = _local(params)
        for part in path[:-1]:
            node = node[part]
        del node[path[-1]]

    message = _message(MissingLeafError, edited("moe_v2", drop))
    assert f"model.layers.0.{hf}" in message
    assert path[-1] in message
    assert "incomplete" in message


def test_missing_embedding_is_no_model(edited: Edited) -> None:
    message = _message(UnknownModelError, edited("dense_v2", lambda params: params.pop("token_embedder")))
    assert "token_embedder.embedding" in message


def test_unknown_leaf(edited: Edited) -> None:
    def add(params: Tree) -> None:
        _local(params)["self_attention"]["query"]["lora_a"] = np.zeros((2, 5, 4), np.float32)

    message = _message(UnknownLeafError, edited("dense_v2", add))
    assert "self_attention.query.lora_a" in message
    assert "[2, 5, 4]" in message


@pytest.mark.parametrize(
    ("path", "axis"),
    [
        (("self_attention", "key", "kernel"), 0),  # overlong: vLLM's default loader takes it in silence
        (("self_attention", "query", "kernel"), -1),
        (("mlp", "moe_block", "MoeBlock_0", "wi_0"), 0),
        (("pre_ffw_norm", "scale"), 0),
    ],
)
def test_wrong_shape(edited: Edited, path: tuple[str, ...], axis: int) -> None:
    shapes: dict[str, Any] = {}

    def grow(params: Tree) -> None:
        node = _local(params)
        for part in path[:-1]:
            node = node[part]
        old = node[path[-1]]
        node[path[-1]] = np.concatenate([old, np.take(old, [0], axis=axis)], axis=axis)
        shapes["old"], shapes["new"] = list(old.shape), list(node[path[-1]].shape)

    message = _message(WrongShapeError, edited("moe_v2", grow))
    assert ".".join(path) in message
    assert str(shapes["old"]) in message
    assert str(shapes["new"]) in message


def test_other_number_of_blocks_in_one_leaf(edited: Edited) -> None:
    def cut(params: Tree) -> None:
        norm = _local(params)["pre_ffw_norm"]
        norm["scale"] = norm["scale"][:, :1]

    message = _message(LayoutError, edited("dense_v2", cut))
    assert "pre_ffw_norm.scale" in message
    assert "block" in message


def test_layers_without_holes(edited: Edited) -> None:
    message = _message(LayoutError, edited("moe_unscanned", lambda params: params["decoder"].pop("layers_3")))
    assert "layers [3]" in message


def test_not_gemma_4(tmp_path: Path) -> None:
    llama = {
        "params": {
            "params": {
                "token_embedder": {"embedding": np.zeros((8, 4), np.float32)},
                "decoder": {
                    "layers": {"self_attention": {"query": {"kernel": np.zeros((4, 2, 2, 2), np.float32)}}}
                },
            }
        }
    }
    message = _message(UnknownModelError, write_orbax(tmp_path / "0", llama))
    assert "not Gemma 4" in message
    assert "decoder.layers.self_attention.query.kernel" in message


def test_gemma_3_is_not_gemma_4(edited: Edited) -> None:
    def unscalar(params: Tree) -> None:
        for layers in params["decoder"]["scanned_blocks"].values():
            del layers["layer_scalar"]

    message = _message(UnknownModelError, edited("dense_v2", unscalar))
    assert "layer_scalar" in message


def test_no_model_at_all(tmp_path: Path) -> None:
    message = _message(
        UnknownModelError, write_orbax(tmp_path / "0", {"weights": {"a": np.zeros(3, np.float32)}})
    )
    assert "weights" in message


def test_quantized_weights(edited: Edited) -> None:
    def quantize(params: Tree) -> None:
        kernel = _local(params)["mlp"]["wi_0"]
        kernel["kernel"] = np.zeros(kernel["kernel"].shape, np.int8)

    message = _message(UnsupportedDtypeError, edited("dense_v2", quantize))
    assert "mlp.wi_0.kernel" in message
    assert "int8" in message


def test_scan_axis_that_shapes_cannot_tell_names_both_readings(edited: Edited) -> None:
    """Only where every dimension and the number of blocks are one number, 1: layer_scalar tells otherwise."""

    def flatten(node: Tree) -> None:
        for name, value in node.items():
            if isinstance(value, dict):
                flatten(value)
            else:
                node[name] = np.zeros([1] * value.ndim, np.float32)

    message = _message(LayoutError, edited("dense_v1", flatten))
    assert "param_scan_axis 1" in message
    assert "param_scan_axis 0" in message
    assert "Hugging Face configuration" in message


def test_configuration_that_contradicts_the_shapes_names_both_numbers(twin: Callable[[str], Path]) -> None:
    import transformers

    config = transformers.AutoConfig.from_pretrained(twin("moe_v2"))
    checkpoint = open_checkpoint(cases()["moe_v2"].items)
    for field, value in (
        ("num_experts", 16),
        ("hidden_size", 128),
        ("moe_intermediate_size", 48),
        ("vocab_size", 512),
    ):
        other = copy.deepcopy(config)
        found = getattr(other, field)
        setattr(other, field, value)
        with pytest.raises(ConfigMismatchError, match=f"{field}: configuration {value}, checkpoint {found}"):
            checkpoint.with_config(other)


def test_dimensions_near_no_published_model_need_a_name_or_a_configuration() -> None:
    checkpoint = open_checkpoint(cases()["dense_v2"].items)
    with pytest.raises(ConfigMismatchError) as caught:
        checkpoint.hf_config()
    message = str(caught.value)
    assert "hidden_size: 96" in message
    assert "model_name" in message
    named = open_checkpoint(cases()["dense_v2"].items, model_name="gemma4-31b").hf_config()
    assert named.sliding_window == 1024
    assert named.hidden_size == 96


def test_unknown_model_name_lists_the_known_ones() -> None:
    checkpoint = open_checkpoint(cases()["dense_v2"].items, model_name="gemma4-27b")
    with pytest.raises(OptionError, match="gemma4-26b, gemma4-31b, gemma4-e2b, gemma4-e4b"):
        checkpoint.hf_config()


def test_model_name_of_another_kind() -> None:
    checkpoint = open_checkpoint(cases()["moe_v2"].items, model_name="gemma4-31b")
    with pytest.raises(ConfigMismatchError, match="has no experts"):
        checkpoint.hf_config()


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"tree_metadata": 3}', '{"tree_metadata": {"x": {}}}', "\ud800"]
)
def test_damaged_tree_metadata(copy_case: Callable[[str], Path], damage: str) -> None:
    root = copy_case("dense_v2")
    items = root / cases()["dense_v2"].facts["items"]
    (items / "_METADATA").write_bytes(damage.encode("utf-8", "surrogatepass"))
    message = _message(CorruptMetadataError, items)
    assert "_METADATA" in message


@pytest.mark.parametrize("name", EXPORT_ONLY)
def test_configuration_of_a_model_that_ends_in_a_sliding_window_layer(
    name: str, twin: Callable[[str], Path]
) -> None:
    import transformers

    config = transformers.AutoConfig.from_pretrained(twin(name))
    with pytest.raises(
        ConfigMismatchError, match=r"ends in a sliding-window layer.*can be converted, not served"
    ):
        open_checkpoint(cases()[name].items).with_config(config)
