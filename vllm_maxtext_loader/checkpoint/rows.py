"""Zero rows of a vocabulary: padding that was written, or tokens that were trained."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorstore as ts

from vllm_maxtext_loader.checkpoint.reader import read_result
from vllm_maxtext_loader.checkpoint.storage.stall import StallDetector
from vllm_maxtext_loader.checkpoint.tree import Leaf

_KEPT_BYTES = 64 << 20


def trailing_zero_rows(leaf: Leaf, arrays: dict[str, ts.TensorStore], where: str) -> int:
    """Number of all-zero rows at the end of a table, read backwards one row of chunks at a time.

    Rows that were read are kept in front of the opened array where they are few: a later read then takes them
    from memory.

    Args:
        leaf: a table [rows, columns].
        arrays: opened arrays by leaf key; the leaf's is replaced.
        where: path, for messages.
    """
    array, zeros, stop = arrays[leaf.key], 0, leaf.shape[0]
    read: list[np.ndarray] = []
    watch = StallDetector(where)
    try:
        while stop > 0:
            start = (stop - 1) // leaf.chunks[0] * leaf.chunks[0]
            read.insert(0, read_result(watch, array[start:stop].read(order="C"), leaf))
            used = np.flatnonzero(np.any(read[0].reshape(stop - start, -1) != 0, axis=1))
            zeros += stop - start - 1 - int(used[-1]) if used.size else stop - start
            stop = start
            if used.size:
                break
    finally:
        watch.close()
    if sum(rows.nbytes for rows in read) <= _KEPT_BYTES:
        rows = ts.array(np.concatenate(read))
        arrays[leaf.key] = ts.overlay([array, rows[ts.d[0].translate_to[stop]]])
    return zeros


def count_nonzero_rows(
    leaf: Leaf, arrays: Mapping[str, ts.TensorStore], where: str, axis: int, first: int
) -> int:
    """Number of rows from `first` on that hold a value other than zero, read one row of chunks at a time.

    Args:
        leaf: any array.
        arrays: opened arrays by leaf key.
        where: path, for messages.
        axis: what counts as a row: an index along this axis.
        first: row to begin at.

    Raises:
        ReadError: a chunk is missing, truncated or corrupt.
        StorageError: the storage refuses or does not answer.
    """
    array, chunk, used = arrays[leaf.key], leaf.chunks[axis], 0
    watch = StallDetector(where)
    try:
        while first < leaf.shape[axis]:
            last = min((first // chunk + 1) * chunk, leaf.shape[axis])
            region = (slice(None),) * axis + (slice(first, last),)
            rows = np.moveaxis(read_result(watch, array[region].read(order="C"), leaf), axis, 0)
            used += int(np.count_nonzero(np.any(rows.reshape(len(rows), -1) != 0, axis=1)))
            first = last
    finally:
        watch.close()
    return used
