"""Large chunks in parts: which regions, in which order."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any, cast

import ml_dtypes
import numpy as np
import pytest

from vllm_maxtext_loader.checkpoint.chunks import ChunkRead, in_batches
from vllm_maxtext_loader.checkpoint.parts import Turns, cut, in_turn
from vllm_maxtext_loader.checkpoint.regions import RegionRead, chunk_regions, region_nbytes
from vllm_maxtext_loader.checkpoint.tree import Leaf

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MIB = 1 << 20


def reads(name: str, shape: tuple[int, ...], chunk: tuple[int, ...]) -> list[RegionRead]:
    """The chunks of a leaf."""
    leaf = Leaf(name, (name,), shape, BFLOAT16, chunk)
    regions = chunk_regions(leaf, 1)
    return [RegionRead(leaf, region, number == len(regions) - 1) for number, region in enumerate(regions)]


@pytest.mark.parametrize(
    ("shape", "nbytes"),
    [((12, 5, 8), 200), ((12, 5, 8), 30), ((3, 1000), 100), ((64,), 2), ((7,), 1000), ((), 1)],
)
def test_parts_are_consecutive(shape: tuple[int, ...], nbytes: int) -> None:
    values = np.arange(math.prod(shape)).reshape(shape)
    region = tuple(slice(0, length) for length in shape)
    parts = list(cut(region, 2, nbytes))
    np.testing.assert_array_equal(np.concatenate([values[part].ravel() for part in parts]), values.ravel())
    assert max(region_nbytes(part, 2) for part in parts) <= max(nbytes, 2)
    assert len({region_nbytes(part, 2) for part in parts}) <= 2, "of equal size, but for the last of a row"


@pytest.mark.parametrize(
    ("nbytes", "wanted"),
    [([100] * 4, [4]), ([MIB] * 5, [2, 2, 1]), ([3 * MIB, 100, 100, 2 * MIB, 100], [1, 3, 1]), ([], [])],
)
def test_small_chunks_are_decoded_together(nbytes: list[int], wanted: list[int]) -> None:
    array = cast(Any, SimpleNamespace(itemsize=2))
    chunks = [
        ChunkRead(array, (number,), (slice(7, 7 + size // 2),), (), cast(Any, None))
        for number, size in enumerate(nbytes)
    ]
    batches = list(in_batches(chunks))
    assert [chunk for batch in batches for chunk in batch] == chunks
    assert [len(batch) for batch in batches] == wanted


def test_part_of_a_region_that_begins_elsewhere() -> None:
    parts = list(cut((slice(4, 6), slice(10, 13), slice(0, 2)), 1, 4))
    assert parts == [
        (slice(outer, outer + 1), slice(*inner), slice(0, 2))
        for outer in (4, 5)
        for inner in ((10, 12), (12, 13))
    ]


@pytest.mark.parametrize(
    ("memory", "cores"), [(1, 2), (64 * MIB, 2), (64 * MIB, 224), (2 << 30, 16), (5 << 30, 1)]
)
def test_memory_holds_two_parts_of_every_chunk(memory: int, cores: int) -> None:
    turns = Turns.of(memory, cores)
    assert 1 <= turns.chunks <= 2 * cores
    assert turns.nbytes >= MIB
    assert 2 * turns.chunks * turns.nbytes <= max(memory, 2 * MIB)
    assert not turns.is_large(2 * MIB), "norms, and scales that are folded into experts, stay whole"


def test_large_chunks_take_turns() -> None:
    turns = Turns(chunks=4, nbytes=MIB)
    small, large = (10, 10), (4096, 1024)
    plan = [
        *reads("norm.0", small, small),
        *reads("wi.0", large, large),
        *reads("scale", small, (5, 10)),
        *reads("wi.1", (8192, 1024), large),
        *reads("wi.2", large, large),
        *reads("wo", large, large),
        *reads("norm.1", small, small),
    ]
    ordered = in_turn(plan, turns, lambda read: True)
    found = [(read.leaf.key, read.region[0].start) for read in ordered]
    # Five large chunks: groups of three and two, rather than of four and one. What is small comes before the group it is in.
    first = [("wi.0", 0), ("wi.1", 0), ("wi.1", 4096)]
    second = [("wi.2", 0), ("wo", 0)]
    assert found == [
        ("norm.0", 0),
        ("scale", 0),
        ("scale", 5),
        *((key, start + row) for row in range(0, 4096, 512) for key, start in first),
        *((key, start + row) for row in range(0, 4096, 512) for key, start in second),
        ("norm.1", 0),
    ]
    assert [read.leaf.key for read in ordered if read.last] == [
        "norm.0",
        "scale",
        "wi.0",
        "wi.1",
        "wi.2",
        "wo",
        "norm.1",
    ]
    for read in ordered:
        assert (read.whole is None) == (read.leaf.shape == small)


def test_what_stays_whole() -> None:
    turns = Turns(chunks=2, nbytes=MIB)
    edge = reads("edge", (5000, 1024), (4096, 1024))
    plan = [*edge, *reads("small", (2048, 512), (2048, 512))]
    ordered = in_turn(plan, turns, lambda read: True)
    # The second chunk ends outside its array.
    assert [read.region for read in ordered if read.whole is None] == [edge[1].region, plan[2].region]
    assert in_turn(plan, turns, lambda read: False) == plan, "TensorStore reads whole chunks"


def test_every_value_comes_once() -> None:
    plan = list(
        itertools.chain(*(reads(f"w{number}", (6, 700, 1000), (3, 700, 1000)) for number in range(5)))
    )
    ordered = in_turn(plan, Turns(chunks=4, nbytes=MIB), lambda read: True)
    counts = {read.leaf.key: np.zeros(read.leaf.shape, np.uint8) for read in plan}
    for read in ordered:
        counts[read.leaf.key][read.region] += 1
    assert all((count == 1).all() for count in counts.values())
