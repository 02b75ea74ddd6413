"""An array in its final form, one shard on each device, while regions are copied into it in place.

On JAX's CPU backend the device's memory is the host's: there a shard is ordinary memory until it is full, and then
becomes the array without a copy (`HostShard`). On an accelerator, the array is filled by tiles (`device_shards`).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding

from vllm_maxtext_loader.checkpoint.regions import Region
from vllm_maxtext_loader.checkpoint.ring import aligned
from vllm_maxtext_loader.conversion.convert import assign
from vllm_maxtext_loader.conversion.values import fold_expert_scale
from vllm_maxtext_loader.options import DIRECT_VARIABLE
from vllm_maxtext_loader.tpu.columns import ColumnRange

Offsets = tuple[int, ...]
Convert = Callable[[np.ndarray], np.ndarray]

_CONVERTED_BYTES = 1 << 18
"""Values are computed with in parts of this size: what is made of one on the way stays in the processor's cache."""


def memory_is_host(device: Any) -> bool:
    """Whether a device's memory is the host's, and shards are filled there."""
    return device.platform == "cpu" and os.environ.get(DIRECT_VARIABLE) != "device"


@dataclasses.dataclass(frozen=True)
class Block:
    """Values for one shard.

    Attributes:
        device: whose shard.
        values: one axis per axis of the array.
        offsets: where they begin in the shard.
        scales: [experts in values], multiplied in; the result is rounded once.
        convert: what is done to the values before, each by itself.
    """

    device: Any
    values: np.ndarray
    offsets: Offsets
    scales: np.ndarray | None = None
    convert: Convert | None = None

    def fill(self, target: np.ndarray, part: Region) -> None:
        """Writes a part of the values to `target`, which is of the part's shape."""
        scales = None if self.scales is None else self.scales[part[0]]
        fill(target, self.values[part], scales, self.convert)


