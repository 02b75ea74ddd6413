"""An HTTP proxy for the loopback that counts what passes and makes things go wrong."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import http.client
import http.server
import re
import socket
import threading
import urllib.parse
from collections.abc import Callable

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "upgrade", "content-length", "date", "server"}


@dataclasses.dataclass(frozen=True)
class Request:
    """One request that passed the proxy.

    Attributes:
        method: HTTP method.
        kind: "list", "stat" (an object's or a bucket's properties), "read" (an object's bytes), "write" (an upload, or a
            part of one), "delete" (of an object or an upload) or "other".
        name: bucket/object; for a listing, bucket/prefix.
        span: the Range header, "" where there is none.
        status: HTTP status of the answer; 0 where the connection was broken instead.
        sent: bytes of the whole answer's body.
        authorization: the Authorization header, "" where there is none.
        body: what the client sent.
        user_project: the project that is billed, "" where none is named.
    """

    method: str
    kind: str
    name: str
    span: str
    status: int
    sent: int
    authorization: str = ""
    body: bytes = b""
    user_project: str = ""


@dataclasses.dataclass
class Fault:
    """What goes wrong with requests that match.

    Attributes:
        match: regular expression, searched for in "kind bucket/object".
        status: HTTP status to answer with instead of asking the server.
        hang: seconds to wait without a byte before the connection is broken.
        cut: bytes of the body after which the connection is broken.
        flip: whether the first byte of the body is damaged.
        rate: bytes per second of the body.
        after: requests to let pass first.
        times: requests it happens to; None means all.
        body: body for `status`.
        before: called before the server is asked.
    """

    match: str
    status: int | None = None
    hang: float | None = None
    cut: int | None = None
    flip: bool = False
    rate: float | None = None
    after: int = 0
    times: int | None = None
    body: str = ""
    before: Callable[[], None] | None = None

    def takes(self, label: str) -> bool:
        """Whether it happens to this request; counts it."""
        if not re.search(self.match, label):
            return False
        if self.after > 0:
            self.after -= 1
            return False
        if self.times is None:
            return True
        self.times -= 1
        return self.times >= 0


class Proxy:
    """Passes requests to the server, counts them, and carries out `faults`.

    Not counted is what its client has given up before an answer came: a machine that stood still is no request of ours.
    """

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.page_size: int | None = None
        """Names in one page of a listing; None means the server's own number."""
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.connections: set[socket.socket] = set()
        self.listener: http.server.ThreadingHTTPServer | None = None
        self.listen()

    def listen(self) -> None:
        """Starts to accept connections."""
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self.listener = _Listener(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self.listener.serve_forever, args=(0.05,), daemon=True).start()

    def refuse(self) -> None:
        """Breaks all connections, and refuses new ones until `listen` is called."""
        self.clear()
        assert self.listener is not None
        self.listener.shutdown()
        self.listener.server_close()
        with self.lock:
            for connection in self.connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def clear(self) -> None:
        """Forgets requests and faults, and lets go what hangs."""
        self.closing.set()
        with self.lock:
            self.requests.clear()
            self.faults.clear()
        self.closing = threading.Event()

    def counts(self, url: str = "gs://") -> collections.Counter[str]:
        """Number of requests by kind, for what is below `url`."""
        with self.lock:
            return collections.Counter(
                request.kind for request in self.requests if f"gs://{request.name}".startswith(url)
            )

    def reads(self, url: str = "gs://") -> list[Request]:
        """Requests that were answered with an object's bytes, for what is below `url`."""
        with self.lock:
            return [
                request
                for request in self.requests
                if request.kind == "read"
                and request.status in (200, 206)
                and f"gs://{request.name}".startswith(url)
            ]


class _Listener(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that give up break their connections; that is no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Proxy

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self.owner.lock:
            self.owner.connections.add(self.connection)

    def finish(self) -> None:
        with self.owner.lock:
            self.owner.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Silent: `Proxy.requests` is the log."""

    def _serve(self) -> None:
        owner, closing = self.owner, self.owner.closing
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else None
        kind, name = classify(self.path)
        kind = "delete" if self.command == "DELETE" else kind
        with owner.lock:
            fault = next((fault for fault in owner.faults if fault.takes(f"{kind} {name}")), None) or Fault(
                ""
            )
        if fault.before is not None:
            fault.before()
        if fault.hang is not None:
            status, headers, data = 0, [], b""
        elif fault.status is not None:
            status, headers, data = fault.status, [], (fault.body or f"fault {fault.status}").encode()
        else:
            status, headers, data = self._ask(body)
        if self._is_given_up():
            self.close_connection = True
            return
        whole = status in (200, 206)
        if fault.flip and whole:
            data = bytes([data[0] ^ 0xFF]) + data[1:]
        broken = fault.hang is not None or (fault.cut is not None and whole)
        with owner.lock:
            span = self.headers.get("Range") or ""
            authorization = self.headers.get("Authorization") or ""
            answered = 0 if broken else status
            query = urllib.parse.parse_qs(self.path.partition("?")[2])
            (project,) = query.get("userProject", [""])
            owner.requests.append(
                Request(
                    self.command, kind, name, span, answered, len(data), authorization, body or b"", project
                )
            )
        if fault.hang is not None:
            closing.wait(fault.hang)
            self._break()
            return
        self.send_response(status)
        for key, value in headers:
            self.send_header(key, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD" or status in (204, 304):
            return
        if fault.cut is not None and whole:
            self.wfile.write(data[: fault.cut])
            self._break()
        elif fault.rate is not None and whole:
            step = max(1, int(fault.rate / 10))
            for start in range(0, len(data), step):
                self.wfile.write(data[start : start + step])
                if closing.wait(0.1):
                    self._break()
                    break
        else:
            self.wfile.write(data)

    def _ask(self, body: bytes | None) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection("127.0.0.1", self.owner.upstream, timeout=60)
        try:
            asked = {key: value for key, value in self.headers.items() if key.lower() not in _HOP_BY_HOP}
            target = self.path
            if self.owner.page_size is not None and classify(target)[0] == "list":
                target += f"&maxResults={self.owner.page_size}"
            upstream.request(self.command, target, body, asked)
            answer = upstream.getresponse()
            headers = [pair for pair in answer.getheaders() if pair[0].lower() not in _HOP_BY_HOP]
            return answer.status, headers, answer.read()
        finally:
            upstream.close()

    def _is_given_up(self) -> bool:
        """Whether the client has closed the connection, as it does after a second without an answer, to ask again."""
        try:
            return self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _break(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _serve


def classify(target: str) -> tuple[str, str]:
    """Kind of a request and what it is about, from its path: ("read", "bucket/object")."""
    path, _, raw = target.partition("?")
    query = urllib.parse.parse_qs(raw)
    match = re.match(r"(?:/download)?/(?:storage/v1|upload/storage/v1)/b/([^/]+)(?:/o(?:/(.*))?)?$", path)
    if not match:
        return "other", path
    bucket, key = match.group(1), match.group(2)
    if path.startswith("/upload/"):
        return "write", f"{bucket}/{query.get('name', [''])[0]}"
    if key is None and path.endswith("/o"):
        return "list", f"{bucket}/{query.get('prefix', [''])[0]}"
    kind = "read" if query.get("alt") == ["media"] else "stat"
    return kind, f"{bucket}/{urllib.parse.unquote(key)}" if key else bucket


def free_port() -> int:
    """A port of the loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
