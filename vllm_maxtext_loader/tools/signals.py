"""Signals that wait until a section of code is done: a server that was paused must be resumed."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class HeldSignals:
    """A block in which SIGINT, SIGTERM and SIGHUP wait; at its end they do what they did before.

    Elsewhere than in the main thread, which alone receives signals, the block does nothing.
    """

    def __init__(self) -> None:
        self._arrived: list[int] = []
        self._before: dict[int, Any] = {}
        self._released = False

    def __enter__(self) -> HeldSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _ENDING:
                # nohup has SIGHUP ignored: that stays.
                if (handler := signal.getsignal(number)) is not signal.SIG_IGN:
                    self._before[number] = handler
                    signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._arrived:
            signal.raise_signal(self._arrived[0])

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """A part of the block that the first signal interrupts: it raises what ends the process."""
        self._released = True
        try:
            if self._arrived:
                self._raise(self._arrived.pop())
            yield
        finally:
            self._released = False

    def _receive(self, number: int, _: FrameType | None) -> None:
        if not self._released:
            self._arrived.append(number)
            return
        # What handles the interruption must not be interrupted by a second signal.
        self._released = False
        self._raise(number)

    @staticmethod
    def _raise(number: int) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)
