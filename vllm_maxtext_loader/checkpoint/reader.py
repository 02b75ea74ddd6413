"""Reads leaves in the order in which their chunks are stored, each chunk once, under a byte budget.

A leaf of a scanned model holds the same weight of every layer, and a stored chunk spans all of them: reading
layer by layer would decode every chunk once per layer. Here a leaf is cut along its chunk grid into regions;
several regions are in flight at a time, never more bytes of them than the budget.

TensorStore (for a bucket, `remote`) decodes into memory of ours, a `ring` that is used over and over.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import os
import queue
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorstore as ts

from vllm_maxtext_loader.checkpoint.arrays import array_error
from vllm_maxtext_loader.checkpoint.chunks import is_remote
from vllm_maxtext_loader.checkpoint.parts import Turns, in_turn
from vllm_maxtext_loader.checkpoint.regions import Region, RegionRead, chunk_regions, region_nbytes
from vllm_maxtext_loader.checkpoint.remote import RemoteReads
from vllm_maxtext_loader.checkpoint.ring import Ring
from vllm_maxtext_loader.checkpoint.storage.path import Location
from vllm_maxtext_loader.checkpoint.storage.ranges import Transfers
from vllm_maxtext_loader.checkpoint.storage.retry import to_storage_error
from vllm_maxtext_loader.checkpoint.storage.stall import Pending, StallDetector
from vllm_maxtext_loader.checkpoint.tree import Leaf
from vllm_maxtext_loader.errors import MaxTextLoadError
from vllm_maxtext_loader.options import fetch_window

if TYPE_CHECKING:
    from vllm_maxtext_loader.checkpoint.exchange.exchange import Exchange

_REGIONS_IN_FLIGHT = 4
"""Regions the budget is divided into: some are converted or placed while the others are fetched and decoded."""


@dataclasses.dataclass(frozen=True)
class Wait:
    """How long the consumer waited for a region.

    Attributes:
        seconds: in all.
        network: seconds of these in which the region's bytes had not arrived; the rest was decoding. None where that
            is not known.
        is_for_host: whether another host reads the region, and was waited for.
    """

    seconds: float
    network: float | None
    is_for_host: bool = False


@dataclasses.dataclass(frozen=True)
class DecodedRegion:
    """A decoded region of a leaf.

    Attributes:
        leaf: what it is a part of.
        region: which part; a slice per axis, with explicit bounds.
        array: the values, of the region's shape, any strides. The memory is used again: it holds these values until the
            next region is asked for, and until all `readers` are done.
        last: whether this completes the leaf.
        readers: futures of what still reads `array` when the next region is requested; consumers append them.
        source: the host (number of its process) that has read it and sent it here; None where it was read here.
    """

    leaf: Leaf
    region: Region
    array: np.ndarray
    last: bool
    readers: list[Future[None]] = dataclasses.field(default_factory=list)
    source: int | None = None

    @property
    def busy(self) -> bool:
        """Whether a user is not done."""
        return any(not reader.done() for reader in self.readers)

    def wait(self) -> None:
        """Waits for the readers; raises what one of them has raised."""
        for reader in self.readers:
            reader.result()


def read_regions(
    leaves: Iterable[Leaf],
    arrays: dict[str, ts.TensorStore],
    budget: int,
    where: str,
    *,
    outer: Mapping[str, tuple[int, ...]] | None = None,
    needed: Callable[[Leaf, Region], bool] | None = None,
    on_wait: Callable[[Wait], None] | None = None,
    transfers: Transfers | None = None,
    exchange: Exchange | None = None,
    in_parts: bool = False,
) -> Iterator[DecodedRegion]:
    """Every region of every leaf, in order. Reading begins with the call and prefetches ahead of the consumer.

    Args:
        leaves: what to read.
        arrays: opened arrays by leaf key.
        budget: bytes that are in flight or in the caller's hands at a time: decoded regions, and what is held before they
            are in their place; see `_Memory`. A region that is larger than the budget is read alone.
        where: path, for messages.
        outer: by leaf key, axes that come first in memory. Every index along them is one run of memory.
        needed: whether a region is wanted; those that are not are not read, and a leaf without any is passed over.
            None means all are.
        on_wait: told how long each region was waited for.
        transfers: what is fetched from a bucket is added to it.
        exchange: with other hosts; says which regions are read here, and which are received. None means that this host reads
            for itself.
        in_parts: whether a chunk from a bucket that is large beside the budget may come as several regions, those of several
            chunks, and leaves, in turn; small leaves then come first. Not with `exchange`, whose regions are what hosts agreed on.

    Raises:
        ReadError: a chunk is missing, truncated or corrupt; when its region is asked for.
        StorageError: the storage refuses, or does not answer within the time limit; likewise.
    """
    leaves = list(leaves)
    # Before the first request, or what fails at once would not be told.
    watch = StallDetector(where)
    opened = (arrays[leaf.key] for leaf in leaves if leaf.key in arrays)
    remote = next((is_remote(array) for array in opened if array.kvstore is not None), False)
    memory = _Memory.of(budget, leaves, remote=remote, in_parts=in_parts)
    if exchange is not None:
        assert memory.turns is None
        regions = exchange.reads()
    else:
        regions = _own_reads(leaves, memory, needed)
    if remote:
        reads = RemoteReads(
            regions, arrays, memory.window, memory.ring, transfers or Transfers(), memory.turns
        )
    else:
        reads = LocalReads(regions)
    prefetcher = _Prefetcher(reads, arrays, Ring(memory.ring), outer or {}, exchange)
    prefetcher.request()
    completed = _completed_reads(prefetcher, watch, on_wait)
    # Also where the iterator is dropped before it was used.
    weakref.finalize(completed, reads.close)
    return completed


def first_regions(
    leaves: Iterable[Leaf], budget: int, *, remote: bool, in_parts: bool = False
) -> Iterator[tuple[Leaf, Region]]:
    """The region of each leaf that `read_regions` is expected to yield first, where all are needed.

    Args:
        leaves: what will be read.
        budget, in_parts: see `read_regions`.
        remote: whether the arrays are in a bucket.
    """
    leaves = list(leaves)
    memory = _Memory.of(budget, leaves, remote=remote, in_parts=in_parts)
    for leaf in leaves:
        reads = itertools.islice(_own_reads([leaf], memory, None), 1)
        if memory.turns is not None:
            reads = in_turn(reads, memory.turns, lambda _: True)[:1]
        yield from ((leaf, read.region) for read in reads)


def region_limit(budget: int) -> int:
    """Bytes of a region that is read from a bucket; what hosts that exchange regions must agree on.

    Args:
        budget: see `read_regions`.
    """
    return _Memory.of(budget, (), remote=True, in_parts=False).region


@dataclasses.dataclass(frozen=True)
class _Memory:
    """What a read budget is divided into.

    On a disk, TensorStore reads the stored chunks of all regions that were asked for, and decodes each into memory of its own
    before it copies it into the ring: half of the budget is for that. Where chunks are so large that the other half would not
    hold one per core, cores come before the bound.

    Attributes:
        window: for stored bytes from a bucket.
        ring: for decoded bytes.
        turns: how large chunks are decoded in parts; None where they are not.
    """

    window: int
    ring: int
    turns: Turns | None

    @classmethod
    def of(cls, budget: int, leaves: Iterable[Leaf], *, remote: bool, in_parts: bool) -> _Memory:
        """For leaves of a checkpoint in a bucket (`remote`) or on a disk."""
        cores = len(os.sched_getaffinity(0))
        if remote:
            window = fetch_window(budget)
            ring = budget - window
            return cls(window, ring, Turns.of(ring, cores) if in_parts else None)
        largest = max((leaf.chunk_nbytes for leaf in leaves), default=0)
        return cls(0, max(budget // 2, min(cores * largest, budget)), None)

    @property
    def region(self) -> int:
        """Bytes of a region."""
        return max(1, self.ring // _REGIONS_IN_FLIGHT)


def _own_reads(
    leaves: Iterable[Leaf], memory: _Memory, needed: Callable[[Leaf, Region], bool] | None
) -> Iterator[RegionRead]:
    """The regions that a host reads that reads for itself."""
    for leaf in leaves:
        alone = memory.turns is not None and memory.turns.is_large(leaf.chunk_nbytes)
        regions = chunk_regions(leaf, 1 if alone else memory.region)
        regions = [region for region in regions if needed is None or needed(leaf, region)]
        for index, region in enumerate(regions):
            yield RegionRead(leaf, region, index == len(regions) - 1)


class LocalReads:
    """Regions of arrays that TensorStore reads, in order."""

    def __init__(self, regions: Iterator[RegionRead]) -> None:
        self._regions = regions

    def get(self, *, block: bool) -> RegionRead | None:
        """The next region; None at the end."""
        return next(self._regions, None)

    def close(self) -> None:
        """Nothing is read ahead."""


class _Prefetcher:
    """Regions that have been asked for.

    Args:
        reads: what to ask for.
        arrays: opened arrays by leaf key.
        ring: memory they are decoded into.
        outer: see `read_regions`.
        exchange: likewise.

    Attributes:
        pending: regions that may still be decoded, in the order in which they were asked for.
        delivered: regions that were yielded, and whose memory is in use.
    """

    def __init__(
        self,
        reads: LocalReads | RemoteReads,
        arrays: dict[str, ts.TensorStore],
        ring: Ring,
        outer: Mapping[str, tuple[int, ...]],
        exchange: Exchange | None,
    ) -> None:
        self._exchange = exchange
        self.pending: collections.deque[_Request] = collections.deque()
        self.delivered: collections.deque[DecodedRegion] = collections.deque()
        self.reads = reads
        self._arrays, self._ring, self._outer = arrays, ring, outer
        self._upcoming: RegionRead | None = None
        self._ended = False

    def request(self) -> None:
        """Asks for as many regions as there is memory for, and for one at least; waits for readers where it must."""
        while (read := self._next()) is not None:
            while self.delivered and not self.delivered[0].busy:
                self._release()
            leaf, region = read.leaf, read.region
            nbytes = region_nbytes(region, leaf.dtype.itemsize)
            memory = self._ring.allocate(nbytes)
            if memory is None and not self.pending:
                self._release()
                continue
            if memory is None:
                return
            values = _shaped(memory, leaf, region, self._outer.get(leaf.key, ()))
            if read.source is not None:
                assert self._exchange is not None
                future = self._exchange.receive(read, memory[:nbytes])
            elif read.batches is None or isinstance(self.reads, LocalReads):
                destination = ts.array(values, copy=False, write=True)
                future = destination.write(self._arrays[leaf.key][region]).commit
            else:
                future = self.reads.decode(read, values)
            decoded = DecodedRegion(leaf, region, values, read.last, source=read.source)
            self.pending.append(_Request(decoded, future, read))
            self._upcoming = None

    def _next(self) -> RegionRead | None:
        """What to ask for next; None where there is nothing, or nothing yet while something is pending."""
        if self._upcoming is None and not self._ended:
            try:
                self._upcoming = self.reads.get(block=not self.pending)
            except queue.Empty:
                return None
            self._ended = self._upcoming is None
        return self._upcoming

    def _release(self) -> None:
        """Frees the memory of the region that was given first, as soon as nobody reads it any more."""
        self.delivered.popleft().wait()
        self._ring.release()


@dataclasses.dataclass(frozen=True)
class _Request:
    """A region that is being decoded."""

    decoded: DecodedRegion
    future: Pending
    read: RegionRead


def _completed_reads(
    prefetcher: _Prefetcher, watch: StallDetector, on_wait: Callable[[Wait], None] | None
) -> Iterator[DecodedRegion]:
    """The prefetched regions, each when it has been decoded."""
    try:
        while prefetcher.pending:
            entry = prefetcher.pending[0]
            started = time.perf_counter()
            is_for_host = entry.read.source is not None
            if is_for_host:
                # Whether the hosts still move is watched by the exchange.
                entry.future.result()
            else:
                read_result(watch, entry.future, entry.decoded.leaf)
            prefetcher.pending.popleft()
            if on_wait is not None:
                ended = time.perf_counter()
                network = entry.read.network_seconds(started, ended)
                on_wait(Wait(ended - started, network, is_for_host))
            prefetcher.delivered.append(entry.decoded)
            yield entry.decoded
            prefetcher.request()
    finally:
        # Dropping the futures abandons the reads; see open_arrays for why they are not cancelled.
        prefetcher.pending.clear()
        prefetcher.reads.close()
        watch.close()


def _shaped(memory: np.ndarray, leaf: Leaf, region: Region, outer: tuple[int, ...]) -> np.ndarray:
    """`memory` as an array of the region's shape, with the axes in `outer` varying slowest."""
    order = [*outer, *(axis for axis in range(len(region)) if axis not in outer)]
    lengths = [region[axis].stop - region[axis].start for axis in order]
    values = memory[: math.prod(lengths) * leaf.dtype.itemsize].view(leaf.dtype).reshape(lengths)
    return values.transpose(np.argsort(order)) if order else values


def read_result(watch: StallDetector, future: Pending, leaf: Leaf) -> Any:
    """What was read of a leaf, or its error: a ReadError or a StorageError that names the leaf."""
    try:
        return watch.result(future, leaf.key)
    except MaxTextLoadError:
        raise
    except TimeoutError as error:
        raise to_storage_error(f"cannot read leaf {leaf.key} of {watch.where}", error) from error
    except Exception as error:
        what = f"cannot read leaf {leaf.key} of {watch.where}"
        raise array_error(what, error, Location(watch.where)) from error
