"""Checksums of array data: the same however it is read, and a flipped bit is found while loading."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support import gcs
from support.checkpoints import FIXTURES
from support.damage import biggest, flip, regions, without_database
from vllm_maxtext_loader import errors, open_checkpoint
from vllm_maxtext_loader.api import Checkpoint
from vllm_maxtext_loader.checkpoint import checksums
from vllm_maxtext_loader.checkpoint.reader import DecodedRegion
from vllm_maxtext_loader.checkpoint.regions import chunk_regions
from vllm_maxtext_loader.checkpoint.tree import Leaf

RUN = FIXTURES / "moe_v2/checkpoints"


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    path = tmp_path / "sums.json"
    checkpoint = open_checkpoint(RUN)
    path.write_text(checksums.dumps(checksums.compute(checkpoint), checkpoint.plan.where))
    return path


def verify(checkpoint: Checkpoint, path: Path) -> int:
    verifier = checksums.Verifier(path, checkpoint.plan.where)
    verifier.expect(checkpoint.tree.leaves.values())
    return sum(1 for _ in verifier.watch(regions(checkpoint)))


def test_file_is_read_back(sums: Path) -> None:
    checkpoint = open_checkpoint(RUN)
    assert checksums.read(sums) == checksums.compute(checkpoint)
    assert json.loads(sums.read_text())["checkpoint"] == checkpoint.plan.where
    assert checksums.read(sums).keys() == {leaf.key for leaf in checkpoint.tree.leaves.values()}


@pytest.mark.parametrize("gib", [1e-9, 1e-5, 1.0])
def test_read_budget_does_not_matter(sums: Path, gib: float) -> None:
    checkpoint = open_checkpoint(RUN, concurrent_gib=gib)
    assert checksums.compute(checkpoint) == checksums.read(sums)
    assert verify(checkpoint, sums) >= len(checkpoint.tree.leaves)


@given(
    shape=st.lists(st.integers(1, 9), max_size=4).map(tuple),
    steps=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    limit=st.integers(1, 4000),
    dtype=st.sampled_from([np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)]),
)
@settings(max_examples=150, deadline=None)
def test_every_chunk_has_one_checksum(
    shape: tuple[int, ...], steps: list[int], limit: int, dtype: np.dtype
) -> None:
    chunks = tuple(min(size, step) for size, step in zip(shape, steps, strict=False))
    leaf = Leaf("k", ("k",), shape, dtype, chunks)
    array = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    found: dict[int, int] = {}
    for region in chunk_regions(leaf, limit):
        for index, _, value in checksums._chunks(DecodedRegion(leaf, region, array[region], last=False)):
            assert index not in found
            found[index] = value
    grid = [range(math.ceil(size / step)) for size, step in zip(shape, chunks, strict=True)]
    expected = {}
    for index, chunk in enumerate(itertools.product(*grid)):
        inside = tuple(
            slice(number * step, (number + 1) * step) for number, step in zip(chunk, chunks, strict=True)
        )
        expected[index] = google_crc32c.value(array[inside].tobytes())
    assert found == expected


def test_flipped_bit_is_read_without_complaint_and_found(sums: Path, tmp_path: Path) -> None:
    reference = regions(open_checkpoint(RUN))
    for at in range(100, 4000, 97):
        run = shutil.copytree(RUN, tmp_path / str(at))
        flip(biggest(run / "0/items"), at)
        try:
            found = regions(open_checkpoint(run))
        except errors.ReadError:
            continue  # This one broke the compression, which is noticed anyway.
        changed = [
            one.leaf.key
            for one, other in zip(found, reference, strict=True)
            if one.array.tobytes() != other.array.tobytes()
        ]
        if changed:
            break
    else:
        pytest.fail("no flipped bit passed unnoticed")
    with pytest.raises(errors.ReadError) as raised:
        verify(open_checkpoint(run), sums)
    for part in (
        f"{run}/0/items: leaf {changed[0]}, chunk [",
        "CRC-32C is ",
        f"({sums})",
        "Copy the checkpoint again",
    ):
        assert part in str(raised.value)


def test_no_extra_read_from_a_bucket(sums: Path) -> None:
    server, proxy = gcs.shared()
    server.upload(RUN, gcs.BUCKET, "sums/")
    with gcs.environment(proxy.url):
        counts = []
        for read in (regions, lambda checkpoint: verify(checkpoint, sums)):
            checkpoint = open_checkpoint(f"gs://{gcs.BUCKET}/sums")
            proxy.clear()
            read(checkpoint)
            gcs.assert_once(proxy)
            counts.append(proxy.counts())
        assert counts[0] == counts[1]


def test_checksums_of_another_checkpoint(sums: Path, tmp_path: Path) -> None:
    other = open_checkpoint(FIXTURES / "dense_v2/checkpoints")
    with pytest.raises(errors.OptionError) as raised:
        verify(other, sums)
    for part in (
        str(sums),
        "another checkpoint",
        other.plan.where,
        "leaf params.",
        "bfloat16 [",
        "vllm-maxtext checksum",
    ):
        assert part in str(raised.value)
    parsed = json.loads(sums.read_text())
    parsed["leaves"].popitem()
    sums.write_text(json.dumps(parsed))
    with pytest.raises(errors.OptionError, match=r"leaf .* is bfloat16 .*, in the file not there"):
        verify(open_checkpoint(RUN), sums)


def test_storage_does_not_matter(sums: Path, tmp_path: Path) -> None:
    """Decoded bytes count: the same arrays in files instead of a database have the same checksums."""
    assert verify(open_checkpoint(without_database(RUN, tmp_path / "run")), sums) > 0


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: "", "is no checksum file"),
        (lambda text: text[:200], "is no checksum file"),
        (lambda text: "[]", "is no checksum file"),
        (
            lambda text: text.replace("checksums 1", "checksums 2"),
            "expected format 'vllm-maxtext-checksums 1', found",
        ),
        (lambda text: text.replace('"crc32c": "', '"crc32c": "12345678'), "checksums for"),
        (lambda text: text.replace('"crc32c": "', '"crc32c": "wxyz'), "is no checksum file"),
        (lambda text: text.replace('"chunks"', '"lumps"', 1), "is no checksum file"),
    ],
)
def test_file_that_is_none(sums: Path, damage: Callable[[str], str], says: str) -> None:
    sums.write_text(damage(sums.read_text()))
    with pytest.raises(errors.OptionError, match=says) as raised:
        checksums.read(sums)
    assert f"checksums {sums}: " in str(raised.value)
    assert "vllm-maxtext checksum CKPT --output FILE" in str(raised.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(errors.OptionError, match=r"nope: cannot be read \(No such file or directory\)"):
        checksums.read(tmp_path / "nope")
