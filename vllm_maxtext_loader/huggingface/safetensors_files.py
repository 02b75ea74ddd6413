"""safetensors files: one that exists, on a disk (memory-mapped) or in a bucket (read by ranges), and a new one.

A file is a length (8 bytes, little-endian), a JSON header and raw bytes. Mapping the bytes instead of loading
tensors keeps memory bounded, and spares the commands an import of torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from vllm_maxtext_loader.checkpoint.ring import aligned
from vllm_maxtext_loader.checkpoint.storage import gcs
from vllm_maxtext_loader.checkpoint.storage.path import Location
from vllm_maxtext_loader.dtypes import SAFETENSORS
from vllm_maxtext_loader.errors import HuggingFaceDirectoryError

_RANGE, _REQUESTS = 8 << 20, 16
"""Bytes of one request for a tensor in a bucket, and requests in flight."""

_LONGEST_HEADER = 100_000_000
"""Bytes; as in the safetensors library."""

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS.items()}


@dataclasses.dataclass(frozen=True)
class HfTensor:
    """One tensor of a safetensors file.

    Attributes:
        name: as the file has it.
        file: the file, on a disk or in a bucket.
        dtype_name: safetensors' name of the dtype, e.g. "BF16".
        shape: exact shape.
        offset: position of its first byte in the file.
    """

    name: str
    file: Path | Location
    dtype_name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> np.dtype | None:
        """numpy dtype; None where it is not one of `dtypes.SAFETENSORS`."""
        return SAFETENSORS.get(self.dtype_name)

    @property
    def nbytes(self) -> int:
        """Size in bytes; 0 where it has no array."""
        return 0 if self.dtype is None else math.prod(self.shape) * self.dtype.itemsize

    def array(self) -> np.ndarray:
        """The values: mapped from a local file and read when they are touched; from a bucket read whole.

        Raises:
            HuggingFaceDirectoryError: the object in the bucket is gone, or shorter than before.
            StorageError: the storage refuses or does not answer.
        """
        return self.flat(0, math.prod(self.shape)).reshape(self.shape)

    def flat(self, start: int, stop: int) -> np.ndarray:
        """Values from `start` to `stop`, in the order of memory; see `array`."""
        if self.dtype is None:
            raise TypeError(f"{self.name}: dtype {self.dtype_name} has no array")
        begin = self.offset + start * self.dtype.itemsize
        if isinstance(self.file, Location):
            return _fetch(self.file, begin, (stop - start) * self.dtype.itemsize).view(self.dtype)
        return np.memmap(self.file, self.dtype, "r", begin, (stop - start,)).view(np.ndarray)


def _fetch(file: Location, begin: int, nbytes: int) -> np.ndarray:
    """Bytes of an object, by several requests at a time."""
    values = aligned(nbytes)

    def fetch(start: int) -> None:
        stop = min(nbytes, start + _RANGE)
        data = _read_range(file, begin + start, begin + stop)
        values[start:stop] = np.frombuffer(data, np.uint8)

    with ThreadPoolExecutor(_REQUESTS) as pool:
        try:
            for _ in pool.map(fetch, range(0, nbytes, _RANGE)):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
    return values


def _read_range(file: Location, start: int, stop: int) -> bytes:
    """Bytes of an object, all of them.

    Raises:
        HuggingFaceDirectoryError: there are fewer.
        StorageError: the storage refuses or does not answer.
    """
    try:
        data = gcs.read_range(file.url, start, stop)
    except FileNotFoundError as error:
        raise HuggingFaceDirectoryError(f"{file}: no such object (any more).") from error
    if len(data) != stop - start:
        raise HuggingFaceDirectoryError(
            f"{file}: is truncated: {len(data)} of {stop - start} bytes from {start}."
        )
    return data


def read_header(file: Path) -> list[HfTensor]:
    """The tensors of a file, from its header.

    Raises:
        HuggingFaceDirectoryError: the file cannot be read, is truncated, or is of another format.
    """
    return _read_header(file, file)


def read_remote_header(file: Location, nbytes: int) -> list[HfTensor]:
    """The tensors of a file in a bucket, from its header: two requests.

    Args:
        file: the object.
        nbytes: its size.

    Raises:
        HuggingFaceDirectoryError: it is gone, truncated, or of another format.
        StorageError: the storage refuses or does not answer.
    """
    prefix = _read_range(file, 0, min(8, nbytes)) if nbytes else b""
    length = min(int.from_bytes(prefix, "little"), _LONGEST_HEADER)
    if stop := min(8 + length, nbytes):
        prefix += _read_range(file, 8, stop) if stop > 8 else b""
    # The library checks headers of files only. This one has the object's size, and a hole where the data would be.
    with tempfile.NamedTemporaryFile() as copy:
        try:
            copy.write(prefix)
            copy.truncate(nbytes)
            copy.flush()
        except OSError as error:
            raise HuggingFaceDirectoryError(
                f"{file}: its header cannot be checked in {tempfile.gettempdir()}: {error.strerror}."
            ) from error
        return _read_header(Path(copy.name), file)


def _read_header(local: Path, file: Path | Location) -> list[HfTensor]:
    """The tensors of `file`, from the header that `local` has."""
    try:
        # Opening checks all of the header: its format, every tensor's size and place, the length of the file.
        with safe_open(local, framework="numpy"), local.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (OSError, SafetensorError) as error:
        raise HuggingFaceDirectoryError(
            f"{file}: is truncated or not a safetensors file ({type(error).__name__}: {error})."
        ) from error
    # The library does not say where a tensor's bytes lie, and its slices are copies. One region of a scanned leaf touches
    # the tensors of all layers: only a mapping of the file keeps memory bounded.
    return [
        HfTensor(name, file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    ]


@dataclasses.dataclass(frozen=True)
class FileLayout:
    """Where everything lies in a file that is about to be written.

    Attributes:
        prefix: its first bytes: the header and its length.
        tensors: by name: first byte and end (counted from the prefix's end), shape and dtype; in the file's order,
            without gaps.
    """

    prefix: bytes
    tensors: dict[str, tuple[int, int, tuple[int, ...], np.dtype]]

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.prefix) + max((end for _, end, _, _ in self.tensors.values()), default=0)


def file_layout(
    tensors: Iterable[tuple[str, tuple[int, ...], np.dtype]],
    parts: Mapping[str, Sequence[tuple[str, tuple[int, ...]]]] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> FileLayout:
    """Lays out a file.

    Args:
        tensors: name, shape and dtype of each.
        parts: by name, the names and shapes under which a tensor's memory is stored instead, in order.
        metadata: what the header says besides the format.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    regions: dict[str, tuple[int, int, tuple[int, ...], np.dtype]] = {}
    end = 0
    # Wider dtypes first, as the safetensors library has it: every tensor is then aligned to its own items.
    for name, shape, dtype in sorted(tensors, key=lambda tensor: -tensor[2].itemsize):
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        at = begin
        for part, part_shape in (parts or {}).get(name, [(name, shape)]):
            after = at + math.prod(part_shape) * dtype.itemsize
            header[part] = {
                "dtype": _DTYPE_NAMES[dtype],
                "shape": list(part_shape),
                "data_offsets": [at, after],
            }
            at = after
        regions[name] = begin, end, shape, dtype
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return FileLayout(len(encoded).to_bytes(8, "little") + encoded, regions)


def create_file(file: Path, layout: FileLayout) -> tuple[np.memmap, dict[str, np.ndarray]]:
    """Makes a file at full size, with its header and without its data.

    The safetensors library writes whole tensors only. The regions of a scanned leaf fill the tensors of all layers bit by
    bit, so the file has to exist before any tensor is complete.

    Args:
        file: to be made; must not exist.
        layout: what it holds.

    Returns:
        The mapped file, and each tensor's place in it by name.

    Raises:
        HuggingFaceDirectoryError: the disk has no room for it.
    """
    try:
        with file.open("xb") as stream:
            stream.write(layout.prefix)
            stream.flush()
            # A full disk shows here, as an error, and not later, as a bus error amid a mapped write.
            os.posix_fallocate(stream.fileno(), 0, layout.nbytes)
    except OSError as error:
        raise HuggingFaceDirectoryError(
            f"{file}: cannot make a file of {layout.nbytes} bytes: {error.strerror}."
        ) from error
    mapped = np.memmap(file, np.uint8, "r+")
    data = mapped.view(np.ndarray)[len(layout.prefix) :]
    return mapped, {
        name: data[begin:end].view(dtype).reshape(shape)
        for name, (begin, end, shape, dtype) in layout.tensors.items()
    }
