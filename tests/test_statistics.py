"""Statistics of values: against plain float64 arithmetic, for every dtype, stride, and unusual number."""

from __future__ import annotations

import json
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_maxtext_loader.checkpoint.statistics import ValueStatistics, count_nonfinite, statistics

DTYPES = [np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)]


def _wide(array: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return array.astype(np.float64)


def _expected(array: np.ndarray) -> ValueStatistics:
    values = _wide(array).ravel()
    finite = values[np.isfinite(values)]
    return ValueStatistics(
        values.size,
        float(finite.min(initial=math.inf)),
        float(finite.max(initial=-math.inf)),
        math.fsum(finite.tolist()),
        int((values == 0).sum()),
        int(np.isnan(values).sum()),
        int(np.isinf(values).sum()),
    )


def _check(found: ValueStatistics, expected: ValueStatistics) -> None:
    assert found.total == pytest.approx(expected.total, rel=1e-9, abs=1e-9)
    for name in ("count", "minimum", "maximum", "zeros", "nans", "infinities"):
        assert getattr(found, name) == getattr(expected, name), name


def _bits(dtype: np.dtype, bits: np.ndarray) -> np.ndarray:
    return bits.astype(f"u{dtype.itemsize}").view(dtype)


@pytest.mark.parametrize("dtype", [DTYPES[0], DTYPES[1]], ids=str)
def test_every_number_of_sixteen_bits(dtype: np.dtype) -> None:
    array = _bits(dtype, np.arange(1 << 16))
    found = statistics(array)
    values = _wide(array)
    assert found.nans == np.isnan(values).sum()
    assert found.infinities == 2
    assert found.zeros == 2
    assert found.maximum == -found.minimum == float(ml_dtypes.finfo(dtype).max)
    assert count_nonfinite(array) == found.nans + 2
    for number in array[::257]:
        _check(statistics(np.array([number])), _expected(np.array([number])))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_bits_and_strides(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = tuple(data.draw(st.lists(st.integers(0, 7), max_size=4)))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    array = _bits(dtype, rng.integers(0, 1 << (8 * dtype.itemsize), math.prod(shape))).reshape(shape)
    array = array.transpose(data.draw(st.permutations(range(array.ndim))))
    array = array[::2] if array.ndim else array
    _check(statistics(array), _expected(array))
    assert count_nonfinite(array) == int((~np.isfinite(_wide(array))).sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_add_up(dtype: np.dtype) -> None:
    array = np.random.default_rng(0).standard_normal(300_000).astype(dtype)
    array[[5, 200_000]] = np.nan, -np.inf
    array[7:12] = -0.0
    parts = [statistics(part) for part in (array[:10], array[10:10], array[10:250_000], array[250_000:])]
    _check(sum(parts, ValueStatistics()), _expected(array))
    _check(statistics(array), _expected(array))
    assert (statistics(array).zeros, statistics(array).problem) == (_expected(array).zeros, "1 NaN, 1 inf")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unusual_arrays(dtype: np.dtype) -> None:
    zeros = statistics(np.array([0.0, -0.0, 0.0], dtype))
    assert zeros.all_zero
    assert zeros.problem == "all zero"
    assert math.copysign(1, zeros.minimum) == math.copysign(1, zeros.maximum) == 1
    subnormal = statistics(_bits(dtype, np.array([1, 1])))
    assert subnormal.zeros == 0
    assert subnormal.problem is None
    assert subnormal.minimum == subnormal.mean == float(ml_dtypes.finfo(dtype).smallest_subnormal)
    nothing = statistics(np.array([np.nan, np.nan, np.inf], dtype))
    assert nothing.to_json() == {
        "count": 3,
        "min": None,
        "max": None,
        "mean": None,
        "zero_share": 0.0,
        "nan": 2,
        "inf": 1,
    }
    assert nothing.problem == "2 NaN, 1 inf"
    empty = statistics(np.empty((0, 3), dtype))
    assert empty == ValueStatistics()
    assert empty.problem is None
    assert not empty.all_zero
    assert count_nonfinite(np.empty(0, dtype)) == 0
    json.dumps(empty.to_json(), allow_nan=False)
    scalar = statistics(np.array(2.5, dtype))
    assert (scalar.count, scalar.minimum, scalar.mean) == (1, 2.5, 2.5)


def test_mean_is_of_the_stored_values() -> None:
    """A sum in float32, or in bfloat16, would stop growing."""
    assert statistics(np.full(1 << 22, 0.1, np.float32)).mean == pytest.approx(
        float(np.float32(0.1)), rel=1e-12
    )
    assert statistics(np.ones(1 << 20, DTYPES[0])).mean == 1.0


def test_other_dtypes_are_refused() -> None:
    for function in (statistics, count_nonfinite):
        with pytest.raises(TypeError, match="found int32"):
            function(np.ones(3, np.int32))
