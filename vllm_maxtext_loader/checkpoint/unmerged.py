"""Databases of a writer's processes that were never merged into one.

Each process of a save writes its own OCDBT database (`ocdbt.process_N`); when all have finished, Orbax merges
them under `manifest.ocdbt`. A save by a handler alone leaves that to its caller, a writer may die before it,
and copies lose the file. Where one process wrote everything, its database is the checkpoint.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import tensorstore as ts

from vllm_maxtext_loader.checkpoint.arrays import Format, open_arrays
from vllm_maxtext_loader.checkpoint.data_files import absent_chunks, read_extents
from vllm_maxtext_loader.checkpoint.storage.path import Location
from vllm_maxtext_loader.errors import CorruptMetadataError, MaxTextLoadError

logger = logging.getLogger("vllm." + __name__)

OCDBT_MANIFEST = "manifest.ocdbt"
_PART = "ocdbt.process_"


def unmerged_parts(items: Location) -> list[str]:
    """Directories of the processes' databases, where nothing joins them; empty where the manifest is there.

    Looked for only where an array could not be opened: a good checkpoint costs no request.
    """
    try:
        names = items.listdir()
    except (OSError, MaxTextLoadError):
        return []
    return [] if OCDBT_MANIFEST in names else [name for name in names if name.startswith(_PART)]


def open_unmerged(
    items: Location, parts: Sequence[str], names: Sequence[str], stored: Format, context: ts.Context
) -> tuple[Location, dict[str, ts.TensorStore]]:
    """Opens the arrays in the only database that holds all of them.

    Args:
        items: the directory that holds the databases.
        parts: names of the databases' directories.
        names: arrays of the tree.
        stored: how they are stored.
        context: TensorStore's resources.

    Returns:
        The database's directory, and its arrays by name.

    Raises:
        CorruptMetadataError: no database, or more than one, holds all arrays.
    """
    file = "zarr.json" if stored.zarr3 else ".zarray"
    whole: list[tuple[Location, dict[str, ts.TensorStore]]] = []
    for part in parts:
        try:
            keys = read_extents(items / part, context)
            if keys is None or any(f"{name}/{file}" not in keys for name in names):
                continue
            arrays = open_arrays(items / part, names, dataclasses.replace(stored, ocdbt=True), context)
        except CorruptMetadataError:
            continue
        # All processes write the metadata of an array, and each its own chunks. Where chunks of zeros were
        # left out, only the number of writers tells that one has written all.
        if next(absent_chunks(arrays, keys), None) is None or (
            not stored.complete and _writers(items, parts) == 1
        ):
            whole.append((items / part, arrays))
    if len(whole) == 1:
        logger.warning(
            "%s: %s does not exist; reading %s, which holds every chunk of every array. Finish the save to "
            "be rid of this warning: %s.",
            items,
            OCDBT_MANIFEST,
            whole[0][0].name,
            _finalize(stored),
        )
        return whole[0]
    found = parts[0] if len(parts) == 1 else f"{parts[0]} to {parts[-1]} ({len(parts)} in all)"
    each = (
        "it does not hold"
        if len(parts) == 1
        else "none of them holds"
        if not whole
        else "more than one holds"
    )
    raise CorruptMetadataError(
        f"{items}: {OCDBT_MANIFEST} does not exist next to {found}, and {each} every chunk: the writer ended "
        "before it merged what its processes wrote, or files were lost in a copy. If all processes' "
        f"directories are here, finish the save with Orbax ({_finalize(stored)}); else copy it again, or "
        "choose another step."
    )


def _finalize(stored: Format) -> str:
    # The handler looks for the metadata files of its own zarr version, and fails without them.
    version = "use_zarr3=True" if stored.zarr3 else ""
    return f"`orbax.checkpoint.PyTreeCheckpointHandler({version}).finalize(etils.epath.Path(ITEMS))`"


def _writers(items: Location, parts: Sequence[str]) -> int:
    """Number of processes that wrote, by Orbax's record of the arrays; at least the number of databases."""
    try:
        return max(len(parts), len((items / "array_metadatas").listdir()))
    except (OSError, MaxTextLoadError):
        return len(parts)
