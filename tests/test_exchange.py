"""Hosts that exchange what they read: who reads what, real sockets between threads and processes, and what ends an exchange."""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.exchange_host import Values, make_values
from vllm_maxtext_loader.checkpoint.exchange.connection import pieces
from vllm_maxtext_loader.checkpoint.exchange.exchange import Exchange
from vllm_maxtext_loader.checkpoint.exchange.peers import Peers
from vllm_maxtext_loader.checkpoint.exchange.rendezvous import NoExchangeError, Terms, meet, stay_away
from vllm_maxtext_loader.checkpoint.exchange.sharing import (
    Assignment,
    Needs,
    assign,
    even_nbytes,
    small_nbytes,
)
from vllm_maxtext_loader.checkpoint.reader import read_regions
from vllm_maxtext_loader.checkpoint.regions import Region
from vllm_maxtext_loader.checkpoint.tree import Leaf
from vllm_maxtext_loader.engine import stores
from vllm_maxtext_loader.errors import MaxTextLoadError, ReadError, StorageError

PROCESS = Path(__file__).parent / "support" / "exchange_host.py"
LIMIT = 1.0
"""Seconds without progress after which hosts give up, where a test waits for that."""

PATIENT = 10.0
"""The same, where it does not."""


def leaf_of(name: str, shape: tuple[int, ...], chunks: tuple[int, ...]) -> Leaf:
    return Leaf(name, (name,), shape, np.dtype(np.float32), chunks)


def columns(hosts: int, width: int) -> Callable[[Leaf, Region], Needs]:
    """Every host needs an equal part of the last axis, as with tensor parallelism."""

    def needs_of(_: Leaf, region: Region) -> Needs:
        each = width // hosts
        low = np.maximum(np.arange(hosts) * each, region[-1].start)
        high = np.minimum((np.arange(hosts) + 1) * each, region[-1].stop)
        boxes = np.array([[(part.start, part.stop) for part in region]] * hosts)
        boxes[:, -1, 0], boxes[:, -1, 1] = low, high
        return Needs(np.flatnonzero(low < high), boxes[low < high])

    return needs_of


class TestAssign:
    def test_every_region_has_one_owner_that_needs_it(self) -> None:
        leaves = [leaf_of("a", (64, 128), (8, 16)), leaf_of("b", (32, 128), (8, 128))]
        found = assign(leaves, range(4), 1, columns(4, 128), 0)
        total = sum(leaf.nbytes for leaf in leaves)
        assert sum(found.read.values()) == total
        assert [share.number for share in found.shares] == list(range(len(found.shares)))
        for share in found.shares:
            assert share.part(share.owner if share.owner is not None else -1) is not None
        # A chunk of the first leaf lies within one host's columns, one of the second in all hosts'.
        assert sum(found.alone.values()) == leaves[0].nbytes + 4 * leaves[1].nbytes
        assert found.is_gain

    def test_reading_is_spread_evenly(self) -> None:
        found = assign([leaf_of("a", (6400, 64), (64, 64))], range(8), 1, columns(8, 64), 0)
        assert max(found.read.values()) - min(found.read.values()) <= 64 * 64 * 4

    def test_equal_hosts_are_taken_in_order(self) -> None:
        found = assign([leaf_of("a", (8, 8), (1, 8))], [2, 5, 7], 1, lambda *_: only([2, 5, 7]), 0)
        assert [share.owner for share in found.shares] == [2, 5, 7, 2, 5, 7, 2, 5]

    def test_small_regions_and_those_of_other_paths_are_read_by_all(self) -> None:
        leaves = [leaf_of("small", (4, 4), (4, 4)), leaf_of("large", (64, 64), (64, 64))]
        found = assign(leaves, range(2), 1, columns(2, 64), 65)
        assert [share.owner for share in found.shares] == [None, 0]
        whole = assign(leaves, range(2), 1, lambda *_: None, 0)
        assert [(share.owner, share.part(1)) for share in whole.shares] == [
            (None, share.region) for share in whole.shares
        ]
        assert not whole.is_gain
        assert small_nbytes(1 << 40) == 1 << 20
        assert small_nbytes(1 << 20) == 1 << 8

    def test_large_models_are_cut_into_enough_regions(self) -> None:
        assert even_nbytes(1 << 30, 64) == 8 << 20
        assert even_nbytes(1 << 40, 64) == 1 << 29

    def test_region_that_nobody_needs_is_not_read(self) -> None:
        none = Needs(np.empty(0, np.int64), np.empty((0, 2, 2), np.int64))
        assert assign([leaf_of("a", (8, 8), (4, 8))], range(2), 1, lambda *_: none, 0).shares == []

    def test_hosts_that_agree_have_one_digest(self) -> None:
        leaves = [leaf_of("a", (64, 128), (8, 16))]
        first, again = (assign(leaves, range(4), 1, columns(4, 128), 0).digest() for _ in range(2))
        assert first == again
        assert first != assign(leaves, range(4), 1024, columns(4, 128), 0).digest()
        assert first != assign(leaves, range(4), 1, lambda *_: only([0, 1, 2, 3]), 0).digest()


