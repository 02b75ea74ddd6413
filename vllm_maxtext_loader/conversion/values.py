"""How the values of a leaf change on the way to a Hugging Face tensor: pure functions, each with an inverse.

All of them compute in float32 and leave the one rounding to the caller. An `Elementwise` operation is one row's data:
it knows the axis whose size it needs, and goes both ways, so that `verify` can judge a value by what MaxText stores.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np

from vllm_maxtext_loader.dtypes import BFLOAT16, FLOAT32


class Elementwise(Protocol):
    """An operation on every value by itself; float32 in, float32 out, unrounded."""

    def to_hf(self, stored: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """The Hugging Face values of stored ones."""
        ...

    def to_maxtext(self, values: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """The inverse: what MaxText stores for Hugging Face values."""
        ...

    def stored_forms(self, values: np.ndarray, sizes: Mapping[str, int]) -> Iterator[np.ndarray]:
        """`to_maxtext`, and what other converters of MaxText's make of the same values."""
        ...


class _OneForm:
    """An operation that all of MaxText's converters compute alike."""

    def to_maxtext(self, values: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        raise NotImplementedError

    def stored_forms(self, values: np.ndarray, sizes: Mapping[str, int]) -> Iterator[np.ndarray]:
        yield self.to_maxtext(values, sizes)


@dataclasses.dataclass(frozen=True)
class DivideByRoot(_OneForm):
    """Undoes a multiplication by the square root of an axis' size.

    bfloat16 values do not all come back: several of them map to the same stored value (8 to 15 % of an embedding's).
    Applying the operation again gives the stored value for over 99 %.

    Attributes:
        axis: whose size it is.
        root_dtype: dtype the root is rounded to before it is used.
    """

    axis: str
    root_dtype: np.dtype = FLOAT32

    def to_hf(self, stored: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        return to_float32(stored) / self._root(sizes)

    def to_maxtext(self, values: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        return to_float32(values) * self._root(sizes)

    def _root(self, sizes: Mapping[str, int]) -> np.float32:
        return np.float32(np.array(math.sqrt(sizes[self.axis]), self.root_dtype))


@dataclasses.dataclass(frozen=True)
class MultiplyByRoot:
    """Undoes a division by the square root of an axis' size; the reverse of `DivideByRoot`."""

    axis: str

    def to_hf(self, stored: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        return to_float32(stored) * np.float32(math.sqrt(sizes[self.axis]))

    def to_maxtext(self, values: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        return to_float32(values) * np.float32(1 / math.sqrt(sizes[self.axis]))

    def stored_forms(self, values: np.ndarray, sizes: Mapping[str, int]) -> Iterator[np.ndarray]:
        yield self.to_maxtext(values, sizes)
        # MaxText 0.2.5 checkpoint_conversion/standalone_scripts/llama_or_mistral_ckpt.py rounds the root, and divides.
        yield to_float32(values) / np.float32(np.array(math.sqrt(sizes[self.axis]), BFLOAT16))


@dataclasses.dataclass(frozen=True)
class SubtractOne(_OneForm):
    """Norm weights that Hugging Face stores as the difference from one."""

    def to_hf(self, stored: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        return to_float32(stored) - np.float32(1)

    def to_maxtext(self, values: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        return to_float32(values) + np.float32(1)


def fold_expert_scale(down_proj: np.ndarray, per_expert_scale: np.ndarray) -> np.ndarray:
    """Experts' output matrices times their scale, in float32 (unrounded).

    Args:
        down_proj: [experts, ...]; expert axis first, as MaxText's `wo`.
        per_expert_scale: [experts].
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
