"""The chunks of an array in a bucket: where each is stored, and how it is decoded while its bytes arrive.

What is not as expected (a missing chunk, damaged bytes) is read again by TensorStore, whose errors are the same as for a local
checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorstore as ts

from vllm_maxtext_loader.checkpoint.arrays import is_damage
from vllm_maxtext_loader.checkpoint.encoding import Decoder, Encoding, Index
from vllm_maxtext_loader.checkpoint.regions import Region, region_nbytes
from vllm_maxtext_loader.checkpoint.storage import gcs
from vllm_maxtext_loader.checkpoint.storage.ranges import (
    Extent,
    Fetcher,
    Located,
    Stream,
    UnexpectedValueError,
)
from vllm_maxtext_loader.errors import MaxTextLoadError

_POLL_SECONDS = 0.25
_MOST_LISTED = 200_000
_BATCH_BYTES = 2 << 20
"""Decoded; what one thread decodes at a time."""

_BEYOND = 1 << 60
_SIZE = re.compile(r"is not valid for value of size (\d+)")
"""What OCDBT says of a range beyond a value's end; it knows the size from its index, without a request."""


def is_remote(array: ts.TensorStore) -> bool:
    """Whether an opened array is in a bucket."""
    return _bucket_store(array) is not None


def _bucket_store(array: ts.TensorStore) -> dict[str, Any] | None:
    """The key-value store specification of an array in a bucket."""
    store = array.kvstore
    if store is None:
        return None
    spec = store.spec().to_json()
    return spec if "gcs" in (spec["driver"], spec.get("base", {}).get("driver")) else None


@dataclasses.dataclass(frozen=True)
class ChunkRead:
    """A chunk that is being fetched.

    Attributes:
        array: what it is a part of.
        index: which chunk.
        region: which part of the array; less than a chunk's shape where the array ends before the chunk does.
        place: the same part, relative to the region that is read.
        stream: its stored bytes.
    """

    array: RemoteArray
    index: Index
    region: Region
    place: Region
    stream: Stream

    @property
    def nbytes(self) -> int:
        """Decoded size of its region."""
        return region_nbytes(self.region, self.array.itemsize)


def in_batches(chunks: Iterable[ChunkRead]) -> Iterator[tuple[ChunkRead, ...]]:
    """Chunks that one thread decodes one after the other: small ones together, since handing each over takes Python's lock.

    Args:
        chunks: consecutive ones of a region.
    """
    batch: list[ChunkRead] = []
    nbytes = 0
    for chunk in chunks:
        batch.append(chunk)
        nbytes += chunk.nbytes
        if nbytes >= _BATCH_BYTES:
            yield tuple(batch)
            batch, nbytes = [], 0
    if batch:
        yield tuple(batch)