def only(hosts: list[int]) -> Needs:
    return Needs(np.array(hosts), np.array([[(0, 8), (0, 8)]] * len(hosts)))


@pytest.mark.parametrize("nbytes", [1, 7, 64, 1 << 20])
def test_pieces_are_the_values_in_order(nbytes: int) -> None:
    values = np.arange(6 * 7 * 5, dtype=np.uint16).reshape(6, 7, 5)[1:, :, 1:4]
    cut = list(pieces(values, nbytes))
    np.testing.assert_array_equal(np.concatenate([piece.ravel() for piece in cut]), values.ravel())
    assert all(piece.nbytes <= max(nbytes, values.itemsize) for piece in cut)


class Shelf:
    """A store in memory; values may be replaced before they are read."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.changed = threading.Condition()
        self.replace: dict[str, Callable[[str], str]] = {}

    def set(self, key: str, value: str) -> None:
        with self.changed:
            self.values[key] = self.replace.get(key, str)(value)
            self.changed.notify_all()

    def get(self, key: str, seconds: float) -> str:
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, seconds):
                raise TimeoutError(key)
            return self.values[key]


def all_meet(
    store: Any,
    hosts: list[int],
    assignment: Assignment,
    *,
    skip: tuple[int, ...] = (),
    limit: float = PATIENT,
) -> dict[int, Peers | NoExchangeError]:
    """What each host, a thread, finds."""

    def come(host: int) -> Peers | NoExchangeError:
        terms = Terms(host, hosts, "127.0.0.1", 1 << 20, "here", limit)
        try:
            return meet(store, terms, lambda _: assignment)[0]
        except NoExchangeError as error:
            return error

    present = [host for host in hosts if host not in skip]
    with ThreadPoolExecutor(len(present)) as pool:
        return dict(zip(present, pool.map(come, present), strict=True))


SHAPE, CHUNKS = (48, 3, 64), (8, 3, 64)


@pytest.fixture
def assignment() -> Assignment:
    leaves = [leaf_of("a", SHAPE, CHUNKS), leaf_of("b", SHAPE, CHUNKS)]
    return assign(leaves, range(3), 1, columns(3, 64), 0)


def load(
    exchange: Exchange, assignment: Assignment, arrays: dict[str, Any], budget: int, **options: Any
) -> dict[int, np.ndarray]:
    """What one host has after an exchange, by share."""
    host = exchange._peers.host
    own = [share for share in assignment.shares if share.part(host) is not None]
    found = {}
    with exchange:
        leaves = list({share.leaf.key: share.leaf for share in own}.values())
        regions = read_regions(leaves, arrays, budget, "here", exchange=exchange, **options)
        for share, decoded in zip(own, exchange.offer(regions), strict=True):
            part = share.part(host)
            assert part is not None
            inside = tuple(
                slice(a.start - b.start, a.stop - b.start) for a, b in zip(part, decoded.region, strict=True)
            )
            found[share.number] = decoded.array[inside].copy()
    return found


@pytest.mark.parametrize("budget", [4 * 6144, 1 << 20])
def test_each_host_gets_what_it_needs(assignment: Assignment, budget: int) -> None:
    """With a budget of four regions, hosts wait for each other again and again."""
    values = {name: make_values(SHAPE, seed) for seed, name in enumerate("ab")}
    arrays = [{name: Values(array) for name, array in values.items()} for _ in range(3)]
    peers = all_meet(Shelf(), [0, 1, 2], assignment)
    outer = {"a": (1,), "b": (2, 1)}

    def run(host: int) -> dict[int, np.ndarray]:
        found = peers[host]
        assert isinstance(found, Peers)
        opened = {name: own.opened() for name, own in arrays[host].items()}
        return load(Exchange(assignment, found), assignment, opened, budget, outer=outer)

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(run, range(3)))
    for host, found in enumerate(results):
        assert len(found) == len(assignment.shares)
        for share in assignment.shares:
            part = share.part(host)
            assert part is not None
            np.testing.assert_array_equal(found[share.number], values[share.leaf.key][part])


@pytest.mark.parametrize("seed", range(8))
def test_no_host_waits_for_ever(seed: int) -> None:
    """Any needs, little memory, hosts of different speed."""
    rng = np.random.default_rng(seed)
    hosts = range(int(rng.integers(2, 6)))
    leaves = [leaf_of(name, SHAPE, CHUNKS) for name in "abcd"]

    def needs_of(leaf: Leaf, region: Region) -> Needs | None:
        own = np.random.default_rng([seed, ord(leaf.key), region[0].start])
        if own.random() < 0.1:
            return None
        needing = np.flatnonzero(own.random(len(hosts)) < 0.7)
        edges = [
            np.sort(own.choice(np.arange(part.start, part.stop + 1), (len(needing), 2))) for part in region
        ]
        boxes = np.stack(edges, axis=1) + np.array([0, 1])
        return Needs(needing, np.minimum(boxes, [[part.stop] * 2 for part in region]))

    found = assign(leaves, hosts, 1, needs_of, 0)
    values = {name: make_values(SHAPE, number) for number, name in enumerate("abcd")}
    opened = [{name: Values(array).opened() for name, array in values.items()} for _ in hosts]
    peers = all_meet(Shelf(), list(hosts), found)

    def run(host: int) -> dict[int, np.ndarray]:
        own = peers[host]
        assert isinstance(own, Peers)
        pauses = np.random.default_rng([seed, host])

        def pause(_: object) -> None:
            time.sleep(pauses.random() * 0.004 * (host % 2))

        return load(Exchange(found, own), found, opened[host], 4 * 6144, on_wait=pause)

    with ThreadPoolExecutor(len(hosts)) as pool:
        results = list(pool.map(run, hosts))
    for host, result in enumerate(results):
        own = {share.number: share for share in found.shares if share.part(host) is not None}
        assert set(result) == set(own)
        for number, share in own.items():
            part = share.part(host)
            assert part is not None
            np.testing.assert_array_equal(result[number], values[share.leaf.key][part])


def test_several_loads_of_one_process_are_apart(assignment: Assignment) -> None:
    for _ in range(2):
        for peers in all_meet(Shelf(), [0, 1, 2], assignment).values():
            assert isinstance(peers, Peers)


class TestMeet:
    def test_host_that_does_not_come(self, assignment: Assignment) -> None:
        found = all_meet(Shelf(), [0, 1, 2], assignment, skip=(2,), limit=0.5)
        assert {str(error) for error in found.values()} == {
            "process 2 did not begin to load within 0.5 s of the others"
        }

    def test_first_host_that_does_not_come(self, assignment: Assignment) -> None:
        started = time.monotonic()
        found = all_meet(Shelf(), [0, 1], assignment, skip=(0,), limit=0.2)
        assert isinstance(found[1], NoExchangeError)
        assert time.monotonic() - started < 5

    def test_host_that_stays_away_is_not_waited_for(self, assignment: Assignment) -> None:
        store, started = Shelf(), time.monotonic()
        stay_away(store, 2, "VLLM_MAXTEXT_EXCHANGE turns the exchange off")
        found = all_meet(store, [0, 1, 2], assignment, skip=(2,), limit=30)
        assert {str(error) for error in found.values()} == {
            f"host {socket.gethostname()}: VLLM_MAXTEXT_EXCHANGE turns the exchange off"
        }
        assert time.monotonic() - started < 10

    @pytest.mark.parametrize("host", [0, 1, 2])
    def test_host_that_cannot_be_reached(self, assignment: Assignment, host: int) -> None:
        store = Shelf()
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        store.replace[f"host/{host}"] = lambda value: json.dumps({**json.loads(value), "port": port})
        found = all_meet(store, [0, 1, 2], assignment, limit=LIMIT)
        # The last host connects to the others, and nobody to it.
        if host == 2:
            assert all(isinstance(peers, Peers) for peers in found.values())
            return
        for error in found.values():
            assert isinstance(error, NoExchangeError)
            assert str(error).endswith("Is there a firewall?")
        assert f"(process 2) does not reach 127.0.0.1 port {port} of host " in str(found[2])

    def test_another_plan(self, assignment: Assignment) -> None:
        store = Shelf()
        store.replace["verdict/1"] = lambda value: json.dumps({**json.loads(value), "plan": "other"})
        found = all_meet(store, [0, 1, 2], assignment)
        assert {str(error) for error in found.values()} == {"process 1 has another plan of who reads what"}

    def test_no_gain(self) -> None:
        alone = assign([leaf_of("a", (64, 64), (1, 64))], range(2), 1, lambda *_: None, 0)
        found = all_meet(Shelf(), [0, 1], alone)
        assert {str(error) for error in found.values()} == {"the hosts would read hardly less in all"}

    def test_address_that_is_not_ours(self, assignment: Assignment) -> None:
        terms = Terms(0, [0, 1], "192.0.2.1", 1, "here", LIMIT)
        with pytest.raises(NoExchangeError, match=r"cannot listen on 192\.0\.2\.1"):
            meet(Shelf(), terms, lambda _: assignment)

    @pytest.mark.parametrize("says", ["nothing", "wrong token", "known host with wrong token"])
    def test_stranger_is_not_let_in(
        self, assignment: Assignment, says: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A stranger comes before the host it pretends to be, and does not keep that out."""
        store, strangers = Shelf(), []

        def intrude(value: str) -> str:
            stranger = socket.create_connection(("127.0.0.1", json.loads(value)["port"]), timeout=5)
            strangers.append(stranger)
            if says != "nothing":
                stranger.sendall((1 if "known" in says else 7).to_bytes(8, "big") + bytes(64))
            return value

        store.replace["host/0"] = intrude
        found = all_meet(store, [0, 1], assignment, limit=2 * LIMIT)
        assert all(isinstance(peers, Peers) for peers in found.values())
        (stranger,) = strangers
        # A nonce, and then the end.
        received = b""
        with contextlib.suppress(ConnectionError):
            while part := stranger.recv(100):
                received += part
        assert len(received) == 32
        if says != "nothing":
            assert "was refused: it does not know the token" in caplog.text

    def test_nobody_is_let_in_before_the_token_is_known(self, assignment: Assignment) -> None:
        """Whoever comes first must not pass with an empty token."""
        store, answers = Shelf(), []

        def intrude(value: str) -> str:
            stranger = socket.create_connection(("127.0.0.1", json.loads(value)["port"]), timeout=5)
            nonce = stranger.recv(32, socket.MSG_WAITALL)
            proof = hmac.digest(b"", b"connects 2 1 " + nonce, "sha256")
            stranger.sendall((2).to_bytes(8, "big") + bytes(32) + proof)
            answers.append(stranger)
            return value

        store.replace["host/1"] = intrude
        all_meet(store, [0, 1, 2], assignment, skip=(0, 2), limit=0.3)
        with contextlib.suppress(ConnectionError):
            assert answers[0].recv(1) == b""

    def test_listener_with_another_token_is_not_believed(self, assignment: Assignment) -> None:
        store = Shelf()
        with socket.create_server(("127.0.0.1", 0)) as false:
            port = false.getsockname()[1]

            def pretend() -> None:
                connection, _ = false.accept()
                with connection:
                    connection.sendall(bytes(32))
                    connection.recv(72, socket.MSG_WAITALL)
                    connection.sendall(bytes(32))

            threading.Thread(target=pretend, daemon=True).start()
            store.replace["host/0"] = lambda value: json.dumps({**json.loads(value), "port": port})
            found = all_meet(store, [0, 1], assignment, limit=LIMIT)
        assert "does not know the token" in str(found[1])


