"""A bucket on the loopback that answers as slowly as a network does.

    python benchmarks/slow_bucket.py DIRECTORY --latency-ms 50 --request-mb-s 10

Serves the files below DIRECTORY as objects of the bucket "bucket", through the part of Cloud Storage's JSON interface that
reading clients use. The body of an answer begins after the latency and flows at a rate of its own; the sum over all requests can
be limited, too. Bodies go from the page cache to the socket by sendfile(2), since reader and bucket share the processor's cores.
Prints its port. GET /statistics: requests, bytes, bodies in flight (mean and peak), since the last GET /reset.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import socket
import time
import urllib.parse
from pathlib import Path
from typing import Any

BUCKET = "bucket"
_OBJECTS = f"/storage/v1/b/{BUCKET}/o"
_STEPS_PER_SECOND = 20
_LEAST_STEP = 64 << 10


@dataclasses.dataclass
class Statistics:
    """What was served since `started`.

    Attributes:
        requests: answers.
        sent: bytes of bodies.
        active: bodies being sent now.
        peak: most of them at a time.
        area: seconds, summed over the bodies.
        changed: when `active` changed last.
        started: when the first body began.
        log: object, first byte and number of bytes of each body.
    """

    requests: int = 0
    sent: int = 0
    active: int = 0
    peak: int = 0
    area: float = 0.0
    changed: float = 0.0
    started: float = 0.0
    log: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)

    def change(self, by: int) -> None:
        """Counts a body that begins (1) or ends (-1)."""
        now = time.monotonic()
        self.started = self.started or now
        self.area += self.active * (now - self.changed) if self.active else 0.0
        self.active += by
        self.peak, self.changed = max(self.peak, self.active), now

    def report(self) -> dict[str, Any]:
        """As JSON."""
        span = self.changed - self.started
        return {
            "requests": self.requests,
            "bytes": self.sent,
            "mean": self.area / span if span > 0 else 0.0,
            "peak": self.peak,
            "log": self.log,
        }


class Bucket:
    """The server.

    Args:
        root: directory whose files are the objects.
        latency: seconds from a request to its answer.
        rate: bytes per second and request.
        total: bytes per second of all requests together.
    """

    def __init__(self, root: Path, latency: float, rate: float, total: float) -> None:
        self._root, self._latency, self._rate, self._total = root, latency, rate, total
        self._statistics = Statistics()
        self._total_free = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, listener: socket.socket) -> None:
        """Accepts connections, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(listener)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = loop.create_task(self._converse(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _converse(self, connection: socket.socket) -> None:
        """Answers the requests of one connection."""
        loop = asyncio.get_running_loop()
        received = b""
        with connection:
            try:
                while True:
                    while b"\r\n\r\n" not in received:
                        if not (part := await loop.sock_recv(connection, 1 << 16)):
                            return
                        received += part
                    head, _, received = received.partition(b"\r\n\r\n")
                    await self._answer(connection, head.decode())
            except ConnectionError:
                return

    async def _answer(self, connection: socket.socket, head: str) -> None:
        line, *rest = head.split("\r\n")
        url = urllib.parse.urlsplit(line.split(" ")[1])
        query = urllib.parse.parse_qs(url.query)
        if url.path == "/statistics":
            await _send(connection, 200, self._statistics.report())
            return
        if url.path == "/reset":
            self._statistics = Statistics()
            await _send(connection, 200, {})
            return
        headers = {name.lower(): value.strip() for name, _, value in (entry.partition(":") for entry in rest)}
        statistics = self._statistics
        statistics.requests += 1
        await asyncio.sleep(self._latency)
        if url.path.rstrip("/") == _OBJECTS:
            await _send(connection, 200, self._list(query))
            return
        name = urllib.parse.unquote(url.path.removeprefix("/download").removeprefix(f"{_OBJECTS}/"))
        path = self._root / name
        if not path.is_file():
            await _send(connection, 404, {"error": {"code": 404, "message": "not found"}})
        elif query.get("alt") != ["media"]:
            await _send(connection, 200, self._properties(name))
        else:
            await self._send_body(connection, name, headers.get("range", ""), statistics)

    async def _send_body(
        self, connection: socket.socket, name: str, asked: str, statistics: Statistics
    ) -> None:
        loop = asyncio.get_running_loop()
        with (self._root / name).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start, stop = _span(asked, size)
            status = "206 Partial Content" if asked else "200 OK"
            lines = [f"HTTP/1.1 {status}", f"Content-Length: {stop - start}", "x-goog-generation: 1"]
            lines += [f"Content-Range: bytes {start}-{stop - 1}/{size}"] if asked else []
            await loop.sock_sendall(connection, "\r\n".join([*lines, "", ""]).encode())
            statistics.log.append((name, start, stop - start))
            statistics.change(1)
            step = max(_LEAST_STEP, int(self._rate / _STEPS_PER_SECOND))
            free = time.monotonic()
            try:
                while start < stop:
                    count = min(step, stop - start)
                    now = time.monotonic()
                    free += count / self._rate
                    self._total_free = max(self._total_free, now) + count / self._total
                    if (due := max(free, self._total_free)) > now:
                        await asyncio.sleep(due - now)
                    await loop.sock_sendfile(connection, file, start, count, fallback=False)
                    statistics.sent += count
                    start += count
            finally:
                statistics.change(-1)

    def _properties(self, name: str) -> dict[str, str]:
        return {
            "name": name,
            "bucket": BUCKET,
            "size": str((self._root / name).stat().st_size),
            "generation": "1",
        }

    def _list(self, query: dict[str, list[str]]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
        names = sorted(
            str(path.relative_to(self._root))
            for path in (self._root / prefix.rpartition("/")[0]).rglob("*")
            if path.is_file()
        )
        names = [name for name in names if name.startswith(prefix)]
        if not delimiter:
            return {"items": [self._properties(name) for name in names]}
        inside = {name for name in names if delimiter not in name[len(prefix) :]}
        prefixes = {
            prefix + name[len(prefix) :].partition(delimiter)[0] + delimiter for name in set(names) - inside
        }
        return {"items": [self._properties(name) for name in sorted(inside)], "prefixes": sorted(prefixes)}


def _span(asked: str, size: int) -> tuple[int, int]:
    """First byte and end of a Range header."""
    if not asked:
        return 0, size
    first, _, last = asked.removeprefix("bytes=").partition("-")
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1) if last else size


async def _send(connection: socket.socket, status: int, content: Any) -> None:
    body = json.dumps(content).encode()
    head = f"HTTP/1.1 {status} -\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    await asyncio.get_running_loop().sock_sendall(connection, head.encode() + body)


def main() -> None:
    """Parses the command line and serves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--port", type=int, default=0, help="default: one that is free")
    parser.add_argument("--latency-ms", type=float, default=50)
    parser.add_argument("--request-mb-s", type=float, default=10)
    parser.add_argument("--total-mb-s", type=float, default=float("inf"))
    args = parser.parse_args()
    bucket = Bucket(
        args.directory.resolve(), args.latency_ms / 1e3, args.request_mb_s * 1e6, args.total_mb_s * 1e6
    )
    with socket.create_server(("127.0.0.1", args.port), backlog=1024) as listener:
        listener.setblocking(False)
        print(listener.getsockname()[1], flush=True)
        asyncio.run(bucket.serve(listener))


if __name__ == "__main__":
    main()
