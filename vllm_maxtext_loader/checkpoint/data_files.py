"""Are the data files there? From listings and OCDBT's own index; no array data is read.

An OCDBT database knows the file, offset and length of each chunk; without one, each chunk is a file. What
must be there according to the metadata is compared with one listing of the files and their sizes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorstore as ts

from vllm_maxtext_loader.checkpoint.arrays import array_error
from vllm_maxtext_loader.checkpoint.storage.path import Location
from vllm_maxtext_loader.checkpoint.storage.retry import to_storage_error
from vllm_maxtext_loader.checkpoint.storage.stall import StallDetector
from vllm_maxtext_loader.errors import CheckpointNotFoundError, StorageError

_MOST_FILES_REMOTE = 10_000
"""Objects that are listed in a bucket: ten requests."""

_MOST_FILES_LOCAL = 200_000
_MOST_CHUNKS = 500_000
_MOST_NODES = 256
"""Nodes of an OCDBT database's B-tree that are read: one request each."""


@dataclasses.dataclass(frozen=True)
class Extent:
    """Where a value of an OCDBT database is stored.

    Attributes:
        file: path relative to the database.
        stop: bytes that the file must have at least.
    """

    file: str
    stop: int


@dataclasses.dataclass(frozen=True)
class MissingChunks:
    """Chunks of a leaf that are not stored.

    Attributes:
        key: the leaf.
        missing: number of them.
        chunks: number of chunks of the leaf.
        first: the first of them, and what is wrong with it.
    """

    key: str
    missing: int
    chunks: int
    first: str


@dataclasses.dataclass(frozen=True)
class DataFiles:
    """What a look at the names and sizes of the data files found.

    Attributes:
        checked: whether every chunk was looked for.
        detail: what was looked at, or why not; one sentence.
        missing: leaves with chunks that are not there.
    """

    checked: bool
    detail: str
    missing: tuple[MissingChunks, ...] = ()


def check_data_files(
    base: Location, arrays: Mapping[str, ts.TensorStore], *, ocdbt: bool, complete: bool, context: ts.Context
) -> DataFiles:
    """Looks for the stored chunks of all arrays.

    In a bucket this takes at most ten requests for the listing, and one for each node of the index.
    Where that is not enough, nothing is looked for.

    Args:
        base: directory of the database, or of the arrays' directories.
        arrays: opened arrays by name.
        ocdbt: whether they are in one OCDBT database.
        complete: whether chunks of zeros were stored.
        context: TensorStore's resources.

    Raises:
        CorruptMetadataError: the database's index is damaged.
    """
    if not ocdbt and not complete:
        return DataFiles(
            False, "chunks that are all zero were not written, so that a lost chunk cannot be told from them"
        )
    if sum(math.prod(chunk_grid(array)) for array in arrays.values()) > _MOST_CHUNKS:
        return DataFiles(False, f"there are more than {_MOST_CHUNKS:,} chunks")
    most = _MOST_FILES_REMOTE if base.is_remote else _MOST_FILES_LOCAL
    try:
        extents = read_extents(base, context) if ocdbt else {}
        if extents is None:
            return DataFiles(False, "the index of the OCDBT database is too large to be read here")
        sizes = base.sizes(most)
    except (StorageError, CheckpointNotFoundError) as error:
        return DataFiles(False, str(error))
    if sizes is None:
        return DataFiles(False, f"there are more than {most:,} files")
    if ocdbt:
        faults = {name: fault for name, extent in extents.items() if (fault := _fault(extent, sizes))}
        stored: Mapping[str, Any] = extents
    else:
        faults = {name: f"{name} is empty" for name, size in sizes.items() if size == 0}
        stored = sizes
    missing: list[MissingChunks] = []
    for name, array in arrays.items():
        found = [
            faults.get(key, f"{key} does not exist")
            for key in chunk_keys(name, array)
            if key in faults or (complete and key not in stored)
        ]
        if found:
            missing.append(MissingChunks(name, len(found), math.prod(chunk_grid(array)), found[0]))
    if ocdbt:
        used = {extent.file for extent in extents.values() if extent is not None}
        return DataFiles(True, f"every chunk was looked for, in {len(used)} data files", tuple(missing))
    return DataFiles(True, "the file of every chunk was looked for", tuple(missing))


