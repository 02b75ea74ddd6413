"""Large chunks in a bucket: fetched by ranges, decoded while they arrive, equal to what was written."""

from __future__ import annotations

import collections
import functools
import itertools
import logging
import operator
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from support import gcs
from support.checkpoints import write_orbax
from support.damage import cut
from vllm_maxtext_loader import errors
from vllm_maxtext_loader.checkpoint.encoding import Encoding
from vllm_maxtext_loader.checkpoint.find import locate
from vllm_maxtext_loader.checkpoint.reader import DecodedRegion, Wait, read_regions
from vllm_maxtext_loader.checkpoint.regions import Region
from vllm_maxtext_loader.checkpoint.storage.path import tensorstore_context
from vllm_maxtext_loader.checkpoint.storage.ranges import (
    Extent,
    Fetcher,
    Located,
    Stream,
    Transfers,
    UnexpectedValueError,
)
from vllm_maxtext_loader.checkpoint.tree import Leaf, Tree, read_tree

LIMIT = 3.0
BUDGET = 64 << 20
RANGE = 1 << 20
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FORMATS = {
    "ocdbt zarr3": (True, True),
    "ocdbt zarr2": (True, False),
    "zarr3": (False, True),
    "zarr2": (False, False),
}


def weights(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.02).astype(BFLOAT16)


TABLE = weights((3000, 1000))
KERNEL = weights((8, 3, 70, 900), seed=1)


@pytest.fixture(scope="module")
def _environment() -> Iterator[None]:
    with gcs.environment(gcs.shared()[1].url, VLLM_MAXTEXT_TIMEOUT=str(LIMIT)):
        yield


@pytest.fixture
def proxy(_environment: None) -> Iterator[gcs.Proxy]:
    proxy = gcs.shared()[1]
    proxy.clear()
    yield proxy
    failed = bool(proxy.faults)
    proxy.clear()
    if failed:
        # What was given up is asked for again for a while.
        gcs.wait_for_quiet(0.5)


