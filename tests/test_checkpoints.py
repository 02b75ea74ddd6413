"""Truth number one: what comes out of every checkpoint MaxText wrote is, bit by bit, its Hugging Face twin."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch as safetensors_torch
import tensorstore
import torch

from support.checkpoints import FIXTURES, Tree, cases, read_orbax, servable, write_orbax
from vllm_maxtext_loader import Checkpoint, open_checkpoint
from vllm_maxtext_loader.conversion.published import published_tensors


def _opened(name: str) -> Checkpoint:
    """A fixture, with its twin's configuration where shapes do not tell all."""
    import transformers

    checkpoint = open_checkpoint(cases()[name].items)
    if checkpoint.plan.family.config_tags or name == "gemma3_mm":
        return checkpoint.with_config(transformers.AutoConfig.from_pretrained(cases()[name].twin_config))
    return checkpoint


def _equal_to_twin_of(name: str, weights: dict[str, torch.Tensor], twin: dict[str, torch.Tensor]) -> None:
    """As `_equal_to_twin`, for any family: values that are computed with must give what MaxText stores."""
    plan = _opened(name).trimmed_plan()
    # MaxText's older script rounds the root of the head size before it divides.
    by_script = "llama_or_mistral_ckpt" in cases()[name].facts["writer"]
    computed = {
        copy_op.target: (entry.converter, copy_op.sizes)
        for entry in plan.leaves
        if entry.converter.values
        for copy_op in entry.copies
    }
    assert sorted(weights) == sorted(twin)
    for key, expected in twin.items():
        found = weights[key]
        assert found.shape == expected.shape, key
        assert found.dtype == expected.dtype, key
        if key not in computed:
            assert torch.equal(found, expected), key
            continue
        converter, sizes = computed[key]
        stored, again = (
            torch.from_numpy(converter.to_maxtext(value.float().numpy(), sizes)).to(expected.dtype)
            for value in (expected, found)
        )
        if by_script:
            torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
        elif expected.dtype == torch.float32:
            torch.testing.assert_close(found, expected, rtol=2**-22, atol=0)
        else:
            assert (stored == again).float().mean() >= 0.99, key


def _equal_to_twin(weights: dict[str, torch.Tensor], twin: dict[str, torch.Tensor]) -> None:
    """Same names, shapes, dtypes and bits; the embedding within what MaxText's scaling leaves of it."""
    assert sorted(weights) == sorted(twin)
    for name, expected in twin.items():
        found = weights[name]
        assert found.shape == expected.shape, name
        assert found.dtype == expected.dtype, name
        if name.endswith(".embed_tokens.weight"):
            root = torch.tensor(math.sqrt(expected.shape[1]), dtype=torch.float32)
            stored, again = ((value.float() * root).to(torch.bfloat16) for value in (expected, found))
            assert (stored == again).float().mean() >= 0.99, name
        else:
            assert torch.equal(found, expected), name


def test_every_fixture_is_tested() -> None:
    assert sorted(path.parent.name for path in FIXTURES.glob("*/case.json")) == sorted(cases())


@pytest.mark.parametrize("name", cases())
def test_weights_equal_the_twin(name: str, twin: Callable[[str], Path]) -> None:
    expected = safetensors_torch.load_file(twin(name) / "model.safetensors")
    checkpoint = _opened(name)
    stored = {target.dtype.name for target in checkpoint.plan.targets.values()}
    if stored == {"bfloat16"}:
        _equal_to_twin_of(name, dict(checkpoint.hf_weights()), expected)
    else:
        weights = dict(checkpoint.hf_weights())
        assert {str(weight.dtype).removeprefix("torch.") for weight in weights.values()} == stored
        dtype = next(iter(expected.values())).dtype
        _equal_to_twin_of(name, dict(checkpoint.hf_weights(dtype=dtype)), expected)


@pytest.mark.parametrize("name", servable())
def test_twins_configuration_is_accepted_and_demands_the_same(name: str, twin: Callable[[str], Path]) -> None:
    import transformers

    config = transformers.AutoConfig.from_pretrained(twin(name))
    checkpoint = open_checkpoint(cases()[name].items)
    expected = safetensors_torch.load_file(twin(name) / "model.safetensors")
    planned = checkpoint.with_config(config).plan
    found = {name: shape for spec in planned.targets.values() for name, shape in published_tensors(spec)}
    assert found == {name: tuple(value.shape) for name, value in expected.items()}


@pytest.mark.parametrize("name", ["moe_v2", "dense_v1"])
@pytest.mark.parametrize("budget", [1e-9, 1e-4, 1.0])
def test_every_budget_gives_the_same(name: str, budget: float, twin: Callable[[str], Path]) -> None:
    expected = safetensors_torch.load_file(twin(name) / "model.safetensors")
    _equal_to_twin(dict(open_checkpoint(cases()[name].items, concurrent_gib=budget).hf_weights()), expected)


