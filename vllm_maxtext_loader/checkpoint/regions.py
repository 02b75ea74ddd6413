"""Regions of leaves: what is read in one piece."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING

from vllm_maxtext_loader.checkpoint.tree import Leaf

if TYPE_CHECKING:
    from vllm_maxtext_loader.checkpoint.chunks import ChunkRead
    from vllm_maxtext_loader.checkpoint.parts import ChunkParts

Region = tuple[slice, ...]
"""A part of an array: a slice per axis, with explicit bounds."""


@dataclasses.dataclass(frozen=True)
class RegionRead:
    """A region to be read.

    Attributes:
        leaf, region, last: as of `DecodedRegion`.
        batches: the chunks it consists of, those together that one thread decodes one after the other; None where TensorStore
            reads it.
        source: as of `DecodedRegion`.
        number: by which the source knows it.
        whole: the chunk that the region is a part of, and that is decoded part by part; None where the region is of whole
            chunks.
        parts: decodes the parts of that chunk.
    """

    leaf: Leaf
    region: Region
    last: bool
    batches: tuple[tuple[ChunkRead, ...], ...] | None = None
    source: int | None = None
    number: int = 0
    whole: Region | None = None
    parts: ChunkParts | None = None

    def network_seconds(self, start: float, end: float) -> float | None:
        """Seconds between `start` and `end` in which a decoder waited for bytes; None where that is not known."""
        if self.batches is None:
            return None
        waits = [
            sum(
                max(0.0, min(end, stop) - max(start, begin))
                for chunk in batch
                for begin, stop in chunk.stream.waits
            )
            for batch in self.batches
        ]
        return max(waits, default=0.0)


def chunk_regions(leaf: Leaf, limit: int) -> list[Region]:
    """Cuts a leaf into regions aligned to its chunks, each of at most `limit` bytes where chunks allow it.

    Chunks are merged along the last axes first, so that regions are contiguous runs in storage order.

    Args:
        leaf: the array.
        limit: bytes per region; a single chunk larger than this is still one region.
    """
    steps = list(leaf.chunks) if leaf.chunks else []
    for axis in reversed(range(len(leaf.shape))):
        size = leaf.shape[axis]
        inner = (
            math.prod(min(step, length) for step, length in zip(steps, leaf.shape, strict=True))
            * leaf.dtype.itemsize
        )
        whole = math.ceil(size / steps[axis])
        multiple = max(1, min(whole, limit // max(1, inner)))
        # As many regions as that makes, of equal size where it divides: every other size is compiled for once more.
        multiple = math.ceil(whole / math.ceil(whole / multiple)) if whole else 1
        steps[axis] = min(size, steps[axis] * multiple)
        if multiple < whole:
            break
    ranges = [
        [slice(start, min(size, start + max(1, step))) for start in range(0, size, max(1, step))]
        for size, step in zip(leaf.shape, steps, strict=True)
    ]
    return [tuple(region) for region in itertools.product(*ranges)]


def region_nbytes(region: Region, itemsize: int) -> int:
    """Decoded size of a region in bytes."""
    return math.prod(part.stop - part.start for part in region) * itemsize
