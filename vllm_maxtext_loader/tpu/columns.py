"""Which output column of a MaxText leaf goes to which column of tpu-inference's packed array.

Not written down: column numbers are sent through tpu-inference's own functions, once per kind of layer, and the answer is the
map. Written against tpu-inference 0.32.0 layers/common/process_weights/{linear,moe}_weights.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class ColumnRange:
    """Neighbouring columns of a leaf that are neighbours in the final array, too.

    Attributes:
        leaf: MaxText leaf name ("self_attention.query.kernel").
        source: first column in the leaf, its output axes flattened.
        start: first column in the final array.
        length: number of columns.
    """

    leaf: str
    source: int
    start: int
    length: int


def _column_ranges(
    columns: np.ndarray, names: Sequence[str], numbers: dict[str, np.ndarray]
) -> list[ColumnRange]:
    """Ranges of a final array's columns.

    Args:
        columns: number of the column that each of them was; 0 for padding.
        names: leaves.
        numbers: the numbers that a leaf's columns were given.
    """
    ranges = []
    for leaf in names:
        first, last = int(numbers[leaf].min()), int(numbers[leaf].max())
        (positions,) = np.nonzero((columns >= first) & (columns <= last))
        breaks = np.nonzero((np.diff(positions) != 1) | (np.diff(columns[positions]) != 1))[0] + 1
        for run in np.split(positions, breaks):
            ranges.append(ColumnRange(leaf, int(columns[run[0]]) - first, int(run[0]), len(run)))
    return ranges


def _numbered(widths: dict[str, int]) -> dict[str, np.ndarray]:
    """A number for every column of every leaf, from 1."""
    numbers, first = {}, 1
    for leaf, width in widths.items():
        numbers[leaf] = np.arange(first, first + width, dtype=np.int32)
        first += width
    return numbers


@dataclasses.dataclass(frozen=True)
class LinearColumns:
    """What decides where the columns of a linear layer's leaves go.

    Attributes:
        outputs: per output the leaf, its output axes ([features], or [heads, head_dim]) and how often each head
            comes.
        output_sizes: tpu-inference's.
        n_shards: shards its outputs are packed for.
    """

    outputs: tuple[tuple[str, tuple[int, ...], int], ...]
    output_sizes: tuple[int, ...]
    n_shards: int

    def numbers(self) -> dict[str, np.ndarray]:
        """The numbers of each leaf's columns."""
        return _numbered({leaf: math.prod(axes) for leaf, axes, _ in self.outputs})

    def unpacked(self) -> np.ndarray:
        """The number of each column, as vLLM's parameter has them side by side."""
        numbers = self.numbers()
        columns = [
            np.repeat(numbers[leaf].reshape(axes), repeats, axis=0).ravel()
            for leaf, axes, repeats in self.outputs
        ]
        return np.concatenate(columns)

    @property
    def packing(self) -> Packing:
        """How tpu-inference packs it."""
        width = sum(math.prod(axes) * repeats for _, axes, repeats in self.outputs)
        return Packing(width, self.output_sizes, self.n_shards)


class Packing(NamedTuple):
    """What tpu-inference packs the outputs of a linear layer by, whichever leaves they are.

    Attributes:
        width: number of outputs.
        output_sizes: tpu-inference's.
        n_shards: shards they are packed for.
    """

    width: int
    output_sizes: tuple[int, ...]
    n_shards: int


_orders: dict[Packing, np.ndarray] = {}


def linear_orders(packings: Iterable[Packing]) -> list[np.ndarray]:
    """By column of final arrays, which of the outputs (side by side) it is.

    One program is compiled for all that are not known yet: another step of a run is packed as the first one.
    """
    packings = list(packings)
    for packing in packings:
        if len(packing.output_sizes) == 1 or packing.n_shards == 1:
            _orders[packing] = np.arange(packing.width, dtype=np.int32)
    if unknown := [packing for packing in dict.fromkeys(packings) if packing not in _orders]:
        _orders.update(zip(unknown, _learn(unknown), strict=True))
    return [_orders[packing] for packing in packings]


