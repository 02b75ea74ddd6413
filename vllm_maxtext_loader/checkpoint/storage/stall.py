"""Waits for TensorStore; gives up when nothing moves any more, and says when requests are made again.

A big chunk on a slow network may take longer than any limit, so what counts is whether bytes arrive.
TensorStore counts the bytes of finished reads only. What happens inside a transfer is curl's business, which
is told to abort one in which nothing arrives (`abort_stalled_transfers`): a transfer that lives longer than
that is moving.
"""

from __future__ import annotations

import collections
import math
import os
import time
from pathlib import Path
from typing import Any, Protocol

import tensorstore as ts

from vllm_maxtext_loader.checkpoint.storage.retry import no_progress_seconds, retry_warning

_STALL = "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"
_STALL_BYTES = "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES"
_CONNECT = "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS"

_in_force: dict[str, str] = {}
"""What these variables were when TensorStore made its first request."""

_TELL_EVERY = 1.0
"""Seconds between looks at the counters, where nothing has to be waited for."""


def abort_stalled_transfers() -> float:
    """Makes TensorStore abort (and repeat) a transfer in which nothing arrives.

    TensorStore reads these variables when it makes its first request; what is set already stays.

    Returns:
        Seconds after which a stalled transfer is aborted; infinity where TensorStore had made requests
        before this was first called, so that it cannot be known.
    """
    if not ts.experimental_collect_matching_metrics("/tensorstore/http/request_started"):
        seconds = str(max(1, math.ceil(no_progress_seconds() / 4)))
        for name, value in ((_STALL, seconds), (_STALL_BYTES, "1"), (_CONNECT, seconds)):
            os.environ.setdefault(name, value)
        _in_force.update({name: os.environ[name] for name in (_STALL, _STALL_BYTES)})
    try:
        seconds, least = float(_in_force[_STALL]), float(_in_force[_STALL_BYTES])
    except (KeyError, ValueError):
        return math.inf
    return seconds if seconds > 0 and least > 0 else math.inf


class Pending(Protocol):
    """A future: TensorStore's, or one that stands for several."""

    def done(self) -> bool: ...

    def result(self, timeout: float | None = None) -> Any: ...


class StallDetector:
    """Waits for the results of one open or load.

    Args:
        where: path of what is read, for messages.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.limit = no_progress_seconds()
        self.stall = abort_stalled_transfers()
        self._counters = _Counters.now()
        self._looked = self._moved = self._event = time.monotonic()
        self._failed: collections.Counter[str] = collections.Counter()

    def result(self, future: Pending, what: str) -> Any:
        """The future's result, or its error.

        Args:
            future: what is being read.
            what: part of `where` that is read, for messages.

        Raises:
            TimeoutError: nothing has moved for the time limit.
        """
        self._moved = self._event = time.monotonic()
        self._failed.clear()
        try:
            while not future.done():
                try:
                    return future.result(timeout=min(0.25, self.limit / 10))
                except TimeoutError:
                    self._look(what)
                    if time.monotonic() - self._moved > self.limit:
                        raise TimeoutError(self._say()) from None
            return future.result()
        finally:
            if time.monotonic() - self._looked > _TELL_EVERY:
                self._look(what)

    def close(self) -> None:
        """Says what was repeated since the last look."""
        self._look("")

    def _look(self, what: str) -> None:
        before, after = self._counters, _Counters.now()
        now = time.monotonic()
        self._counters, self._looked = after, now
        if after.arrived != before.arrived:
            self._moved = now
        if after.events != before.events:
            self._event = now
        elif after.active and now - self._event > self.stall + 1:
            self._moved = now
        if after.retries > before.retries:
            count = after.retries - before.retries
            codes = {code: number - before.codes.get(code, 0) for code, number in after.codes.items()}
            reasons = [f"HTTP {code}" for code, number in codes.items() if number > 0] or [
                "connection broken or stalled"
            ]
            self._failed.update(dict.fromkeys(reasons, count))
            retry_warning(
                f"{self.where}/{what}" if what else self.where,
                f"{count} request{'s' if count > 1 else ''} failed ({', '.join(reasons)})",
            )

    def _say(self) -> str:
        failed = f"; requests failed meanwhile: {', '.join(self._failed)}" if self._failed else ""
        return f"timed out: nothing arrived for {self.limit:g} s{failed}"


def arrived() -> tuple[int, ...]:
    """Bytes that have arrived in this process, from buckets and disks: moves while anything is being read."""
    return _Counters.now().arrived


class _Counters:
    """TensorStore's counters of this process: bytes that arrived, requests, repetitions."""

    def __init__(self) -> None:
        self.arrived: tuple[int, ...] = ()
        self.events: tuple[int, ...] = ()
        self.active = self.retries = 0
        self.codes: dict[str, int] = {}

    @classmethod
    def now(cls) -> _Counters:
        """The counters' present values; about 0.2 ms."""
        found: dict[str, list[dict[str, Any]]] = {}
        for prefix in ("/tensorstore/kvstore/", "/tensorstore/http/"):
            for metric in ts.experimental_collect_matching_metrics(prefix):
                found[metric["name"].removeprefix("/tensorstore/")] = metric["values"]

        def total(name: str) -> int:
            return sum(int(value.get("value", 0)) for value in found.get(name, []))

        counters = cls()
        counters.arrived = (total("kvstore/gcs/bytes_read"), total("kvstore/file/bytes_read"), _disk_bytes())
        counters.retries = total("kvstore/gcs/retries")
        counters.events = (total("http/request_started"), total("http/request_completed"), counters.retries)
        counters.active = total("http/active")
        counters.codes = {
            value["code"]: int(value["value"])
            for value in found.get("http/response_codes", [])
            if value["code"] in ("408", "429") or value["code"] >= "500"
        }
        return counters


def _disk_bytes() -> int:
    """Bytes this process has fetched from disks: they move while one large file is being read."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.partition(":")[2]) for line in lines if line.startswith("read_bytes:")), 0)
