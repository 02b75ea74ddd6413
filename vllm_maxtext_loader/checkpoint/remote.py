"""Reads arrays in a bucket: chunks are fetched by ranges, and decoded while they arrive.

TensorStore fetches a chunk by one request and decodes it when it has all of it. Here `ranges` fetches the stored bytes, many ranges
at a time, and `encoding` decodes them into their place.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import queue
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import tensorstore as ts

from vllm_maxtext_loader.checkpoint.chunks import (
    ChunkRead,
    RemoteArray,
    chunk_nbytes,
    in_batches,
    is_remote,
)
from vllm_maxtext_loader.checkpoint.encoding import Encoding
from vllm_maxtext_loader.checkpoint.parts import ChunkParts, Turns, ends_together, in_turn
from vllm_maxtext_loader.checkpoint.regions import Region, RegionRead
from vllm_maxtext_loader.checkpoint.storage.ranges import Fetcher, Stream, Transfers

_POLL_SECONDS = 0.25
_LISTINGS = 8


class RemoteReads:
    """Regions of arrays, some of them in a bucket, in order. Fetching begins at once.

    Args:
        regions: what to read, in order. What comes from another host is passed on in its place.
        arrays: opened arrays by leaf key.
        window: stored bytes that may be in memory.
        ring: bytes that may be decoded at a time.
        transfers: what is fetched is added to it.
        turns: how large chunks are decoded in parts; None where they are not.
    """

    def __init__(
        self,
        regions: Iterable[RegionRead],
        arrays: dict[str, ts.TensorStore],
        window: int,
        ring: int,
        transfers: Transfers,
        turns: Turns | None,
    ) -> None:
        cores = len(os.sched_getaffinity(0))
        largest = max((chunk_nbytes(array) for array in arrays.values()), default=1)
        self._arrays = arrays
        self._remote: dict[str, RemoteArray | None] = {}
        self._reads: queue.SimpleQueue[RegionRead | Exception | None] = queue.SimpleQueue()
        self._lister = ThreadPoolExecutor(_LISTINGS, thread_name_prefix="maxtext-list")
        # More threads than cores: some wait for bytes.
        self._decoders = ThreadPoolExecutor(cores + 2, thread_name_prefix="maxtext-decode")
        # As many large chunks arrive side by side as are decoded side by side.
        beside = max(1, min(cores, ring // largest), turns.chunks if turns else 1)
        self._turns = turns
        self._parts: dict[tuple[str | int, ...], ChunkParts] = {}
        self._fetcher = Fetcher(functools.partial(self._streams, regions), window, beside, transfers)
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
        assert read.batches is not None
        if read.parts is not None:
            return AllOf([read.parts.decode(read.region, values)])
        return AllOf([self._decoders.submit(_decode, batch, values) for batch in read.batches])

    def close(self) -> None:
        """Gives up what is not read yet."""
        self._fetcher.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._lister.shutdown(wait=False, cancel_futures=True)

    def _streams(self, regions: Iterable[RegionRead], fetcher: Fetcher) -> Iterator[Stream]:
        """The streams of all regions, each region being put into the queue before them."""
        try:
            for read in self._in_turn(regions, fetcher):
                array = self._array(read, fetcher)
                if array is None:
                    self._reads.put(read)
                elif read.whole is None:
                    batches = tuple(in_batches(array.chunks(read.region)))
                    self._reads.put(dataclasses.replace(read, batches=batches))
                    for chunk in itertools.chain.from_iterable(batches):
                        yield chunk.stream
                else:
                    yield from self._part(array, read, read.whole)
        except Exception as error:
            self._reads.put(error)
        else:
            self._reads.put(None)

    def _in_turn(self, regions: Iterable[RegionRead], fetcher: Fetcher) -> Iterable[RegionRead]:
        if self._turns is None:
            return regions
        return in_turn(regions, self._turns, lambda read: self._array(read, fetcher) is not None)

    def _part(self, array: RemoteArray, read: RegionRead, whole: Region) -> Iterator[Stream]:
        """Puts a part of a chunk into the queue; the chunk's stream, if it is the first part."""
        key = (read.leaf.key, *(part.start for part in whole))
        is_first = key not in self._parts
        if is_first:
            (chunk,) = array.chunks(whole)
            self._parts[key] = ChunkParts(chunk, self._decoders)
        parts = self._parts[key]
        if ends_together(read.region, whole):
            del self._parts[key]
        self._reads.put(dataclasses.replace(read, batches=((parts.chunk,),), parts=parts))
        if is_first:
            yield parts.chunk.stream

    def _array(self, read: RegionRead, fetcher: Fetcher) -> RemoteArray | None:
        """The array of a region that is fetched here; None where TensorStore reads it, or another host."""
        if read.source is not None:
            return None
        key = read.leaf.key
        if key not in self._remote:
            array = self._arrays[key]
            encoding = Encoding.of(array) if is_remote(array) else None
            self._remote[key] = (
                None
                if encoding is None
                else RemoteArray(array, encoding, fetcher, self._lister, self._is_large)
            )
        return self._remote[key]

    def _is_large(self, nbytes: int) -> bool:
        return self._turns is not None and self._turns.is_large(nbytes)


def _decode(batch: Sequence[ChunkRead], values: np.ndarray) -> None:
    for chunk in batch:
        chunk.array.decode(chunk, values[chunk.place])


@dataclasses.dataclass(frozen=True)
class AllOf:
    """The futures of a region's batches of chunks, as one."""

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