@pytest.fixture(scope="module", params=list(FORMATS))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A run with two large leaves, each one chunk of some MB; its URL and its directory."""
    directory = tmp_path_factory.mktemp("ranges")
    ocdbt, zarr3 = FORMATS[request.param]
    tree = {"token_embedder": {"embedding": TABLE}, "decoder": {"kernel": KERNEL, "norm": weights((5,))}}
    write_orbax(directory / "0", {"params": {"params": tree}}, ocdbt=ocdbt, zarr3=zarr3)
    (directory / "0/commit_success.txt").touch()
    prefix = f"ranges-{request.param.replace(' ', '-')}"
    gcs.shared()[0].upload(directory, gcs.BUCKET, f"{prefix}/")
    return f"gs://{gcs.BUCKET}/{prefix}", directory


def read(url: str, **options: Any) -> list[DecodedRegion]:
    """Everything, in memory that stays."""
    tree = read_tree(locate(url, None), tensorstore_context())
    return read_all(tree, url, **options)


def read_all(tree: Tree, url: str, **options: Any) -> list[DecodedRegion]:
    budget = options.pop("budget", BUDGET)
    return [
        DecodedRegion(found.leaf, found.region, found.array.copy(), found.last)
        for found in read_regions(tree.leaves.values(), tree.arrays, budget, url, **options)
    ]


def assembled(regions: list[DecodedRegion], name: str) -> np.ndarray:
    leaf = next(found.leaf for found in regions if found.leaf.name == name)
    values = np.full(leaf.shape, np.nan, leaf.dtype)
    for found in regions:
        if found.leaf is leaf:
            values[found.region] = found.array
    return values


def stored_nbytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def data_reads(proxy: gcs.Proxy) -> list[gcs.Request]:
    """Requests for parts of chunks, not for metadata."""
    return [request for request in proxy.reads() if request.sent > 10_000]


def test_large_chunks_come_by_ranges(run: tuple[str, Path], proxy: gcs.Proxy) -> None:
    url, path = run
    transfers, waits = Transfers(), list[Wait]()
    regions = read(url, transfers=transfers, on_wait=waits.append)
    np.testing.assert_array_equal(assembled(regions, "token_embedder.embedding"), TABLE)
    np.testing.assert_array_equal(assembled(regions, "decoder.kernel"), KERNEL)
    found = data_reads(proxy)
    assert len(found) >= (TABLE.nbytes + KERNEL.nbytes) * 0.7 / RANGE, "several ranges for each chunk"
    assert max(request.sent for request in found) <= RANGE
    gcs.assert_once(proxy)
    assert sum(request.sent for request in proxy.reads()) <= stored_nbytes(path), "no byte twice, in all"
    stored = sum(request.sent for request in found)
    assert transfers.requests >= len(found)
    assert stored <= transfers.nbytes <= stored + 1000
    assert transfers.seconds > 0
    assert all(wait.network is not None and wait.network <= wait.seconds + 0.01 for wait in waits)


def test_ranges_come_side_by_side(run: tuple[str, Path], proxy: gcs.Proxy) -> None:
    url, _ = run
    tree = read_tree(locate(url, None), tensorstore_context())
    proxy.faults = [gcs.Fault("read ", rate=2 * RANGE)]
    transfers, started = Transfers(), time.monotonic()
    read_all(tree, url, transfers=transfers)
    assert transfers.in_flight > 3
    assert time.monotonic() - started < 0.7 * transfers.nbytes / (2 * RANGE), "faster than one connection"


@pytest.mark.parametrize(
    "fault", [{"hang": 60}, {"cut": 500_000}, {"status": 503}], ids=["stall", "cut", "503"]
)
def test_a_range_is_repeated_and_the_others_go_on(
    run: tuple[str, Path], proxy: gcs.Proxy, fault: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    url, _ = run
    tree = read_tree(locate(url, None), tensorstore_context())
    proxy.clear()
    # In files of zarr v3 the index of a shard comes before its ranges.
    proxy.faults = [gcs.Fault("read .*(process_0/d/|embedding/c?)", after=1, times=1, **fault)]
    ours = logging.getLogger("vllm.vllm_maxtext_loader")
    ours.addHandler(caplog.handler)
    try:
        regions = read_all(tree, url)
    finally:
        ours.removeHandler(caplog.handler)
    np.testing.assert_array_equal(assembled(regions, "token_embedder.embedding"), TABLE)
    # What was answered in full was answered once: only the range that failed was asked for again.
    gcs.assert_once(proxy)
    failed = [request for request in proxy.requests if request.status not in (200, 206)]
    assert len(failed) == 1
    repeated = [(request.name, request.span) for request in proxy.reads()]
    assert repeated.count((failed[0].name, failed[0].span)) == 1
    if "hang" in fault:
        assert proxy.requests[-1].span == failed[0].span, "the others came while it hung"
    assert "1 request failed" in caplog.text


def test_persistent_fault_ends_in_one_error(run: tuple[str, Path], proxy: gcs.Proxy) -> None:
    url, _ = run
    tree = read_tree(locate(url, None), tensorstore_context())
    proxy.faults = [gcs.Fault("read ", status=503, after=3)]
    started = time.monotonic()
    with pytest.raises(errors.StorageError, match=r"cannot read leaf params.*503|_TIMEOUT"):
        read_all(tree, url)
    assert time.monotonic() - started < LIMIT + 4


def test_truncated_data(run: tuple[str, Path], proxy: gcs.Proxy, tmp_path: Path) -> None:
    url, directory = run
    server = gcs.shared()[0]
    victim = max(
        (path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    name = f"{url.removeprefix(f'gs://{gcs.BUCKET}/')}/{victim.relative_to(directory)}"
    whole = victim.read_bytes()
    damaged = tmp_path / "damaged"
    damaged.write_bytes(whole)
    cut(damaged, len(whole) - 100_000)
    server.put(gcs.BUCKET, name, damaged.read_bytes())
    try:
        with pytest.raises(errors.ReadError, match=r"cannot read leaf params\.params\..*copy it again"):
            read(url)
    finally:
        server.put(gcs.BUCKET, name, whole)


def test_only_what_is_needed_is_fetched(run: tuple[str, Path], proxy: gcs.Proxy) -> None:
    url, _ = run
    tree = read_tree(locate(url, None), tensorstore_context())
    proxy.clear()

    def needed(leaf: Leaf, region: Region) -> bool:
        return leaf.name == "decoder.kernel"

    regions = read_all(tree, url, needed=needed)
    assert {found.leaf.name for found in regions} == {"decoder.kernel"}
    assert sum(request.sent for request in proxy.reads(url)) < KERNEL.nbytes
    assert read_all(tree, url, needed=lambda leaf, region: False) == []


def test_abandoned_reading_ends(run: tuple[str, Path], proxy: gcs.Proxy) -> None:
    url, _ = run
    before = {thread.ident for thread in threading.enumerate()}

    def threads() -> list[str]:
        return [
            thread.name
            for thread in threading.enumerate()
            if thread.name.startswith("maxtext-") and thread.ident not in before
        ]

    tree = read_tree(locate(url, None), tensorstore_context())
    proxy.faults = [gcs.Fault("read ", rate=RANGE / 4)]
    started = read_regions(tree.leaves.values(), tree.arrays, BUDGET, url)
    next(started)
    unused = read_regions(tree.leaves.values(), tree.arrays, BUDGET, url)
    assert any(name == "maxtext-fetch" for name in threads())
    del started, unused
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threads() == []


def stored_array(
    path: str | dict[str, Any], values: np.ndarray, metadata: dict[str, Any], driver: str
) -> ts.TensorStore:
    """An array that TensorStore writes; `path`: a kvstore's URL or specification."""
    spec = {"driver": driver, "kvstore": path, "metadata": metadata}
    array = ts.open(spec, create=True, delete_existing=True).result()
    array[...] = values
    return ts.open({**spec, "fill_missing_data_reads": False}, open=True).result()


