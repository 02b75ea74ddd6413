"""Carries out a plan on the host: decoded regions in, whole Hugging Face tensors out.

Every region is written straight to its place in the destination, through the view that `Rearrange` gives, so
the host holds the tensors that are being filled and the regions in flight, nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from vllm_maxtext_loader.checkpoint.reader import DecodedRegion
from vllm_maxtext_loader.checkpoint.regions import Region
from vllm_maxtext_loader.conversion.plan import CopyOp, LeafConversion, Plan, TensorSpec
from vllm_maxtext_loader.conversion.values import fold_expert_scale, round_to, to_float32
from vllm_maxtext_loader.dtypes import BFLOAT16


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
    where = dict(zip(entry.scan_axes, copy_op.index, strict=True))
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


def locate(
    entry: LeafConversion, copy_op: CopyOp, values: np.ndarray, region: Region
) -> Iterator[tuple[np.ndarray, Region]]:
    """Where the values of a region belong in the leaf as Hugging Face orders it; nothing is computed or copied.

    Args:
        entry: the leaf.
        copy_op: the layer.
        values, region: from `layer_of`.

    Yields:
        (values, region): without the writer's padding; rotary pairs that are stored next to each other come as two
        regions, first halves and second halves.
    """
    converter, sizes = entry.converter, copy_op.sizes
    if (axis := converter.padded_axis()) is not None:
        kept = slice(region[axis].start, min(region[axis].stop, sizes[converter.padded or ""]))
        if kept.start >= kept.stop:
            return
        values = values[(slice(None),) * axis + (slice(kept.stop - kept.start),)]
        region = (*region[:axis], kept, *region[axis + 1 :])
    if not copy_op.pairs:
        yield values, region
        return
    axis = converter.rearrange.maxtext_axes.index("head_dim")
    start, stop, half = region[axis].start, region[axis].stop, sizes["head_dim"] // 2
    for part in (0, 1):
        # Element 2i + part of a head becomes element i + part * half.
        first = (start - part + 1) // 2
        count = (stop - part + 1) // 2 - first
        if count > 0:
            picked = (slice(None),) * axis + (slice(2 * first + part - start, None, 2),)
            there = slice(part * half + first, part * half + first + count)
            yield values[picked], (*region[:axis], there, *region[axis + 1 :])


def compute(
    entry: LeafConversion,
    copy_op: CopyOp,
    values: np.ndarray,
    experts: slice,
    fold: bool,
    scales: ScaleStore,
) -> np.ndarray:
    """What happens to the values, as the table says: float32 where something is computed, untouched otherwise.

    Args:
        entry: the leaf.
        copy_op: the layer.
        values: from `locate`.
        experts: their range along the leaf's first axis; of experts where the leaf is theirs.
        fold: whether the scale per expert is multiplied into the experts' output.
        scales: kept scales.
    """
    converter = entry.converter
    if fold and converter.fold == "scale":
        return np.ones_like(values)
    if fold and converter.fold == "output":
        return fold_expert_scale(values, scales.get(copy_op.layer, experts))
    return converter.to_hf(values, copy_op.sizes)


def keep_scales(entry: LeafConversion, decoded: DecodedRegion, scales: ScaleStore) -> None:
    """Keeps the scales per expert of a region for folding; a region of any other leaf is passed over."""
    if entry.converter.fold != "scale":
        return
    for copy_op in entry.copies:
        if (found := layer_of(entry, copy_op, decoded)) is not None:
            values, region = found
            scales.put(copy_op.layer, copy_op.sizes["experts"], region[0], values)


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
        if fold_expert_scales:
            keep_scales(entry, decoded, scales)
        for copy_op in entry.copies:
            target = plan.targets[copy_op.target]
            if copy_op.target not in filling:
                wanted = target.dtype if dtype is None or target.keep_dtype else dtype
                # Zeros: a vocabulary may have rows that are not stored.
                made = np.zeros(target.shape, wanted) if allocate is None else allocate(target, wanted)
                filling[copy_op.target] = made
            if (found := layer_of(entry, copy_op, decoded)) is None:
                continue
            view = entry.converter.rearrange.view(filling[copy_op.target], copy_op.sizes)
            for values, region in locate(entry, copy_op, *found):
                assign(view[region], compute(entry, copy_op, values, region[0], fold_expert_scales, scales))
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
