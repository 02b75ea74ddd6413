"""One connection between two hosts: frames in both directions, each side with a thread that reads and one that writes.

A host sends nothing large before the other has said that it has memory for it. So the reading thread never waits for memory, and
whatever is said besides (signs of life, a failure) arrives at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import queue
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Protocol

import numpy as np

_HEADER = struct.Struct("!BQQ")
"""Kind, number, bytes that follow."""

_PIECE = 1 << 20
"""Bytes that are made contiguous and handed to the socket at a time."""

_LONGEST_TEXT = 1 << 16


class Kind(enum.IntEnum):
    """What a frame says.

    WANT: there is memory for region `number`. DATA: the values of region `number`. BEAT: still alive, and has moved so much.
    FAIL: the load has failed, as the text says. DONE: this host has all it wants, and has sent all it has.
    """

    WANT = 1
    DATA = 2
    BEAT = 3
    FAIL = 4
    DONE = 5


class Observer(Protocol):
    """Is told what happens on connections, by their threads."""

    def beat(self, host: int, moved: int) -> None: ...

    def done(self, host: int) -> None: ...

    def failed(self, host: int, text: str) -> None: ...

    def broken(self, host: int, error: Exception) -> None: ...


@dataclasses.dataclass(frozen=True)
class _Frame:
    """A frame to be sent; `sent` becomes done when the socket has taken it."""

    kind: Kind
    number: int = 0
    payload: np.ndarray | bytes = b""
    sent: Future[None] | None = None


class Connection:
    """A connection to one host. `start` must be called before anything arrives.

    Args:
        sock: connected, and proven to be the host's.
        host: its number.
        observer: is told what happens.

    Attributes:
        moved: bytes of values that were sent and received.
    """

    def __init__(self, sock: socket.socket, host: int, observer: Observer) -> None:
        self.host = host
        self._socket, self._observer = sock, observer
        self._lock = threading.Lock()
        self._offers: dict[int, _Frame] = {}
        self._wanted: set[int] = set()
        self._receiving: dict[int, tuple[np.ndarray, Future[None]]] = {}
        self._frames: queue.SimpleQueue[_Frame | None] = queue.SimpleQueue()
        self._sent = self._received = 0
        self._error: Exception | None = None
        name = f"maxtext-host-{host}"
        self._threads = [
            threading.Thread(target=run, name=name, daemon=True) for run in (self._read, self._write)
        ]

    @property
    def moved(self) -> int:
        """See the class."""
        return self._sent + self._received

    def start(self) -> None:
        """Starts the threads."""
        for thread in self._threads:
            thread.start()

    def send(self, number: int, values: np.ndarray) -> Future[None]:
        """Sends a region's values, in the order in which they are in memory, when the host has memory for them.

        Returns:
            Done when the values are no longer needed.
        """
        # A dtype of our own (bfloat16) is unknown to the buffer protocol.
        values = values.view(f"u{values.dtype.itemsize}")
        order = sorted(range(values.ndim), key=lambda axis: -values.strides[axis])
        frame = _Frame(Kind.DATA, number, values.transpose(order), Future())
        assert frame.sent is not None
        with self._lock:
            if self._error is not None:
                frame.sent.set_exception(self._error)
            elif number in self._wanted:
                self._wanted.discard(number)
                self._frames.put(frame)
            else:
                self._offers[number] = frame
        return frame.sent

    def receive(self, number: int, memory: np.ndarray) -> Future[None]:
        """Asks for a region.

        Args:
            number: of the region.
            memory: bytes, of the size of what this host needs of it.

        Returns:
            Done when the memory holds the values.
        """
        received: Future[None] = Future()
        with self._lock:
            if self._error is not None:
                received.set_exception(self._error)
                return received
            self._receiving[number] = (memory, received)
        self._frames.put(_Frame(Kind.WANT, number))
        return received

    def say(self, kind: Kind, number: int = 0, text: str = "") -> None:
        """Sends a frame without values."""
        self._frames.put(_Frame(kind, number, text.encode()[:_LONGEST_TEXT]))

    def fail(self, error: Exception) -> None:
        """Ends what is waited for with an error."""
        with self._lock:
            if self._error is not None:
                return
            self._error = error
            offered = [frame.sent for frame in self._offers.values()]
            waiting = [*offered, *(future for _, future in self._receiving.values())]
            self._offers.clear()
        for future in waiting:
            if future is not None and not future.done():
                future.set_exception(error)

    def finish(self) -> None:
        """Sends what is still to be sent, and then the end."""
        self._frames.put(None)

    def join(self, seconds: float) -> None:
        """Waits for the other side's end, and closes the connection."""
        for thread in self._threads:
            if thread.is_alive():
                thread.join(seconds)
        self.abort()

    def abort(self) -> None:
        """Closes the connection now."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _write(self) -> None:
        frame: _Frame | None = None
        try:
            while (frame := self._frames.get()) is not None:
                self._write_frame(frame)
            self._socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._observer.broken(self.host, error)
            # Nobody sends what is left.
            while frame is not None:
                if frame.sent is not None and not frame.sent.done():
                    frame.sent.set_exception(self._error or error)
                frame = self._frames.get()

    def _write_frame(self, frame: _Frame) -> None:
        payload = frame.payload
        if isinstance(payload, bytes):
            self._socket.sendall(_HEADER.pack(frame.kind, frame.number, len(payload)) + payload)
            return
        self._socket.sendall(_HEADER.pack(frame.kind, frame.number, payload.nbytes))
        for piece in pieces(payload, _PIECE):
            self._socket.sendall(np.ascontiguousarray(piece).data)
            self._sent += piece.nbytes
        if frame.sent is not None:
            frame.sent.set_result(None)

    def _read(self) -> None:
        try:
            while (head := self._read_header()) is not None:
                self._take(*head)
        except (OSError, ValueError) as error:
            self._observer.broken(self.host, error)
        else:
            self._observer.broken(self.host, ConnectionError("it was closed"))

    def _read_header(self) -> tuple[Kind, int, int] | None:
        """The next frame's header; None at the end."""
        memory = bytearray(_HEADER.size)
        if not self._fill(memoryview(memory), may_end=True):
            return None
        kind, number, nbytes = _HEADER.unpack(memory)
        return Kind(kind), number, nbytes

    def _take(self, kind: Kind, number: int, nbytes: int) -> None:
        match kind:
            case Kind.WANT:
                with self._lock:
                    frame = self._offers.pop(number, None)
                    if frame is None:
                        self._wanted.add(number)
                if frame is not None:
                    self._frames.put(frame)
            case Kind.DATA:
                with self._lock:
                    memory, future = self._receiving.pop(number, (np.empty(0, np.uint8), None))
                if future is None or memory.nbytes != nbytes:
                    raise ValueError(f"region {number} came with {nbytes} bytes, expected {memory.nbytes}")
                try:
                    self._fill(memoryview(memory), counted=True)
                except OSError:
                    with self._lock:
                        self._receiving[number] = (memory, future)
                    raise
                if not future.done():
                    future.set_result(None)
            case Kind.BEAT:
                self._observer.beat(self.host, number)
            case Kind.FAIL:
                if nbytes > _LONGEST_TEXT:
                    raise ValueError(f"a text of {nbytes} bytes")
                text = bytearray(nbytes)
                self._fill(memoryview(text))
                self._observer.failed(self.host, text.decode(errors="replace"))
            case Kind.DONE:
                self._observer.done(self.host)

    def _fill(self, memory: memoryview, *, may_end: bool = False, counted: bool = False) -> bool:
        """Reads bytes until `memory` is full; False at the end of the stream.

        Raises:
            ConnectionError: the stream has ended before.
        """
        filled = 0
        while filled < len(memory):
            count = self._socket.recv_into(memory[filled:])
            if count == 0:
                if may_end and filled == 0:
                    return False
                raise ConnectionError("it was closed in the middle")
            filled += count
            self._received += count if counted else 0
        return True


def pieces(values: np.ndarray, nbytes: int) -> Iterator[np.ndarray]:
    """Cuts values into parts of at most so many bytes (or single values), in order, along as few axes as possible."""
    if values.nbytes <= nbytes or values.ndim == 0:
        if values.size:
            yield values
        return
    rows = nbytes // (values.nbytes // len(values))
    if rows == 0:
        for row in values:
            yield from pieces(row, nbytes)
        return
    for first in range(0, len(values), rows):
        yield values[first : first + rows]
