"""Statistics of stored values: minimum, maximum, mean, zeros, NaN and infinities. numpy only.

bfloat16 is not one of numpy's own types and its arithmetic is slow, so zeros and non-finite values are found by their
bits, and bfloat16 is widened by a shift. Everything runs in blocks that stay in the cache: memory is bounded, whatever
the array's size or strides.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from vllm_maxtext_loader.dtypes import BFLOAT16, FLOAT16, FLOAT32

_BLOCK = 1 << 16
"""Values at a time. The temporary arrays fit a core's cache; larger ones are mapped anew for every block (5x slower)."""

_EXPONENTS: dict[np.dtype, int] = {
    BFLOAT16: 0x7F80,
    FLOAT16: 0x7C00,
    FLOAT32: 0x7F80_0000,
}
"""The exponent's bits: a value is not finite where all of them are set."""


@dataclasses.dataclass(frozen=True)
class ValueStatistics:
    """Statistics of any number of values; those of two parts add up to those of the whole.

    Attributes:
        count: number of values.
        minimum, maximum: of the finite values; inf and -inf where there are none.
        total: sum of the finite values.
        zeros: how many are zero, of either sign.
        nans: how many are NaN.
        infinities: how many are infinite, of either sign.
    """

    count: int = 0
    minimum: float = math.inf
    maximum: float = -math.inf
    total: float = 0.0
    zeros: int = 0
    nans: int = 0
    infinities: int = 0

    def __add__(self, other: ValueStatistics) -> ValueStatistics:
        return ValueStatistics(
            self.count + other.count,
            min(self.minimum, other.minimum),
            max(self.maximum, other.maximum),
            self.total + other.total,
            self.zeros + other.zeros,
            self.nans + other.nans,
            self.infinities + other.infinities,
        )

    @property
    def finite(self) -> int:
        """Number of finite values."""
        return self.count - self.nans - self.infinities

    @property
    def mean(self) -> float | None:
        """Mean of the finite values; None where there are none."""
        return self.total / self.finite if self.finite else None

    @property
    def range_and_mean(self) -> tuple[float | None, float | None, float | None]:
        """Minimum, maximum and mean of the finite values; None where there are none."""
        return (self.minimum, self.maximum, self.mean) if self.finite else (None, None, None)

    @property
    def zero_share(self) -> float | None:
        """Share of zeros among all values; None where there are no values."""
        return self.zeros / self.count if self.count else None

    @property
    def all_zero(self) -> bool:
        """Whether there are values, and all of them are zero."""
        return 0 < self.count == self.zeros

    @property
    def problem(self) -> str | None:
        """What no trained weight should have, in words; None where there is nothing."""
        found = [
            f"{number:,} {name}" for number, name in ((self.nans, "NaN"), (self.infinities, "inf")) if number
        ]
        return ", ".join(found) or ("all zero" if self.all_zero else None)

    def to_json(self) -> dict[str, Any]:
        """The statistics with JSON's types: null where there are no finite values."""
        minimum, maximum, mean = self.range_and_mean
        return {
            "count": self.count,
            "min": minimum,
            "max": maximum,
            "mean": mean,
            "zero_share": self.zero_share,
            "nan": self.nans,
            "inf": self.infinities,
        }


def count_nonfinite(array: np.ndarray) -> int:
    """Number of NaN and infinite values.

    Args:
        array: bfloat16, float16 or float32, any shape and strides.

    Raises:
        TypeError: it has another dtype.
    """
    threshold = _exponent(array.dtype) << 1
    return sum(int(np.count_nonzero((bits << 1) >= threshold)) for bits in _blocks(array))


def sample(array: np.ndarray, most: int) -> np.ndarray:
    """At most `most` values of an array in evenly spaced runs of its memory; all values of a smaller array.

    Args:
        array: contiguous in some order of its axes.
        most: number of values, a multiple of 16.
    """
    values = array.transpose(np.argsort(array.strides)[::-1]).reshape(-1)
    if values.size <= most:
        return values
    runs = 16
    return values[: values.size // runs * runs].reshape(runs, -1)[:, : most // runs]


def statistics(array: np.ndarray) -> ValueStatistics:
    """Statistics of all values of an array.

    Args:
        array: bfloat16, float16 or float32, any shape and strides.

    Raises:
        TypeError: it has another dtype.
    """
    threshold = _exponent(array.dtype) << 1
    whole = ValueStatistics()
    for bits in _blocks(array):
        whole += _block_statistics(bits, array.dtype, threshold)
    return whole


def _block_statistics(bits: np.ndarray, dtype: np.dtype, threshold: int) -> ValueStatistics:
    """Statistics of a few values, given as unsigned integers; `threshold` is the exponent's bits without the sign."""
    magnitude = bits << 1  # The sign is shifted out.
    zeros = magnitude.size - int(np.count_nonzero(magnitude))
    nans = infinities = 0
    if int(magnitude.max()) >= threshold:
        nans = int(np.count_nonzero(magnitude > threshold))
        infinities = int(np.count_nonzero(magnitude == threshold))
        bits = bits[magnitude < threshold]
    if not bits.size:
        return ValueStatistics(magnitude.size, nans=nans, infinities=infinities)
    values = _widened(bits, dtype)
    return ValueStatistics(
        magnitude.size,
        # Plus zero: -0.0 becomes 0.0.
        float(values.min()) + 0.0,
        float(values.max()) + 0.0,
        float(values.sum(dtype=np.float64)) + 0.0,
        zeros,
        nans,
        infinities,
    )


def _widened(bits: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float32 values of bits; exact for the three dtypes."""
    if dtype == BFLOAT16:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(dtype).astype(np.float32, copy=False)


def _exponent(dtype: np.dtype) -> int:
    if dtype not in _EXPONENTS:
        raise TypeError(
            f"dtype must be one of {', '.join(known.name for known in _EXPONENTS)}, found {dtype}"
        )
    return _EXPONENTS[dtype]


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """The array's bits as unsigned integers: 1-D blocks in the order of its memory, copied only where strides ask for it."""
    if not array.size:
        return
    bits = array.view(f"u{array.dtype.itemsize}")
    for block in np.nditer(bits, ["external_loop", "buffered"], order="K", buffersize=_BLOCK):
        yield np.asarray(block)
