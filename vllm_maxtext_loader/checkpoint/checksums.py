"""Checksums of a checkpoint's array data, which Orbax does not store: made once, compared while loading.

A flipped bit in array data is read without complaint, or decodes into other numbers. `compute` takes a
CRC-32C of every stored chunk's decoded bytes; `Verifier` compares them with what a load reads anyway, so
nothing is read twice. A chunk is the unit because reads are cut along chunks, however large the read budget
is.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from vllm_maxtext_loader.checkpoint.reader import DecodedRegion, read_regions
from vllm_maxtext_loader.errors import OptionError, ReadError

if TYPE_CHECKING:
    from vllm_maxtext_loader.api import Checkpoint
    from vllm_maxtext_loader.checkpoint.tree import Leaf

FORMAT = "vllm-maxtext-checksums 1"
_AGAIN = "Regenerate them: vllm-maxtext checksum CKPT --output FILE."
_HEX_DIGITS = 8


@dataclasses.dataclass(frozen=True)
class LeafSums:
    """Checksums of one leaf.

    Attributes:
        shape, dtype, chunks: of the leaf; checksums fit only these.
        crc32c: one per stored chunk, row-major in the chunk grid.
    """

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]
    crc32c: tuple[int, ...]


def compute(
    checkpoint: Checkpoint, on_region: Callable[[DecodedRegion], None] | None = None
) -> dict[str, LeafSums]:
    """Reads all leaves of the model once, and takes their checksums.

    Args:
        checkpoint: an opened checkpoint.
        on_region: told each region, for progress.

    Returns:
        Checksums by leaf key.

    Raises:
        ReadError, StorageError: as while loading.
    """
    leaves = list(checkpoint.tree.leaves.values())
    found = {leaf.key: [0] * math.prod(_grid(leaf)) for leaf in leaves}
    for decoded in read_regions(
        leaves, checkpoint.tree.arrays, checkpoint.concurrent_bytes, checkpoint.plan.where
    ):
        for index, _, value in _chunks(decoded):
            found[decoded.leaf.key][index] = value
        if on_region is not None:
            on_region(decoded)
    return {
        leaf.key: LeafSums(leaf.shape, leaf.dtype.name, leaf.chunks, tuple(found[leaf.key]))
        for leaf in leaves
    }


def dumps(sums: Mapping[str, LeafSums], where: str) -> str:
    """The content of a checksum file.

    Args:
        sums: checksums by leaf key.
        where: the checkpoint's path; for people, it is not compared.
    """
    leaves = {
        key: {
            "shape": leaf.shape,
            "dtype": leaf.dtype,
            "chunks": leaf.chunks,
            "crc32c": "".join(f"{value:0{_HEX_DIGITS}x}" for value in leaf.crc32c),
        }
        for key, leaf in sums.items()
    }
    return json.dumps({"format": FORMAT, "checkpoint": where, "leaves": leaves}, indent=1) + "\n"


def read(path: str | os.PathLike[str]) -> dict[str, LeafSums]:
    """Checksums of a file that `dumps` made.

    Raises:
        OptionError: there is no such file, or it holds something else.
    """
    try:
        parsed = json.loads(Path(path).read_bytes())
        if parsed["format"] != FORMAT:
            raise OptionError(
                f"checksums {path}: expected format {FORMAT!r}, found {parsed['format']!r}. {_AGAIN}"
            )
        return {str(key): _leaf_sums(entry) for key, entry in parsed["leaves"].items()}
    except OptionError:
        raise
    except OSError as error:
        raise OptionError(
            f"checksums {path}: cannot be read ({error.strerror or error}). {_AGAIN}"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise OptionError(
            f"checksums {path}: is no checksum file ({type(error).__name__}: {error}). {_AGAIN}"
        ) from error


class Verifier:
    """Compares what is read with a checksum file.

    Args:
        path: the file.
        where: the checkpoint's path, for messages.

    Raises:
        OptionError: see `read`.
    """

    def __init__(self, path: str | os.PathLike[str], where: str) -> None:
        self.path = os.fspath(path)
        self.where = where
        self.sums = read(path)

    def expect(self, leaves: Iterable[Leaf]) -> None:
        """Refuses, before any data is read, a file that was made from another checkpoint.

        Raises:
            OptionError: with the first leaf that does not fit.
        """
        for leaf in leaves:
            sums = self.sums.get(leaf.key)
            actual = f"{leaf.dtype.name} {list(leaf.shape)} in chunks of {list(leaf.chunks)}"
            stated = (
                f"{sums.dtype} {list(sums.shape)} in chunks of {list(sums.chunks)}" if sums else "not there"
            )
            if actual != stated:
                raise OptionError(
                    f"checksums {self.path}: were made from another checkpoint than {self.where}: leaf "
                    f"{leaf.key} is {actual}, in the file {stated}. {_AGAIN}"
                )

    def check(self, decoded: DecodedRegion) -> None:
        """Compares every chunk of a region.

        Raises:
            ReadError: with the leaf and the chunk that differ.
        """
        sums = self.sums[decoded.leaf.key]
        for index, chunk, value in _chunks(decoded):
            if value != sums.crc32c[index]:
                raise ReadError(
                    f"{self.where}: leaf {decoded.leaf.key}, chunk {list(chunk)}: CRC-32C is {value:08x}, "
                    f"expected {sums.crc32c[index]:08x} ({self.path}): the data has changed since the "
                    "checksums were made. Copy the checkpoint again, or choose another step."
                )

    def watch(self, regions: Iterable[DecodedRegion]) -> Iterator[DecodedRegion]:
        """Passes regions on after comparing them. What another host has read was compared there, and may be a part of a chunk."""
        for decoded in regions:
            if decoded.source is None:
                self.check(decoded)
            yield decoded


def _grid(leaf: Leaf) -> tuple[int, ...]:
    """Number of chunks along each axis."""
    return tuple(math.ceil(size / step) for size, step in zip(leaf.shape, leaf.chunks, strict=True))


def _chunks(decoded: DecodedRegion) -> Iterator[tuple[int, tuple[int, ...], int]]:
    """(row-major index, position in the chunk grid, CRC-32C) of every chunk of a region."""
    leaf, grid = decoded.leaf, _grid(decoded.leaf)
    # As integers: bfloat16 is unknown to the buffer protocol.
    bits = decoded.array.view(f"u{decoded.array.dtype.itemsize}")
    ranges = [
        range(part.start // step, math.ceil(part.stop / step))
        for part, step in zip(decoded.region, leaf.chunks, strict=True)
    ]
    for chunk in itertools.product(*ranges):
        inside = tuple(
            slice(number * step - part.start, min((number + 1) * step, part.stop) - part.start)
            for number, step, part in zip(chunk, leaf.chunks, decoded.region, strict=True)
        )
        index = 0
        for number, count in zip(chunk, grid, strict=True):
            index = index * count + number
        yield index, chunk, google_crc32c.value(np.ascontiguousarray(bits[inside]))


def _leaf_sums(entry: Any) -> LeafSums:
    shape, chunks = (tuple(int(size) for size in entry[name]) for name in ("shape", "chunks"))
    text = entry["crc32c"]
    values = tuple(int(text[at : at + _HEX_DIGITS], 16) for at in range(0, len(text), _HEX_DIGITS))
    count = math.prod(-(-size // step) for size, step in zip(shape, chunks, strict=True))
    if len(values) != count:
        raise ValueError(f"{len(values)} checksums for {count} chunks")
    return LeafSums(shape, str(entry["dtype"]), chunks, values)
