"""safetensors files as memory-mapped arrays: one that exists, and one that is about to be written.

A file is a length (8 bytes, little-endian), a JSON header and raw bytes. Mapping the bytes instead of loading
tensors keeps memory bounded, and spares the commands an import of torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from vllm_maxtext_loader.dtypes import SAFETENSORS
from vllm_maxtext_loader.errors import HuggingFaceDirectoryError

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS.items()}


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
        """numpy dtype; None where it is not one of `dtypes.SAFETENSORS`."""
        return SAFETENSORS.get(self.dtype_name)

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
        # Opening checks all of the header: its format, every tensor's size and place, the length of the file.
        with safe_open(file, framework="numpy"), file.open("rb") as stream:
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


def create_file(
    file: Path,
    tensors: Iterable[tuple[str, tuple[int, ...], np.dtype]],
    parts: Mapping[str, Sequence[tuple[str, tuple[int, ...]]]] | None = None,
) -> tuple[np.memmap, dict[str, np.ndarray]]:
    """Makes a file at full size, with its header and without its data.

    The safetensors library writes whole tensors only. The regions of a scanned leaf fill the tensors of all layers bit by
    bit, so the file has to exist before any tensor is complete.

    Args:
        file: to be made; must not exist.
        tensors: name, shape and dtype of each.
        parts: by name, the names and shapes under which a tensor's memory is stored instead, in order.

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
