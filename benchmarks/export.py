"""How much memory an export to a bucket takes, and how often it reads the checkpoint for that.

    python benchmarks/export.py --gib 3 --memory 0.5 1 3

Makes a MaxText v2 scanned checkpoint of 26B layer shapes, whose chunks span all layers, and exports it to a bucket with
each bound on the tensors in memory, each time in a fresh process. The bucket is a server on the loopback that forgets
what it gets. Memory is the highest resident set over the one before.
"""

from __future__ import annotations

import argparse
import collections
import http.server
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import urllib.parse
from importlib.metadata import version
from pathlib import Path

import load

GIB = 1 << 30


class Sink(http.server.BaseHTTPRequestHandler):
    """The part of Cloud Storage's JSON interface that an export uses; nothing is stored."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""

    def _serve(self) -> None:
        left = int(self.headers.get("Content-Length") or 0)
        buffer = memoryview(bytearray(1 << 20))
        while left:
            left -= self.rfile.readinto(buffer[: min(left, len(buffer))])
        status, body = 200, b"{}"
        span = re.match(r"bytes \d+-(\d+)/(\d+)", self.headers.get("Content-Range") or "")
        if self.command == "DELETE":
            status = 404
        elif span is not None and int(span[1]) + 1 == int(span[2]):
            body = json.dumps({"size": span[2]}).encode()
        elif span is not None:
            status = 308
        self.send_response(status)
        if span is not None:
            self.send_header("Range", f"bytes=0-{span[1]}")
        if self.command == "POST":
            path, _, query = self.path.partition("?")
            name = urllib.parse.parse_qs(query)["name"][0]
            self.send_header("Location", f"http://sink{path}?upload_id={urllib.parse.quote(name)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_DELETE = _serve


def sink() -> None:
    """Serves, and prints its port."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Sink)
    print(server.server_port, flush=True)
    server.serve_forever()


def measure(checkpoint: str, config: str, memory: str) -> dict[str, float]:
    """Exports; run in a process of its own."""
    from vllm_maxtext_loader import open_checkpoint
    from vllm_maxtext_loader.tools.export import export
    from vllm_maxtext_loader.tools.export_config import make_configuration

    opened = open_checkpoint(checkpoint)
    # Imports what takes half a gigabyte, whatever the model.
    make_configuration(opened, config)
    read: collections.Counter[str] = collections.Counter()
    peak, started = load.Peak(), time.perf_counter()
    peak.start()
    done = export(
        opened,
        "gs://bucket/out",
        config=config,
        max_shard_bytes=500 * 10**6,
        memory_bytes=int(float(memory) * GIB),
        on_region=lambda decoded: read.update(bytes=decoded.array.nbytes),
    )
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "peak": peak.stop() / GIB,
        "read": read["bytes"] / opened.plan.nbytes,
        "budget": opened.concurrent_bytes / GIB,
        "nbytes": done.nbytes / GIB,
        "largest": max(target.nbytes for target in opened.plan.targets.values()) / GIB,
    }


def main() -> None:
    """Prints the table; `--sink` and `--measure` are what it calls itself with."""
    if sys.argv[1:2] == ["--sink"]:
        sink()
    if sys.argv[1:2] == ["--measure"]:
        print("RESULT " + json.dumps(measure(*sys.argv[2:])), flush=True)
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=3.0)
    parser.add_argument("--memory", type=float, nargs="+", default=[0.5, 1, 3], help="GiB")
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, gcsfs {version('gcsfs')}")
    with tempfile.TemporaryDirectory() as directory:
        dims = load.dims_for("26b", args.gib)
        checkpoint = load.make_checkpoint_in_process(Path(directory) / "maxtext", dims)
        load.write_config(Path(directory), checkpoint, dims)
        server = subprocess.Popen([sys.executable, __file__, "--sink"], stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        environment = {
            **os.environ,
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{int(server.stdout.readline())}",
        }
        print(f"{'--memory':>10}{'peak GiB':>10}{'read':>8}{'seconds':>9}")
        last: dict[str, float] = {}
        try:
            for memory in args.memory:
                command = [sys.executable, __file__, "--measure", str(checkpoint), directory, str(memory)]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                if not (found := load.result(done)):
                    print(f"{memory:>10}  {done.stderr.strip().splitlines()[-1]}")
                    continue
                print(f"{memory:>10}{found['peak']:>10.2f}{found['read']:>7.2f}x{found['seconds']:>9.1f}")
                last = found
        finally:
            server.terminate()
        if last:
            print(
                f"{last['nbytes']:.2f} GiB of tensors, the largest of {last['largest']:.2f} GiB; read budget "
                f"{last['budget']:.2f} GiB"
            )


if __name__ == "__main__":
    main()