@pytest.mark.parametrize("budget", [1e-6, 1.0])
@pytest.mark.parametrize("name", cases())
def test_every_stored_chunk_is_decoded_once(name: str, budget: float) -> None:
    checkpoint = _opened(name)
    checkpoint.concurrent_bytes = max(1, int(budget * 2**30))
    before = _decoded_chunks()
    for _ in checkpoint.hf_weights():
        pass
    leaves = [entry.leaf for entry in checkpoint.plan.leaves]
    assert _decoded_chunks() - before == sum(
        math.prod(math.ceil(size / step) for size, step in zip(leaf.shape, leaf.chunks, strict=True))
        for leaf in leaves
    )


def test_reading_begins_before_the_first_piece_is_asked_for(twin: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(cases()["moe_v2"].items)
    before = _decoded_chunks()
    weights = checkpoint.hf_weights()
    assert _decoded_chunks() == before, "tensors are read when the first is asked for"
    weights.close()
    regions = checkpoint.iter_regions()
    deadline = time.monotonic() + 20
    while _decoded_chunks() == before:
        assert time.monotonic() < deadline, "nothing was read"
        time.sleep(0.01)
    expected = safetensors_torch.load_file(twin("moe_v2") / "model.safetensors")
    _equal_to_twin(dict(checkpoint.hf_weights(regions=regions)), expected)


def _decoded_chunks() -> int:
    """TensorStore's own count, of this process."""
    metrics = tensorstore.experimental_collect_matching_metrics("/tensorstore/cache/chunk_cache/reads")
    return sum(int(value["value"]) for metric in metrics for value in metric["values"])


def test_folding_multiplies_down_proj_and_leaves_ones(twin: Callable[[str], Path]) -> None:
    expected = safetensors_torch.load_file(twin("moe_v2") / "model.safetensors")
    plain = dict(open_checkpoint(cases()["moe_v2"].items).hf_weights())
    folded = dict(open_checkpoint(cases()["moe_v2"].items).hf_weights(fold_expert_scales=True))
    for name, value in folded.items():
        if name.endswith("per_expert_scale"):
            assert torch.equal(value, torch.ones_like(value))
        elif name.endswith("experts.down_proj"):
            scale = expected[name.replace("experts.down_proj", "router.per_expert_scale")]
            product = expected[name].float() * scale.float()[:, None, None]
            assert torch.equal(value, product.to(torch.bfloat16))
        else:
            assert torch.equal(value, plain[name])


@pytest.mark.parametrize(("ocdbt", "zarr3"), [(True, True), (True, False), (False, True), (False, False)])
def test_every_storage_format(ocdbt: bool, zarr3: bool, tmp_path: Path, twin: Callable[[str], Path]) -> None:
    tree = read_orbax(cases()["dense_v2"].items)
    items = write_orbax(tmp_path / "0", tree, ocdbt=ocdbt, zarr3=zarr3)
    checkpoint = open_checkpoint(items)
    assert (checkpoint.tree.ocdbt, checkpoint.tree.zarr3) == (ocdbt, zarr3)
    expected = safetensors_torch.load_file(twin("dense_v2") / "model.safetensors")
    _equal_to_twin(dict(checkpoint.hf_weights()), expected)


def test_chunks_are_read_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """The regions of a leaf tile it, and no region cuts a chunk that another region also needs."""
    from vllm_maxtext_loader.checkpoint.regions import chunk_regions

    checkpoint = open_checkpoint(cases()["moe_v2"].items)
    for leaf in checkpoint.tree.leaves.values():
        for limit in (1, 1000, 10**6, 10**9):
            seen = np.zeros(leaf.shape, np.int8)
            for region in chunk_regions(leaf, limit):
                seen[region] += 1
                for part, chunk, size in zip(region, leaf.chunks, leaf.shape, strict=True):
                    assert part.start % chunk == 0
                    assert part.stop % chunk == 0 or part.stop == size
            assert np.all(seen == 1)


@pytest.mark.parametrize("reserved", [0, 3 << 15])
@pytest.mark.parametrize("budget", [1 << 17, 1 << 21])
def test_first_regions_are_those_that_are_read(budget: int, reserved: int) -> None:
    """Devices' programs are compiled for them; what is reserved makes all regions smaller."""
    checkpoint = open_checkpoint(cases()["moe_v2"].items)
    checkpoint.concurrent_bytes = budget
    largest = max(entry.leaf.chunk_nbytes for entry in checkpoint.plan.leaves)
    # On a disk, half is TensorStore's, but a chunk for each core.
    cores = len(os.sched_getaffinity(0))
    limit = max((budget - reserved) // 2, min(cores * largest, budget - reserved)) // 4
    read: dict[str, Any] = {}
    for decoded in checkpoint.iter_regions(reserved=reserved):
        read.setdefault(decoded.leaf.key, decoded.region)
        single = all(
            part.stop - part.start <= chunk
            for part, chunk in zip(decoded.region, decoded.leaf.chunks, strict=True)
        )
        assert single or decoded.array.nbytes <= limit
    assert {leaf.key: region for leaf, region in checkpoint.first_regions(reserved=reserved)} == read


def test_run_directory_means_the_newest_step_and_items_are_found_from_everywhere() -> None:
    items = cases()["moe_v2"].items
    for path in (items, items.parent, items.parent.parent, str(items) + "/"):
        assert open_checkpoint(path).location.items.url == str(items)


def _values(tree: Tree, leaf: Callable[[np.ndarray], object]) -> Tree:
    return {
        name: _values(value, leaf) if isinstance(value, dict) else leaf(value) for name, value in tree.items()
    }


def _nnx(params: Tree) -> Tree:
    """An NNX state as Tunix saves it: every leaf under "value", random number state mixed in."""
    tree = _values(params, lambda array: {"value": array})
    rngs = {
        "dropout": {"key": {"value": np.zeros(2, np.uint32)}, "count": {"value": np.zeros((), np.uint32)}}
    }
    tree["decoder"]["layers_remainder"] = {"rngs": rngs}
    return tree


def _train_state(params: Tree) -> Tree:
    moments = _values(params, lambda array: np.zeros(array.shape, np.float32))
    adam = {"count": np.zeros((), np.int32), "mu": {"params": moments}, "nu": {"params": moments}}
    return {"params": {"params": params}, "opt_state": [adam, None, {"count": np.zeros((), np.int32)}]}


WRITERS: dict[str, tuple[str, Callable[[Tree], Tree], str]] = {
    "bare params": ("items", lambda params: {"params": params}, "Linen (bare params)"),
    "Tunix SFT": ("model_params", _nnx, "NNX (Tunix SFT or MaxText decode)"),
    "Tunix RL": ("model_params", lambda params: {"base": _nnx(params)}, "NNX (Tunix RL)"),
    "training": ("items", _train_state, "Linen (MaxText train state)"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_wrapper(writer: str, tmp_path: Path, twin: Callable[[str], Path]) -> None:
    """The same weights in the trees of other writers, written by Orbax: the same tensors, and the rest is not read."""
    item, wrap, title = WRITERS[writer]
    params = read_orbax(cases()["dense_v2"].items)["params"]["params"]
    items = write_orbax(tmp_path / "3", wrap(params), item=item)
    checkpoint = open_checkpoint(items.parent)
    assert checkpoint.tree.writer == title
    skipped = {entry.reason for entry in checkpoint.tree.skipped}
    if writer == "training":
        assert checkpoint.tree.skipped_nbytes > 2 * checkpoint.tree.nbytes
        assert skipped == {"optimizer state"}
    elif writer != "bare params":
        assert skipped == {"random number state"}
    expected = safetensors_torch.load_file(twin("dense_v2") / "model.safetensors")
    _equal_to_twin(dict(checkpoint.hf_weights()), expected)


def test_float32_masters_are_rounded_once(tmp_path: Path, twin: Callable[[str], Path]) -> None:
    tree = read_orbax(cases()["moe_v2"].items)
    tree["params"] = _values(tree["params"], lambda array: array.astype(np.float32))
    checkpoint = open_checkpoint(write_orbax(tmp_path / "0", tree))
    expected = safetensors_torch.load_file(twin("moe_v2") / "model.safetensors")
    assert {weight.dtype for _, weight in checkpoint.hf_weights()} == {torch.float32}
    _equal_to_twin(dict(checkpoint.hf_weights(dtype=torch.bfloat16)), expected)


def test_padded_vocabulary_is_dropped(tmp_path: Path, twin: Callable[[str], Path]) -> None:
    tree = read_orbax(cases()["dense_v2"].items)
    embedder = tree["params"]["params"]["token_embedder"]
    embedder["embedding"] = np.concatenate([embedder["embedding"], np.zeros_like(embedder["embedding"][:64])])
    items = write_orbax(tmp_path / "0", tree)
    expected = safetensors_torch.load_file(twin("dense_v2") / "model.safetensors")
    _equal_to_twin(dict(open_checkpoint(items).hf_weights()), expected)


def test_prefused_experts(tmp_path: Path, twin: Callable[[str], Path]) -> None:
    tree = read_orbax(cases()["moe_v2"].items)
    for layers in tree["params"]["params"]["decoder"]["scanned_blocks"].values():
        block = layers["mlp"]["moe_block"]["MoeBlock_0"]
        block["wi"] = np.concatenate([block.pop("wi_0"), block.pop("wi_1")], axis=-1)
    expected = safetensors_torch.load_file(twin("moe_v2") / "model.safetensors")
    _equal_to_twin(dict(open_checkpoint(write_orbax(tmp_path / "0", tree)).hf_weights()), expected)