def _learn(packings: list[Packing]) -> list[np.ndarray]:
    # Imported here: `ColumnRange` needs no tpu-inference, whose import takes over ten seconds.
    from tpu_inference.layers.common.process_weights.linear_weights import (
        LinearWeights,
        process_linear_weights,
    )

    @jax.jit
    def process(weights: list[jax.Array]) -> list[Any]:
        return [
            process_linear_weights(
                LinearWeights(weight, None, None, None),
                fused=True,
                output_sizes=list(packing.output_sizes),
                reorder_size=packing.n_shards,
            ).weight
            for weight, packing in zip(weights, packings, strict=True)
        ]

    numbers: Any = [np.arange(packing.width, dtype=np.int32)[None, :] for packing in packings]
    return [np.asarray(weight)[0] for weight in process(numbers)]


def linear_column_ranges(layers: Sequence[LinearColumns]) -> list[tuple[list[ColumnRange], int]]:
    """Where the columns of linear layers go, and how many each layer has."""
    found = []
    for layer, order in zip(layers, linear_orders(layer.packing for layer in layers), strict=True):
        numbers, columns = layer.numbers(), layer.unpacked()[order]
        found.append((_column_ranges(columns, list(numbers), numbers), len(columns)))
    return found


@functools.cache
def expert_order(
    mesh: Any, backend: Any, activation: Any, width: int, hidden: int, has_bias: bool
) -> np.ndarray | None:
    """By column of the packed array of gate and up, which of these (side by side, from 1) it is; 0 is padding.

    Args:
        mesh, backend, activation: of tpu-inference's layer.
        width: columns of gate and up together.
        hidden: width of the model.
        has_bias: whether the experts have biases.

    Returns:
        None where tpu-inference's layout does more than to move columns of gate and up, or moves biases elsewhere.
    """
    from tpu_inference.layers.common.process_weights.moe_weights import process_unquantized_moe_weights

    inner = width // 2
    # NumPy's arrays: XLA would compile every one of JAX's operations on the way.
    down: Any = np.arange(hidden * inner, dtype=np.int32).reshape(1, hidden, inner)
    packed: Any = np.arange(1, width + 1, dtype=np.int32)[None, :]
    biases: Any = (packed, down[:, :, 0]) if has_bias else (None, None)
    made = process_unquantized_moe_weights(
        mesh=mesh,
        moe_backend=backend,
        activation=activation,
        w13_weight=packed[:, :, None],
        w13_bias=biases[0],
        w2_weight=down,
        w2_bias=biases[1],
    )
    w13, w2 = np.asarray(made.w13_weight), np.asarray(made.w2_weight)
    if w13.ndim != 3 or w13.shape[:2] != (1, 1) or not np.array_equal(w2, np.swapaxes(down, 1, 2)):
        return None
    if has_bias and not (
        np.array_equal(made.w13_bias, w13) and np.array_equal(made.w2_bias, biases[1][:, None, :])
    ):
        return None
    return w13[0, 0]


def expert_column_ranges(
    mesh: Any,
    backend: Any,
    activation: Any,
    leaves: tuple[str, ...],
    widths: tuple[int, ...],
    hidden: int,
    *,
    interleaved: bool = False,
    has_bias: bool = False,
) -> tuple[list[ColumnRange], int] | None:
    """Where the columns of gate and up go, and how many columns the packed array has.

    Args:
        mesh, backend, activation: of tpu-inference's layer.
        leaves, widths: gate and up, or the one leaf that is both.
        hidden: width of the model.
        interleaved: whether gate and up take turns in the published tensor.
        has_bias: whether the experts have biases.

    Returns:
        None where tpu-inference's layout does more than to move columns of gate and up, or moves biases elsewhere.
    """
    order = expert_order(mesh, backend, activation, sum(widths), hidden, has_bias)
    if order is None:
        return None
    numbers = _numbered(dict(zip(leaves, widths, strict=True)))
    columns = list(numbers.values())
    packed = np.stack(columns, axis=-1).ravel() if interleaved else np.concatenate(columns)
    return _column_ranges(np.where(order > 0, packed[order - 1], 0), leaves, numbers), len(order)