class RemoteArray:
    """An array in a bucket, whose chunks are found and decoded here.

    Args:
        array: the opened array.
        encoding: how it is stored.
        fetcher: what fetches its bytes.
        lister: runs listings of the bucket.
        is_large: whether a chunk of so many bytes is decoded in parts.

    Attributes:
        itemsize: bytes of a value.
    """

    def __init__(
        self,
        array: ts.TensorStore,
        encoding: Encoding,
        fetcher: Fetcher,
        lister: ThreadPoolExecutor,
        is_large: Callable[[int], bool],
    ) -> None:
        self._array, self._encoding, self._fetcher, self._lister = array, encoding, fetcher, lister
        store, spec = array.kvstore, _bucket_store(array)
        assert store is not None
        assert spec is not None
        self._store: ts.KvStore = store
        self._ocdbt = spec["driver"] == "ocdbt"
        self._url = f"gs://{spec.get('bucket', '')}/{spec.get('path', '')}".rstrip("/")
        self._indices: dict[str, ts.Future[ts.KvStore.ReadResult]] = {}
        self._nbytes = chunk_nbytes(array)
        self.itemsize = array.dtype.numpy_dtype.itemsize
        # A shard of one chunk is read whole: its index comes with the last range. That is too late for a chunk that is given away in
        # parts.
        self._by_index = encoding.sharded and (
            math.prod(encoding.shard) > 1
            or (not self._ocdbt and self._nbytes > fetcher.size)
            or is_large(self._nbytes)
        )

    def chunks(self, region: Region) -> Iterator[ChunkRead]:
        """The chunks of a region that is aligned to them."""
        start, stop = tuple(part.start for part in region), tuple(part.stop for part in region)
        for index in self._encoding.chunks(start, stop):
            lower = [where * step for where, step in zip(index, self._encoding.chunk, strict=True)]
            upper = [
                min(low + step, end) for low, step, end in zip(lower, self._encoding.chunk, stop, strict=True)
            ]
            yield ChunkRead(
                self,
                index,
                tuple(map(slice, lower, upper)),
                tuple(slice(a - first, b - first) for a, b, first in zip(lower, upper, start, strict=True)),
                Stream(self._fetcher, functools.partial(self._locate, index)),
            )

    def decode(self, chunk: ChunkRead, target: np.ndarray) -> None:
        """Decodes a chunk into its place, while its bytes arrive.

        Raises:
            AbandonedError: the fetcher was closed.
            Exception: the storage failed, or the chunk is damaged; TensorStore's error.
        """
        try:
            try:
                self._decode(chunk, target)
            except (UnexpectedValueError, ValueError) as error:
                if not is_unexpected(error):
                    raise
                self.read(chunk.region, target)
        finally:
            chunk.stream.close()

    def decoder(self, chunk: ChunkRead) -> Decoder:
        """Decodes a chunk part by part."""
        assert not self._encoding.sharded or self._by_index
        return self._encoding.decoder(chunk.stream)

    def _decode(self, chunk: ChunkRead, target: np.ndarray) -> None:
        encoding = self._encoding
        payload = _Payload(chunk.stream, 0 if self._by_index else encoding.index_nbytes)
        encoding.decode(payload, target)
        payload.finish()
        # Without an index of its own, the shard is this one chunk.
        if (
            encoding.sharded
            and not self._by_index
            and encoding.entry(bytes(payload.index), chunk.index) != (0, payload.nbytes)
        ):
            raise UnexpectedValueError("the chunk is not where the shard's index says")

    def read(self, region: Region, target: np.ndarray) -> None:
        """Reads a chunk, or a part of it, by TensorStore.

        Raises:
            AbandonedError: the fetcher was closed.
            Exception: the storage failed, or the chunk is damaged; TensorStore's error.
        """
        destination = ts.array(target, copy=False, write=True)
        future = destination.write(self._array[region]).commit
        while True:
            try:
                future.result(timeout=_POLL_SECONDS)
                return
            except TimeoutError:
                self._fetcher.check_open()

    def _locate(self, index: Index, done: Located) -> None:
        """Finds where a chunk is stored."""
        key = self._encoding.key(index)
        whole = Extent(self._store, key, 0, None, self._nbytes)
        if self._by_index:
            if key not in self._indices:
                span = slice(-self._encoding.index_nbytes, None)
                self._indices[key] = self._store.read(key, byte_range=span, staleness_bound=float("-inf"))
            self._indices[key].add_done_callback(lambda found: done(self._entry(found, key, index)))
        elif self._nbytes <= self._fetcher.size:
            done(whole)
        elif self._ocdbt:
            span = slice(_BEYOND, _BEYOND + 1)
            probe = self._store.read(key, byte_range=span, staleness_bound=float("-inf"))
            probe.add_done_callback(lambda found: done(_sized(found, whole)))
        else:
            self._sizes.add_done_callback(lambda found: done(_listed(found, whole)))

    @functools.cached_property
    def _sizes(self) -> Future[dict[str, int] | None]:
        return self._lister.submit(gcs.list_sizes, self._url, _MOST_LISTED)

    def _entry(self, found: ts.Future[ts.KvStore.ReadResult], key: str, index: Index) -> Extent | Exception:
        try:
            value = found.result()
            if value.state != "value":
                return UnexpectedValueError("the value is missing")
            start, nbytes = self._encoding.entry(value.value, index)
        except Exception as error:
            return error
        return Extent(self._store, key, start, start + nbytes, nbytes)


def is_unexpected(error: Exception) -> bool:
    """Whether TensorStore should look at the chunk; otherwise the storage has failed."""
    return isinstance(error, UnexpectedValueError) or is_damage(error)


def _sized(found: ts.Future[ts.KvStore.ReadResult], whole: Extent) -> Extent | Exception:
    """The extent of a value, by OCDBT's answer to a range beyond it."""
    try:
        found.result()
    except ValueError as error:
        if match := _SIZE.search(str(error)):
            return dataclasses.replace(whole, stop=int(match[1]), nbytes=int(match[1]))
        return error
    return UnexpectedValueError("the value is missing")


def _listed(found: Future[dict[str, int] | None], whole: Extent) -> Extent | Exception:
    """The extent of a value, by the listing of the bucket."""
    try:
        sizes = found.result()
    except MaxTextLoadError as error:
        return error
    if sizes is None:
        return whole
    if not (size := sizes.get(whole.key)):
        return UnexpectedValueError("the value is missing")
    return dataclasses.replace(whole, stop=size, nbytes=size)


class _Payload:
    """The stored bytes of a chunk without the index of its shard.

    Args:
        stream: all of the stored value.
        trailer: size of the index at its end.

    Attributes:
        index: the index, when all has been read.
        nbytes: bytes before it.
    """

    def __init__(self, stream: Stream, trailer: int) -> None:
        self._stream, self._trailer = stream, trailer
        self._position = 0
        self.nbytes = 0
        self.index = bytearray()

    def read(self, size: int = -1) -> memoryview:
        """The next bytes; empty at the end."""
        while data := self._stream.read(size):
            extent = self._stream.extent
            assert extent is not None
            total = len(data) if extent.stop is None else extent.nbytes
            self.nbytes = max(0, total - self._trailer)
            end = min(len(data), max(0, self.nbytes - self._position))
            self._position += len(data)
            self.index += memoryview(data)[end:]
            if end:
                return memoryview(data)[:end]
        return memoryview(b"")

    def finish(self) -> None:
        """Reads to the end.

        Raises:
            UnexpectedValueError: the decoder has not read all that was for it.
        """
        if self.read():
            raise UnexpectedValueError("the chunk is longer than its shape")


def chunk_nbytes(array: ts.TensorStore) -> int:
    """Decoded size of a chunk."""
    shape = array.chunk_layout.read_chunk.shape or array.shape
    lengths = (step or size for step, size in zip(shape, array.shape, strict=True))
    return math.prod(lengths) * array.dtype.numpy_dtype.itemsize
