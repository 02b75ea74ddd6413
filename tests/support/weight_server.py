"""A server on the loopback that keeps the protocol of new weights as a real one does, without an engine.

It stands in for `vllm serve` where a test is about the client: late, bad and deleted steps, servers that
fail, signals at every request. What a client must not do is noted in `wrong`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

NBYTES = 3 << 20
SWAP = ["/pause", "/start_weight_update", "/update_weights", "/finish_weight_update", "/resume"]


@dataclasses.dataclass
class Fault:
    """What goes wrong with requests.

    Attributes:
        route: route, or method of the workers.
        status: HTTP status to answer with; 0 breaks the connection.
        body: the answer's body.
        hang: seconds to wait before answering.
        late: seconds to wait before the request is carried out.
        done: whether the request is carried out before it goes wrong.
        after: requests to let pass first.
        times: how many requests it happens to; None means all.
    """

    route: str
    status: int = 500
    body: Any = None
    hang: float = 0.0
    late: float = 0.0
    done: bool = False
    after: int = 0
    times: int | None = None

    def takes(self, name: str) -> bool:
        if name != self.route:
            return False
        if self.after:
            self.after -= 1
            return False
        if self.times is None:
            return True
        self.times -= 1
        return self.times >= 0


class WeightServer:
    """The server.

    Args:
        items: directory of the weights that it starts with.
        step: their step.
        workers: how many answer to a call.

    Attributes:
        served: (items, step) of every swap, in order.
        requests: names of the requests, in order.
        wrong: what a client did that breaks a server.
        authorization: the Authorization header of the last request.
        polls: answers to `pull_weights` until a step is staged.
        bad: error by items directory that cannot be staged.
        in_flight: seconds that a pause with "wait" takes.
        on_request: called with the name of a request, after it is carried out and before it is answered.
        torn: whether the weights are a mixture.
        tears: whether the next swap leaves a mixture.
    """

    def __init__(self, items: str, step: int | None = 0, workers: int = 1) -> None:
        self.workers = workers
        self.served: list[tuple[str, int | None]] = []
        self.requests: list[str] = []
        self.wrong: list[str] = []
        self.authorization = ""
        self.polls = 2
        self.bad: dict[str, str] = {}
        self.in_flight = 0.0
        self.faults: list[Fault] = []
        self.on_request: Callable[[str], None] = lambda name: None
        self.pauses: list[str] = []
        self.dev_mode = True
        self.tears = False
        self.restart(items, step)
        self._lock = threading.RLock()
        self._http: http.server.ThreadingHTTPServer | None = None
        self.port = 0
        self.start()

    def restart(self, items: str, step: int | None) -> None:
        """Forgets all of it, as a process that is started anew."""
        self.items, self.step = items, step
        self.version = f"step-{step}"
        self.paused = self.updating = self.torn = False
        self.staged: dict[str, Any] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listens, after `stop` on the same port."""
        owner = self

        class Handler(_Handler):
            server_of = owner

        self._http = _Listener(("127.0.0.1", self.port), Handler)
        self.port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Refuses connections."""
        assert self._http is not None
        self._http.shutdown()
        self._http.server_close()

    def assert_serves(self, step: int | None) -> None:
        """It answers, with this step, and no client did what breaks a server."""
        assert self.wrong == []
        assert (self.paused, self.updating, self.torn) == (False, False, False)
        assert (self.step, self.version) == (step, f"step-{step}")

    def answer(self, route: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        """Carries a request out."""
        name = body["method"] if route == "/collective_rpc" else route
        self.requests.append(name)
        if route != "/health" and not self.dev_mode:
            return 404, {"detail": "Not Found"}
        fault = next((fault for fault in self.faults if fault.takes(name)), None)
        if fault is not None and not fault.done:
            time.sleep(fault.hang)
            return fault.status, fault.body
        time.sleep(fault.late if fault is not None else 0.0)
        with self._lock:
            status, content = self._carry_out(name, query, body)
        self.on_request(name)
        if name == "/pause" and query["mode"] == ["wait"]:
            time.sleep(self.in_flight)
        if fault is not None:
            time.sleep(fault.hang)
            return fault.status, fault.body
        return status, content

    def _carry_out(self, name: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        match name:
            case "/pause":
                if query["clear_cache"] != ["true"]:
                    self.wrong.append("the caches outlive their weights")
                self.pauses.append(query["mode"][0])
                self.paused = True
                return 200, {"status": "paused"}
            case "/resume":
                if self.updating:
                    self.wrong.append("resumed without a KV cache")
                self.paused = False
                return 200, {"status": "resumed"}
            case "/is_paused":
                return 200, {"is_paused": self.paused}
            case "/start_weight_update":
                if self.updating:
                    return _error("start_weight_update called while an update is already active")
                if not self.paused:
                    self.wrong.append("started an update while requests run")
                self.updating = True
                return 200, {"message": "Weight update started"}
            case "/update_weights":
                return self._update(body["update_info"])
            case "/finish_weight_update":
                self.updating = False
                if (version := body.get("weight_version")) is not None:
                    if version != f"step-{self.step}":
                        self.wrong.append(f"called step {self.step} {version}")
                    self.version = version
                return 200, {"message": "Weight update finished"}
            case "weight_state":
                state = {"path": self.items, "items": self.items, "step": self.step, "staged": self.staged}
                return 200, {"results": [state | {"torn": self.torn}] * self.workers}
            case "pull_weights":
                return 200, {"results": [self._pull(body["kwargs"]["update_info"])] * self.workers}
            case "drop_weights":
                self.staged = None
                return 200, {"results": [None] * self.workers}
        return 404, {"detail": "Not Found"}

    def _pull(self, update: dict[str, Any]) -> dict[str, Any]:
        if self.staged is None or self.staged["path"] != update["path"]:
            self.staged = {"path": update["path"], "step": update.get("step"), "polls": 0}
        staged = self.staged
        staged["polls"] += 1
        error = self.bad.get(update["path"])
        state = "staging" if staged["polls"] <= self.polls else "failed" if error else "staged"
        read = NBYTES * min(staged["polls"], self.polls) // max(self.polls, 1)
        return {
            "state": state,
            "path": staged["path"],
            "step": staged["step"],
            "read_bytes": read if state == "staging" else NBYTES,
            "total_bytes": NBYTES,
            "seconds": 0.5,
            "error": error if state == "failed" else None,
        }

    def _update(self, update: dict[str, Any]) -> tuple[int, Any]:
        if not self.updating or not self.paused:
            self.wrong.append("updated outside of an update")
        if self.staged is None or self.staged["path"] != update["path"] or self.staged["polls"] <= self.polls:
            self.wrong.append("updated before the step was staged")
        self.torn = self.tears
        if self.torn:
            return _error("TornWeightsError: some arrays are of the new step")
        self.items, self.step = update["path"], update.get("step")
        self.served.append((self.items, self.step))
        self.staged = None
        return 200, {"message": "Weights updated"}


def _error(message: str, status: int = 500) -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": "InternalServerError", "code": status}}


class _Listener(http.server.ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True


class _Handler(http.server.BaseHTTPRequestHandler):
    server_of: WeightServer

    def do_GET(self) -> None:
        self._serve(None)

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self._serve(json.loads(self.rfile.read(length) or b"{}"))

    def _serve(self, body: Any) -> None:
        parts = urllib.parse.urlsplit(self.path)
        self.server_of.authorization = self.headers.get("Authorization", "")
        status, content = self.server_of.answer(parts.path, urllib.parse.parse_qs(parts.query), body)
        if not status:
            self.close_connection = True
            self.connection.close()
            return
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        with contextlib.suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serving(items: str, step: int | None = 0, **options: Any) -> Iterator[WeightServer]:
    """A server for the duration."""
    server = WeightServer(items, step, **options)
    try:
        yield server
    finally:
        server.stop()