ZSTD = {"id": "zstd", "level": 1}
BYTES: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
INDEX = {"index_codecs": [BYTES, {"name": "crc32c"}], "index_location": "end"}


def v3(
    shape: tuple[int, ...], chunk: list[int], codecs: list[Any], data_type: str = "bfloat16"
) -> dict[str, Any]:
    return {
        "shape": list(shape),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "codecs": codecs,
        "data_type": data_type,
    }


def v2(shape: tuple[int, ...], chunks: list[int], **more: Any) -> dict[str, Any]:
    return {"shape": list(shape), "chunks": chunks, "dtype": "bfloat16", "compressor": ZSTD, **more}


def sharded(chunk: list[int], **more: Any) -> dict[str, Any]:
    codecs = [BYTES, {"name": "zstd"}]
    return {
        "name": "sharding_indexed",
        "configuration": {"chunk_shape": chunk, "codecs": codecs, **INDEX, **more},
    }


SHAPE = (10, 3, 700)
ENCODINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "v2": ("zarr", v2(SHAPE, [5, 3, 700])),
    "v2, chunks that end outside": ("zarr", v2(SHAPE, [4, 2, 500])),
    "v2, not compressed": ("zarr", v2(SHAPE, [4, 2, 500], compressor=None)),
    "v2, keys with slashes": ("zarr", v2(SHAPE, [4, 3, 700], dimension_separator="/")),
    "v3": ("zarr3", v3(SHAPE, [5, 3, 700], [BYTES, {"name": "zstd"}])),
    "v3, chunks that end outside": ("zarr3", v3(SHAPE, [4, 2, 500], [BYTES, {"name": "zstd"}])),
    "v3, not compressed": ("zarr3", v3(SHAPE, [4, 3, 700], [BYTES])),
    "v3, a chunk per shard": ("zarr3", v3(SHAPE, [5, 3, 700], [sharded([5, 3, 700])])),
    "v3, chunks in shards": ("zarr3", v3(SHAPE, [4, 4, 700], [sharded([2, 2, 350])])),
}
LEFT_TO_TENSORSTORE: dict[str, tuple[str, dict[str, Any]]] = {
    "v2, Fortran order": ("zarr", v2(SHAPE, [5, 3, 700], order="F")),
    "v2, blosc": ("zarr", v2(SHAPE, [5, 3, 700], compressor={"id": "blosc"})),
    "v2, big endian": ("zarr", v2(SHAPE, [5, 3, 700], dtype=">f4")),
    "v3, gzip": ("zarr3", v3(SHAPE, [5, 3, 700], [BYTES, {"name": "gzip"}])),
    "v3, transposed": (
        "zarr3",
        v3(SHAPE, [5, 3, 700], [{"name": "transpose", "configuration": {"order": [2, 0, 1]}}, BYTES]),
    ),
    "v3, index first": ("zarr3", v3(SHAPE, [5, 3, 700], [sharded([5, 3, 700], index_location="start")])),
}


