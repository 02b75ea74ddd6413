"""Tiles that fill arrays on devices: their shape, and the programs that put them into shards.

All programs run on the devices of one process. They can be compiled for devices that are not there (`compile`).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vllm_maxtext_loader.tpu.shards import PendingArray

_AXIS = "device"

_TILE_COLUMNS = 64
"""What a tile costs beyond its bytes, in columns."""


@dataclasses.dataclass(frozen=True)
class ShardKind:
    """What arrays that are filled by one program have in common.

    Attributes:
        shape: of one shard.
        dtype: of the array.
        width: columns that a tile has at most.
        row_major: whether the array's memory must be row-major. Otherwise the device chooses.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    width: int
    row_major: bool = False

    @classmethod
    def of(cls, array: PendingArray) -> ShardKind:
        """The kind of an array."""
        widths: list[int] = []
        for *_, columns in array.addressable_indices.values():
            for part in array.column_ranges:
                length = min(columns.stop, part.start + part.length) - max(columns.start, part.start)
                widths += [length] if length > 0 else []
        return cls(array.shard_shape, array.dtype, best_width(widths), array.row_major)

    @property
    def nbytes(self) -> int:
        """Of one shard."""
        return math.prod(self.shape) * self.dtype.itemsize

    def tile(self, lengths: Sequence[int], limit: int) -> tuple[int, ...]:
        """Shape of a tile.

        Args:
            lengths: shape of what is typically written at a time.
            limit: bytes.
        """
        size = max(1, limit // self.dtype.itemsize)
        tile = (_even(lengths[-1], min(size, self.width)),)
        size //= tile[0]
        for length in reversed(lengths[:-1]):
            tile = (_even(length, size), *tile)
            size = size // length if tile[0] == length else 1
        return tile


def best_width(widths: Sequence[int]) -> int:
    """The one of these widths that covers ranges of all of them with little padding and few tiles."""
    lengths = collections.Counter(widths)

    def cost(width: int) -> int:
        return sum(
            count * math.ceil(length / width) * (width + _TILE_COLUMNS) for length, count in lengths.items()
        )

    return min(sorted(lengths, reverse=True), key=cost)


def _even(length: int, limit: int) -> int:
    """The longest part of at most `limit` where a length is cut into parts that are alike."""
    return math.ceil(length / math.ceil(length / max(1, min(length, limit))))


def put_tile(
    shard: jax.Array, tile: jax.Array, where: jax.Array, *, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """What one device does with a tile.

    Args:
        shard: what is written into.
        tile: the values, flat. A flat array lies in memory alike on the host and on every kind of device.
        where: [1, 3, axes]: where the tile begins in the shard; first and last (exclusive) index of what counts
            in the tile. Elsewhere the shard keeps its values.
        shape: of the tile.

    Returns:
        (the shard, a value that exists when the tile has been read)
    """
    offsets, low, high = where[0]
    before = jax.lax.dynamic_slice(shard, offsets, shape)
    counts = jnp.ones((), bool)
    for axis in range(len(shape)):
        index = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        counts &= (index >= low[axis]) & (index < high[axis])
    shard = jax.lax.dynamic_update_slice(shard, jnp.where(counts, tile.reshape(shape), before), offsets)
    return shard, jax.lax.slice(shard, (0,) * shard.ndim, (1,) * shard.ndim).reshape(1)


class LocalDevices:
    """Devices of one process, and the programs that run on all of them."""

    def __init__(self, devices: Iterable[Any]) -> None:
        self.devices = tuple(sorted(devices, key=lambda device: device.id))
        mesh = Mesh(np.array(self.devices), (_AXIS,))
        self.sharding = NamedSharding(mesh, PartitionSpec(_AXIS))

    def allocation(self, kinds: Sequence[ShardKind]) -> Any:
        """The program that makes the shards of arrays of these kinds, all zeros."""
        made = [self._shards(kind) for kind in kinds]

        def allocate() -> list[jax.Array]:
            return [jnp.zeros(array.shape, array.dtype) for array in made]

        return jax.jit(allocate, out_shardings=[self._format(kind) for kind in kinds])

    def update(self, kind: ShardKind, tile: tuple[int, ...]) -> Any:
        """The program that puts a tile into every shard of an array, in place. See `put_tile`."""
        spec, form = PartitionSpec(_AXIS), self._format(kind)
        program = jax.shard_map(
            functools.partial(put_tile, shape=tile),
            mesh=self.sharding.mesh,
            in_specs=spec,
            out_specs=spec,
            check_vma=False,
        )
        shardings = (form, self.sharding, self.sharding)
        return jax.jit(program, donate_argnums=0, in_shardings=shardings, out_shardings=shardings[:2])

    def update_arguments(self, kind: ShardKind, tile: tuple[int, ...]) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What `update` is called with, without values."""
        count = len(self.devices)
        return (
            self._shards(kind),
            jax.ShapeDtypeStruct((count * math.prod(tile),), kind.dtype, sharding=self.sharding),
            jax.ShapeDtypeStruct((count, 3, len(tile)), np.int32, sharding=self.sharding),
        )

    def _shards(self, kind: ShardKind) -> jax.ShapeDtypeStruct:
        """All shards of an array, behind each other along the first axis."""
        shape = (len(self.devices) * kind.shape[0], *kind.shape[1:])
        return jax.ShapeDtypeStruct(shape, kind.dtype, sharding=self._format(kind))

    def _format(self, kind: ShardKind) -> Any:
        return (
            Format(Layout(tuple(range(len(kind.shape)))), self.sharding) if kind.row_major else self.sharding
        )
