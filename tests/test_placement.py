"""The small parts of placing: memory that is used again, regions as blocks, columns to where they belong."""

from __future__ import annotations

import collections
import itertools
import math
import random
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vllm_maxtext_loader.checkpoint.reader import DecodedRegion, read_regions
from vllm_maxtext_loader.checkpoint.regions import Region, chunk_regions
from vllm_maxtext_loader.checkpoint.ring import Ring
from vllm_maxtext_loader.checkpoint.tree import Leaf
from vllm_maxtext_loader.tpu.columns import ColumnRange, LinearColumns, linear_column_ranges
from vllm_maxtext_loader.tpu.device_shards import fill_on_devices, staged_nbytes
from vllm_maxtext_loader.tpu.shards import (
    Block,
    HostShard,
    PendingArray,
    flattened_blocks,
    memory_is_host,
    tiles,
)
from vllm_maxtext_loader.tpu.tile_programs import ShardKind, best_width


@pytest.mark.parametrize("seed", range(20))
def test_ring_never_gives_memory_that_is_taken(seed: int) -> None:
    rng = random.Random(seed)
    ring, taken = Ring(1 << 14), []
    for number in range(400):
        if taken and rng.random() < 0.45:
            memory, mark = taken.pop(0)
            assert np.all(memory == mark)
            ring.release()
        elif (memory := ring.allocate(rng.randrange(1, 6000))) is not None:
            assert memory.ctypes.data % 64 == 0
            memory[:] = number % 251
            taken.append((memory, number % 251))
    assert all(np.all(memory == mark) for memory, mark in taken)


def test_ring_gives_what_is_larger_than_itself_only_alone() -> None:
    ring = Ring(1000)
    assert (large := ring.allocate(5000)) is not None
    assert large.nbytes >= 5000
    assert ring.allocate(1) is None
    ring.release()
    assert ring.allocate(1) is not None
    assert ring.allocate(5000) is None


def test_memory_is_not_used_again_while_somebody_reads_it() -> None:
    import tensorstore as ts

    values = np.arange(65536, dtype=np.float32).reshape(1024, 64)
    leaf = Leaf("a", ("a",), values.shape, values.dtype, (1, 64))
    on_complete = threading.Event()

    def compare(decoded: DecodedRegion) -> None:
        on_complete.wait()
        np.testing.assert_array_equal(decoded.array, values[decoded.region])

    # Half of the budget is for four regions: with all of them in use, the reader has to wait for the first.
    given = 0
    with ThreadPoolExecutor(8) as pool:
        for decoded in read_regions([leaf], {"a": ts.array(values)}, 1 << 15, "here"):
            decoded.readers.append(pool.submit(compare, decoded))
            given += 1
            if given == 4:
                threading.Timer(0.2, on_complete.set).start()
            assert given <= 4 or on_complete.is_set()
    assert given == 64


def test_error_of_who_reads_the_memory_ends_the_reading() -> None:
    import tensorstore as ts

    values = np.zeros((64, 64), np.float32)
    leaf = Leaf("a", ("a",), values.shape, values.dtype, (4, 64))
    failed: Future[None] = Future()
    failed.set_exception(RuntimeError("no memory on the device"))
    regions = read_regions([leaf], {"a": ts.array(values)}, 4 * 1024, "here")
    next(regions).readers.append(failed)
    with pytest.raises(RuntimeError, match="no memory on the device"):
        collections.deque(regions, maxlen=0)


def test_boxes_that_are_not_needed_are_not_read() -> None:
    import tensorstore as ts

    values = np.arange(48, dtype=np.float32).reshape(8, 6)
    leaf = Leaf("a", ("a",), (8, 6), values.dtype, (2, 3))
    arrays = {"a": ts.array(values)}

    def needed(_: Leaf, region: Region) -> bool:
        return region[0].start >= 4

    # A budget of four chunks: every chunk is a region of its own.
    regions = [
        (decoded.region, decoded.array.copy(), decoded.last)
        for decoded in read_regions([leaf], arrays, 4 * 24, "test", needed=needed, outer={"a": (1,)})
    ]
    assert len(regions) == 4
    assert [last for *_, last in regions] == [False, False, False, True]
    for region, array, _ in regions:
        np.testing.assert_array_equal(array, values[region])


