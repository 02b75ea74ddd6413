"""Random and damaged metadata: a plan or a `MaxTextLoadError`, never another exception, never a hang.

FUZZ_EXAMPLES is the number of inputs in all; FUZZ_EXAMPLES=100000 takes about half an hour.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.checkpoints import FIXTURES, cases
from support.damage import without_database
from support.fuzz_inputs import DIRECTORIES, changed, damaged_bytes, damaged_json, invented
from vllm_maxtext_loader import MaxTextLoadError, errors, families, open_checkpoint
from vllm_maxtext_loader.api import Checkpoint
from vllm_maxtext_loader.checkpoint import checksums
from vllm_maxtext_loader.checkpoint.find import locate
from vllm_maxtext_loader.checkpoint.reader import DecodedRegion
from vllm_maxtext_loader.checkpoint.tree import Leaf, Tree
from vllm_maxtext_loader.conversion.dims import ModelDims
from vllm_maxtext_loader.conversion.plan import Plan, make_plan
from vllm_maxtext_loader.families.gemma4 import FAMILY

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "500"))
LONGEST = 60
"""Seconds one input may take before the process is ended with a traceback."""

MEMORY = 4 << 30
"""Bytes of address space one input may take on top of what the process has."""


def fuzz(share: float) -> settings:
    """Settings for a test that tries this share of the inputs."""
    return settings(
        max_examples=max(1, round(EXAMPLES * share)),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    """Makes an input that asks for too much memory fail, instead of the machine."""
    from transformers import Gemma4Config  # noqa: F401  Its libraries alone are larger than the limit.

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    faulthandler.dump_traceback_later(LONGEST, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def trees() -> list[Tree]:
    return [open_checkpoint(case.items).tree for case in cases().values()]


def check_plan(plan: Plan) -> None:
    """What a plan promises: every tensor is made of leaves that are read."""
    read = {entry.leaf.key for entry in plan.leaves}
    assert plan.targets
    assert all(target.leaves and set(target.leaves) <= read for target in plan.targets.values())
    assert {name for name, _ in plan.family.hf_shapes(plan.dims)} == plan.targets.keys()
    assert all(write.target in plan.targets for entry in plan.leaves for write in entry.copies)
    assert plan.nbytes > 0
    assert all(target.nbytes > 0 for target in plan.targets.values())


def plan_of(tree: Tree, leaves: list[Leaf], wanted: ModelDims | None) -> Plan | None:
    named = {leaf.name: leaf for leaf in leaves if 0 not in leaf.shape}
    message, plan = str(tree.location.items), None
    try:
        family = families.identify(named, message)
        plan = make_plan(dataclasses.replace(tree, leaves=named, arrays={}), family, wanted)
        check_plan(plan)
    except MaxTextLoadError as error:
        message = str(error)
    assert str(tree.location.items) in message
    return plan


def test_changed_trees(trees: list[Tree]) -> None:
    wanted = [make_plan(tree, families.identify(tree.leaves, "")).dims for tree in trees]

    @fuzz(0.4)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(trees) - 1))
        leaves = data.draw(changed(list(trees[at].leaves.values())))
        dims = data.draw(st.one_of(st.none(), st.sampled_from(wanted)))
        with bounded():
            plan = plan_of(trees[at], leaves, dims)
            if plan is not None and dims is None:
                with contextlib.suppress(MaxTextLoadError):
                    Checkpoint(
                        trees[at], plan, data.draw(st.sampled_from([None, "gemma4-26b", "x"])), 1 << 30, True
                    ).hf_config()

    run()


def test_invented_trees(trees: list[Tree]) -> None:
    @fuzz(0.1)
    @given(invented())
    def run(leaves: list[Leaf]) -> None:
        with bounded():
            plan_of(trees[0], leaves, None)

    run()


def opens(path: Path) -> None:
    """Opens a checkpoint; it is planned, or refused."""
    with bounded(), contextlib.suppress(MaxTextLoadError):
        check_plan(open_checkpoint(path).plan)


@contextlib.contextmanager
def replaced(path: Path, data: bytes | None) -> Iterator[None]:
    """A file with other content (None: gone) for the duration."""
    before = path.read_bytes()
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)


def test_damaged_files(tmp_path: Path) -> None:
    """Metadata of a checkpoint whose arrays lie in files: damaged as JSON and as bytes, or gone."""
    run_dir = without_database(FIXTURES / "dense_v2/checkpoints", tmp_path / "run")
    step, items = run_dir / "0", run_dir / "0/items"
    for chunks in items.glob("*/c/"):
        shutil.rmtree(chunks)  # Array data is not looked at.
    leaves = sorted(items.glob("*/zarr.json"))
    opens(run_dir)

    @fuzz(0.3)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        path = data.draw(
            st.one_of(st.just(items / "_METADATA"), st.sampled_from([step / "_CHECKPOINT_METADATA", *leaves]))
        )
        before = path.read_bytes()
        kind = data.draw(st.integers(0, 7))
        if kind < 5:
            value = json.loads(before)
            for _ in range(data.draw(st.integers(1, 3))):
                value = data.draw(damaged_json(value))
            after: bytes | None = json.dumps(value).encode()
        else:
            after = data.draw(damaged_bytes(before)) if kind < 7 else None
        with replaced(path, after):
            opens(run_dir)

    run()


def test_damaged_database(tmp_path: Path) -> None:
    """Manifest and B-tree of a checkpoint whose arrays lie in an OCDBT database."""
    run_dir = shutil.copytree(FIXTURES / "dense_v2/checkpoints", tmp_path / "run")
    items = run_dir / "0/items"
    paths = [items / "manifest.ocdbt", *(items / "d").iterdir()]
    opens(run_dir)

    @fuzz(0.05)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(paths))
        with replaced(path, data.draw(damaged_bytes(path.read_bytes()))):
            opens(run_dir)

    run()


def make(root: Path, content: dict[str, Any] | bytes) -> None:
    """Writes a tree of directories and files."""
    if isinstance(content, bytes):
        root.write_bytes(content)
        return
    root.mkdir()
    for name, inner in content.items():
        make(root / name, inner)


def test_random_directories(tmp_path: Path) -> None:
    @fuzz(0.1)
    @given(DIRECTORIES, st.one_of(st.none(), st.sampled_from([0, 3, 7, 10, 10**20])))
    def run(content: dict[str, Any], step: int | None) -> None:
        make(tmp_path / "run", content)
        message = str(tmp_path / "run")
        try:
            with bounded():
                found = locate(tmp_path / "run", step)
            assert (Path(found.items.url) / "_METADATA").exists()
            assert step is None or found.step == step
        except MaxTextLoadError as error:
            message = str(error)
        finally:
            shutil.rmtree(tmp_path / "run")
        assert str(tmp_path / "run") in message

    run()


def test_damaged_checksum_file(tmp_path: Path) -> None:
    leaf = Leaf("a.b", ("a", "b"), (4, 6), np.dtype(np.float32), (2, 3))
    sums = {"a.b": checksums.LeafSums(leaf.shape, "float32", leaf.chunks, (1, 2, 3, 4))}
    good = json.loads(checksums.dumps(sums, "gs://bucket/run"))
    decoded = DecodedRegion(leaf, (slice(0, 4), slice(0, 6)), np.zeros((4, 6), np.float32), last=True)

    def use() -> None:
        verifier = checksums.Verifier(tmp_path / "sums", "gs://bucket/run")
        verifier.expect([leaf])
        verifier.check(decoded)

    @fuzz(0.05)
    @given(
        st.one_of(
            damaged_json(good).map(lambda value: json.dumps(value).encode()),
            damaged_bytes(json.dumps(good).encode()),
        )
    )
    def run(data: bytes) -> None:
        (tmp_path / "sums").write_bytes(data)
        with bounded(), pytest.raises(MaxTextLoadError):
            use()

    run()


def with_leaf(tree: Tree, name: str, **changes: Any) -> Tree:
    """The tree with one leaf changed."""
    leaf = dataclasses.replace(tree.leaves[name], **changes)
    others = {key: other for key, other in tree.leaves.items() if key != name}
    return dataclasses.replace(tree, leaves={**others, leaf.name: leaf})


@pytest.fixture(scope="module")
def moe(trees: list[Tree]) -> Tree:
    return next(tree for tree in trees if "/moe_v2/" in tree.location.items.url)


SCALAR = "decoder.scanned_blocks.local_layers.layer_scalar"
GATE = "decoder.scanned_blocks.local_layers.mlp.moe_block.MoeBlock_0.wi_0"


def test_found_billions_of_layers(moe: Tree) -> None:
    name = "decoder.scanned_blocks.global_layer.layer_scalar"
    with pytest.raises(
        errors.LayoutError, match=rf"{name} has shape \[1, 2147483648, 2\]: .* would be stacked"
    ):
        make_plan(with_leaf(moe, name, shape=(1, 2**31, 2)), FAMILY)


def test_found_layer_number_of_many_digits(moe: Tree) -> None:
    path = ("decoder", "layers_99999999999", "layer_scalar")
    with pytest.raises(errors.UnknownLeafError, match="no place in Gemma 4"):
        make_plan(with_leaf(moe, SCALAR, path=path), FAMILY)


def test_found_parts_of_two_types(moe: Tree) -> None:
    plan = make_plan(with_leaf(moe, GATE, dtype=np.dtype(np.float16)), FAMILY)
    fused = [target for target in plan.targets.values() if target.name.endswith("experts.gate_up_proj")]
    assert {target.dtype for target in fused} == {np.dtype(np.float32), moe.leaves[GATE].dtype}


def test_names_that_no_array_can_have(tmp_path: Path) -> None:
    items = tmp_path / "items"
    items.mkdir()
    for key, says in (
        (["a\ud800"], r"\(a\\ud800\) is no name of an array"),
        ([], "is no name"),
        (["a/b"], "is no name"),
        (["params", "a\nWARNING: forged"], r"\(params, a\\nWARNING: forged\) is no name of an array"),
        (["\x1b[2Jscale"], r"\(\\x1b\[2Jscale\) is no name of an array"),
        (["a\u202eb"], r"\(a\\u202eb\) is no name of an array"),
    ):
        entry = {
            "key_metadata": [{"key": part} for part in key],
            "value_metadata": {"value_type": "jax.Array"},
        }
        (items / "_METADATA").write_text(json.dumps({"tree_metadata": {"x": entry}}))
        with pytest.raises(errors.CorruptMetadataError, match=says):
            open_checkpoint(items)
