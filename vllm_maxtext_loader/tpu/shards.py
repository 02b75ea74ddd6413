"""An array in its final form, one shard on each device, while chunks are copied into it in place."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from vllm_maxtext_loader.checkpoint.reader import Box
from vllm_maxtext_loader.tpu.columns import Run

Starts = tuple[int, ...]


@dataclasses.dataclass
class Weight:
    """A weight of a module, in its final form, while it is being filled.

    Attributes:
        parameters: full names of the parameters it is.
        shape: global shape; the last axis is the output columns.
        sharding: how it is spread over devices.
        groups: per leaf, which of its axes (layers left out) make up each axis of the final array.
        runs: where the columns go.
        waiting: leaves that are not complete.
        finish: puts the array into the module.
        shards: the part of every device of this process.
        made: done when the shards are there.
    """

    parameters: tuple[str, ...]
    shape: tuple[int, ...]
    sharding: NamedSharding
    groups: dict[str, tuple[tuple[int, ...], ...]]
    runs: list[Run]
    waiting: set[str]
    finish: Callable[[jax.Array], None]
    shards: dict[Any, jax.Array] = dataclasses.field(default_factory=dict)
    made: Future[None] | None = None

    @functools.cached_property
    def bounds(self) -> dict[Any, Box]:
        """By device of this process, what it holds of the array."""
        indices = self.sharding.addressable_devices_indices_map(self.shape)
        return {
            device: tuple(
                slice(*part.indices(size)[:2]) for part, size in zip(index, self.shape, strict=True)
            )
            for device, index in indices.items()
            if index is not None
        }

    def targets(self, leaf: str, starts: Starts, lengths: Sequence[int]) -> Iterator[tuple[Any, Box, Starts]]:
        """Where a block of a leaf goes.

        Args:
            leaf: its name.
            starts: where it begins in the leaf, along the final array's axes.
            lengths: its shape.

        Yields:
            (device, part of the block, where that begins in the device's shard)
        """
        *rows, column = starts
        for (device, shard), run in itertools.product(self.bounds.items(), self.runs):
            if run.leaf != leaf:
                continue
            moved = (*rows, run.start + column - run.source)
            limits = [
                *shard[:-1],
                slice(max(shard[-1].start, run.start), min(shard[-1].stop, run.start + run.length)),
            ]
            low = [max(a, limit.start) for a, limit in zip(moved, limits, strict=True)]
            high = [min(a + n, limit.stop) for a, n, limit in zip(moved, lengths, limits, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                part = tuple(slice(a - m, b - m) for a, b, m in zip(low, high, moved, strict=True))
                yield device, part, tuple(a - s.start for a, s in zip(low, shard, strict=True))

    def make(self, dtype: np.dtype) -> None:
        """Makes the empty shards."""
        for device, shard in self.bounds.items():
            shape = tuple(part.stop - part.start for part in shard)
            self.shards[device] = jnp.zeros(shape, dtype, device=device)

    def wait(self) -> None:
        """Waits until the empty shards are made."""
        if self.made is not None:
            self.made.result()

    def array(self) -> jax.Array:
        """The whole array; its shards are this object's no longer."""
        shards = list(self.shards.values())
        self.shards = {}
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, shards)


@functools.partial(jax.jit, donate_argnums=0)
def update(shard: jax.Array, block: jax.Array, starts: Starts, scales: Any) -> jax.Array:
    """`shard` with `block` at `starts`, in the same memory; [experts] scales are multiplied in, rounding once."""
    if scales is not None:
        block = block.astype(jnp.float32) * scales[:, None, None]
    return jax.lax.dynamic_update_slice(shard, block.astype(shard.dtype), starts)


def blocks(
    values: np.ndarray, box: Box, shape: tuple[int, ...], groups: tuple[tuple[int, ...], ...]
) -> Iterator[tuple[np.ndarray, Starts]]:
    """A box with its axes flattened into groups: one block, or several where a group is not one run.

    Args:
        values: [box lengths].
        box: where they lie in an array of `shape`.
        shape: of the whole.
        groups: axes that become one; at most two in a group.

    Yields:
        (values with one axis per group, where they begin)
    """
    for outer, *inner in groups:
        if inner and values.shape[outer] > 1 and values.shape[inner[0]] < shape[inner[0]]:
            for position in range(values.shape[outer]):
                start = box[outer].start + position
                one = (*box[:outer], slice(start, start + 1), *box[outer + 1 :])
                yield from blocks(values.take([position], axis=outer), one, shape, groups)
            return
    starts = tuple(
        int(np.ravel_multi_index([box[axis].start for axis in group], [shape[axis] for axis in group]))
        for group in groups
    )
    if values.size:
        yield values.reshape([math.prod(values.shape[axis] for axis in group) for group in groups]), starts