@pytest.mark.parametrize("passed_over", ["a", "b", "c", "abc"])
def test_leaves_of_which_nothing_is_needed_are_passed_over(passed_over: str) -> None:
    """A host of a slice whose devices hold no part of a leaf, wherever in the order that leaf is."""
    import tensorstore as ts

    values = np.arange(48, dtype=np.float32).reshape(8, 6)
    leaves = [Leaf(name, (name,), (8, 6), values.dtype, (4, 6)) for name in "abc"]
    # A leaf that is passed over is not even opened.
    arrays = {leaf.key: ts.array(values) for leaf in leaves if leaf.key not in passed_over}
    regions = read_regions(leaves, arrays, 4 * 96, "test", needed=lambda leaf, _: leaf.key not in passed_over)
    assert [(decoded.leaf.key, decoded.last) for decoded in regions] == [
        (name, last) for name in "abc" if name not in passed_over for last in (False, True)
    ]


def test_outer_axes_are_contiguous() -> None:
    import tensorstore as ts

    values = np.arange(120, dtype=np.float32).reshape(4, 5, 6)
    leaf = Leaf("a", ("a",), (4, 5, 6), values.dtype, (4, 5, 6))
    (decoded,) = read_regions([leaf], {"a": ts.array(values)}, 1 << 20, "test", outer={"a": (1,)})
    np.testing.assert_array_equal(decoded.array, values)
    assert all(decoded.array[:, layer].flags.c_contiguous for layer in range(5))