@pytest.mark.parametrize("outer", [(), (1,), (2, 0)], ids=str)
@pytest.mark.parametrize("name", [*ENCODINGS, *LEFT_TO_TENSORSTORE])
def test_every_encoding(proxy: gcs.Proxy, name: str, outer: tuple[int, ...]) -> None:
    driver, metadata = (ENCODINGS | LEFT_TO_TENSORSTORE)[name]
    values = weights(SHAPE)
    path = f"gs://{gcs.BUCKET}/encodings/{name.replace(' ', '-').replace(',', '')}/"
    array = stored_array(path, values, metadata, driver)
    assert (Encoding.of(array) is None) == (name in LEFT_TO_TENSORSTORE)
    proxy.clear()
    leaf = Leaf(
        "a", ("a",), SHAPE, np.dtype(array.dtype.numpy_dtype), tuple(array.chunk_layout.read_chunk.shape)
    )
    for budget in (1, 12_000, BUDGET):
        actual = np.zeros(SHAPE, leaf.dtype)
        for found in read_regions([leaf], {"a": array}, budget, path, outer={"a": outer}):
            actual[found.region] = found.array
        np.testing.assert_array_equal(actual, values.astype(leaf.dtype))
        if name in ENCODINGS:
            gcs.assert_once(proxy, path)
        proxy.clear()


LARGE = weights((96, 2, 40, 500), seed=2)
"""7.3 MiB; chunks are cut into parts where they are larger than 2 MiB, whatever the budget."""

LARGE_ENCODINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "v2": ("zarr", v2(LARGE.shape, [*LARGE.shape])),
    "v2, two chunks": ("zarr", v2(LARGE.shape, [48, 2, 40, 500])),
    "v2, chunks that end outside": ("zarr", v2(LARGE.shape, [64, 2, 40, 500])),
    "v2, not compressed": ("zarr", v2(LARGE.shape, [*LARGE.shape], compressor=None)),
    "v3": ("zarr3", v3(LARGE.shape, [*LARGE.shape], [BYTES, {"name": "zstd"}])),
    "v3, a chunk per shard": ("zarr3", v3(LARGE.shape, [*LARGE.shape], [sharded([*LARGE.shape])])),
    "v3, chunks in shards": ("zarr3", v3(LARGE.shape, [*LARGE.shape], [sharded([48, 2, 40, 500])])),
}


def large_arrays(name: str) -> tuple[list[Leaf], dict[str, ts.TensorStore], str]:
    """Three leaves of the same values, and a small one between them."""
    driver, metadata = LARGE_ENCODINGS[name]
    root = f"gs://{gcs.BUCKET}/parts/{name.replace(' ', '-').replace(',', '')}/"
    arrays = {key: stored_array(f"{root}{key}/", LARGE, metadata, driver) for key in "abc"}
    arrays["small"] = stored_array(f"{root}small/", weights((5,)), v2((5,), [5]), "zarr")
    leaves = [
        Leaf(
            key, (key,), tuple(arrays[key].shape), BFLOAT16, tuple(arrays[key].chunk_layout.read_chunk.shape)
        )
        for key in ("a", "small", "b", "c")
    ]
    return leaves, arrays, root


@pytest.mark.parametrize("outer", [(), (1,)], ids=str)
@pytest.mark.parametrize("name", LARGE_ENCODINGS)
def test_large_chunks_in_parts(proxy: gcs.Proxy, name: str, outer: tuple[int, ...]) -> None:
    leaves, arrays, root = large_arrays(name)
    for budget in (1, 4 << 20, BUDGET):
        proxy.clear()
        values = {leaf.key: np.zeros(leaf.shape, leaf.dtype) for leaf in leaves}
        order: list[str] = []
        completed: list[str] = []
        waits = list[Wait]()
        for found in read_regions(
            leaves,
            arrays,
            budget,
            root,
            in_parts=True,
            outer=dict.fromkeys("abc", outer),
            on_wait=waits.append,
        ):
            assert found.leaf.key not in completed
            values[found.leaf.key][found.region] = found.array
            order.append(found.leaf.key)
            if found.last:
                completed.append(found.leaf.key)
        for key in "abc":
            np.testing.assert_array_equal(values[key].view(np.uint16), LARGE.view(np.uint16))
        assert sorted(completed) == ["a", "b", "c", "small"]
        if budget < BUDGET or leaves[0].chunks == LARGE.shape:
            assert len(order) > 8, "parts"
        if budget == BUDGET and leaves[0].chunks == LARGE.shape:
            assert order[:7] == ["small", "a", "b", "c", "a", "b", "c"], "in turn"
        gcs.assert_once(proxy, root)
        assert all(wait.network is not None and wait.network <= wait.seconds + 0.01 for wait in waits)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *itertools.product(
            ["v2", "v3, a chunk per shard", "v3, chunks in shards"], ["flipped", "short", "gone"]
        ),
        ("v3, a chunk per shard", "index"),
    ],
)
def test_damage_in_a_part(proxy: gcs.Proxy, name: str, damage: str) -> None:
    """What is wrong far behind the first part is an error with TensorStore's words, and nothing hangs."""
    leaves, arrays, root = large_arrays(name)
    server = gcs.shared()[0]
    prefix = root.removeprefix(f"gs://{gcs.BUCKET}/")
    victim = max(server.names(gcs.BUCKET, f"{prefix}b/"), key=lambda name: len(server.get(gcs.BUCKET, name)))
    data = bytearray(server.get(gcs.BUCKET, victim))
    middle = len(data) * 3 // 4
    match damage:
        case "flipped":
            data[middle : middle + 4000] = bytes(4000)
        case "short":
            del data[middle:]
        case "index":
            data[-10] ^= 0xFF
    if damage == "gone":
        server.delete(gcs.BUCKET, victim)
    else:
        server.put(gcs.BUCKET, victim, bytes(data))
    with pytest.raises(errors.ReadError, match="cannot read leaf b of"):
        for _ in read_regions(leaves, arrays, BUDGET, root, in_parts=True):
            pass


