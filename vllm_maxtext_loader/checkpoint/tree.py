"""What is in a checkpoint: every leaf with its shape, dtype and chunks; no array data is read.

Orbax keeps the tree in `_METADATA` (JSON) and each array's shape in its own zarr metadata. The tree
is wrapped differently by each writer; `WRAPPERS` lists them. Whatever lies outside the wrapper
(optimizer state, step, random number state) is named in `Tree.skipped` and never read.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from vllm_maxtext_loader.checkpoint.location import TREE_METADATA, ItemLocation
from vllm_maxtext_loader.checkpoint.storage import (
    Location,
    no_progress_seconds,
    redact,
    storage_error,
)
from vllm_maxtext_loader.errors import (
    CorruptMetadataError,
    MaxTextLoadError,
    ReadError,
    UnknownModelError,
    UnsupportedDtypeError,
)

ANCHOR = ("token_embedder", "embedding")
"""The leaf every MaxText model has; what precedes it is the writer's wrapper."""

WRAPPERS: dict[tuple[str, ...], str] = {
    ("params", "params"): "Linen (MaxText train state)",
    ("params",): "Linen (bare params)",
    (): "NNX (Tunix SFT)",
    ("base",): "NNX (Tunix RL)",
    ("model",): "NNX (MaxText train state)",
}
"""Known wrappers, in order of preference where a tree holds several."""