@contextlib.contextmanager
def connected(limit: float) -> Iterator[tuple[Peers, Peers]]:
    """Two hosts that are connected."""
    left, right = socket.socketpair()
    first = Peers(0, {0: "one", 1: "two"}, {1: left}, "gs://bucket/0/items", limit)
    second = Peers(1, {0: "one", 1: "two"}, {0: right}, "gs://bucket/0/items", limit)
    yield first, second
    for peers in (first, second):
        peers.fail(RuntimeError("the test has ended"))


@pytest.fixture
def two() -> Iterator[tuple[Peers, Peers]]:
    with connected(PATIENT) as peers:
        yield peers


@pytest.fixture
def impatient() -> Iterator[tuple[Peers, Peers]]:
    with connected(LIMIT) as peers:
        yield peers


def ends(function: Callable[[], Any]) -> MaxTextLoadError:
    """The error that a wait ends with; in time."""
    started = time.monotonic()
    with pytest.raises((ReadError, StorageError)) as caught:
        function()
    assert time.monotonic() - started < 5 * LIMIT
    return caught.value


def test_processes_without_a_store_read_for_themselves() -> None:
    with pytest.raises(
        NoExchangeError, match=r"no store in common: they are not Ray's, and jax\.distributed was not"
    ):
        stores.find({"engine": "a"}, "digest")


