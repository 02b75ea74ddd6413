"""The few ways in which a MaxText array becomes a Hugging Face one: pure functions, each with an inverse.

Moving data is one operation, `Rearrange`, written like einops: "H N D -> (N D) H" reads "hidden,
query heads, head dim becomes a matrix of (heads x head dim) rows". Upper-case names are the model's
dimensions (see `gemma4.DIMENSIONS`). Its inverse is a *view* of the Hugging Face tensor in MaxText's
axis order, so that a stored chunk is written to its place by one assignment, whatever the chunk's
extent, and nothing is ever held twice.

Changing values happens in exactly three places: the embedding's scale, the expert scale that
tpu-inference does not apply, and the one rounding to the engine's dtype. All three are in float32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import einops
import numpy as np

PART = "part"
"""Name of the axis that numbers the regions stored as separate leaves: 0 = gate, 1 = up."""


@dataclasses.dataclass(frozen=True)
class Rearrange:
    """A transpose and reshape between one MaxText leaf (one layer of it) and one Hugging Face tensor.

    Attributes:
        pattern: "MaxText axes -> Hugging Face axes", einops notation.
        part: which region of the Hugging Face tensor's `part` axis the leaf is; None for all of it.
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


def scale_embedding(embedding: np.ndarray, hidden_size: int) -> np.ndarray:
    """What MaxText stores: bf16(float32(x) * float32(sqrt(hidden size))).

    Source: MaxText 0.2.5 checkpoint_conversion/utils/param_mapping.py, Gemma 4 embedding hook.
    """
    return round_to(to_float32(embedding) * _root(hidden_size), embedding.dtype)


def unscale_embedding(stored: np.ndarray, hidden_size: int) -> np.ndarray:
    """The embedding before MaxText scaled it, in float32 (unrounded).

    bf16 values are not recovered exactly in 8-15 % of cases, whatever is done: several of them map
    to the same stored value. Scaling the result again gives the stored value for over 99 %.
    """
    return to_float32(stored) / _root(hidden_size)


def fold_expert_scale(down_proj: np.ndarray, per_expert_scale: np.ndarray) -> np.ndarray:
    """Experts' output matrices times their scale, in float32 (unrounded).

    Args:
        down_proj: [E, ...]; expert axis first, as MaxText's `wo`.
        per_expert_scale: [E].
    """
    scale = to_float32(per_expert_scale)
    return to_float32(down_proj) * scale.reshape(-1, *([1] * (down_proj.ndim - 1)))


def unfold_expert_scale(folded: np.ndarray, per_expert_scale: np.ndarray) -> np.ndarray:
    """Inverse of `fold_expert_scale` for non-zero scales, in float32."""
    scale = to_float32(per_expert_scale)
    return to_float32(folded) / scale.reshape(-1, *([1] * (folded.ndim - 1)))


def to_float32(array: np.ndarray) -> np.ndarray:
    """Exact widening."""
    return array.astype(np.float32)


def round_to(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The one rounding (to nearest even); no copy where the dtype is right already."""
    return array.astype(dtype, copy=False)


def _root(hidden_size: int) -> np.float32:
    return np.float32(math.sqrt(hidden_size))
