"""How the chunks of an array are stored, and how they are decoded while their bytes arrive.

What MaxText and Orbax write is C order, little endian, compressed with zstd or not at all; with zarr v3 inside a shard, of which
the index is at the end. Such a chunk is decoded as a stream, straight into its place. Everything else is left to TensorStore.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import struct
import threading
from collections.abc import Iterator
from typing import IO, Any, Protocol, cast

import google_crc32c
import numpy as np
import tensorstore as ts
import zstandard

from vllm_maxtext_loader.checkpoint.storage.ranges import UnexpectedValueError

Index = tuple[int, ...]

_SCRATCH_BYTES = 256 << 10
"""Decoded at a time: what is copied to its place is still in the processor's cache."""

_ENTRY = struct.Struct("<QQ")
_CHECKSUM = struct.Struct("<I")

_local = threading.local()


class Source(Protocol):
    """Stored bytes, range by range; b"" at the end."""

    def read(self, size: int = -1) -> bytes | memoryview: ...


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How an array's chunks are stored.

    Attributes:
        chunk: shape of a chunk.
        shard: chunks per stored value, along each axis.
        sharded: whether chunks are in shards, with an index; also where a shard is one chunk.
        zstd: whether chunks are compressed; otherwise they are stored as they are.
        prefix: what precedes the indices in a key.
        separator: what separates them.
    """

    chunk: tuple[int, ...]
    shard: tuple[int, ...]
    sharded: bool
    zstd: bool
    prefix: str
    separator: str

    @classmethod
    def of(cls, array: ts.TensorStore) -> Encoding | None:
        """The encoding of an opened array; None where only TensorStore can decode it."""
        try:
            spec = array.spec().to_json()
            metadata = spec["metadata"]
            return _zarr3(metadata) if metadata["zarr_format"] == 3 else _zarr2(metadata)
        except (KeyError, TypeError, IndexError, ValueError):
            return None

    @property
    def index_nbytes(self) -> int:
        """Size of a shard's index; 0 where there are no shards."""
        return math.prod(self.shard) * _ENTRY.size + _CHECKSUM.size if self.sharded else 0

    def key(self, index: Index) -> str:
        """Key of the stored value that holds a chunk."""
        parts = [str(position // count) for position, count in zip(index, self.shard, strict=True)]
        return self.prefix + (self.separator.join(parts) if parts else "" if self.prefix else "0")

    def chunks(self, start: Index, stop: Index) -> Iterator[Index]:
        """Indices of the chunks of a region, in C order."""
        return itertools.product(
            *(
                range(a // step, math.ceil(b / step))
                for a, b, step in zip(start, stop, self.chunk, strict=True)
            )
        )

    def entry(self, index: bytes, chunk: Index) -> tuple[int, int]:
        """First byte and size of a chunk, by its shard's index.

        Raises:
            UnexpectedValueError: the index is damaged, or the chunk is not stored.
        """
        if len(index) != self.index_nbytes or _crc32c(index[: -_CHECKSUM.size]) != index[-_CHECKSUM.size :]:
            raise UnexpectedValueError("the shard's index is damaged")
        position = 0
        for where, count in zip(chunk, self.shard, strict=True):
            position = position * count + where % count
        offset, nbytes = _ENTRY.unpack_from(index, position * _ENTRY.size)
        if offset == nbytes == (1 << 64) - 1:
            raise UnexpectedValueError("the chunk is not in its shard")
        return offset, nbytes

    def decode(self, source: Source, target: np.ndarray) -> None:
        """Decodes a chunk.

        Args:
            source: its stored bytes, to the end, without the shard's index.
            target: where to; of the chunk's shape, or less where the array ends before the chunk does.

        Raises:
            UnexpectedValueError: the bytes are not a chunk of this encoding.
        """
        if not hasattr(_local, "decompressor"):
            _local.decompressor = zstandard.ZstdDecompressor()
        decoder = Decoder(source, _local.decompressor if self.zstd else None)
        decoder.read(target, self.chunk)
        decoder.finish()

    def decoder(self, source: Source) -> Decoder:
        """A decoder of one chunk's stored bytes, for as long as is needed, by several threads in turn."""
        return Decoder(source, zstandard.ZstdDecompressor() if self.zstd else None)


class Decoder:
    """Decodes a chunk from its beginning on, part by part.

    Args:
        source: its stored bytes, to the end, without the shard's index.
        decompressor: used for nothing else meanwhile; None where the chunk is stored as it is.
    """

    def __init__(self, source: Source, decompressor: zstandard.ZstdDecompressor | None) -> None:
        self._reader = (
            _Stored(source) if decompressor is None else decompressor.stream_reader(cast(IO[bytes], source))
        )

    def read(self, target: np.ndarray, shape: tuple[int, ...] | None = None) -> None:
        """Decodes the values that come next, in C order.

        Args:
            target: where to.
            shape: shape of what is stored; None means the target's. Of what is beyond the target, nothing is kept.

        Raises:
            UnexpectedValueError: the bytes are not of this encoding, or end too early.
        """
        if not hasattr(_local, "scratch"):
            _local.scratch = np.empty(_SCRATCH_BYTES, np.uint8)
        # Moved as bits: NumPy copies its own types faster than bfloat16, and without holding the GIL.
        bits = target.view(np.dtype(f"u{target.itemsize}"))
        with _zstd_errors():
            for part, inner in _parts(target.shape if shape is None else shape, target.itemsize):
                outer = part[: len(part) - 1]
                # Beyond the end of the array there is no place.
                outside = any(where >= length for where, length in zip(outer, bits.shape, strict=False))
                place = bits[:0] if outside else bits[(*part, ...)]
                if place.shape == inner and place.flags.c_contiguous:
                    _fill(self._reader, memoryview(place.reshape(-1).view(np.uint8)))
                    continue
                nbytes = math.prod(inner) * target.itemsize
                _fill(self._reader, memoryview(_local.scratch)[:nbytes])
                if outside:
                    continue
                values = _local.scratch[:nbytes].view(bits.dtype).reshape(inner)
                place[...] = values[tuple(slice(length) for length in place.shape)]

    def finish(self) -> None:
        """Reads to the end.

        Raises:
            UnexpectedValueError: there is more than was read.
        """
        with _zstd_errors():
            if self._reader.read(1):
                raise UnexpectedValueError("the chunk is longer than its shape")


@contextlib.contextmanager
def _zstd_errors() -> Iterator[None]:
    try:
        yield
    except zstandard.ZstdError as error:
        raise UnexpectedValueError(str(error)) from error


class _Stored:
    """Bytes that are stored as they are; read like a `zstandard.ZstdDecompressionReader`."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._left = memoryview(b"")

    def readinto(self, target: memoryview) -> int:
        if not self._left:
            self._left = memoryview(self._source.read())
        count = min(len(target), len(self._left))
        target[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def read(self, size: int) -> bytes:
        return bytes(size) if self._left or self._source.read() else b""


def _fill(reader: Any, target: memoryview) -> None:
    done = 0
    while done < len(target):
        count = reader.readinto(target[done:])
        if not count:
            raise UnexpectedValueError("the chunk is shorter than its shape")
        done += count


def _parts(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[tuple[Any, ...], tuple[int, ...]]]:
    """Cuts an array into consecutive parts in C order, of at most `_SCRATCH_BYTES`: (indices, shape of the part)."""
    axis, inner = len(shape), itemsize
    while axis and inner * shape[axis - 1] <= _SCRATCH_BYTES:
        axis -= 1
        inner *= shape[axis]
    if not axis:
        yield (), shape
        return
    axis -= 1
    rows = max(1, _SCRATCH_BYTES // inner)
    for outer in itertools.product(*map(range, shape[:axis])):
        for start in range(0, shape[axis], rows):
            count = min(rows, shape[axis] - start)
            yield (*outer, slice(start, start + count)), (count, *shape[axis + 1 :])


def _crc32c(data: bytes) -> bytes:
    return _CHECKSUM.pack(google_crc32c.value(data))


def _zarr2(metadata: dict[str, Any]) -> Encoding | None:
    compressor = metadata["compressor"]
    if metadata["order"] != "C" or metadata.get("filters") or str(metadata["dtype"]).startswith(">"):
        return None
    if compressor is not None and compressor["id"] != "zstd":
        return None
    chunk = tuple(metadata["chunks"])
    ones = (1,) * len(chunk)
    return Encoding(chunk, ones, False, compressor is not None, "", metadata.get("dimension_separator", "."))


def _zarr3(metadata: dict[str, Any]) -> Encoding | None:
    grid, keys, codecs = metadata["chunk_grid"], metadata["chunk_key_encoding"], metadata["codecs"]
    if grid["name"] != "regular" or keys["name"] != "default":
        return None
    stored = chunk = tuple(grid["configuration"]["chunk_shape"])
    sharded = codecs[0]["name"] == "sharding_indexed"
    if sharded:
        shard = codecs[0]["configuration"]
        names = [codec["name"] for codec in shard["index_codecs"]]
        if len(codecs) > 1 or shard["index_location"] != "end" or names != ["bytes", "crc32c"]:
            return None
        chunk, codecs = tuple(shard["chunk_shape"]), shard["codecs"]
    names = [codec["name"] for codec in codecs]
    if names not in (["bytes"], ["bytes", "zstd"]) or codecs[0]["configuration"]["endian"] != "little":
        return None
    separator = keys.get("configuration", {}).get("separator", "/")
    counts = tuple(whole // part for whole, part in zip(stored, chunk, strict=True))
    return Encoding(chunk, counts, sharded, "zstd" in names, f"c{separator}" if chunk else "c", separator)