@pytest.mark.parametrize("shape", [(6, 4, 8), (5, 1, 3), (1, 4, 2)])
@pytest.mark.parametrize(
    "axis_groups", [((0,), (1, 2)), ((0, 1), (2,)), ((0,), (1,), (2,)), ((0, 1), (), (2,))]
)
def test_blocks_are_the_flattened_array(
    shape: tuple[int, ...], axis_groups: tuple[tuple[int, ...], ...]
) -> None:
    values = np.arange(np.prod(shape)).reshape(shape)
    flat = values.reshape([math.prod(shape[axis] for axis in group) for group in axis_groups])
    for chunks in itertools.product(*[{1, max(1, size // 2), size} for size in shape]):
        made = np.full_like(flat, -1)
        for region in chunk_regions(Leaf("a", ("a",), shape, values.dtype, chunks), 1):
            for block, starts in flattened_blocks(values[region], region, shape, axis_groups):
                at = tuple(
                    slice(start, start + size) for start, size in zip(starts, block.shape, strict=True)
                )
                assert np.all(made[at] == -1)
                made[at] = block
        np.testing.assert_array_equal(made, flat)


@pytest.mark.engine
@pytest.mark.parametrize("n_shards", [1, 2, 4])
def test_columns_go_where_tpu_inference_puts_them(n_shards: int) -> None:
    from tpu_inference.layers.common.process_weights.linear_weights import (
        LinearWeights,
        process_linear_weights,
    )

    rng = np.random.default_rng(0)
    query, key = rng.random((6, 8, 4), np.float32), rng.random((6, 2, 4), np.float32)
    repeats = max(1, n_shards // 2)
    packed = [query, np.repeat(key, repeats, axis=1), np.repeat(key, repeats, axis=1)]
    sizes = [part[0].size for part in packed]
    wanted = process_linear_weights(
        LinearWeights(jnp.concatenate([part.reshape(6, -1) for part in packed], axis=1), None, None, None),
        fused=True,
        output_sizes=sizes,
        reorder_size=n_shards,
    ).weight
    # Where there is no value leaf, keys serve twice.
    outputs = (("query", (8, 4), 1), ("key", (2, 4), repeats), ("key", (2, 4), repeats))
    other = LinearColumns((("query", (8, 4), 1),), (32,), n_shards)
    layer = LinearColumns(outputs, tuple(sizes), n_shards)
    _, (column_ranges, columns) = linear_column_ranges([other, layer])
    made = np.zeros((6, columns), np.float32)
    for run in column_ranges:
        source = {"query": query, "key": key}[run.leaf].reshape(6, -1)
        made[:, run.start : run.start + run.length] = source[:, run.source : run.source + run.length]
    np.testing.assert_array_equal(made, wanted)


@pytest.mark.parametrize("shape", [(7,), (1, 1), (5, 7), (7, 5, 3), (2, 3, 2, 2)])
@pytest.mark.parametrize("size", [1, 4, 15, 10_000])
def test_parts_cover_a_block_once(shape: tuple[int, ...], size: int) -> None:
    times, rest = np.zeros(shape, int), math.prod(shape[2:])
    for part in tiles(shape, size):
        assert 0 < times[part].size <= max(size, rest)
        times[part] += 1
    assert (times == 1).all()


WAYS = ["host", "devices"]


def pending(
    way: str, shape: tuple[int, ...], dtype: Any, column_ranges: list[ColumnRange] | None = None
) -> PendingArray:
    """An empty array on one device."""
    array = PendingArray(
        parameters=("w",),
        shape=shape,
        sharding=NamedSharding(Mesh(np.array(jax.devices()[:1]), ("model",)), PartitionSpec(None, "model")),
        axis_groups={"a": tuple((axis,) for axis in range(len(shape)))},
        column_ranges=column_ranges or [ColumnRange("a", 0, 0, shape[-1])],
        missing_leaves={"a"},
        on_complete=lambda array: None,
        dtype=np.dtype(dtype),
    )
    if way == "devices":
        fill_on_devices([array])
    return array


def write(array: PendingArray, *blocks: Block) -> None:
    """Writes blocks, the last part first."""
    for task in reversed(list(array.tasks(blocks))):
        task()


def block(values: np.ndarray, offsets: tuple[int, ...], **changes: Any) -> Block:
    """Values for the only device."""
    return Block(jax.devices()[0], values, offsets, **changes)


def test_variable_decides_where_shards_are_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    device = jax.devices()[0]
    assert memory_is_host(device)
    monkeypatch.setenv("VLLM_MAXTEXT_DIRECT", "device")
    assert not memory_is_host(device)


@pytest.mark.parametrize("way", WAYS)
def test_shards_are_filled_in_place(way: str) -> None:
    values = np.random.default_rng(0).random((6, 10), np.float32)
    array = pending(way, (6, 12), np.float32, [ColumnRange("a", 0, 7, 5), ColumnRange("a", 5, 1, 5)])
    for region in chunk_regions(Leaf("a", ("a",), (6, 10), values.dtype, (4, 3)), 1):
        start = region[0].start, region[1].start
        targets = array.targets("a", start, values[region].shape)
        write(array, *[Block(device, values[region][part], offsets) for device, part, offsets in targets])
    wanted = np.zeros((6, 12), np.float32)
    wanted[:, 7:], wanted[:, 1:6] = values[:, :5], values[:, 5:]
    np.testing.assert_array_equal(array.array(), wanted)


@pytest.mark.parametrize("way", WAYS)
def test_written_memory_may_be_used_again(way: str) -> None:
    array, values = pending(way, (4, 6), np.float32), np.ones((2, 6), np.float32)
    write(array, block(values, (1, 0)))
    values[:] = 7
    np.testing.assert_array_equal(np.asarray(array.array()).sum(axis=1), [0, 6, 6, 0])


@pytest.mark.parametrize("rows", [3, 4000])
@pytest.mark.parametrize("way", WAYS)
def test_scales_are_multiplied_in_with_one_rounding(way: str, rows: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.random((rows, 16, 40), np.float32).astype(jnp.bfloat16)
    scales = rng.random(rows, np.float32)
    wanted = jnp.asarray(values.astype(np.float32) * scales[:, None, None]).astype(jnp.bfloat16)
    array = pending(way, (rows + 1, 16, 40), jnp.bfloat16)
    write(array, block(values, (1, 0, 0), scales=scales))
    made = np.asarray(array.array())
    np.testing.assert_array_equal(made[1:], np.asarray(wanted))
    assert not made[0].any()


@pytest.mark.parametrize("way", WAYS)
def test_float32_is_rounded_once(way: str) -> None:
    values = np.random.default_rng(0).random((700, 500), np.float32)
    array = pending(way, (700, 500), jnp.bfloat16)
    write(array, block(values, (0, 0), convert=lambda values: values / np.float32(3)))
    wanted = (values / np.float32(3)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(array.array()), wanted)


@pytest.mark.parametrize("seed", range(20))
def test_devices_hold_what_the_host_holds(seed: int) -> None:
    """Blocks of any shape, in any order, by several threads; the first decides the shape of all tiles."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(size) for size in rng.integers(1, (6, 90, 900)[-int(rng.integers(2, 4)) :]))
    arrays = [pending(way, shape, jnp.bfloat16) for way in WAYS]
    values = rng.random(shape, np.float32).astype(jnp.bfloat16)
    scales = rng.random(shape[0], np.float32) if len(shape) == 3 else None
    chunks = tuple(int(rng.integers(1, size + 1)) for size in shape)
    regions = chunk_regions(Leaf("a", ("a",), shape, values.dtype, chunks), 1)
    for array in arrays:
        with ThreadPoolExecutor(4) as pool:
            done = []
            for start in range(0, len(regions), 3):
                # Some are left out, and some are boxes of their own next to others.
                blocks = [
                    block(
                        values[region],
                        tuple(part.start for part in region),
                        scales=None if scales is None else scales[region[0]],
                    )
                    for region in regions[start : start + 3]
                    if (sum(part.start for part in region) + seed) % 7
                ]
                if blocks:
                    done += [pool.submit(task) for task in array.tasks(blocks)]
            for future in done:
                future.result()
    host, devices = (np.asarray(array.array()).view(np.uint16) for array in arrays)
    np.testing.assert_array_equal(devices, host)


def test_buffers_are_bounded_and_used_again() -> None:
    array = pending("none", (512, 1024), np.float32)
    (staging,) = fill_on_devices([array])
    assert staging.buffers * staging.tile_nbytes <= array.shape[0] * array.shape[1] * 4 // 16
    values = np.random.default_rng(0).random((512, 1024), np.float32)
    tasks = list(array.tasks([block(values, (0, 0))]))
    assert len(tasks) == values.nbytes // staging.tile_nbytes > 4 * staging.buffers
    memory = {buffer.memory.ctypes.data for buffer in [staging._free.get() for _ in range(staging.buffers)]}
    assert len(memory) == staging.buffers
    assert staging._free.empty()


@pytest.mark.parametrize("limit", [1 << 18, 1 << 20])
def test_buffers_are_within_their_limit(limit: int) -> None:
    """What is on its way to the devices is a part of the read budget."""
    (staging,) = fill_on_devices([pending("none", (1 << 15, 1 << 13), np.float32)], limit)
    assert staging.buffers >= 2
    assert limit // 2 < staging.buffers * staging.tile_nbytes <= limit
    assert staged_nbytes(1 << 40, 4 * limit) == limit


def test_programs_are_compiled_before_there_are_values() -> None:
    array = pending("none", (64, 96), np.float32)
    (staging,) = fill_on_devices([array])
    assert array.on_devices is not None
    assert not array.on_devices.is_prepared
    array.on_devices.prepare([block(np.broadcast_to(np.uint8(0), (16, 96)), (0, 0))])
    assert array.on_devices.is_prepared
    (program,) = staging.programs.values()
    values = np.random.default_rng(0).random((64, 96), np.float32)
    write(array, block(values[:48], (0, 0)), block(values[48:], (48, 0)))
    assert [*staging.programs.values()] == [program]
    assert program.tile == (16, 96)
    np.testing.assert_array_equal(array.array(), values)


def test_end_of_a_load_ends_its_threads_and_buffers() -> None:
    before = set(threading.enumerate())
    array = pending("none", (64, 64), np.float32)
    (staging,) = fill_on_devices([array])
    values = np.ones((64, 64), np.float32)
    write(array, block(values, (0, 0)))
    buffer = staging._free.get()
    staging._free.put(buffer)
    memory = weakref.ref(buffer.memory)
    del buffer
    assert any(thread.name.startswith("maxtext-compile") for thread in set(threading.enumerate()) - before)
    staging.close()
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("maxtext-compile"):
            thread.join(10)
            assert not thread.is_alive()
    assert memory() is None
    np.testing.assert_array_equal(array.array(), values)


def test_error_of_a_task_leaves_its_buffer_to_the_others() -> None:
    array = pending("none", (64, 64), np.float32)
    (staging,) = fill_on_devices([array])

    def fails(values: np.ndarray) -> np.ndarray:
        raise MemoryError("no memory")

    values = np.ones((64, 64), np.float32)
    for _ in range(staging.buffers + 1):
        with pytest.raises(MemoryError, match="no memory"):
            write(array, block(values, (0, 0), convert=fails))
    write(array, block(values, (0, 0)))
    np.testing.assert_array_equal(array.array(), values)


def test_arrays_are_filled_where_they_lie() -> None:
    """Neither a tile nor a copy of the array takes a second array's memory."""
    array = pending("none", (256, 512), np.float32)
    (staging,) = fill_on_devices([array])
    write(array, block(np.ones((256, 512), np.float32), (0, 0)))
    (staged,) = staging.arrays
    assert staged.values is not None
    before = staged.values.unsafe_buffer_pointer()
    write(array, block(np.full((10, 10), 2, np.float32), (3, 3)))
    made = array.array()
    assert made.addressable_shards[0].data.unsafe_buffer_pointer() == before
    assert np.asarray(made).sum() == 256 * 512 + 100
    for program in staging.programs.values():
        compiled = program.compiled.result()
        assert compiled.memory_analysis().temp_size_in_bytes <= 4096


@pytest.mark.parametrize(
    ("widths", "wanted"),
    [((512, 256, 256), 256), ((88, 88), 88), ((1000, 1), 1000), ((4096, 2048, 2048), 2048), ((7,), 7)],
)
def test_width_of_tiles(widths: tuple[int, ...], wanted: int) -> None:
    assert best_width(widths) == wanted


@pytest.mark.parametrize("lengths", [(8, 2816, 88), (1, 2816, 88), (729, 88), (1, 1), (3, 1, 200)])
@pytest.mark.parametrize("limit", [64, 1000, 1 << 22])
def test_tiles_are_small_and_cover_without_much_waste(lengths: tuple[int, ...], limit: int) -> None:
    tile = ShardKind(lengths, np.dtype(jnp.bfloat16), 88).tile(lengths, limit)
    assert math.prod(tile) * 2 <= limit
    for length, part in zip(lengths, tile, strict=True):
        count = math.ceil(length / part)
        assert count * part - length < count


def test_full_shard_becomes_the_array_without_a_copy() -> None:
    shard = HostShard((64, 64), np.dtype(np.float32), jax.devices()[0])
    assert shard.array().unsafe_buffer_pointer() == shard._values.ctypes.data