def fill(
    target: np.ndarray, values: np.ndarray, scales: np.ndarray | None = None, convert: Convert | None = None
) -> None:
    """Writes `values` to `target`, of the same shape. See `Block` for scales and convert."""
    computed = scales is not None or convert is not None or values.dtype != target.dtype
    for part in tiles(values.shape, _CONVERTED_BYTES // values.itemsize if computed else values.size):
        made = values[part] if convert is None else convert(values[part])
        assign(target[part], made if scales is None else fold_expert_scale(made, scales[part[0]]))


class HostShard:
    """A shard in memory that is the host's and the device's at once (JAX on the CPU).

    Args:
        shape: of the shard.
        dtype: of the shard.
        device: where the array will be.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, device: Any) -> None:
        memory = aligned(math.prod(shape) * dtype.itemsize)
        self._values = memory.view(dtype).reshape(shape)
        self._device = device

    def write(
        self,
        block: np.ndarray,
        offsets: Offsets,
        scales: np.ndarray | None = None,
        convert: Convert | None = None,
    ) -> None:
        """Puts `block`, which has one axis per axis of the shard, at `offsets`. See `Block` for the rest."""
        target = self._values[tuple(slice(a, a + n) for a, n in zip(offsets, block.shape, strict=True))]
        fill(target, block, scales, convert)

    @property
    def values(self) -> np.ndarray:
        """The memory."""
        return self._values

    def array(self) -> jax.Array:
        """The shard on its device; it must not be written to any more."""
        return jax.device_put(self._values, self._device)


class DeviceShards(Protocol):
    """The shards of an array, where the devices fill them."""

    @property
    def is_prepared(self) -> bool:
        """Whether the program that writes into the array is being compiled, or has been."""
        ...

    def prepare(self, blocks: Sequence[Block]) -> None:
        """Begins to compile the program that writes blocks like these; their values do not count."""
        ...

    def tasks(self, blocks: Sequence[Block]) -> Iterator[Callable[[], None]]:
        """What to run, in any order and by any thread, to write blocks of one region into the shards."""
        ...

    def arrays(self) -> list[jax.Array]:
        """The shards, in the order of the devices' ids; they must not be written to any more."""
        ...


@dataclasses.dataclass
class PendingArray:
    """A weight of a module, in its final form, while it is being filled.

    Attributes:
        parameters: full names of the parameters it is.
        shape: global shape; the last axis is the output columns.
        sharding: how it is spread over devices.
        axis_groups: per leaf, which of its axes (layers left out) make up each axis of the final array.
        column_ranges: where the columns go.
        missing_leaves: leaves that are not complete.
        on_complete: puts the array into the module.
        dtype: of the array.
        rounded_to: dtype that values are rounded to on the way to a wider one; None where that is not needed.
        row_major: whether its memory must be row-major on the device. Otherwise the device chooses.
        on_devices: what fills its shards on the devices; None where they are filled in host memory.
    """

    parameters: tuple[str, ...]
    shape: tuple[int, ...]
    sharding: NamedSharding
    axis_groups: dict[str, tuple[tuple[int, ...], ...]]
    column_ranges: list[ColumnRange]
    missing_leaves: set[str]
    on_complete: Callable[[jax.Array], None]
    dtype: np.dtype
    rounded_to: np.dtype | None = None
    row_major: bool = False
    on_devices: DeviceShards | None = None
    _shards: dict[Any, HostShard] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def addressable_indices(self) -> dict[Any, Region]:
        """By device of this process, what it holds of the array."""
        indices = self.sharding.addressable_devices_indices_map(self.shape)
        return {
            device: tuple(
                slice(*part.indices(size)[:2]) for part, size in zip(index, self.shape, strict=True)
            )
            for device, index in indices.items()
            if index is not None
        }

    def targets(
        self, leaf: str, offsets: Offsets, lengths: Sequence[int]
    ) -> Iterator[tuple[Any, Region, Offsets]]:
        """Where a block of a leaf goes.

        Args:
            leaf: its name.
            offsets: where it begins in the leaf, along the final array's axes.
            lengths: its shape.

        Yields:
            (device, part of the block, where that begins in the device's shard)
        """
        *rows, column = offsets
        for (device, shard), columns in itertools.product(
            self.addressable_indices.items(), self.column_ranges
        ):
            if columns.leaf != leaf:
                continue
            target = (*rows, columns.start + column - columns.source)
            limits = [
                *shard[:-1],
                slice(
                    max(shard[-1].start, columns.start), min(shard[-1].stop, columns.start + columns.length)
                ),
            ]
            low = [max(a, limit.start) for a, limit in zip(target, limits, strict=True)]
            high = [min(a + n, limit.stop) for a, n, limit in zip(target, lengths, limits, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                part = tuple(slice(a - m, b - m) for a, b, m in zip(low, high, target, strict=True))
                yield device, part, tuple(a - s.start for a, s in zip(low, shard, strict=True))

    @functools.cached_property
    def shard_shape(self) -> tuple[int, ...]:
        """Shape of what one device holds."""
        return self.sharding.shard_shape(self.shape)

    def shard(self, device: Any) -> HostShard:
        """The part of a device of this process; made empty when it is first asked for."""
        if device not in self._shards:
            self._shards[device] = HostShard(self.shard_shape, self.dtype, device)
        return self._shards[device]

    def tasks(self, blocks: Sequence[Block]) -> Iterator[Callable[[], None]]:
        """What to run, in any order and by any thread, to write blocks of one region into the array."""
        if self.on_devices is not None:
            yield from self.on_devices.tasks(blocks)
            return
        by_device: dict[Any, list[Block]] = collections.defaultdict(list)
        for block in blocks:
            by_device[block.device].append(block)
        for device, parts in by_device.items():
            yield functools.partial(_write, self.shard(device), parts)

    def complete(self) -> None:
        """Puts the array into the module; called when all leaves are in it."""
        self.on_complete(self.array())

    def array(self) -> jax.Array:
        """The whole array; it must not be written to any more."""
        if self.on_devices is not None:
            shards, self.on_devices = self.on_devices.arrays(), None
        else:
            shards = [self.shard(device).array() for device in self.addressable_indices]
            self._shards = {}
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, shards)


def _write(shard: HostShard, blocks: Sequence[Block]) -> None:
    for block in blocks:
        shard.write(block.values, block.offsets, block.scales, block.convert)


def tiles(shape: tuple[int, ...], size: int) -> Iterator[Region]:
    """Cuts a block into parts of at most `size` values, along its first axis, and where that is not enough along the second.

    Args:
        shape: of the block.
        size: number of values; a part is never less than one row of what comes after the second axis.
    """
    if len(shape) == 1:
        for row in range(0, shape[0], size):
            yield (slice(row, min(shape[0], row + size)),)
        return
    rest = max(1, math.prod(shape[2:]))
    columns = max(1, min(shape[1], size // rest))
    rows = max(1, size // (columns * rest)) if columns == shape[1] else 1
    for row, column in itertools.product(range(0, shape[0], rows), range(0, shape[1], columns)):
        yield slice(row, min(shape[0], row + rows)), slice(column, min(shape[1], column + columns))


def flattened_blocks(
    values: np.ndarray, region: Region, shape: tuple[int, ...], axis_groups: tuple[tuple[int, ...], ...]
) -> Iterator[tuple[np.ndarray, Offsets]]:
    """A region with its axes flattened into groups: one block, or several where a group is not one run.

    Args:
        values: [region lengths].
        region: where they lie in an array of `shape`.
        shape: of the whole.
        axis_groups: axes that become one; at most two in a group. A group of none is an axis of length one.

    Yields:
        (values with one axis per group, where they begin)
    """
    order = [axis for group in axis_groups for axis in group]
    if order != sorted(order):
        # An output head is stored [hidden, vocab] and computed with as [vocab, hidden]; a transpose is a view.
        values, region = values.transpose(order), tuple(region[axis] for axis in order)
        shape = tuple(shape[axis] for axis in order)
        axis_groups = tuple(tuple(order.index(axis) for axis in group) for group in axis_groups)
    for outer, *inner in filter(None, axis_groups):
        if inner and values.shape[outer] > 1 and values.shape[inner[0]] < shape[inner[0]]:
            for position in range(values.shape[outer]):
                start = region[outer].start + position
                one = (*region[:outer], slice(start, start + 1), *region[outer + 1 :])
                yield from flattened_blocks(values.take([position], axis=outer), one, shape, axis_groups)
            return
    offsets = tuple(
        int(np.ravel_multi_index([region[axis].start for axis in group], [shape[axis] for axis in group]))
        if group
        else 0
        for group in axis_groups
    )
    if values.size:
        yield (
            values.reshape([math.prod(values.shape[axis] for axis in group) for group in axis_groups]),
            offsets,
        )
