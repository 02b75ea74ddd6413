"""What is in a checkpoint: every leaf with its shape, dtype and chunks; no array data is read.

Orbax keeps the tree in `_METADATA` (JSON) and each array's shape in its own zarr metadata. The tree
is wrapped differently by each writer; `WRITERS` lists them. What is no weight (optimizer state, step,
random number state; see `marks`) is named in `Tree.skipped` and never read.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import tensorstore as ts

from vllm_maxtext_loader.checkpoint.arrays import Format, open_arrays
from vllm_maxtext_loader.checkpoint.marks import (
    Key,
    dtype_error,
    is_foreign,
    plain,
    random_streams,
    refuse_foreign,
    state_reason,
)
from vllm_maxtext_loader.checkpoint.names import TREE_METADATA
from vllm_maxtext_loader.checkpoint.storage.path import Location
from vllm_maxtext_loader.checkpoint.substitutes import describe_substitute
from vllm_maxtext_loader.checkpoint.unmerged import OCDBT_MANIFEST, open_unmerged, unmerged_parts
from vllm_maxtext_loader.dtypes import FLOATS
from vllm_maxtext_loader.errors import CorruptMetadataError, UnknownModelError

if TYPE_CHECKING:
    from vllm_maxtext_loader.checkpoint.find import ItemLocation

logger = logging.getLogger("vllm." + __name__)

EMBEDDING_LEAF = ("token_embedder", "embedding")
"""The leaf every MaxText model has; what precedes it is the writer's wrapper."""

WRITERS: dict[tuple[str, ...], str] = {
    ("params", "params"): "Linen (MaxText train state)",
    ("params",): "Linen (bare params)",
    (): "NNX (Tunix SFT or MaxText decode)",
    ("base",): "NNX (Tunix RL)",
    ("model",): "NNX (MaxText train state)",
}
"""Known wrappers, in order of preference where a tree holds several."""

_ARRAY_TYPES = ("jax.Array", "np.ndarray", "scalar")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the model.

    Attributes:
        key: its name in the checkpoint, e.g. "params.params.decoder.decoder_norm.scale".
        path: its path inside the model, wrapper and NNX's trailing "value" stripped.
        shape: global shape.
        dtype: numpy dtype (bfloat16 of ml_dtypes).
        chunks: shape of one stored chunk, the unit of reading.
    """

    key: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]

    @property
    def name(self) -> str:
        """Dotted path inside the model."""
        return ".".join(self.path)

    @property
    def nbytes(self) -> int:
        """Decoded size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def chunk_nbytes(self) -> int:
        """Decoded size of one stored chunk in bytes."""
        return math.prod(map(min, self.chunks, self.shape)) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Skipped:
    """An array that is deliberately not loaded.

    Attributes:
        key: its name in the checkpoint.
        nbytes: decoded size in bytes.
        reason: "optimizer state", "random number state", "training step" and so on.
    """

    key: str
    nbytes: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Tree:
    """The model's leaves and what lies beside them.

    Attributes:
        location: where it was found.
        writer: what kind of writer wrapped it (a value of `WRITERS`).
        leaves: by dotted path inside the model, in the order of `_METADATA`.
        skipped: arrays outside the model.
        ocdbt: whether the arrays lie in one OCDBT database.
        zarr3: whether the arrays are zarr v3 (else v2).
        complete: whether chunks of zeros were stored; see `Format`.
        base: directory of the database, or of the arrays' directories.
        arrays: opened TensorStore handles by `Leaf.key`.
    """

    location: ItemLocation
    writer: str
    leaves: dict[str, Leaf]
    skipped: tuple[Skipped, ...]
    ocdbt: bool
    zarr3: bool
    complete: bool
    base: Location
    arrays: dict[str, ts.TensorStore] = dataclasses.field(repr=False)

    @property
    def nbytes(self) -> int:
        """Decoded bytes of all leaves of the model."""
        return sum(leaf.nbytes for leaf in self.leaves.values())

    @property
    def skipped_nbytes(self) -> int:
        """Decoded bytes of all arrays that are not read."""
        return sum(entry.nbytes for entry in self.skipped)


def holds_model(keys: Iterable[Key]) -> bool:
    """Whether a tree with these leaves holds one MaxText model, or adapters or quantized weights of one."""
    listed = list(keys)
    streams = random_streams(listed)
    if prefixes := _prefixes(listed, streams):
        return _is_one(prefixes)
    return any(is_foreign(key) for key in listed if state_reason(key, None, streams) is None)


