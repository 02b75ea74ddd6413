"""Reads arrays in a bucket: chunks are fetched by ranges, and decoded while they arrive.

TensorStore fetches a chunk by one request and decodes it when it has all of it. Here `ranges` fetches the stored bytes, many ranges
at a time, and `encoding` decodes them into their place.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import queue
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import tensorstore as ts

from vllm_maxtext_loader.checkpoint.chunks import ChunkRead, Region, RemoteArray, chunk_nbytes, is_remote
from vllm_maxtext_loader.checkpoint.encoding import Encoding
from vllm_maxtext_loader.checkpoint.storage.ranges import Fetcher, Stream, Transfers
from vllm_maxtext_loader.checkpoint.tree import Leaf

_POLL_SECONDS = 0.25
_LISTINGS = 8


@dataclasses.dataclass(frozen=True)
class RegionRead:
    """A region to be read.

    Attributes:
        leaf, region, last: as of `DecodedRegion`.
        chunks: the chunks it consists of; None where TensorStore reads it.
        source: as of `DecodedRegion`.
        number: by which the source knows it.
    """

    leaf: Leaf
    region: Region
    last: bool
    chunks: tuple[ChunkRead, ...] | None = None
    source: int | None = None
    number: int = 0

    def network_seconds(self, start: float, end: float) -> float | None:
        """Seconds between `start` and `end` in which a decoder waited for bytes; None where that is not known."""
        if self.chunks is None:
            return None
        waits = [
            sum(max(0.0, min(end, stop) - max(start, begin)) for begin, stop in chunk.stream.waits)
            for chunk in self.chunks
        ]
        return max(waits, default=0.0)


class RemoteReads:
    """Regions of arrays, some of them in a bucket, in order. Fetching begins at once.

    Args:
        regions: what to read, in order. What comes from another host is passed on in its place.
        arrays: opened arrays by leaf key.
        window: stored bytes that may be in memory.
        ring: bytes that may be decoded at a time.
        transfers: what is fetched is added to it.
    """

    def __init__(
        self,
        regions: Iterable[RegionRead],
        arrays: dict[str, ts.TensorStore],
        window: int,
        ring: int,
        transfers: Transfers,
    ) -> None:
        cores = len(os.sched_getaffinity(0))
        largest = max((chunk_nbytes(array) for array in arrays.values()), default=1)
        self._arrays = arrays
        self._remote: dict[str, RemoteArray | None] = {}
        self._reads: queue.SimpleQueue[RegionRead | Exception | None] = queue.SimpleQueue()
        self._lister = ThreadPoolExecutor(_LISTINGS, thread_name_prefix="maxtext-list")
        # More threads than cores: some wait for bytes.
        self._decoders = ThreadPoolExecutor(cores + 2, thread_name_prefix="maxtext-decode")
        # As many large chunks arrive side by side as can be decoded side by side.
        beside = max(1, min(cores, ring // largest))
        self._fetcher = Fetcher(
            functools.partial(self._streams, regions), window, window // beside, transfers
        )
        self._fetcher.start()

    def get(self, *, block: bool) -> RegionRead | None:
        """The next region; None at the end.

        Raises:
            queue.Empty: there is none yet, and `block` is not set.
        """
        while True:
            try:
                found = self._reads.get(timeout=_POLL_SECONDS) if block else self._reads.get_nowait()
            except queue.Empty:
                if not block:
                    raise
                self._fetcher.check_open()
                continue
            if isinstance(found, Exception):
                raise found
            return found

    def decode(self, read: RegionRead, values: np.ndarray) -> AllOf:
        """Decodes a region into `values`."""
        assert read.chunks is not None
        return AllOf(
            [self._decoders.submit(chunk.array.decode, chunk, values[chunk.place]) for chunk in read.chunks]
        )

    def close(self) -> None:
        """Gives up what is not read yet."""
        self._fetcher.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._lister.shutdown(wait=False, cancel_futures=True)

    def _streams(self, regions: Iterable[RegionRead], fetcher: Fetcher) -> Iterator[Stream]:
        """The streams of all regions, each region being put into the queue before them."""
        try:
            for read in regions:
                array = self._array(read.leaf.key, fetcher) if read.source is None else None
                chunks = None if array is None else tuple(array.chunks(read.region))
                self._reads.put(dataclasses.replace(read, chunks=chunks))
                for chunk in chunks or ():
                    yield chunk.stream
        except Exception as error:
            self._reads.put(error)
        else:
            self._reads.put(None)

    def _array(self, key: str, fetcher: Fetcher) -> RemoteArray | None:
        if key not in self._remote:
            array = self._arrays[key]
            encoding = Encoding.of(array) if is_remote(array) else None
            self._remote[key] = (
                None if encoding is None else RemoteArray(array, encoding, fetcher, self._lister)
            )
        return self._remote[key]


@dataclasses.dataclass(frozen=True)
class AllOf:
    """The futures of a region's chunks, as one."""

    futures: list[Future[None]]

    def done(self) -> bool:
        """Whether all are done."""
        return all(future.done() for future in self.futures)

    def result(self, timeout: float | None = None) -> None:
        """Returns when all are done; raises what one of them has raised.

        Raises:
            TimeoutError: the next of them is not done in time.
        """
        for future in self.futures:
            future.result(timeout)
