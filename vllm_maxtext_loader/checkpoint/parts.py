"""Large chunks in parts, those of several chunks in turn.

One chunk is one compressed stream, which one core decodes from its beginning. A checkpoint whose chunks are few and large would keep one
core busy, and memory for whole chunks. A stream can be stopped and continued, though: here a chunk is cut into parts, consecutive in its
stream, and as many chunks as keep all cores busy take turns, part by part.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from vllm_maxtext_loader.checkpoint.chunks import ChunkRead, is_unexpected
from vllm_maxtext_loader.checkpoint.encoding import Decoder
from vllm_maxtext_loader.checkpoint.regions import Region, RegionRead, region_nbytes
from vllm_maxtext_loader.checkpoint.storage.ranges import UnexpectedValueError

_LEAST_BYTES = 1 << 20
"""Of a part; also keeps whatever is small (norms, scales that are folded into experts) whole, and in front."""


@dataclasses.dataclass(frozen=True)
class Turns:
    """How many chunks take turns, and how large their parts are.

    Attributes:
        chunks: that take turns.
        nbytes: of a part, at most, where its rows allow it.
    """

    chunks: int
    nbytes: int

    @classmethod
    def of(cls, memory: int, cores: int) -> Turns:
        """What keeps all cores busy within the memory for decoded bytes.

        Args:
            memory: bytes. Each chunk has two parts in it: one is decoded while the other is placed.
            cores: that decode.
        """
        # Twice as many as cores, so that none idles where one chunk ends, or waits for its bytes.
        chunks = max(1, min(2 * cores, memory // (2 * _LEAST_BYTES)))
        return cls(chunks, max(_LEAST_BYTES, memory // (2 * chunks)))

    def is_large(self, nbytes: int) -> bool:
        """Whether a chunk of so many bytes is decoded in parts."""
        return nbytes > 2 * self.nbytes


def in_turn(
    reads: Iterable[RegionRead], turns: Turns, decodes: Callable[[RegionRead], bool]
) -> list[RegionRead]:
    """The same reads, with large chunks in parts, those of several chunks in turn.

    Args:
        reads: in order. Those of one large chunk each are cut; what is small keeps its order, and comes before the large chunks
            that it is between.
        turns: how many chunks, and how large the parts.
        decodes: whether a region's chunks are decoded here, and not by TensorStore.

    Returns:
        Reads, of which `last` says again which one completes its leaf.
    """
    judged = [(read, _is_large_chunk(read, turns) and decodes(read)) for read in reads]
    sizes = iter(_even_groups(sum(is_cut for _, is_cut in judged), turns.chunks))
    ordered: list[RegionRead] = []
    group: list[RegionRead] = []
    size = next(sizes, 0)
    for read, is_cut in judged:
        if not is_cut:
            ordered.append(read)
            continue
        group.append(read)
        if len(group) == size:
            ordered += _alternate(group, turns.nbytes)
            group, size = [], next(sizes, 0)
    final = {read.leaf.key: position for position, read in enumerate(ordered)}
    return [
        dataclasses.replace(read, last=final[read.leaf.key] == position)
        for position, read in enumerate(ordered)
    ]


def _is_large_chunk(read: RegionRead, turns: Turns) -> bool:
    """Whether a region is a large chunk. One that ends outside its array is left whole: its stream holds more than its region."""
    lengths = tuple(part.stop - part.start for part in read.region)
    return lengths == read.leaf.chunks and turns.is_large(
        region_nbytes(read.region, read.leaf.dtype.itemsize)
    )


def _even_groups(count: int, most: int) -> list[int]:
    """Sizes of as few groups as hold `count` things, `most` in each at most, as even as can be: [3, 2] for 5 by 4."""
    groups = math.ceil(count / most)
    return [count // groups + (number < count % groups) for number in range(groups)]


def _alternate(group: list[RegionRead], nbytes: int) -> Iterator[RegionRead]:
    """The parts of some chunks: the first of each, then the second of each, and so on."""
    parts = (
        [
            dataclasses.replace(read, region=part, whole=read.region)
            for part in cut(read.region, read.leaf.dtype.itemsize, nbytes)
        ]
        for read in group
    )
    for row in itertools.zip_longest(*parts):
        yield from (part for part in row if part is not None)


def cut(region: Region, itemsize: int, nbytes: int) -> Iterator[Region]:
    """Cuts a region into consecutive parts in C order, of at most `nbytes` where a run along the last axis is not longer.

    As equal as can be: every other shape is one more program to compile.

    Args:
        region: bounds along each axis.
        itemsize: bytes of a value.
        nbytes: most bytes of a part.
    """
    lengths = [part.stop - part.start for part in region]
    axis, inner = len(lengths), itemsize
    while axis and inner * lengths[axis - 1] <= nbytes:
        axis -= 1
        inner *= lengths[axis]
    if not axis:
        yield region
        return
    axis -= 1
    count = math.ceil(lengths[axis] / max(1, nbytes // inner))
    rows = math.ceil(lengths[axis] / count)
    for outer in itertools.product(*(range(part.start, part.stop) for part in region[:axis])):
        for start in range(region[axis].start, region[axis].stop, rows):
            stop = min(start + rows, region[axis].stop)
            yield (*(slice(at, at + 1) for at in outer), slice(start, stop), *region[axis + 1 :])


class ChunkParts:
    """A large chunk, decoded part by part, in order, by whichever thread is free.

    Args:
        chunk: what is fetched.
        pool: of threads that decode.

    Attributes:
        chunk: the same.
    """

    def __init__(self, chunk: ChunkRead, pool: ThreadPoolExecutor) -> None:
        self.chunk, self._pool = chunk, pool
        self._decoder: Decoder | None = chunk.array.decoder(chunk)
        self._lock = threading.Lock()
        self._waiting: collections.deque[tuple[Region, np.ndarray, Future[None]]] = collections.deque()
        self._error: BaseException | None = None

    def decode(self, region: Region, target: np.ndarray) -> Future[None]:
        """Decodes the part that comes next; one after the other.

        Args:
            region: the part, as a region of the array.
            target: where to; of the region's shape.
        """
        future: Future[None] = Future()
        with self._lock:
            self._waiting.append((region, target, future))
            if len(self._waiting) == 1:
                self._pool.submit(self._run)
        return future

    def _run(self) -> None:
        """Decodes one part. The next one queues behind those of other chunks."""
        region, target, future = self._waiting[0]
        try:
            if self._error is not None:
                raise self._error
            self._decode(region, target)
        except BaseException as error:
            self._error = error
            self.chunk.stream.close()
            future.set_exception(error)
        else:
            future.set_result(None)
        with self._lock:
            self._waiting.popleft()
            if self._waiting:
                # Closed meanwhile: nobody waits any more.
                with contextlib.suppress(RuntimeError):
                    self._pool.submit(self._run)

    def _decode(self, region: Region, target: np.ndarray) -> None:
        chunk = self.chunk
        if self._decoder is not None:
            try:
                self._decoder.read(target)
                if ends_together(region, chunk.region):
                    self._decoder.finish()
                    if chunk.stream.read():
                        raise UnexpectedValueError("the chunk is longer than its shape")
                    chunk.stream.close()
                return
            except (UnexpectedValueError, ValueError) as error:
                if not is_unexpected(error):
                    raise
                self._decoder = None
                chunk.stream.close()
        # What was decoded until now is what TensorStore decodes, if it does not refuse the whole chunk.
        chunk.array.read(region, target)


def ends_together(part: Region, whole: Region) -> bool:
    """Whether a part is the last one, in C order, of a region."""
    return all(of.stop == end.stop for of, end in zip(part, whole, strict=True))
