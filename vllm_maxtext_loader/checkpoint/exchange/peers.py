"""All other hosts of a load: regions are sent to them and received from them, and what ends one host ends all of them.

Every wait ends. A host that fails says so and why; one that dies closes its connections; one that hangs, or whose network is gone, gives
no sign of life. Where all are alive and nothing moves on any host, all give up.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future

import numpy as np

from vllm_maxtext_loader.checkpoint.exchange.connection import Connection, Kind
from vllm_maxtext_loader.checkpoint.storage.retry import TIMEOUT_VARIABLE
from vllm_maxtext_loader.checkpoint.storage.stall import arrived
from vllm_maxtext_loader.errors import MaxTextLoadError, ReadError, StorageError

_BEATS = 8
"""Signs of life within the time limit."""

_PATIENCE = 1.25
"""Hosts are waited for longer than a host waits for its storage, whose error says more."""

_FAREWELL_SECONDS = 2.0
"""How long the last bytes may take to reach the others."""

_KINDS = {kind.__name__: kind for kind in (ReadError, StorageError)}
"""Errors that travel as what they are; any other is a StorageError on the other hosts."""


class Peers:
    """The connections of one load.

    Args:
        host: number of this host.
        names: by number, what every host is called.
        sockets: connections to all others, by number.
        where: path of the checkpoint, for messages.
        limit: seconds without progress after which a load gives up.
    """

    def __init__(
        self,
        host: int,
        names: Mapping[int, str],
        sockets: Mapping[int, socket.socket],
        where: str,
        limit: float,
    ) -> None:
        self.host = host
        self._names, self._where, self._limit = names, where, limit
        self._steps = 0
        self._lock = threading.Lock()
        self._error: MaxTextLoadError | None = None
        self._closed = threading.Event()
        self._ended = threading.Condition()
        self._done: set[int] = set()
        now = time.monotonic()
        self._moved = now
        self._seen = dict.fromkeys(sockets, now)
        self._counts: dict[int, tuple[int, int]] = dict.fromkeys(sockets, (0, 0))
        self._connections = {other: Connection(sock, other, self) for other, sock in sockets.items()}
        self._watcher = threading.Thread(target=self._watch, name="maxtext-hosts", daemon=True)

    def start(self) -> None:
        """Starts to send and to receive."""
        for connection in self._connections.values():
            connection.start()
        self._watcher.start()

    def name(self, host: int) -> str:
        """What a host is called in messages."""
        return f"Host {self._names[host]} (process {host})"

    def step(self) -> None:
        """Counts a region that this host is done with, as progress."""
        self._steps += 1

    def send(self, host: int, number: int, values: np.ndarray) -> Future[None]:
        """Sends what a host needs of a region; done when the values are no longer needed."""
        return self._connections[host].send(number, values)

    def receive(self, host: int, number: int, memory: np.ndarray) -> Future[None]:
        """Receives what this host needs of a region that another one reads; done when it is in `memory` (bytes)."""
        return self._connections[host].receive(number, memory)

    def finish(self) -> None:
        """Waits until every host has all it needs, and closes the connections.

        Raises:
            ReadError, StorageError: another host has failed, is gone, or does not answer.
        """
        for connection in self._connections.values():
            connection.say(Kind.DONE)
        with self._ended:
            while self._error is None and len(self._done) < len(self._connections):
                self._ended.wait()
        error = self._error
        self._close()
        if error is not None:
            raise error

    def fail(self, error: BaseException) -> None:
        """Tells all others that the load has failed here, and closes the connections."""
        self._fail(*self._described(error))
        self._close()

    def _described(self, error: BaseException) -> tuple[MaxTextLoadError, str]:
        """An error of this host's as the others see it, and its text for them."""
        if isinstance(error, MaxTextLoadError):
            kind, text = type(error).__name__, str(error)
        else:
            kind, text = "", f"{type(error).__name__}: {error}".removesuffix(": ")
        # What another host has said is passed on as it is.
        said = text if error is self._error else f"{self.name(self.host)} could not load: {text}"
        return _KINDS.get(kind, StorageError)(said), json.dumps({"kind": kind, "text": said})

    def beat(self, host: int, moved: int) -> None:
        """A sign of life of another host, with a number that is another one when the host has moved."""
        self._count(host, beat=moved)

    def done(self, host: int) -> None:
        """Another host has all it needs."""
        with self._ended:
            self._done.add(host)
            self._ended.notify_all()

    def failed(self, host: int, text: str) -> None:
        """Another host says that its load has failed."""
        try:
            said = json.loads(text)
            error = _KINDS.get(said["kind"], StorageError)(str(said["text"]))
        except (ValueError, KeyError, TypeError):
            error = StorageError(f"{self.name(host)} could not load, and did not say why.")
            text = json.dumps({"kind": "", "text": str(error)})
        self._fail(error, text)

    def broken(self, host: int, error: Exception) -> None:
        """A connection has ended."""
        if host in self._done or self._closed.is_set():
            return
        self._give_up(
            f"{self.name(host)} is gone: the connection to it broke off before {self._where} was loaded ({error}). Look at "
            f"that host's log, then start the engine again."
        )

    def _give_up(self, text: str) -> None:
        self._fail(StorageError(text), json.dumps({"kind": StorageError.__name__, "text": text}))

    def _fail(self, error: MaxTextLoadError, text: str) -> None:
        """Ends every wait on this host, and tells the others; what is said first counts."""
        with self._lock:
            if self._error is not None:
                return
            self._error = error
        for connection in self._connections.values():
            connection.fail(error)
            connection.say(Kind.FAIL, text=text)
            connection.finish()
        with self._ended:
            self._ended.notify_all()

    def _close(self) -> None:
        self._closed.set()
        for connection in self._connections.values():
            connection.finish()
        deadline = time.monotonic() + _FAREWELL_SECONDS
        for connection in self._connections.values():
            connection.join(max(0.0, (deadline - time.monotonic()) / 2))

    def _count(self, host: int, *, beat: int | None = None) -> None:
        """Looks whether anything was heard of a host, and whether it moves."""
        before = self._counts[host]
        now = (before[0] if beat is None else beat, self._connections[host].moved)
        self._counts[host] = now
        if beat is not None or now != before:
            self._seen[host] = time.monotonic()
        if now != before:
            self._moved = time.monotonic()

    def _watch(self) -> None:
        """Gives signs of life, and gives up where there are none, or nothing moves."""
        before, moved = (self._steps, arrived()), 0
        while not self._closed.wait(self._limit / _BEATS):
            now = (self._steps, arrived())
            if now != before:
                before, moved = now, moved + 1
                self._moved = time.monotonic()
            for host, connection in self._connections.items():
                connection.say(Kind.BEAT, moved)
                self._count(host)
            self._check()

    def _check(self) -> None:
        limit, now = self._limit * _PATIENCE, time.monotonic()
        silent = [host for host, seen in self._seen.items() if host not in self._done and now - seen > limit]
        advice = f"{TIMEOUT_VARIABLE} (seconds) raises the limit."
        if silent:
            self._give_up(
                f"{self.name(silent[0])} has given no sign of life for {limit:g} s while {self._where} was loaded. Is it "
                f"running, and can the hosts reach each other? {advice}"
            )
        elif now - self._moved > limit:
            self._give_up(
                f"{self._where}: nothing has moved on any host for {limit:g} s ({self.name(self.host)} says so). {advice}"
            )
