"""Moving a leaf's values: one operation, `Rearrange`, with its inverse.

A pattern is written as for einops: "hidden heads head_dim -> (heads head_dim) hidden" says that the query kernel becomes
a matrix of (heads x head_dim) rows. Names are axes of the family (`Family.axes`). The inverse is a *view* of the Hugging
Face tensor in MaxText's axis order, so that any region of a stored chunk is written by one assignment, whatever its
extent, and nothing is held twice.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

import einops
import numpy as np

PART = "part"
"""Name of the axis that numbers the parts stored as separate leaves: 0 = gate, 1 = up."""


@dataclasses.dataclass(frozen=True)
class Rearrange:
    """A transpose and reshape between one MaxText leaf (one layer of it) and one Hugging Face tensor.

    Attributes:
        pattern: "MaxText axes -> Hugging Face axes", einops notation.
        part: which part of the Hugging Face tensor's `part` axis the leaf is; None for all of it.
        parts: length of the `part` axis.
    """

    pattern: str
    part: int | None = None
    parts: int = 2

    @functools.cached_property
    def maxtext_axes(self) -> tuple[str, ...]:
        """Names of the leaf's axes, in order."""
        return tuple(self.pattern.partition("->")[0].replace("(", " ").replace(")", " ").split())

    @functools.cached_property
    def hf_axes(self) -> tuple[tuple[str, ...], ...]:
        """Names of the axes that each axis of the Hugging Face tensor is made of, in order."""
        groups = re.findall(r"\(([^)]*)\)|(\S+)", self._sides[1])
        return tuple(tuple((group or single).split()) for group, single in groups)

    @functools.cached_property
    def interleaved(self) -> bool:
        """Whether the parts take turns along the axis of the Hugging Face tensor that they share."""
        return any(PART in group[1:] for group in self.hf_axes)

    @functools.cached_property
    def _sides(self) -> tuple[str, str]:
        left, _, right = self.pattern.partition("->")
        return left.strip(), right.strip()

    def maxtext_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of the leaf (of one layer) for the given dimension sizes."""
        return _shape(self._sides[0], {PART: self.parts, **sizes})

    def hf_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of the Hugging Face tensor for the given dimension sizes."""
        return _shape(self._sides[1], {PART: self.parts, **sizes})

    def view(self, hf: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """The inverse: a view of a contiguous Hugging Face tensor with the leaf's shape.

        Args:
            hf: tensor of shape `hf_shape(sizes)`.
            sizes: size of every named dimension.
        """
        left, right = self._sides
        lengths = {PART: self.parts, **sizes}
        if self.part is not None:
            left = f"{PART} {left}"
        used = {name: lengths[name] for name in _names(right)}
        view = einops.rearrange(hf, f"{right} -> {left}", **used)
        return view if self.part is None else view[self.part]

    def apply(self, leaf: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Forward: the Hugging Face tensor of a whole leaf.

        Args:
            leaf: array of shape `maxtext_shape(sizes)`; for a leaf that is one of several parts, the
                parts stacked along a new first axis.
            sizes: size of every named dimension.
        """
        left, right = self._sides
        lengths = {PART: self.parts, **sizes}
        if self.part is not None:
            left = f"{PART} {left}"
        used = {name: lengths[name] for name in _names(left)}
        return einops.rearrange(leaf, f"{left} -> {right}", **used)


def _names(side: str) -> set[str]:
    return {name for name in side.replace("(", " ").replace(")", " ").split() if not name.isdigit()}


def _shape(side: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    shape: list[int] = []
    group: list[int] | None = None
    for token in side.replace("(", " ( ").replace(")", " ) ").split():
        if token == "(":
            group = []
        elif token == ")":
            shape.append(math.prod(group or []))
            group = None
        else:
            (shape if group is None else group).append(1 if token == "1" else sizes[token])
    return tuple(shape)
