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
from conftest import FIXTURES, cases
from damage import without_database
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_maxtext_loader import MaxTextLoadError, checksums, open_checkpoint
from vllm_maxtext_loader.api import Checkpoint
from vllm_maxtext_loader.checkpoint.location import locate
from vllm_maxtext_loader.checkpoint.reader import Piece
from vllm_maxtext_loader.checkpoint.tree import ANCHOR, Leaf, Tree
from vllm_maxtext_loader.conversion.gemma4 import CONTAINERS, RULES, Dims
from vllm_maxtext_loader.conversion.plan import Plan, make_plan

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


SIZES = st.one_of(st.integers(0, 9), st.sampled_from([16, 96, 160, 2816, 262_144, 2**31, 2**40, 2**62]))
SHAPES = st.lists(SIZES, max_size=5).map(tuple)
DTYPES = st.sampled_from([np.dtype(np.float32), np.dtype(np.float16)])
PARTS = sorted(
    {part for rule in RULES for part in rule.leaf.split(".")}
    | {
        part
        for container in CONTAINERS
        for part in container.pattern.replace("\\", "").split(".")
        if part.isidentifier()
    }
    | {
        "layers_0",
        "layers_7",
        "layers_00",
        "layers_99999999999",
        "layer_3",
        "value",
        "scanned_blocks",
        "layers",
    }
    | {"Gemma4DecoderLayerToLinen_1", "vision_encoder", "Gemma4VisionEncoderLayer_0", *ANCHOR}
)
PART = st.one_of(st.sampled_from(PARTS), st.text(min_size=1, max_size=6))


class Leaves(list[Leaf]):
    """Leaves that are shown by how they differ from a real checkpoint's."""

    original: frozenset[Leaf] = frozenset()

    def __repr__(self) -> str:
        gone = [f"- {leaf.name} {leaf.shape}" for leaf in self.original - set(self)]
        new = [f"+ {leaf.name} {leaf.shape} {leaf.dtype}" for leaf in self if leaf not in self.original]
        return "\n".join([f"{len(self)} leaves", *sorted(gone), *new])


@st.composite
def changed(draw: st.DrawFn, original: list[Leaf]) -> list[Leaf]:
    """The leaves of a real checkpoint after a few changes of every kind."""
    leaves = Leaves(original)
    leaves.original = frozenset(original)
    for _ in range(draw(st.integers(0, 4))):
        if not leaves:
            break
        at = draw(st.integers(0, len(leaves) - 1))
        leaf = leaves[at]
        path, shape = list(leaf.path), list(leaf.shape)
        match draw(
            st.sampled_from(
                ["drop", "rename", "copy", "resize", "swap", "grow", "shrink", "dtype", "add", "many"]
            )
        ):
            case "drop":
                leaves.pop(at)
                continue
            case "rename":
                path[draw(st.integers(0, len(path) - 1))] = draw(PART)
            case "copy":
                path[draw(st.integers(0, len(path) - 1))] = draw(PART)
                leaves.append(leaf)
            case "resize" if shape:
                shape[draw(st.integers(0, len(shape) - 1))] = draw(SIZES)
            case "swap" if shape:
                one, other = (draw(st.integers(0, len(shape) - 1)) for _ in range(2))
                shape[one], shape[other] = shape[other], shape[one]
            case "grow":
                shape.insert(draw(st.integers(0, len(shape))), draw(SIZES))
            case "shrink" if shape:
                shape.pop(draw(st.integers(0, len(shape) - 1)))
            case "dtype":
                leaf = dataclasses.replace(leaf, dtype=draw(DTYPES))
            case "add":
                leaves.append(leaf)
                path, shape = draw(st.lists(PART, min_size=1, max_size=6)), list(draw(SHAPES))
            case "many":
                keep = draw(st.integers(0, len(leaves)))
                del leaves[:keep]
                continue
        leaves[at] = dataclasses.replace(
            leaf, key=".".join(path), path=tuple(path), shape=tuple(shape), chunks=tuple(shape)
        )
    return leaves


@st.composite
def invented(draw: st.DrawFn) -> list[Leaf]:
    """Leaves of random paths and shapes."""
    found = []
    for _ in range(draw(st.integers(0, 8))):
        path, shape = tuple(draw(st.lists(PART, min_size=1, max_size=6))), draw(SHAPES)
        found.append(Leaf(".".join(path), path, shape, draw(DTYPES), shape))
    return found


