"""Every family, by the same tests: what is lost, out of shape or unknown in a tree is refused by name, from metadata.

A family that is added gets these tests without another line. The trees are MaxText's own (tests/fixtures).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from support.checkpoints import cases, families, write_orbax
from vllm_maxtext_loader import MaxTextLoadError, open_checkpoint
from vllm_maxtext_loader import families as registry
from vllm_maxtext_loader.checkpoint.tree import Leaf, Tree
from vllm_maxtext_loader.conversion.family import Scope
from vllm_maxtext_loader.conversion.plan import Plan, make_plan
from vllm_maxtext_loader.errors import (
    ConfigMismatchError,
    LayoutError,
    MissingLeafError,
    OptionError,
    UnknownLeafError,
    UnknownModelError,
    WrongShapeError,
)
from vllm_maxtext_loader.huggingface.config import choose_preset, make_config, match_presets

SCANNED = {
    "gemma4": "moe_v2",
    "gemma3": "gemma3_scanned",
    "qwen3": "qwen3_scanned",
    "qwen3_moe": "qwen3moe_scanned",
    "qwen2": "qwen2_scanned",
    "llama": "llama31_scanned",
    "mistral": "mistral_scanned",
    "mixtral": "mixtral_scanned",
    "gpt_oss": "gptoss_scanned",
}
"""A scanned fixture of every family."""

by_family = pytest.mark.parametrize("name", SCANNED.values(), ids=SCANNED)


def planned(tree: Tree, leaves: dict[str, Leaf]) -> Plan:
    """The plan of a tree with other leaves."""
    family = registry.identify(leaves, str(tree.location.items))
    return make_plan(dataclasses.replace(tree, leaves=leaves, arrays={}), family)


def test_every_family_has_a_scanned_fixture() -> None:
    assert set(SCANNED) == set(families())


@pytest.mark.parametrize("name", cases())
def test_exactly_one_family_fits(name: str) -> None:
    leaves = open_checkpoint(cases()[name].items).tree.leaves
    fitting = [family.name for family in registry.FAMILIES if not family.objections(leaves)]
    assert len(fitting) == 1
    assert registry.identify(leaves, name).name == fitting[0]


@by_family
def test_every_lost_leaf_is_missed(name: str) -> None:
    """Without any one of its leaves a tree is refused, and the error names the leaf or the dimension that is gone."""
    tree = open_checkpoint(cases()[name].items).tree
    for lost in tree.leaves:
        left = {key: leaf for key, leaf in tree.leaves.items() if key != lost}
        if lost == "decoder.logits_dense.kernel":
            # MaxText leaves it out where the embedding serves as the output head.
            assert "untied" not in planned(tree, left).dims.tags
            continue
        with pytest.raises(
            (MissingLeafError, UnknownModelError, LayoutError, WrongShapeError, UnknownLeafError)
        ) as caught:
            planned(tree, left)
        assert str(tree.location.items) in str(caught.value)


@by_family
def test_every_leaf_out_of_shape_is_found(name: str) -> None:
    """One leaf with one axis of another length: it is named with its shape, or its scan axis is."""
    tree = open_checkpoint(cases()[name].items).tree
    for key, leaf in tree.leaves.items():
        row = registry.identify(tree.leaves, name).match(key)
        assert row is not None
        for axis, size in enumerate(leaf.shape):
            if row[0].padded is not None and axis == row[0].padded_axis():
                continue  # A longer vocabulary is MaxText's padding.
            if key == "decoder.scanned_blocks.global_layer.self_attention.key.kernel" and axis == 2:
                continue  # Keys serve as values there: no other leaf states the number of KV heads.
            shape = (*leaf.shape[:axis], size + 1, *leaf.shape[axis + 1 :])
            with pytest.raises(MaxTextLoadError) as caught:
                planned(tree, {**tree.leaves, key: dataclasses.replace(leaf, shape=shape)})
            assert isinstance(caught.value, WrongShapeError | LayoutError | MissingLeafError), caught.value


@by_family
def test_unknown_leaf_is_named(name: str) -> None:
    tree = open_checkpoint(cases()[name].items).tree
    leaf = next(iter(tree.leaves.values()))
    path = ("decoder", "surprise", "kernel")
    extra = dataclasses.replace(leaf, key="params.params.decoder.surprise.kernel", path=path)
    with pytest.raises(UnknownLeafError, match=r"params\.params\.decoder\.surprise\.kernel"):
        planned(tree, {**tree.leaves, extra.name: extra})


@by_family
def test_configuration_of_another_size_names_both_numbers(name: str) -> None:
    checkpoint = open_checkpoint(cases()[name].items)
    raw = json.loads((cases()[name].twin_config / "config.json").read_text())
    config = transformers.AutoConfig.from_pretrained(cases()[name].twin_config)
    config.num_attention_heads *= 2
    with pytest.raises(ConfigMismatchError, match="num_attention_heads: configuration") as caught:
        checkpoint.with_config(config)
    assert f"checkpoint {raw['num_attention_heads']}" in str(caught.value)


def test_configuration_of_another_family_is_named() -> None:
    config = transformers.AutoConfig.from_pretrained(cases()["qwen3_scanned"].twin_config)
    with pytest.raises(ConfigMismatchError, match="model family: configuration qwen3, checkpoint llama"):
        open_checkpoint(cases()["llama31_scanned"].items).with_config(config)


PRESETS = [preset for family in registry.FAMILIES for preset in family.presets]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_presets_have_names_of_their_own_and_configurations(preset: Any) -> None:
    family, found = registry.find_preset(preset.name)
    assert found is preset
    config = make_config(preset.dims, preset.name, "here")
    assert config.architectures[0] in family.architectures.values()
    assert preset in match_presets(preset.dims)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("qwen3-30b-a3b", ["qwen3-30b-a3b-base", "1000000.0", "10000000.0"]),
        ("qwen3-4b", ["qwen3-4b-thinking-2507", "1000000.0", "5000000.0"]),
        ("llama3.1-8b", ["llama3-8b", "llama3", "500000.0"]),
    ],
)
def test_models_of_one_shape_are_a_question(name: str, says: list[str]) -> None:
    """Several published models have these dimensions: the error lists them with what distinguishes them."""
    _, preset = registry.find_preset(name)
    with pytest.raises(ConfigMismatchError) as caught:
        choose_preset(preset.dims, None, "gs://bucket/run")
    assert "several published models have these dimensions" in str(caught.value)
    assert all(part in str(caught.value) for part in [name, *says])
    assert choose_preset(preset.dims, name, "here") is preset


def test_model_name_of_another_family_is_refused() -> None:
    checkpoint = open_checkpoint(cases()["qwen3_scanned"].items, model_name="llama3.1-8b")
    with pytest.raises(ConfigMismatchError, match=r"llama3\.1-8b is a Llama, the checkpoint a Qwen3"):
        checkpoint.hf_config()


def test_llama_3_3_is_refused_by_name_with_the_reason() -> None:
    with pytest.raises(OptionError, match=r"MaxText 0\.2\.5 contradicts itself"):
        registry.find_preset("llama3.3-70b")


def test_llama_is_never_guessed() -> None:
    """Nothing in the tree tells adjacent rotary pairs from halves: without a configuration there are no weights."""
    checkpoint = open_checkpoint(cases()["llama31_scanned"].items)
    with pytest.raises(ConfigMismatchError):
        next(iter(checkpoint.hf_weights()))


def test_rotary_pairs_follow_the_configuration(twin: Callable[[str], Path]) -> None:
    """The wrong layout gives other tensors; only query and key differ."""
    right = open_checkpoint(cases()["llama31_scanned"].items, model_name="llama3.1-8b")
    wrong = open_checkpoint(cases()["llama31_scanned"].items, model_name="llama3-8b")
    theirs = dict(wrong.hf_weights())
    differing = {name for name, value in right.hf_weights() if not torch.equal(value, theirs[name])}
    assert differing == {name for name in theirs if name.endswith(("q_proj.weight", "k_proj.weight"))}


@pytest.mark.parametrize(("part", "title"), registry.UNSUPPORTED.items())
def test_families_that_are_not_loaded_are_named(part: str, title: str, tmp_path: Path) -> None:
    leaf = np.zeros((4, 2), np.float32)
    tree = {"token_embedder": {"embedding": leaf}, "decoder": {"layers": {part: {"kernel": leaf}}}}
    items = write_orbax(tmp_path / "0", {"params": {"params": tree}})
    with pytest.raises(UnknownModelError) as caught:
        open_checkpoint(items)
    assert title in str(caught.value)
    assert "to_huggingface" in str(caught.value)


def test_unknown_tree_lists_what_spoke_against_each_family(tmp_path: Path) -> None:
    leaf = np.zeros((4, 2), np.float32)
    tree = {"token_embedder": {"embedding": leaf}, "decoder": {"layers": {"strange": {"kernel": leaf}}}}
    items = write_orbax(tmp_path / "0", {"params": {"params": tree}})
    with pytest.raises(UnknownModelError) as caught:
        open_checkpoint(items)
    for family in registry.FAMILIES:
        assert f"not {family.title} (no leaf " in str(caught.value)


def test_scopes_have_prefixes() -> None:
    for family in registry.FAMILIES:
        assert {row.scope for row in family.converters} <= set(family.prefixes)
        assert Scope.LAYER in family.prefixes