class TestFailure:
    @pytest.mark.parametrize(
        ("error", "kind", "text"),
        [
            (ReadError("gs://b: leaf a is damaged."), ReadError, "gs://b: leaf a is damaged."),
            (StorageError("gs://b: 403"), StorageError, "gs://b: 403"),
            (ZeroDivisionError("x"), StorageError, "ZeroDivisionError: x"),
            (KeyboardInterrupt(), StorageError, "KeyboardInterrupt"),
        ],
    )
    def test_error_of_one_is_the_error_of_all(
        self, two: tuple[Peers, Peers], error: BaseException, kind: type[Exception], text: str
    ) -> None:
        for peers in two:
            peers.start()
        waiting = two[0].receive(1, 5, np.zeros(8, np.uint8))
        offered = two[0].send(1, 6, np.zeros(8, np.uint8))
        two[1].fail(error)
        for wait in (waiting.result, offered.result, two[0].finish):
            found = ends(wait)
            assert type(found) is kind
            assert str(found) == f"Host two (process 1) could not load: {text}"
        # What is asked for afterwards ends at once.
        assert str(ends(two[0].receive(1, 7, np.zeros(8, np.uint8)).result)) == str(found)

    def test_error_is_passed_on_as_it_was_said(self) -> None:
        """The third host is connected to the first only by the second."""
        pairs = [socket.socketpair(), socket.socketpair()]
        names = dict(enumerate(("one", "two", "three")))
        ends_of = [{1: pairs[0][0]}, {0: pairs[0][1], 2: pairs[1][0]}, {1: pairs[1][1]}]
        peers = [Peers(host, names, sockets, "here", LIMIT) for host, sockets in enumerate(ends_of)]
        for each in peers:
            each.start()
        waiting = peers[2].receive(1, 1, np.zeros(8, np.uint8))
        peers[0].fail(ReadError("damaged"))
        assert str(ends(waiting.result)) == "Host one (process 0) could not load: damaged"
        for each in peers[1:]:
            each.fail(ends(each.finish))

    def test_host_that_closes_its_connections(self, two: tuple[Peers, Peers]) -> None:
        two[0].start()
        waiting = two[0].receive(1, 5, np.zeros(8, np.uint8))
        two[1]._connections[0].abort()
        found = ends(waiting.result)
        assert str(found).startswith("Host two (process 1) is gone: the connection to it broke off before")

    def test_host_that_hangs(self, impatient: tuple[Peers, Peers]) -> None:
        """Its connection stands, and it says nothing."""
        impatient[0].start()
        assert "Host two (process 1) has given no sign of life for 1.25 s" in str(ends(impatient[0].finish))

    def test_hosts_that_wait_for_nothing(self, impatient: tuple[Peers, Peers]) -> None:
        """Both are alive, and neither sends what the other waits for."""
        for peers in impatient:
            peers.start()
        waiting = [peers.receive(1 - host, 5, np.zeros(8, np.uint8)) for host, peers in enumerate(impatient)]
        for future in waiting:
            assert "nothing has moved on any host for 1.25 s" in str(ends(future.result))

    def test_host_that_moves_is_waited_for(self, impatient: tuple[Peers, Peers]) -> None:
        for peers in impatient:
            peers.start()
        memory = np.zeros(8, np.uint8)
        waiting = impatient[0].receive(1, 5, memory)
        for _ in range(10):
            time.sleep(LIMIT / 4)
            impatient[1].step()
        impatient[1].send(0, 5, np.arange(8, dtype=np.uint8))
        waiting.result()
        np.testing.assert_array_equal(memory, np.arange(8))
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(Peers.finish, impatient))

    @pytest.mark.parametrize("frame", [b"\x09" + bytes(16), b"\x02" + bytes(8) + (7).to_bytes(8, "big")])
    def test_nonsense_ends_the_exchange(self, two: tuple[Peers, Peers], frame: bytes) -> None:
        two[0].start()
        two[1]._connections[0]._socket.sendall(frame)
        assert "Host two (process 1) is gone" in str(ends(two[0].finish))


def test_host_that_is_killed_ends_the_others(tmp_path: Path) -> None:
    """Three processes; one is killed in the middle."""
    processes = [start_process(tmp_path, host, victim=1) for host in range(3)]
    for host in (0, 2):
        out, _ = processes[host].communicate(timeout=60)
        found = json.loads(out.splitlines()[-1])
        assert found["error"].startswith(
            f"StorageError: Host {socket.gethostname()} (process 1) is gone: the connection to it broke off"
        )
        assert found["seconds"] < 20
    assert processes[1].wait(10) == -signal.SIGKILL


def start_process(directory: Path, host: int, victim: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(PROCESS), str(directory), str(host), "3", str(victim)]
    environment = {**os.environ, "PYTHONPATH": f"{PROCESS.parents[1]}:{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
