"""Experts as they are published: one tensor per expert and matrix, where vLLM takes all experts of a layer as one.

The fused tensor [experts, rows, columns] is, in memory, the published tensors of expert 0, of expert 1 and so on: its rows
are gate's, then up's. So an export writes one contiguous region under many names, and nothing is copied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from vllm_maxtext_loader.checkpoint.regions import Region
from vllm_maxtext_loader.conversion.family import WeightConverter
from vllm_maxtext_loader.conversion.plan import TensorSpec
from vllm_maxtext_loader.conversion.rearrange import PART, Rearrange


def published_tensors(spec: TensorSpec) -> list[tuple[str, tuple[int, ...]]]:
    """Published name and shape of the tensors that a tensor of the plan is made of, in the order of memory."""
    if not spec.expert_names:
        return [(spec.name, spec.shape)]
    experts, rows, columns = spec.shape
    shape = (rows // len(spec.expert_names), columns)
    return [(name.format(e=expert), shape) for expert in range(experts) for name in spec.expert_names]


@dataclasses.dataclass(frozen=True)
class ExpertPart:
    """What of a region of experts belongs to one published tensor.

    Attributes:
        name: published name.
        selection: the part of the region, without the expert axis.
        region: where it lies in `view` of the published tensor.
    """

    name: str
    selection: tuple[int | slice, ...]
    region: Region
    _rearrange: Rearrange
    _sizes: Mapping[str, int]

    def view(self, tensor: np.ndarray) -> np.ndarray:
        """The published tensor [rows, columns] in the axis order of the leaf (of one expert)."""
        return self._rearrange.view(tensor[None], self._sizes)[0]


def expert_parts(
    spec: TensorSpec, converter: WeightConverter, sizes: Mapping[str, int], region: Region
) -> Iterator[ExpertPart]:
    """Splits a region of a leaf of experts by published tensors.

    Args:
        spec: tensor with `expert_names`.
        converter: the leaf's; its first axis is the experts.
        sizes: size of every axis name of its pattern.
        region: of the leaf (of one layer).
    """
    rearrange, names = converter.rearrange, spec.expert_names
    rows = spec.shape[1] // len(names)
    plain = Rearrange(rearrange.pattern.replace(f"{PART} ", ""))
    axis, rest = None, list(region[1:])
    if rearrange.part is None and len(names) > 1:
        # Gate and up in one leaf: its rows are those of both.
        axis = rearrange.maxtext_axes.index(rearrange.hf_axes[1][-1]) - 1
    for expert in range(region[0].start, region[0].stop):
        for number, name in enumerate(names):
            if rearrange.part is not None and number != rearrange.part:
                continue
            selection: list[int | slice] = [expert - region[0].start, *(slice(None) for _ in rest)]
            there, own = list(rest), dict(sizes)
            own[rearrange.maxtext_axes[0]] = 1
            if axis is not None:
                start, stop = max(rest[axis].start, number * rows), min(rest[axis].stop, (number + 1) * rows)
                if start >= stop:
                    continue
                selection[axis + 1] = slice(start - rest[axis].start, stop - rest[axis].start)
                there[axis] = slice(start - number * rows, stop - number * rows)
                own[rearrange.maxtext_axes[axis + 1]] = rows
            yield ExpertPart(name.format(e=expert), tuple(selection), tuple(there), plain, own)
