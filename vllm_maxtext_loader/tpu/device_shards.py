"""Arrays in the memory of this process's devices, filled by tiles of a fixed shape.

The host fills a tile as it fills a shard in its own memory (`shards.fill`), so both hold the same bits. One
program per kind of array puts a tile into every device's shard. It spans the devices of this process only, and has
no collective operation: what other processes read, and in which order, does not matter.

Tiles are sent from a ring of buffers. A buffer is used again when the program that read it has run.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from vllm_maxtext_loader.checkpoint.ring import aligned
from vllm_maxtext_loader.tpu.shards import Block, Offsets, PendingArray
from vllm_maxtext_loader.tpu.tile_programs import LocalDevices, ShardKind

_STAGED = 100
"""The buffers, and so what is on its way to the devices, have one byte for this many of the arrays."""

MOST_STAGED = 256 << 20
"""Bytes."""

_STAGED_OF_BUDGET = 4
"""The buffers have at most one byte for this many of the read budget, which they are a part of."""

_LARGEST_TILE = 4 << 20
_SMALLEST_TILE = 64 << 10
_MOST_BUFFERS = 32
_COMPILERS = 4


@dataclasses.dataclass(frozen=True)
class Program:
    """The program that fills the arrays of one kind.

    Attributes:
        tile: shape of its tiles.
        compiled: see `LocalDevices.update`.
    """

    tile: tuple[int, ...]
    compiled: Future[Any]


@dataclasses.dataclass(frozen=True)
class _Tile:
    """A part of a shard that is written at a time.

    Attributes:
        offsets: where the tile begins in the shard.
        start, stop: what counts, in the shard.
        blocks: the values, and possibly others.
    """

    offsets: Offsets
    start: Offsets
    stop: Offsets
    blocks: Sequence[Block]

    @property
    def where(self) -> list[list[int]]:
        """As `put_tile` takes it."""
        low = [start - offset for start, offset in zip(self.start, self.offsets, strict=True)]
        high = [stop - offset for stop, offset in zip(self.stop, self.offsets, strict=True)]
        return [list(self.offsets), low, high]

    def fill(self, target: np.ndarray) -> None:
        """Writes the values to the tile's memory."""
        for block in self.blocks:
            low = [max(a, b) for a, b in zip(block.offsets, self.start, strict=True)]
            high = [
                min(a + n, b) for a, n, b in zip(block.offsets, block.values.shape, self.stop, strict=True)
            ]
            if all(a < b for a, b in zip(low, high, strict=True)):
                there = _region(low, high, self.offsets)
                block.fill(target[there], _region(low, high, block.offsets))


def _region(low: Sequence[int], high: Sequence[int], origin: Offsets) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))


class _Buffer:
    """Memory for one tile of every device.

    Attributes:
        memory: [devices, bytes].
        read: exists when the program that reads the memory has run; None where none does.
    """

    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory
        self.read: jax.Array | None = None


class StagedArray:
    """The shards of one array. See `shards.DeviceShards`."""

    def __init__(self, staging: Staging, array: PendingArray) -> None:
        self.kind = ShardKind.of(array)
        self.values: jax.Array | None = None
        self._staging = staging

    @property
    def is_prepared(self) -> bool:
        return self.kind in self._staging.programs

    def prepare(self, blocks: Sequence[Block]) -> None:
        self._program(_boxes_by_device(blocks))

    def tasks(self, blocks: Sequence[Block]) -> Iterator[Callable[[], None]]:
        boxes = _boxes_by_device(blocks)
        program = self._program(boxes)
        tiles: dict[Any, list[_Tile]] = {device: [] for device in self._staging.local.devices}
        for device, low, high, own in boxes:
            tiles[device] += self._cut(program.tile, low, high, own)
        for together in itertools.zip_longest(*tiles.values()):
            yield functools.partial(self._staging.put, self, program, together)

    def _program(self, boxes: Sequence[_Box]) -> Program:
        lengths = [
            max(high[axis] - low[axis] for _, low, high, _ in boxes) for axis in range(len(self.kind.shape))
        ]
        return self._staging.program(self.kind, lengths)

    def _cut(
        self, tile: tuple[int, ...], low: Offsets, high: Offsets, blocks: Sequence[Block]
    ) -> Iterator[_Tile]:
        steps = [range(a, b, step) for a, b, step in zip(low, high, tile, strict=True)]
        for start in itertools.product(*steps):
            stop = tuple(min(a + step, b) for a, step, b in zip(start, tile, high, strict=True))
            # A tile lies within the shard; what in it was written before keeps its values.
            offsets = tuple(min(a, n - step) for a, n, step in zip(start, self.kind.shape, tile, strict=True))
            yield _Tile(offsets, start, stop, blocks)

    def arrays(self) -> list[jax.Array]:
        values = self._staging.take(self)
        return [shard.data for shard in values.addressable_shards]


