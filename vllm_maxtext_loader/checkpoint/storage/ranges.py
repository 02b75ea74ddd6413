"""Fetches stored values by ranges: many requests in flight, few bytes in memory.

A stored chunk may have hundreds of megabytes, and one request for it is as slow as one connection. Here every value is a
`Stream`: its ranges are requested side by side and handed out in order, while a decoder consumes them. TensorStore makes the
requests; it repeats a range that failed or stalled, and leaves the others alone.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator

import tensorstore as ts

REQUESTS = 128
"""Requests in flight at a time."""

_SMALLEST_RANGE, _LARGEST_RANGE = 1 << 20, 8 << 20
_STREAMS_AHEAD = REQUESTS
_POLL_SECONDS = 0.25
_LEAST_WAIT_SECONDS = 1e-4
_CACHED = float("-inf")
"""What TensorStore has cached of an OCDBT database's index need not be looked up again."""


class AbandonedError(Exception):
    """Nobody wants the bytes any more."""


class UnexpectedValueError(Exception):
    """A value that is missing, or is not what it was taken for."""


@dataclasses.dataclass(frozen=True)
class Extent:
    """Bytes of a stored value.

    Attributes:
        store: where it is stored.
        key: its key there.
        start: first byte.
        stop: end; None means the whole value, in one request.
        nbytes: size; an estimate where `stop` is None.
    """

    store: ts.KvStore
    key: str
    start: int
    stop: int | None
    nbytes: int


Located = Callable[[Extent | Exception], None]


@dataclasses.dataclass
class Transfers:
    """What was fetched.

    Attributes:
        requests: ranges that arrived.
        nbytes: their size.
        seconds: time in which at least one request was in flight.
        request_seconds: time, summed over the requests in flight.
    """

    requests: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    request_seconds: float = 0.0

    @property
    def in_flight(self) -> float:
        """Mean number of requests in flight, while there were any."""
        return self.request_seconds / self.seconds if self.seconds else 0.0


@dataclasses.dataclass(frozen=True)
class _Range:
    """A requested range: its future, and its size as it counts for the window."""

    future: ts.Future[ts.KvStore.ReadResult]
    nbytes: int


class Stream:
    """The bytes of one extent, in order, each range as it arrives. One thread reads it.

    Args:
        fetcher: what requests its bytes.
        locate: finds the extent, and calls its argument with it, from any thread, at once or later.

    Attributes:
        waits: when the reader waited for bytes, if it was for more than a moment: pairs of start and end.
    """

    def __init__(self, fetcher: Fetcher, locate: Callable[[Located], None]) -> None:
        self._fetcher = fetcher
        self.locate = locate
        self.extent: Extent | None = None
        self.waits: list[tuple[float, float]] = []
        self.requested = self.step = 0
        """Bytes of the extent that were requested, and bytes of a range."""
        self.done = False
        """Whether nothing more of it will be requested."""
        self.ahead = 0
        """Bytes that were requested and not consumed yet."""
        self.ranges: queue.SimpleQueue[_Range | Exception | None] = queue.SimpleQueue()
        """Ranges in order; None ends them."""
        self._held = self._size = 0
        self._ended = False

    def read(self, size: int = -1) -> bytes:
        """The next range, of whatever size; b"" at the end. The range before it must not be used any more.

        Raises:
            AbandonedError: the fetcher was closed.
            UnexpectedValueError: the value is missing.
            Exception: the storage failed; TensorStore's error.
        """
        self._release()
        if self._ended:
            return b""
        started = time.perf_counter()
        arrived = self._next()
        if (ended := time.perf_counter()) - started >= _LEAST_WAIT_SECONDS:
            self.waits.append((started, ended))
        if arrived is None:
            self._ended = True
            return b""
        if arrived.state != "value":
            raise UnexpectedValueError("the value is missing")
        value = arrived.value
        self._size = len(value)
        return value

    def close(self) -> None:
        """Gives up what is left of it."""
        self._release()
        self._fetcher.dropped(self)

    def _release(self) -> None:
        if self._held:
            self._fetcher.consumed(self, self._held, self._size)
            self._held = self._size = 0

    def _next(self) -> ts.KvStore.ReadResult | None:
        while True:
            try:
                found = self.ranges.get(timeout=_POLL_SECONDS)
                break
            except queue.Empty:
                self._fetcher.check_open()
        if found is None:
            return None
        if isinstance(found, Exception):
            raise found
        self._held = found.nbytes
        while True:
            try:
                return found.future.result(timeout=_POLL_SECONDS)
            except TimeoutError:
                self._fetcher.check_open()


