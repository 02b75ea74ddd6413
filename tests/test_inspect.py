"""`vllm-maxtext inspect`: what metadata alone tells, and how it is shown."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console

from support.checkpoints import Tree, cases, read_orbax
from vllm_maxtext_loader.checkpoint.tree import Leaf
from vllm_maxtext_loader.cli.render import _show_leaves, ranges, show_inspection, size
from vllm_maxtext_loader.errors import CheckpointNotFoundError
from vllm_maxtext_loader.tools.inspect import (
    Inspection,
    container_of,
    count_chunks,
    inspect_checkpoint,
    read_values,
)

Edited = Callable[..., Path]

BF16 = np.dtype(ml_dtypes.bfloat16)


def _shown(path: Path, width: int, values: bool = False) -> str:
    out = io.StringIO()
    found = _with_values(path) if values else inspect_checkpoint(path)
    show_inspection(Console(file=out, width=width, highlight=False, markup=False), found)
    return out.getvalue()


def _with_values(path: Path) -> Inspection:
    found = inspect_checkpoint(path)
    assert found.plan is not None
    return dataclasses.replace(found, values=read_values(found.plan, found.tree))


def _first_column(shown: str) -> str:
    """Names as they were before they were folded, one after the other."""
    lines = shown.splitlines()
    (width,) = {line.index("shape") for line in lines if line.split()[:2] == ["leaf", "shape"]}
    return "".join(line[:width].strip() for line in lines)


@pytest.mark.parametrize("name", cases())
def test_every_case_loads(name: str) -> None:
    found = inspect_checkpoint(cases()[name].items).to_json()
    json.dumps(found, allow_nan=False)
    sliding_end = found["model"]["dims"]["layers"][-1]["sliding"]
    assert found["loads"] is not (sliding_end and found["model"]["family"] == "gemma4")
    assert found["bytes"] == sum(leaf["bytes"] for leaf in found["leaves"]) == sum(found["dtypes"].values())
    assert all(
        leaf["key"].startswith(leaf["name"]) or leaf["name"] in leaf["key"] for leaf in found["leaves"]
    )


def test_facts_of_a_scanned_checkpoint() -> None:
    found = inspect_checkpoint(cases()["moe_v2"].items).to_json()
    assert found["layout"] == {
        "description": "scanned v2, scan axis 1, 2 blocks, 12 layers",
        "title": "scanned v2",
        "scan_axis": 1,
        "blocks": 2,
        "layers": 12,
    }
    assert found["wrapper"] == "Linen (MaxText train state)"
    assert found["storage"] == {"ocdbt": True, "zarr": 3, "compression": "zstd 3"}
    assert found["model"]["name"] is None
    assert found["needs_config"] is True
    assert found["model"]["dims"]["experts"] == 8
    assert found["step"] == 0
    assert found["tensors"] == 264
    assert [entry["reason"] for entry in found["skipped"]] == ["training step"]
    (scale,) = (
        leaf
        for leaf in found["leaves"]
        if leaf["name"].endswith("global_layer.mlp.moe_block.MoeBlock_0.wi_0")
    )
    assert scale["container"] == "decoder.scanned_blocks.global_layer"
    assert scale["shape"] == [8, 2, 96, 40]
    assert scale["bytes"] == 8 * 2 * 96 * 40 * 2
    assert scale["chunks"] == np.prod(
        [-(-a // b) for a, b in zip(scale["shape"], scale["chunk"], strict=True)]
    )


def test_model_name_is_checked_and_reported() -> None:
    assert inspect_checkpoint(cases()["moe_v2"].items, model_name="gemma4-26b").preset.name == "gemma4-26b"
    wrong = inspect_checkpoint(cases()["moe_v2"].items, model_name="gemma4-31b")
    assert not wrong.loads
    assert "gemma4-31b has no experts" in str(wrong.error)


def test_no_array_data_is_read(edited: Edited) -> None:
    items = edited("moe_v2", lambda params: None, ocdbt=False, zarr3=False)
    for file in items.rglob("*"):
        if file.is_file() and file.name not in ("_METADATA", "_sharding", ".zarray", "commit_success.txt"):
            file.write_bytes(b"no chunk")
    found = inspect_checkpoint(items)
    assert found.loads
    assert found.data.checked
    assert found.to_json()["storage"]["zarr"] == 2


def test_a_model_that_would_not_load_is_shown_all_the_same(edited: Edited) -> None:
    def drop(params: Tree) -> None:
        del params["decoder"]["decoder_norm"]
        params["decoder"]["lora"] = {"a": np.ones((3, 4), np.float32)}

    found = inspect_checkpoint(edited("moe_v2", drop))
    content = found.to_json()
    assert not found.loads
    assert content["error"]["type"] == "UnknownLeafError"
    assert content["layout"] is None
    assert content["model"]["dims"] is None
    assert content["tensors"] is None
    assert any(leaf["name"] == "decoder.lora.a" for leaf in content["leaves"])
    shown = _shown(Path(found.tree.location.items.url), 80)
    assert "decoder.lora" in shown
    assert "UnknownLeafError" in shown


def test_steps_of_a_run(copy_case: Callable[[str], Path]) -> None:
    run = copy_case("moe_v2") / "checkpoints"
    for number in ("100", "2000"):
        shutil.copytree(run / "0", run / number)
    metadata = run / "2000" / "_CHECKPOINT_METADATA"
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "commit_timestamp_nsecs": None}))
    (run / "3000.orbax-checkpoint-tmp-17").mkdir()
    (run / "logs").mkdir()
    found = inspect_checkpoint(run)
    assert found.tree.location.step == 100
    assert [(step.number, step.committed) for step in found.steps] == [
        (0, True),
        (100, True),
        (2000, False),
        (3000, False),
    ]
    assert "no commit time" in found.steps[2].detail
    assert "temporary" in found.steps[3].detail
    shown = " ".join(_shown(run, 80).split())
    assert "0, 100 committed" in shown
    assert "2000 not committed" in shown
    assert [step.number for step in inspect_checkpoint(run / "0" / "items").steps] == [0, 100, 2000, 3000]


def test_directories_are_listed_as_they_are_named(copy_case: Callable[[str], Path]) -> None:
    run = copy_case("moe_v2") / "checkpoints"
    for name in ("000100", "before_crash_900", "hf_20250101"):
        shutil.copytree(run / "0", run / name)
    shutil.rmtree(run / "hf_20250101" / "items")
    (run / "hf_20250101" / "_CHECKPOINT_METADATA").rename(run / "hf_20250101" / "config.json")
    (run / "hf_20250101" / "commit_success.txt").unlink()
    shown = " ".join(_shown(run, 100).split())
    assert "0, 000100 committed before_crash_900 passed over: not named as the steps are" in shown
    assert "hf_20250101" not in shown
    steps = inspect_checkpoint(run).to_json()["steps"]
    assert [(step["step"], step["name"], step["passed_over"]) for step in steps] == [
        (0, "0", False),
        (100, "000100", False),
        (900, "before_crash_900", True),
    ]
    # The backup itself is named: the run's steps are still the numbers.
    found = inspect_checkpoint(run / "before_crash_900")
    assert found.tree.location.step == 900
    assert [step.name for step in found.steps if not step.passed_over] == ["0", "000100"]


def test_directories_with_a_prefix(copy_case: Callable[[str], Path]) -> None:
    run = copy_case("moe_v2") / "checkpoints"
    for name in ("checkpoint_5", "checkpoint_20", "params_7"):
        shutil.copytree(run / "0", run / name)
    shutil.rmtree(run / "0")
    (run / "checkpoint_30.orbax-checkpoint-tmp-1").mkdir()
    shown = " ".join(_shown(run / "checkpoint_5", 100).split())
    assert "checkpoint_5, checkpoint_20 committed" in shown
    assert "checkpoint_30.orbax-checkpoint-tmp-1 not committed: temporary directory" in shown
    assert "params_7 passed over" in shown


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        inspect_checkpoint(tmp_path / "absent")


@pytest.mark.parametrize("name", cases())
def test_eighty_columns_lose_nothing(name: str) -> None:
    shown = _shown(cases()[name].items, 80)
    assert max(map(len, shown.splitlines())) <= 80
    # Names are folded, never cut: without the white space each is still there.
    first_column = _first_column(shown)
    for leaf in inspect_checkpoint(cases()[name].items).tree.leaves.values():
        below = leaf.name.removeprefix(container_of(leaf)[0] + ".")
        assert below in shown or all(part in first_column for part in below.split("."))


def test_layers_alike_are_shown_once() -> None:
    shown = _shown(cases()["moe_unscanned"].items, 100)
    assert "alike" in shown
    assert shown.count("self_attention.query.kernel") < 5


def test_chunks_are_counted() -> None:
    leaf = Leaf("params.x", ("x",), (10, 7), np.dtype(np.float32), (4, 7))
    assert count_chunks(leaf) == 3


def test_eighty_columns_at_full_size() -> None:
    """Shapes and chunks of the published 26B model, which no fixture has."""
    block = ("decoder", "scanned_blocks", "local_layers", "mlp")
    leaves = [
        Leaf(
            "k0",
            (*block, "moe_block", "MoeBlock_0", "wi_0"),
            (128, 5, 5, 2816, 704),
            BF16,
            (8, 5, 5, 2816, 704),
        ),
        Leaf("k1", (*block, "post_feedforward_layernorm_1", "scale"), (2816, 5, 5), BF16, (88, 5, 5)),
    ]
    out = io.StringIO()
    _show_leaves(Console(file=out, width=80), leaves)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "128×5×5×2816×704" in out.getvalue()
    assert "8×·×·×·×·" in out.getvalue()
    assert "11.82 GiB" in out.getvalue()
    names = _first_column(out.getvalue())
    assert "mlp.moe_block.MoeBlock_0.wi_0" in names
    assert "mlp.post_feedforward_layernorm_1.scale" in names


def test_small_words() -> None:
    assert ranges([4, 0, 1, 2, 6]) == "0-2,4,6"
    assert (size(8), size(3 << 20), size(5 << 30)) == ("8 B", "3.00 MiB", "5.00 GiB")


@pytest.mark.parametrize("name", ["moe_v2", "dense_v1_axis0", "moe_f32", "e2b"])
def test_values_are_those_that_orbax_reads(name: str) -> None:
    tree = read_orbax(cases()[name].items)
    found = _with_values(cases()[name].items)
    assert found.values is not None
    leaves = {leaf.key: leaf for leaf in found.tree.leaves.values()}
    for key, statistics in found.values.items():
        array: object = tree
        for part in key.split("."):
            assert isinstance(array, dict)
            array = array[part]
        values = np.asarray(array).astype(np.float64)
        assert statistics.count == values.size == np.prod(leaves[key].shape)
        assert (statistics.minimum, statistics.maximum) == (values.min(), values.max())
        assert statistics.mean == pytest.approx(values.mean(), rel=1e-9, abs=1e-12)
        assert statistics.zeros == (values == 0).sum()
        assert statistics.nans == statistics.infinities == 0
    assert found.values_ok is all(statistics.zeros < statistics.count for statistics in found.values.values())


def test_trouble_is_on_top_and_marked(edited: Edited) -> None:
    def diverge(params: Tree) -> None:
        params["decoder"]["decoder_norm"]["scale"][3:5] = np.nan, -np.inf
        local = params["decoder"]["scanned_blocks"]["local_layers"]
        local["self_attention"]["query"]["kernel"][...] = np.nan
        local["post_ffw_norm"]["scale"][...] = 0

    items = edited("moe_v2", diverge)
    found = _with_values(items)
    assert found.values_ok is False
    json.dumps(found.to_json(), allow_nan=False)
    lines = _shown(items, 200, values=True).splitlines()
    top = lines.index(next(line for line in lines if line.startswith("leaf") and "NaN" in line))
    marked = {line.split()[1]: line.split()[2:] for line in lines[top + 1 : top + 4]}
    assert marked["decoder.decoder_norm.scale"][-2:] == ["1", "1"]
    assert marked["decoder.scanned_blocks.local_layers.post_ffw_norm.scale"] == [
        *("0", "0", "0", "100", "%", "0", "0")
    ]
    assert marked["decoder.scanned_blocks.local_layers.self_attention.query.kernel"][:3] == ["-", "-", "-"]
    assert all(line.startswith("! ") for line in lines[top + 1 : top + 4])
    assert not lines[top + 4].startswith("! ")
    assert lines[-1].startswith("3 of 47 leaves hold values that no trained model has: ")
    assert "decoder.decoder_norm.scale (1 NaN, 1 inf)" in lines[-1]
    assert max(map(len, _shown(items, 80, values=True).splitlines()[:-1])) <= 80


def test_names_are_escaped() -> None:
    leaf = Leaf("k", ("x\x1b[31m", "y\nz"), (3, 4), BF16, (3, 4))
    out = io.StringIO()
    _show_leaves(Console(file=out, width=200), [leaf])
    assert "\x1b" not in out.getvalue()
    assert "x\\x1b[31m" in out.getvalue()
    assert "y\\nz" in out.getvalue()