def test_index_in_a_database(proxy: gcs.Proxy) -> None:
    """The index of a shard comes before parts are given away: what they were decoded from is what it names."""
    base = {"driver": "ocdbt", "base": f"gs://{gcs.BUCKET}/parts/database/", "path": "a/"}
    array = stored_array(base, LARGE, v3(LARGE.shape, [*LARGE.shape], [sharded([*LARGE.shape])]), "zarr3")
    leaf = Leaf("a", ("a",), LARGE.shape, BFLOAT16, LARGE.shape)
    regions = list(read_regions([leaf], {"a": array}, 1, "here", in_parts=True))
    assert len(regions) > 3
    assert array.kvstore is not None
    value = bytearray(array.kvstore["c/0/0/0/0"])
    value[-10] ^= 0xFF
    array.kvstore["c/0/0/0/0"] = bytes(value)
    opened = ts.open(array.spec(), open=True).result()
    damaged = read_regions([leaf], {"a": opened}, 1, "here", in_parts=True)
    with pytest.raises(errors.ReadError, match="cannot read leaf a of"):
        next(damaged)


@pytest.mark.parametrize(
    "fault", [{"hang": 60}, {"cut": 500_000}, {"status": 503}], ids=["stall", "cut", "503"]
)
def test_faults_while_parts_are_read(proxy: gcs.Proxy, fault: dict[str, Any]) -> None:
    leaves, arrays, root = large_arrays("v3, a chunk per shard")
    proxy.clear()
    proxy.faults = [gcs.Fault("read .*/b/c", after=3, times=1, **fault)]
    values = np.zeros(LARGE.shape, BFLOAT16)
    for found in read_regions(leaves, arrays, BUDGET, root, in_parts=True):
        if found.leaf.key == "b":
            values[found.region] = found.array
    np.testing.assert_array_equal(values.view(np.uint16), LARGE.view(np.uint16))
    gcs.assert_once(proxy, root)
    assert sum(request.status not in (200, 206) for request in proxy.requests) == 1


class Recorder:
    """A store whose values never arrive; notes the ranges that are asked for."""

    def __init__(self) -> None:
        self.requested: collections.Counter[str] = collections.Counter()

    def read(self, key: str, byte_range: slice, staleness_bound: float) -> Any:
        self.requested[key] += byte_range.stop - byte_range.start
        return ts.Promise[Any].new()[1]

    def await_requested(self, **ranges: int) -> None:
        """Waits until so many ranges of each value were asked for, and asserts that it stays so."""
        wanted = {name: count * RANGE for name, count in ranges.items()}
        deadline = time.monotonic() + 5
        while self.requested != wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert self.requested == wanted


