"""Carries out a plan on the host: decoded regions in, whole Hugging Face tensors out.

Every region is written straight to its place in the destination, through the view that `Rearrange` gives, so
the host holds the tensors that are being filled and the regions in flight, nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

import ml_dtypes
import numpy as np

from vllm_maxtext_loader.checkpoint.reader import DecodedRegion, Region
from vllm_maxtext_loader.conversion.plan import CopyOp, LeafConversion, Plan, TensorSpec
from vllm_maxtext_loader.conversion.rearrange import (
    fold_expert_scale,
    round_to,
    to_float32,
    unscale_embedding,
)
from vllm_maxtext_loader.families.gemma4 import Value

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class ScaleStore:
    """Expert scales by layer, kept because folding needs them when the experts arrive."""

    def __init__(self) -> None:
        self._scales: dict[int, np.ndarray] = {}

    def put(self, layer: int, experts: int, part: slice, values: np.ndarray) -> None:
        """Keeps `values` ([experts in part]) of a layer with `experts` experts."""
        scale = self._scales.setdefault(layer, np.full(experts, np.nan, np.float32))
        scale[part] = to_float32(values)

    def get(self, layer: int, part: slice) -> np.ndarray:
        """Scales of the experts in `part`, float32."""
        return self._scales[layer][part]


def layer_of(
    entry: LeafConversion, copy_op: CopyOp, decoded: DecodedRegion
) -> tuple[np.ndarray, Region] | None:
    """The part of a region that belongs to one layer, and where in that layer it lies.

    Returns:
        (values, region without the stacked axes), None where the region does not reach the layer.
    """
    where = dict(zip(entry.stack, copy_op.index, strict=True))
    selection: list[int | slice] = []
    rest: list[slice] = []
    for axis, part in enumerate(decoded.region):
        if axis in where:
            if not part.start <= where[axis] < part.stop:
                return None
            selection.append(where[axis] - part.start)
        else:
            selection.append(slice(None))
            rest.append(part)
    return decoded.array[tuple(selection)], tuple(rest)


def transform(
    entry: LeafConversion, copy_op: CopyOp, values: np.ndarray, region: Region, fold: bool, scales: ScaleStore
) -> tuple[np.ndarray, Region]:
    """What happens to the values, as the table says; moving them is left to the caller.

    Returns:
        values (float32 where they were computed with, untouched otherwise) and the region they fill.
    """
    match entry.rule.value:
        case Value.UNSCALE_EMBEDDING:
            rows = slice(region[0].start, min(region[0].stop, copy_op.sizes["V"]))
            values = values[: max(0, rows.stop - rows.start)]
            return unscale_embedding(values, copy_op.sizes["H"]), (rows, *region[1:])
        case Value.EXPERT_SCALE if fold:
            scales.put(copy_op.layer, copy_op.sizes["E"], region[0], values)
            return np.ones_like(values), region
        case Value.EXPERT_OUTPUT if fold:
            return fold_expert_scale(values, scales.get(copy_op.layer, region[0])), region
    return values, region


def convert(
    plan: Plan,
    regions: Iterable[DecodedRegion],
    *,
    dtype: np.dtype | None = None,
    fold_expert_scales: bool = False,
    on_region: Callable[[DecodedRegion, float], None] | None = None,
    allocate: Callable[[TensorSpec, np.dtype], np.ndarray] | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every tensor of the plan once.

    Args:
        plan: what to make.
        regions: the plan's leaves, read in the plan's order.
        dtype: dtype of all tensors; None keeps each one's stored dtype.
        fold_expert_scales: multiply per_expert_scale into down_proj and give ones for it.
        on_region: told each region and the seconds it took to convert.
        allocate: gives the contiguous array a tensor is written into, of the target's shape and the given dtype;
            None takes new memory. A tensor may so go straight into a file.
    """
    by_key = {entry.leaf.key: entry for entry in plan.leaves}
    filling: dict[str, np.ndarray] = {}
    waiting = {name: set(target.leaves) for name, target in plan.targets.items()}
    scales = ScaleStore()
    for decoded in regions:
        started = time.perf_counter()
        entry = by_key[decoded.leaf.key]
        for copy_op in entry.copies:
            target = plan.targets[copy_op.target]
            if copy_op.target not in filling:
                wanted = dtype or target.dtype
                made = np.empty(target.shape, wanted) if allocate is None else allocate(target, wanted)
                filling[copy_op.target] = made
            if (found := layer_of(entry, copy_op, decoded)) is None:
                continue
            values, region = transform(entry, copy_op, *found, fold_expert_scales, scales)
            assign(entry.rule.move.view(filling[copy_op.target], copy_op.sizes)[region], values)
        if on_region is not None:
            on_region(decoded, time.perf_counter() - started)
        if not decoded.last:
            continue
        for copy_op in entry.copies:
            waiting[copy_op.target].discard(decoded.leaf.key)
            if not waiting[copy_op.target]:
                yield copy_op.target, filling.pop(copy_op.target)


def cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`values` in another dtype, with one rounding (to nearest even); as they are where it is theirs already."""
    if values.dtype == dtype:
        return values
    if values.dtype != np.float32:
        values = to_float32(values)
    return round_to(values, dtype)


def assign(destination: np.ndarray, values: np.ndarray) -> None:
    """destination[...] = values, with one rounding where the dtypes differ."""
    values = cast(values, destination.dtype)
    if values.dtype == BFLOAT16:
        # The same bits as integers: NumPy copies those without going through bfloat16's own functions.
        values, destination = values.view(np.uint16), destination.view(np.uint16)
    destination[...] = values