_NOT_WEIGHTS = ("opt_state", "optimizer_state", "optimizer", "nnx_aux")
_ARRAY_TYPES = ("jax.Array", "np.ndarray", "scalar")
_FLOAT_DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


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
    wrapper: str
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
        CorruptMetadataError: damaged JSON, or an array that the tree names is not there.
        UnknownModelError: no MaxText model inside.
        UnsupportedDtypeError: a leaf of the model is not bfloat16, float16 or float32.
        StorageError: the storage refuses or does not answer.
    """
    items = location.items
    keys, ocdbt, zarr3 = _parse(items)
    prefix = _wrapper_of(keys, items)
    arrays = _open_arrays(items, [".".join(key) for key in keys], ocdbt, zarr3, context)
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
        if path[-1] == "value" and len(path) > 1:
            path = path[:-1]
        if array.dtype.name not in _FLOAT_DTYPES:
            raise UnsupportedDtypeError(
                f"{items}: leaf {name} is stored as {array.dtype.name}; expected one of "
                f"{', '.join(_FLOAT_DTYPES)}. Quantized checkpoints are not supported: save the unquantized "
                f"weights from MaxText."
            )
        if 0 in array.shape:
            raise CorruptMetadataError(f"{items}: leaf {name} has the empty shape {list(array.shape)}.")
        leaf = Leaf(
            key=name,
            path=path,
            shape=tuple(array.shape),
            dtype=_FLOAT_DTYPES[array.dtype.name],
            chunks=tuple(array.chunk_layout.read_chunk.shape or array.shape),
        )
        if leaf.name in leaves:
            raise CorruptMetadataError(
                f"{items}: leaves {leaves[leaf.name].key} and {name} are the same weight {leaf.name}."
            )
        leaves[leaf.name] = leaf
        opened[name] = array
    return Tree(
        location=location,
        wrapper=WRAPPERS.get(prefix, f"unnamed wrapper {'.'.join(prefix)}"),
        leaves=leaves,
        skipped=tuple(skipped),
        ocdbt=ocdbt,
        zarr3=zarr3,
        arrays=opened,
    )


def _parse(items: Location) -> tuple[list[tuple[str, ...]], bool, bool]:
    """Array keys of `_METADATA`, use_ocdbt, use_zarr3."""
    path = items / TREE_METADATA
    try:
        parsed = json.loads(path.read_bytes())
        keys = [
            tuple(str(part["key"]) for part in entry["key_metadata"])
            for entry in parsed["tree_metadata"].values()
            if entry["value_metadata"]["value_type"] in _ARRAY_TYPES
        ]
        ocdbt, zarr3 = parsed.get("use_ocdbt", True), parsed.get("use_zarr3", False)
    except FileNotFoundError as error:
        raise CorruptMetadataError(f"{path}: disappeared while it was being read.") from error
    except MaxTextLoadError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptMetadataError(
            f"{path}: is damaged ({type(error).__name__}: {error}); not the tree metadata Orbax writes. Copy the "
            f"checkpoint again, or choose another step."
        ) from error
    for key in keys:
        if not key or any(not part or "/" in part or "\0" in part or part in (".", "..") for part in key):
            raise CorruptMetadataError(f"{path}: is damaged: {key!r} is no name of an array.")
    return keys, bool(ocdbt), bool(zarr3)


def _wrapper_of(keys: Iterable[tuple[str, ...]], items: Location) -> tuple[str, ...]:
    """The path prefix under which the model lies.

    Raises:
        UnknownModelError: the tree holds no MaxText model, or several of them.
    """
    found: list[tuple[str, ...]] = []
    top: set[str] = set()
    for key in keys:
        top.add(key[0])
        bare = key[:-1] if key[-1] == "value" else key
        if bare[-2:] == ANCHOR and not set(bare) & set(_NOT_WEIGHTS):
            found.append(bare[:-2])
    for prefix in WRAPPERS:
        if prefix in found:
            return prefix
    if len(found) == 1:
        return found[0]
    if found:
        raise UnknownModelError(
            f"{items}: holds several models: {', '.join('.'.join(prefix) for prefix in found)}; expected one, under "
            f"one of {', '.join('.'.join(prefix) or '(root)' for prefix in WRAPPERS)}."
        )
    raise UnknownModelError(
        f"{items}: is no MaxText model: no leaf {'.'.join(ANCHOR)} under any wrapper. Top-level keys: "
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


def _open_arrays(
    items: Location, names: list[str], ocdbt: bool, zarr3: bool, context: ts.Context
) -> dict[str, ts.TensorStore]:
    """Opens all arrays at once; TensorStore reads their metadata in parallel."""
    futures = {name: ts.open(_spec(items, name, ocdbt, zarr3), context=context) for name in names}
    arrays: dict[str, ts.TensorStore] = {}
    for name, future in futures.items():
        try:
            arrays[name] = future.result(timeout=no_progress_seconds())
        except TimeoutError as error:
            raise storage_error(
                f"cannot open leaf {name} of {items}", TimeoutError("timed out without an answer")
            ) from error
        except Exception as error:
            raise array_error(f"cannot open leaf {name} of {items}", error, at_open=True) from error
    return arrays


def _spec(items: Location, name: str, ocdbt: bool, zarr3: bool) -> dict[str, Any]:
    kvstore: dict[str, Any] = items.kvstore()
    if ocdbt:
        kvstore = {"driver": "ocdbt", "base": kvstore, "path": f"{name}/", "cache_pool": "cache_pool#ocdbt"}
    else:
        kvstore = {**kvstore, "path": f"{kvstore['path']}{name}/"}
    return {
        "driver": "zarr3" if zarr3 else "zarr",
        "kvstore": kvstore,
        "open": True,
        "recheck_cached_metadata": "open",
        "recheck_cached_data": "open",
        # A chunk that is not there would otherwise read as zeros, without a word.
        "fill_missing_data_reads": False,
    }


def array_error(what: str, error: BaseException, *, at_open: bool = False) -> MaxTextLoadError:
    """TensorStore's error, as one of ours, without its source locations.

    Args:
        what: "cannot read leaf … of …".
        error: what TensorStore raised.
        at_open: whether only metadata was being read.
    """
    detail = redact(" ".join(str(error).split("[source locations=", 1)[0].split()))[:600]
    low = detail.lower()
    damaged = ("not_found", "data_loss", "out_of_range", "failed_precondition", "invalid_argument", "missing")
    if any(word in low.partition(":")[0] for word in damaged) or any(
        word in low for word in ("is missing", "corrupt", "crc-32c", "decod", "truncat")
    ):
        kind = CorruptMetadataError if at_open else ReadError
        return kind(
            f"{what}: {detail}. The checkpoint is incomplete or damaged there: copy it again, or choose another step."
        )
    return storage_error(what, error)
