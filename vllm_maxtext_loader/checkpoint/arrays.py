"""Opens a checkpoint's arrays with TensorStore, all at once, and translates its errors."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterable
from typing import Any

import tensorstore as ts

from vllm_maxtext_loader.checkpoint.storage.path import Location
from vllm_maxtext_loader.checkpoint.storage.retry import summarize, to_storage_error
from vllm_maxtext_loader.checkpoint.storage.stall import StallDetector
from vllm_maxtext_loader.checkpoint.substitutes import find_substitute
from vllm_maxtext_loader.errors import CorruptMetadataError, MaxTextLoadError, ReadError


@dataclasses.dataclass(frozen=True)
class Format:
    """How an Orbax tree stores its arrays.

    Attributes:
        ocdbt: in one OCDBT database (else a directory per array).
        zarr3: as zarr v3 (else v2).
        complete: every chunk is stored, also one of zeros only, so that a missing one is an error. Orbax
            records it as `store_array_data_equal_to_fill_value`.
    """

    ocdbt: bool
    zarr3: bool
    complete: bool = True


def open_arrays(
    items: Location, names: Iterable[str], stored: Format, context: ts.Context
) -> dict[str, ts.TensorStore]:
    """Opens arrays; TensorStore reads their metadata in parallel. No array data is read.

    Raises:
        CorruptMetadataError: an array is not there, or its metadata is damaged.
        StorageError: the storage refuses or does not answer.
    """
    # Whatever was read since the load began is new enough: OCDBT's manifest is then read once, not once per
    # array.
    since = time.time()
    futures = {name: ts.open(_spec(items, name, stored, since), context=context) for name in names}
    arrays: dict[str, ts.TensorStore] = {}
    watch = StallDetector(str(items))
    try:
        for name, future in futures.items():
            try:
                arrays[name] = watch.result(future, name)
            except TimeoutError as error:
                raise to_storage_error(f"cannot open leaf {name} of {items}", error) from error
            except Exception as error:
                raise array_error(
                    f"cannot open leaf {name} of {items}", error, items, at_open=True
                ) from error
    finally:
        # A future that nobody holds is given up. Its cancel() may wait, with Python's lock in hand, for a callback that waits for
        # that lock (TensorStore 0.1.86 python/tensorstore/future.cc): for ever, where many arrays fail at once.
        futures.clear()
        watch.close()
    return arrays


def _spec(items: Location, name: str, stored: Format, since: float) -> dict[str, Any]:
    kvstore: dict[str, Any] = items.kvstore()
    if stored.ocdbt:
        kvstore = {"driver": "ocdbt", "base": kvstore, "path": f"{name}/", "cache_pool": "cache_pool#ocdbt"}
    else:
        kvstore = {**kvstore, "path": f"{kvstore['path']}{name}/"}
    return {
        "driver": "zarr3" if stored.zarr3 else "zarr",
        "kvstore": kvstore,
        "open": True,
        "recheck_cached_metadata": since,
        "recheck_cached_data": since,
        # A chunk that is not there would otherwise read as zeros, without a word.
        "fill_missing_data_reads": not stored.complete,
    }


def is_damage(error: BaseException) -> bool:
    """Whether TensorStore's error says that what was read is wrong, not that it could not be read."""
    text = str(error)
    # What stands in quotes is the checkpoint's: paths and names.
    return text.partition(":")[0] in _DAMAGED or "Error decoding" in re.sub(r'"(?:[^"\\]|\\.)*"', "", text)


def array_error(
    what: str, error: BaseException, directory: Location, *, at_open: bool = False
) -> MaxTextLoadError:
    """TensorStore's error, as one of ours.

    Args:
        what: "cannot read leaf … of …".
        error: what TensorStore raised.
        directory: what was being read.
        at_open: whether only metadata was being read.
    """
    text = str(error)
    if is_damage(error):
        kind = CorruptMetadataError if at_open else ReadError
        if found := find_substitute(directory, text):
            return kind(f"{what}: {found} ({summarize(text)})")
        return kind(
            f"{what}: {summarize(text)}. The checkpoint is incomplete or damaged there, or its writer has deleted the "
            "step meanwhile: copy it again, or choose another step."
        )
    return to_storage_error(what, error)


_DAMAGED = ("NOT_FOUND", "DATA_LOSS", "OUT_OF_RANGE", "FAILED_PRECONDITION", "INVALID_ARGUMENT")
"""TensorStore's status where what was read is wrong; others mean that it could not be read."""
