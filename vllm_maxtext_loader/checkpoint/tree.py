"""What is in a checkpoint: every leaf with its shape, dtype and chunks; no array data is read.

Orbax keeps the tree in `_METADATA` (JSON) and each array's shape in its own zarr metadata. The tree
is wrapped differently by each writer; `WRAPPERS` lists them. Whatever lies outside the wrapper
(optimizer state, step, random number state) is named in `Tree.skipped` and never read.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Iterable

import numpy as np
import tensorstore as ts

from vllm_maxtext_loader.checkpoint.arrays import Format, open_arrays
from vllm_maxtext_loader.checkpoint.find import TREE_METADATA, ItemLocation
from vllm_maxtext_loader.checkpoint.storage.path import Location
from vllm_maxtext_loader.dtypes import FLOATS
from vllm_maxtext_loader.errors import (
    CorruptMetadataError,
    MaxTextLoadError,
    UnknownModelError,
    UnsupportedDtypeError,
)

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

OCDBT_MANIFEST = "manifest.ocdbt"

_NOT_WEIGHTS = ("opt_state", "optimizer_state", "optimizer", "nnx_aux")
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
        reason: "optimizer state", "random number state", "training step".
    """

    key: str
    nbytes: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Tree:
    """The model's leaves and what lies beside them.

    Attributes:
        location: where it was found.
        wrapper: what kind of writer wrapped it (a value of `WRAPPERS`).
        leaves: by dotted path inside the model, in the order of `_METADATA`.
        skipped: arrays outside the model.
        ocdbt: whether the arrays lie in one OCDBT database.
        zarr3: whether the arrays are zarr v3 (else v2).
        arrays: opened TensorStore handles by `Leaf.key`.
    """

    location: ItemLocation
    writer: str
    leaves: dict[str, Leaf]
    skipped: tuple[Skipped, ...]
    ocdbt: bool
    zarr3: bool
    arrays: dict[str, ts.TensorStore] = dataclasses.field(repr=False)

    @property
    def nbytes(self) -> int:
        """Decoded bytes of all leaves of the model."""
        return sum(leaf.nbytes for leaf in self.leaves.values())

    @property
    def skipped_nbytes(self) -> int:
        """Decoded bytes of all arrays that are not read."""
        return sum(entry.nbytes for entry in self.skipped)


def read_tree(location: ItemLocation, context: ts.Context) -> Tree:
    """Reads the tree and every array's metadata.

    Raises:
        CorruptMetadataError: damaged JSON, an array that the tree names is not there, or the databases of the
            writer's processes were never merged.
        UnknownModelError: no MaxText model inside.
        UnsupportedDtypeError: a leaf of the model is not bfloat16, float16 or float32.
        StorageError: the storage refuses or does not answer.
    """
    items = location.items
    keys, stored = _parse(items)
    prefix = _prefix_of(keys, items)
    try:
        arrays = open_arrays(items, [".".join(key) for key in keys], stored, context)
    except CorruptMetadataError as error:
        raise _unmerged(items) or error from error
    leaves: dict[str, Leaf] = {}
    skipped: list[Skipped] = []
    opened: dict[str, ts.TensorStore] = {}
    for key in keys:
        name = ".".join(key)
        array = arrays[name]
        dtype = np.dtype(array.dtype.numpy_dtype)
        if reason := _skip_reason(key, prefix):
            skipped.append(Skipped(name, math.prod(array.shape) * dtype.itemsize, reason))
            continue
        path = key[len(prefix) :]
        if path[-1:] == ("value",) and len(path) > 1:
            path = path[:-1]
        if not path:
            raise CorruptMetadataError(f"{items}: {name} is an array; expected the model's leaves below it.")
        if array.dtype.name not in FLOATS:
            raise UnsupportedDtypeError(
                f"{items}: leaf {name} is stored as {array.dtype.name}; expected one of "
                f"{', '.join(FLOATS)}. Quantized checkpoints are not supported: save the unquantized "
                f"weights from MaxText."
            )
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
        ocdbt=stored.ocdbt,
        zarr3=stored.zarr3,
        arrays=opened,
    )


def _parse(items: Location) -> tuple[list[tuple[str, ...]], Format]:
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


def _unmerged(items: Location) -> CorruptMetadataError | None:
    """The error for databases without the manifest that joins them; None where the manifest is there.

    Looked for only where an array could not be opened: a good checkpoint costs no request.
    """
    try:
        names = items.listdir()
    except (OSError, MaxTextLoadError):
        return None
    parts = [name for name in names if name.startswith("ocdbt.process_")]
    if OCDBT_MANIFEST in names or not parts:
        return None
    found = parts[0] if len(parts) == 1 else f"{parts[0]} to {parts[-1]} ({len(parts)} in all)"
    return CorruptMetadataError(
        f"{items}: {OCDBT_MANIFEST} does not exist next to {found}: the writer ended before it merged what its "
        "processes wrote, or the file was lost in a copy. Finish the save with Orbax "
        "(`orbax.checkpoint.PyTreeCheckpointHandler().finalize(etils.epath.Path(ITEMS))`), copy it again, or choose "
        "another step."
    )


def _prefix_of(keys: Iterable[tuple[str, ...]], items: Location) -> tuple[str, ...]:
    """The path prefix under which the model lies.

    Raises:
        UnknownModelError: the tree holds no MaxText model, or several of them.
    """
    found: list[tuple[str, ...]] = []
    top: set[str] = set()
    for key in keys:
        top.add(key[0])
        bare = key[:-1] if key[-1] == "value" else key
        if bare[-2:] == EMBEDDING_LEAF and not set(bare) & set(_NOT_WEIGHTS):
            found.append(bare[:-2])
    for prefix in WRITERS:
        if prefix in found:
            return prefix
    if len(found) == 1:
        return found[0]
    if found:
        raise UnknownModelError(
            f"{items}: holds several models: {', '.join('.'.join(prefix) for prefix in found)}; expected "
            f"one, under one of {', '.join('.'.join(prefix) or '(root)' for prefix in WRITERS)}."
        )
    raise UnknownModelError(
        f"{items}: is no MaxText model: no leaf {'.'.join(EMBEDDING_LEAF)} under any wrapper. Top-level keys: "
        f"{', '.join(sorted(top)[:12]) or 'none'}."
    )


def _skip_reason(key: tuple[str, ...], prefix: tuple[str, ...]) -> str | None:
    """Why an array is not part of the weights; None where it is."""
    if set(key[:1]) & set(_NOT_WEIGHTS):
        return "random number state" if "rngs" in key else "optimizer state"
    if "rngs" in key:
        return "random number state"
    if key == ("step",) or key[-2:] == ("optimizer", "step"):
        return "training step"
    if key[: len(prefix)] != prefix:
        return f"outside the model ({key[0]})"
    return None
