"""safetensors files as memory-mapped arrays: one that exists, and one that is about to be written.

A file is a length (8 bytes, little-endian), a JSON header and raw bytes. Mapping the bytes instead of loading
tensors keeps memory bounded, and spares the commands an import of torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vllm_maxtext_loader.errors import HuggingFaceDirectoryError

SAFETENSORS_DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
"""The dtypes a MaxText checkpoint can be compared with, or exported to."""

_LONGEST_HEADER = 100 << 20
"""Bytes; the limit of the safetensors library."""

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class HfTensor:
    """One tensor of a safetensors file.

    Attributes:
        name: as the file has it.
        file: the file.
        dtype_name: safetensors' name of the dtype, e.g. "BF16".
        shape: exact shape.
        offset: position of its first byte in the file.
    """

    name: str
    file: Path
    dtype_name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> np.dtype | None:
        """numpy dtype; None where it is not one of `SAFETENSORS_DTYPES`."""
        return SAFETENSORS_DTYPES.get(self.dtype_name)

    def array(self) -> np.ndarray:
        """The values, mapped from the file and read when they are touched."""
        if self.dtype is None:
            raise TypeError(f"{self.name}: dtype {self.dtype_name} has no array")
        mapped = np.memmap(self.file, self.dtype, "r", self.offset, (math.prod(self.shape),))
        return mapped.view(np.ndarray).reshape(self.shape)


def read_header(file: Path) -> list[HfTensor]:
    """The tensors of a file, from its header.

    Raises:
        HuggingFaceDirectoryError: the file cannot be read, is truncated, or is of another format.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
        tensors: list[HfTensor] = []
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            tensor = HfTensor(name, file, entry["dtype"], tuple(entry["shape"]), 8 + length + begin)
            wanted = math.prod(tensor.shape) * tensor.dtype.itemsize if tensor.dtype else end - begin
            if not 0 <= begin <= end <= size - 8 - length or end - begin != wanted:
                raise ValueError(
                    f"{name} {list(tensor.shape)} lies at bytes {begin} to {end} of {size - 8 - length}"
                )
            tensors.append(tensor)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HuggingFaceDirectoryError(
            f"{file}: is truncated or no safetensors file ({type(error).__name__}: {error})."
        ) from error
    return tensors


def lay_out(
    file: Path, tensors: Iterable[tuple[str, tuple[int, ...], np.dtype]]
) -> tuple[np.memmap, dict[str, np.ndarray]]:
    """Makes a file at full size, with its header and without its data.

    Args:
        file: to be made; must not exist.
        tensors: name, shape and dtype of each.

    Returns:
        The mapped file, and each tensor's place in it by name.

    Raises:
        HuggingFaceDirectoryError: the disk has no room for it.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    regions: dict[str, tuple[int, int, tuple[int, ...], np.dtype]] = {}
    end = 0
    # Wider dtypes first, as the safetensors library has it: every tensor is then aligned to its own items.
    for name, shape, dtype in sorted(tensors, key=lambda tensor: -tensor[2].itemsize):
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        regions[name] = begin, end, shape, dtype
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    start = 8 + len(encoded)
    try:
        with file.open("xb") as stream:
            stream.write(len(encoded).to_bytes(8, "little") + encoded)
            stream.flush()
            # A full disk shows here, as an error, and not later, as a bus error amid a mapped write.
            os.posix_fallocate(stream.fileno(), 0, start + end)
    except OSError as error:
        raise HuggingFaceDirectoryError(
            f"{file}: cannot make a file of {start + end} bytes: {error.strerror}."
        ) from error
    mapped = np.memmap(file, np.uint8, "r+")
    data = mapped.view(np.ndarray)[start:]
    return mapped, {
        name: data[begin:end].view(dtype).reshape(shape)
        for name, (begin, end, shape, dtype) in regions.items()
    }