def check_plan(plan: Plan) -> None:
    """What a plan promises: every tensor is made of leaves that are read."""
    read = {entry.leaf.key for entry in plan.leaves}
    assert plan.targets
    assert all(target.leaves and set(target.leaves) <= read for target in plan.targets.values())
    assert {name for name, _ in plan.dims.hf_shapes()} == plan.targets.keys()
    assert all(write.target in plan.targets for entry in plan.leaves for write in entry.writes)
    assert plan.nbytes > 0
    assert all(target.nbytes > 0 for target in plan.targets.values())


def plan_of(tree: Tree, leaves: list[Leaf], wanted: Dims | None) -> Plan | None:
    named = {leaf.name: leaf for leaf in leaves if 0 not in leaf.shape}
    message, plan = str(tree.location.items), None
    try:
        plan = make_plan(dataclasses.replace(tree, leaves=named, arrays={}), wanted)
        check_plan(plan)
    except MaxTextLoadError as error:
        message = str(error)
    assert str(tree.location.items) in message
    return plan


def test_changed_trees(trees: list[Tree]) -> None:
    wanted = [make_plan(tree).dims for tree in trees]

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


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from(PARTS)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@st.composite
def damaged_json(draw: st.DrawFn, value: Any) -> Any:
    """The value with one place in it replaced, removed or doubled."""
    if isinstance(value, dict) and value and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(list(value)))
        match draw(st.integers(0, 5)):
            case 0:
                return {name: entry for name, entry in value.items() if name != key}
            case 1:
                return {(draw(PART) if name == key else name): entry for name, entry in value.items()}
        return {**value, key: draw(damaged_json(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 5)):
        at = draw(st.integers(0, len(value) - 1))
        match draw(st.integers(0, 5)):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return value[: at + 1] + value[at:]
        return [*value[:at], draw(damaged_json(value[at])), *value[at + 1 :]]
    if isinstance(value, int) and draw(st.booleans()):
        return draw(SIZES)
    return draw(JSON)


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes with a part cut off, overwritten, inserted or removed."""
    start, stop = sorted(draw(st.integers(0, len(data))) for _ in range(2))
    match draw(st.sampled_from(["end", "start", "flip", "insert", "remove", "random"])):
        case "end":
            return data[:start]
        case "start":
            return data[start:]
        case "flip" if start < len(data):
            return data[:start] + bytes([data[start] ^ draw(st.integers(1, 255))]) + data[start + 1 :]
        case "insert":
            return data[:start] + draw(st.binary(max_size=8)) + data[start:]
        case "remove":
            return data[:start] + data[stop:]
    return draw(st.binary(max_size=40))


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


NAMES = st.one_of(
    st.sampled_from(
        [
            "0",
            "7",
            "007",
            "10",
            "99999999999999999999",
            "step_3",
            "3_",
            "items",
            "items.orbax-checkpoint-tmp-1",
            "default",
        ]
    ),
    st.sampled_from(
        ["7.orbax-checkpoint-tmp-12", "checkpoints", "model_params", "optimizer_state", "\u0663", "a b", "-"]
    ),
    st.sampled_from(
        ["_METADATA", "_CHECKPOINT_METADATA", "commit_success.txt", "manifest.ocdbt", "orbax.checkpoint"]
    ),
)
CONTENTS = st.sampled_from(
    [b"", b"{}", b"[]", b'{"commit_timestamp_nsecs": null}', b'{"custom_metadata": 3}', b"\xff"]
)
DIRECTORIES = st.recursive(
    st.dictionaries(NAMES, CONTENTS, max_size=4),
    lambda inner: st.dictionaries(NAMES, st.one_of(inner, CONTENTS), max_size=4),
    max_leaves=8,
)


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
    piece = Piece(leaf, (slice(0, 4), slice(0, 6)), np.zeros((4, 6), np.float32), last=True)

    def use() -> None:
        verifier = checksums.Verifier(tmp_path / "sums", "gs://bucket/run")
        verifier.expect([leaf])
        verifier.check(piece)

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