def _fault(extent: Extent | None, sizes: Mapping[str, int]) -> str | None:
    """What is wrong with the file that holds a value; None where nothing is, or the index holds the value."""
    if extent is None:
        return None
    if extent.file not in sizes:
        return f"{extent.file} does not exist"
    if sizes[extent.file] < extent.stop:
        return f"{extent.file} has {sizes[extent.file]:,} bytes; at least {extent.stop:,} are needed"
    return None


def absent_chunks(arrays: Mapping[str, ts.TensorStore], stored: Iterable[str]) -> Iterator[str]:
    """Keys of the chunks that are not among `stored`."""
    keys = set(stored)
    return (key for name, array in arrays.items() for key in chunk_keys(name, array) if key not in keys)


def chunk_grid(array: ts.TensorStore) -> tuple[int, ...]:
    """Number of stored chunks along each axis."""
    shape = array.chunk_layout.write_chunk.shape or array.shape
    return tuple(math.ceil(size / (step or size or 1)) for size, step in zip(array.shape, shape, strict=True))


def chunk_keys(name: str, array: ts.TensorStore) -> Iterator[str]:
    """Keys under which zarr stores the chunks of an array: "name/c/0/1" (v3) or "name/0.1" (v2)."""
    metadata = array.spec().to_json()["metadata"]
    if metadata["zarr_format"] == 3:
        encoding = metadata["chunk_key_encoding"]
        v2 = encoding["name"] == "v2"
        separator = encoding.get("configuration", {}).get("separator", "." if v2 else "/")
    else:
        v2, separator = True, metadata.get("dimension_separator", ".")
    start = f"{name}/" if v2 else f"{name}/c"
    for index in np.ndindex(*chunk_grid(array)):
        parts = [str(position) for position in index]
        yield start + (separator.join(parts) or "0" if v2 else "".join(separator + part for part in parts))


def read_extents(base: Location, context: ts.Context) -> dict[str, Extent | None] | None:
    """Every key of an OCDBT database, with where its value is stored (None: in the index itself).

    Returns:
        None where the database's B-tree has more nodes than are read here.

    Raises:
        CorruptMetadataError: a node is missing or damaged.
        StorageError: the storage refuses or does not answer.
    """
    watch = StallDetector(str(base))
    what = f"cannot read the index of {base}"
    try:
        store = watch.result(ts.KvStore.open(base.kvstore(), context=context), "manifest.ocdbt")
        dump = functools.partial(ts.ocdbt.dump, store, context=context)
        versions = watch.result(dump(), "manifest.ocdbt")["versions"]
        root = versions[-1]["root"].get("location") if versions else None
        found: dict[str, Extent | None] = {}
        level = [(b"", root)] if root else []
        nodes = 0
        while level:
            nodes += len(level)
            if nodes > _MOST_NODES:
                return None
            futures = [(prefix, dump(location)) for prefix, location in level]
            level = []
            for prefix, future in futures:
                for entry in watch.result(future, "B-tree")["entries"]:
                    if "location" in entry:
                        level.append((prefix + entry["subtree_common_prefix"], entry["location"]))
                    else:
                        key = (prefix + entry["key"]).decode(errors="replace")
                        value = entry.get("indirect_value")
                        found[key] = None if value is None else _extent(value)
        return found
    except TimeoutError as error:
        raise to_storage_error(what, error) from error
    except ValueError as error:
        raise array_error(what, error, base, at_open=True) from error
    finally:
        watch.close()


def _extent(reference: str) -> Extent:
    """Reads TensorStore's "value:BASE:FILE:OFFSET:LENGTH", whose names are percent-encoded."""
    _, base, file, offset, length = reference.split(":")
    return Extent(urllib.parse.unquote(base + file), int(offset) + int(length))