class Fetcher(threading.Thread):
    """Requests the ranges of streams, in the order of the streams. A thread, to which all of its state belongs.

    Args:
        streams: what to fetch; taken in this thread, as far ahead as the window reaches.
        window: bytes that may be requested and not consumed yet; at least one range is.
        beside: streams that are read side by side; each may use as large a part of the window, and the first of them always go
            on.
        transfers: what is fetched is added to it.
    """

    def __init__(
        self, streams: Callable[[Fetcher], Iterator[Stream]], window: int, beside: int, transfers: Transfers
    ) -> None:
        super().__init__(name="maxtext-fetch", daemon=True)
        self.transfers = transfers
        self._streams: Iterator[Stream] | None = streams(self)
        self._size = max(_SMALLEST_RANGE, min(_LARGEST_RANGE, window // REQUESTS))
        self._window = max(window, self._size)
        self._beside = beside
        # Two ranges, so that one is under way while the other is decoded.
        self._ahead = max(window // beside, 2 * self._size)
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._active: collections.deque[Stream] = collections.deque()
        self._outstanding = self._in_flight = 0
        self._changed = time.perf_counter()
        self._closed = threading.Event()
        self._error: Exception | None = None

    @property
    def size(self) -> int:
        """Bytes of a range."""
        return self._size

    def close(self) -> None:
        """Ends the thread; whoever waits for bytes gets an `AbandonedError`."""
        self._closed.set()
        self._events.put(None)

    def check_open(self) -> None:
        """Raises where no bytes will come any more.

        Raises:
            AbandonedError: the fetcher was closed.
            Exception: what the thread has ended with.
        """
        if self._error is not None:
            raise self._error
        if self._closed.is_set():
            raise AbandonedError

    def consumed(self, stream: Stream, nbytes: int, actual: int) -> None:
        """Says that a reader is done with a range of so many bytes, as counted for the window and as arrived."""

        def event() -> None:
            self._outstanding -= nbytes
            stream.ahead -= nbytes
            self.transfers.nbytes += actual

        self._events.put(event)

    def dropped(self, stream: Stream) -> None:
        """Says that nobody reads a stream any more."""

        def event() -> None:
            self._outstanding -= stream.ahead
            stream.ahead = 0
            self._finish(stream)

        self._events.put(event)

    def run(self) -> None:
        """Requests what there is room for, whenever something has arrived or was consumed."""
        try:
            while True:
                self._fill()
                event = self._events.get()
                while event is not None:
                    event()
                    if self._events.empty():
                        break
                    event = self._events.get()
                else:
                    return
        except Exception as error:
            self._error = error

    def _fill(self) -> None:
        # Room that streams which are read now have not taken yet, since they are not located; later ones leave it to them.
        reserved = 0
        for position, stream in enumerate(list(self._active)):
            is_read = position < self._beside
            room = self._window - self._outstanding - reserved
            while self._may_request(stream, room, is_read=is_read):
                room -= self._request(stream)
            if self._in_flight >= REQUESTS or (not is_read and room <= 0):
                return
            if is_read and stream.extent is None:
                reserved += self._ahead
        # Those that are read side by side are always known.
        while self._in_flight < REQUESTS and (
            self._outstanding + reserved < self._window or len(self._active) < self._beside
        ):
            if not self._take():
                return

    def _take(self) -> bool:
        """Makes the next stream active, and has it located; says whether there is one."""
        if self._streams is None or len(self._active) >= _STREAMS_AHEAD:
            return False
        stream = next(self._streams, None)
        if stream is None:
            self._streams = None
            return False
        self._active.append(stream)
        stream.locate(lambda found: self._events.put(lambda: self._located(stream, found)))
        return True

    def _located(self, stream: Stream, found: Extent | Exception) -> None:
        if isinstance(found, Exception):
            stream.ranges.put(found)
            self._finish(stream)
            return
        stream.extent = found
        # Ranges of equal size, rather than a small one at the end.
        stream.step = math.ceil(found.nbytes / math.ceil(found.nbytes / self._size)) if found.nbytes else 0

    def _may_request(self, stream: Stream, room: int, *, is_read: bool) -> bool:
        if stream.extent is None or stream.done or self._in_flight >= REQUESTS:
            return False
        # Decoders wait for the first: they always go on, or the window could fill up with what comes later.
        if is_read and not stream.ahead:
            return True
        return stream.ahead + stream.step <= max(self._ahead, stream.step) and stream.step <= room

    def _request(self, stream: Stream) -> int:
        """Requests the next range of a stream; returns its size."""
        extent = stream.extent
        assert extent is not None
        if extent.stop is None:
            span, size = None, extent.nbytes
        else:
            start = extent.start + stream.requested
            size = min(stream.step, extent.stop - start)
            span = slice(start, start + size)
        self._count(1)
        self._outstanding += size
        stream.ahead += size
        stream.requested += size
        future = extent.store.read(extent.key, byte_range=span, staleness_bound=_CACHED)
        stream.ranges.put(_Range(future, size))
        future.add_done_callback(lambda _: self._events.put(self._arrived))
        if stream.requested >= extent.nbytes:
            self._finish(stream)
        return size

    def _finish(self, stream: Stream) -> None:
        """No more of the stream is requested."""
        if not stream.done:
            stream.done = True
            stream.ranges.put(None)
            self._active.remove(stream)

    def _arrived(self) -> None:
        self._count(-1)
        self.transfers.requests += 1

    def _count(self, change: int) -> None:
        """Counts a request that begins (1) or has ended (-1)."""
        now = time.perf_counter()
        if self._in_flight:
            self.transfers.seconds += now - self._changed
            self.transfers.request_seconds += self._in_flight * (now - self._changed)
        self._in_flight += change
        self._changed = now