_Box = tuple[Any, Offsets, Offsets, Sequence[Block]]
"""(device, first index in its shard, last index, blocks): what is cut into tiles."""


def _boxes_by_device(blocks: Sequence[Block]) -> list[_Box]:
    by_device: dict[Any, list[Block]] = collections.defaultdict(list)
    for block in blocks:
        by_device[block.device].append(block)
    return [(device, *box) for device, own in by_device.items() for box in _boxes(own)]


def _boxes(blocks: Sequence[Block]) -> Iterator[tuple[Offsets, Offsets, Sequence[Block]]]:
    """(first index, last index, blocks): blocks that fill a box (heads of a kernel) together, all others alone."""
    ends = [tuple(a + n for a, n in zip(block.offsets, block.values.shape, strict=True)) for block in blocks]
    low = tuple(min(starts) for starts in zip(*(block.offsets for block in blocks), strict=True))
    high = tuple(max(stops) for stops in zip(*ends, strict=True))
    if math.prod(b - a for a, b in zip(low, high, strict=True)) == sum(block.values.size for block in blocks):
        yield low, high, blocks
        return
    for block, end in zip(blocks, ends, strict=True):
        yield block.offsets, end, [block]


class Staging:
    """The buffers and the programs of one load.

    Args:
        arrays: what is filled.
        devices: this process's, which hold the arrays.
        limit: bytes that the buffers have at most, for all devices.

    Attributes:
        arrays: their shards.
        local: the devices.
        tile_nbytes: of the largest tile.
        buffers: number of buffers.
        programs: by kind of array.
    """

    def __init__(self, arrays: Sequence[PendingArray], devices: Iterable[Any], limit: int) -> None:
        self.local = LocalDevices(devices)
        self.arrays = [StagedArray(self, array) for array in arrays]
        self.programs: dict[ShardKind, Program] = {}
        count = len(self.local.devices)
        held = sum(array.kind.nbytes for array in self.arrays)
        staged = min(limit // count, held // _STAGED)
        self.tile_nbytes = min(max(_power_of_two(staged // 4), _SMALLEST_TILE), _LARGEST_TILE)
        self.buffers = min(max(2, staged // self.tile_nbytes), _MOST_BUFFERS)
        self._compilers = ThreadPoolExecutor(_COMPILERS, thread_name_prefix="maxtext-compile")
        self._lock = threading.Lock()
        self._allocation: Future[None] | None = None
        # In the order in which they were sent. Memory that is never touched costs nothing.
        self._free: queue.SimpleQueue[_Buffer] = queue.SimpleQueue()
        shape = (self.buffers, count, self.tile_nbytes)
        for memory in aligned(math.prod(shape)).reshape(shape):
            self._free.put(_Buffer(memory))
        # By device: what it was given when it last had no tile, and was told that nothing in it counts.
        self._idle: list[jax.Array | None] = [None] * count

    def program(self, kind: ShardKind, lengths: Sequence[int]) -> Program:
        """The program for arrays of a kind. What is written first (`lengths`) decides its tile's shape."""
        if kind not in self.programs:
            tile = kind.tile(lengths, self.tile_nbytes)
            # Compiled while regions are read, and tiles for it are filled.
            compiled = self._compilers.submit(self._compile, kind, tile)
            self.programs[kind] = Program(tile, compiled)
        return self.programs[kind]

    def _compile(self, kind: ShardKind, tile: tuple[int, ...]) -> Any:
        return self.local.update(kind, tile).lower(*self.local.update_arguments(kind, tile)).compile()

    def allocate(self) -> Future[None]:
        """Makes all arrays, by one program, in the background; the first call begins it."""
        with self._lock:
            if self._allocation is None:
                self._allocation = self._compilers.submit(self._allocate)
            return self._allocation

    def _allocate(self) -> None:
        made = self.local.allocation([array.kind for array in self.arrays])()
        for array, values in zip(self.arrays, made, strict=True):
            array.values = values

    def put(self, array: StagedArray, program: Program, tiles: Sequence[_Tile | None]) -> None:
        """Fills a tile for each device that has one, and puts them into an array."""
        buffer = self._free.get()
        try:
            if buffer.read is not None:
                buffer.read.block_until_ready()
                buffer.read = None
            self._put(array, program, tiles, buffer)
        finally:
            self._free.put(buffer)

    def _put(
        self, array: StagedArray, program: Program, tiles: Sequence[_Tile | None], buffer: _Buffer
    ) -> None:
        dtype, size = array.kind.dtype, math.prod(program.tile)
        where = np.zeros((len(tiles), 3, len(program.tile)), np.int32)
        parts: list[Any] = [memory[: size * dtype.itemsize].view(dtype) for memory in buffer.memory]
        for number, tile in enumerate(tiles):
            if tile is not None:
                where[number] = tile.where
                tile.fill(parts[number].reshape(program.tile))
            elif (idle := self._idle[number]) is not None and (idle.size, idle.dtype) == (size, dtype):
                parts[number] = idle
        given = self._send((size * len(parts),), parts)
        place = self._send(where.shape, np.split(where, len(parts)))
        run = program.compiled.result()
        self.allocate().result()
        with self._lock:
            self._idle = [
                given.addressable_data(number) if tile is None else None for number, tile in enumerate(tiles)
            ]
            array.values, buffer.read = run(array.values, given, place)

    def _send(self, shape: tuple[int, ...], parts: Sequence[Any]) -> jax.Array:
        """An array over all devices, of one part for each; what a device has already is not sent.

        With several processes, JAX takes no array of the host's for a part of its devices. `device_put` of a list takes
        several times as long, in Python, and threads do that one after another.
        """
        length = shape[0] // len(parts)

        def part(index: Any) -> Any:
            return parts[(index[0].start or 0) // length]

        return jax.make_array_from_callback(shape, self.local.sharding, part)

    def close(self) -> None:
        """Ends the threads and lets the buffers go, once nothing more is put. Arrays can still be taken."""
        self._compilers.shutdown(wait=False, cancel_futures=True)
        self._free = queue.SimpleQueue()

    def take(self, array: StagedArray) -> jax.Array:
        """The shards of an array, which are no longer held here."""
        self.allocate().result()
        with self._lock:
            values, array.values = array.values, None
        assert values is not None
        return values


def _power_of_two(number: int) -> int:
    """The largest power of two that is not larger."""
    return 1 << max(0, number.bit_length() - 1)


def staged_nbytes(nbytes: int, budget: int) -> int:
    """Bytes of host memory that the buffers of a load have at most.

    Args:
        nbytes: of the checkpoint's arrays.
        budget: the read budget in bytes.
    """
    return min(MOST_STAGED, nbytes // _STAGED, budget // _STAGED_OF_BUDGET)


def fill_on_devices(arrays: Iterable[PendingArray], limit: int = MOST_STAGED) -> list[Staging]:
    """Makes arrays be filled in their devices' memory.

    Args:
        arrays: what is filled.
        limit: bytes of host memory that tiles on their way have at most. See `staged_nbytes`.
    """
    by_devices: dict[frozenset[Any], list[PendingArray]] = collections.defaultdict(list)
    for array in arrays:
        by_devices[frozenset(array.addressable_indices)].append(array)
    stagings = [Staging(own, devices, limit // len(by_devices)) for devices, own in by_devices.items()]
    for staging, own in zip(stagings, by_devices.values(), strict=True):
        for array, staged in zip(own, staging.arrays, strict=True):
            array.on_devices = staged
    return stagings