def read_tree(location: ItemLocation, context: ts.Context) -> Tree:
    """Reads the tree and every array's metadata.

    Raises:
        CorruptMetadataError: damaged JSON, an array that the tree names is not there, or the databases of the
            writer's processes were never merged.
        UnknownModelError: no MaxText model inside, or adapters without one.
        UnsupportedDtypeError: a leaf of the model is not bfloat16, float16 or float32.
        StorageError: the storage refuses or does not answer.
    """
    items = location.items
    keys, stored = _parse(items)
    streams = random_streams(keys)
    prefixes = _prefixes(keys, streams)
    refuse_foreign(keys, prefixes[0] if prefixes else None, items)
    prefix = _choose(prefixes, keys, items)
    base, arrays = _open(items, [".".join(key) for key in keys], stored, context)
    leaves: dict[str, Leaf] = {}
    skipped: list[Skipped] = []
    opened: dict[str, ts.TensorStore] = {}
    for key in keys:
        name = ".".join(key)
        array = arrays[name]
        dtype = np.dtype(array.dtype.numpy_dtype)
        reason = state_reason(key, prefix, streams)
        if reason is None and key[: len(prefix)] != prefix:
            reason = f"outside the model ({key[0]})"
        if reason is not None:
            skipped.append(Skipped(name, math.prod(array.shape) * dtype.itemsize, reason))
            continue
        path = key[len(prefix) :]
        if not path:
            raise CorruptMetadataError(f"{items}: {name} is an array; expected the model's leaves below it.")
        path = plain(path)
        if array.dtype.name not in FLOATS:
            raise dtype_error(name, path, array.shape, array.dtype.name, FLOATS, items)
        if 0 in array.shape:
            raise CorruptMetadataError(f"{items}: leaf {name} has the empty shape {list(array.shape)}.")
        leaf = Leaf(
            key=name,
            path=path,
            shape=tuple(array.shape),
            dtype=FLOATS[array.dtype.name],
            chunks=tuple(
                int(step or size)
                for step, size in zip(
                    array.chunk_layout.read_chunk.shape or array.shape, array.shape, strict=True
                )
            ),
        )
        if leaf.name in leaves:
            raise CorruptMetadataError(
                f"{items}: leaves {leaves[leaf.name].key} and {name} are the same weight {leaf.name}."
            )
        leaves[leaf.name] = leaf
        opened[name] = array
    return Tree(
        location=location,
        writer=WRITERS.get(prefix, f"unnamed wrapper {'.'.join(prefix)}"),
        leaves=leaves,
        skipped=tuple(skipped),
        ocdbt=stored.ocdbt or base != items,
        zarr3=stored.zarr3,
        complete=stored.complete,
        base=base,
        arrays=opened,
    )


def _parse(items: Location) -> tuple[list[Key], Format]:
    """Array keys of `_METADATA`, and how the arrays are stored."""
    path = items / TREE_METADATA
    advice = "Copy the checkpoint again, or choose another step."
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorruptMetadataError(
            f"{path}: disappeared while it was being read. Was the step deleted?"
        ) from error
    try:
        parsed = json.loads(raw)
        keys = [
            tuple(str(part["key"]) for part in entry["key_metadata"])
            for entry in parsed["tree_metadata"].values()
            if entry["value_metadata"]["value_type"] in _ARRAY_TYPES
        ]
        flags = [
            parsed.get(name) for name in ("use_ocdbt", "use_zarr3", "store_array_data_equal_to_fill_value")
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if found := describe_substitute(raw, is_json=True):
            raise CorruptMetadataError(f"{path}: {found}") from error
        raise CorruptMetadataError(
            f"{path}: is damaged ({type(error).__name__}: {error}); not the tree metadata Orbax writes. "
            f"{advice}"
        ) from error
    for key in keys:
        if not key or any(
            # "Printable" excludes what UTF-8 cannot encode, and NUL.
            not part or "/" in part or part in (".", "..") or not part.isprintable()
            for part in key
        ):
            raise CorruptMetadataError(
                f"{path}: is damaged: ({', '.join(key)}) is no name of an array. {advice}"
            )
    if any(flag is not None and not isinstance(flag, bool) for flag in flags):
        raise CorruptMetadataError(
            f"{path}: is damaged: use_ocdbt, use_zarr3 and the like are {flags}. {advice}"
        )
    ocdbt, zarr3, complete = flags
    if not complete:
        logger.warning(
            "%s: was written without chunks that are all zero: a chunk that was lost since cannot be told "
            "from them.",
            path,
        )
    if ocdbt is None:
        # As Orbax does for trees that do not record it.
        ocdbt = (items / OCDBT_MANIFEST).is_file()
    return keys, Format(ocdbt=ocdbt, zarr3=bool(zarr3), complete=bool(complete))


def _open(
    items: Location, names: list[str], stored: Format, context: ts.Context
) -> tuple[Location, dict[str, ts.TensorStore]]:
    """The directory that the arrays are in, and the arrays by name."""
    try:
        return items, open_arrays(items, names, stored, context)
    except CorruptMetadataError:
        if not (parts := unmerged_parts(items)):
            raise
    return open_unmerged(items, parts, names, stored, context)


def _prefixes(keys: Iterable[Key], streams: frozenset[Key]) -> list[Key]:
    """What precedes the embeddings of the tree; known writers' first."""
    found: list[Key] = []
    for key in keys:
        bare = plain(key)
        if bare[-2:] == EMBEDDING_LEAF and state_reason(bare[:-2] or bare, None, streams) is None:
            found.append(bare[:-2])
    return [
        *(prefix for prefix in WRITERS if prefix in found),
        *(prefix for prefix in found if prefix not in WRITERS),
    ]


def _is_one(prefixes: Sequence[Key]) -> bool:
    """Whether it is clear which of these precedes the model."""
    return len(prefixes) == 1 or (bool(prefixes) and prefixes[0] in WRITERS)


def _choose(prefixes: list[Key], keys: Iterable[Key], items: Location) -> Key:
    """The path prefix under which the model lies.

    Raises:
        UnknownModelError: the tree holds no MaxText model, or several of them.
    """
    if _is_one(prefixes):
        return prefixes[0]
    if prefixes:
        raise UnknownModelError(
            f"{items}: holds several models: {', '.join('.'.join(prefix) for prefix in prefixes)}; expected "
            f"one, under one of {', '.join('.'.join(prefix) or '(root)' for prefix in WRITERS)}."
        )
    top = sorted({key[0] for key in keys})
    raise UnknownModelError(
        f"{items}: is no MaxText model: no leaf {'.'.join(EMBEDDING_LEAF)} under any wrapper. Top-level keys: "
        f"{', '.join(top[:12]) or 'none'}."
    )