def test_a_stream_that_is_found_late_gets_its_part_of_the_window() -> None:
    """Those after it would fill the window with bytes that nobody reads yet, and it would get one range at a time."""
    store = Recorder()
    found: dict[str, Located] = {}

    def streams(fetcher: Fetcher) -> Iterator[Stream]:
        for name in "abcdef":
            yield Stream(fetcher, functools.partial(operator.setitem, found, name))

    fetcher = Fetcher(streams, 12 * RANGE, 3, Transfers())
    fetcher.start()

    def locate(name: str) -> None:
        found[name](Extent(cast(Any, store), name, 0, 100 * RANGE, 100 * RANGE))

    try:
        while len(found) < 4:
            time.sleep(0.01)
        for name in "abd":
            locate(name)
        store.await_requested(a=4, b=4)
        locate("c")
        store.await_requested(a=4, b=4, c=4)
    finally:
        fetcher.close()
        fetcher.join()


def test_streams_that_are_read_go_on_in_a_window_of_one_range() -> None:
    store = Recorder()

    def streams(fetcher: Fetcher) -> Iterator[Stream]:
        for name in "abcd":
            extent = Extent(cast(Any, store), name, 0, 100 * RANGE, 100 * RANGE)
            yield Stream(fetcher, lambda found, extent=extent: found(extent))

    fetcher = Fetcher(streams, 1, 3, Transfers())
    fetcher.start()
    try:
        store.await_requested(a=1, b=1, c=1)
    finally:
        fetcher.close()
        fetcher.join()


def test_missing_chunks_in_shards(proxy: gcs.Proxy) -> None:
    """A chunk that its shard does not hold is an error, or zero, as TensorStore is told."""
    path = f"gs://{gcs.BUCKET}/encodings/missing/"
    values = weights((8, 16))
    values[:4] = 0
    array = stored_array(path, values, v3((8, 16), [8, 16], [sharded([4, 16])]), "zarr3")
    leaf = Leaf("a", ("a",), (8, 16), BFLOAT16, (4, 16))
    with pytest.raises(errors.ReadError, match="cannot read leaf a of"):
        list(read_regions([leaf], {"a": array}, 256, path))
    filled = ts.open({**array.spec().to_json(), "fill_missing_data_reads": True}).result()
    rows = [found.array.copy() for found in read_regions([leaf], {"a": filled}, 256, path)]
    np.testing.assert_array_equal(np.concatenate(rows), values)


class Bytes:
    """A source of parts."""

    def __init__(self, data: bytes, size: int) -> None:
        self._parts = iter([data[start : start + size] for start in range(0, len(data), size)])

    def read(self, size: int = -1) -> bytes:
        return next(self._parts, b"")


@pytest.mark.parametrize("damage", ["", "short", "long", "flipped", "other shape"])
@pytest.mark.parametrize("compressor", [ZSTD, None], ids=["zstd", "raw"])
def test_damaged_chunks_are_not_taken(compressor: dict[str, Any] | None, damage: str) -> None:
    values = weights((300, 1000))
    path = "memory://damage/"
    context = ts.Context()
    spec = {
        "driver": "zarr",
        "kvstore": path,
        "metadata": v2(values.shape, [300, 1000], compressor=compressor),
    }
    array = ts.open(spec, create=True, context=context).result()
    array[...] = values
    assert array.kvstore is not None
    data = array.kvstore["0.0"]
    target = np.zeros(values.shape, BFLOAT16)
    encoding = Encoding.of(array)
    assert encoding is not None
    match damage:
        case "short":
            data = data[:-1000]
        case "long":
            data += data
        case "flipped":
            data = bytes([data[0] ^ 0xFF]) + data[1:]
        case "other shape":
            encoding = Encoding((300, 1001), *list(vars(encoding).values())[1:])
    if not damage or (damage == "flipped" and compressor is None):
        encoding.decode(Bytes(data, 7777), target)
        assert np.array_equal(target.view(np.uint16), values.view(np.uint16)) == (not damage)
        return
    with pytest.raises(UnexpectedValueError):
        encoding.decode(Bytes(data, 7777), target)


def test_many_small_chunks(proxy: gcs.Proxy) -> None:
    values = weights((512, 64))
    path = f"gs://{gcs.BUCKET}/encodings/small/"
    array = stored_array(path, values, v2(values.shape, [1, 64]), "zarr")
    proxy.clear()
    leaf = Leaf("a", ("a",), values.shape, BFLOAT16, (1, 64))
    regions = [found.array.copy() for found in read_regions([leaf], {"a": array}, 1 << 15, path)]
    np.testing.assert_array_equal(np.concatenate(regions), values)
    assert proxy.counts(path) == {"read": 512}, "a request for each chunk, none to find it"
    spans = [request.span for request in proxy.reads(path)]
    assert not any(itertools.chain(spans)), "whole chunks"
