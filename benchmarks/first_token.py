"""From `vllm serve` to the first answer, with this package and with vLLM's default loader.

    python benchmarks/first_token.py --gib 1.5 --cpu

It makes a checkpoint of 26B-A4B's layer shapes and its export, as benchmarks/load.py does. Each loader then serves
twice: with an empty compilation cache, and with what the first start left there. The time is split by what the
server's log says, when it says it:

    imports         until the server names its arguments
    configuration   until the engine's process begins to initialize its engine
    engine          until the loader begins: processes, devices, an empty model
    load            as the loader itself says
    warm-up         until the server answers /health
    first answer    to a request of a few tokens: the programs that were not compiled before
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

import load
import shapes

PHASES = ("imports", "configuration", "engine", "load", "warm-up", "first answer")
START_SECONDS = 600
_ARGUMENTS = "non-default args"
_ENGINE = "Initializing a V1 LLM engine"
_LOADED = re.compile(r"Loading weights took ([\d.]+) seconds|Loaded .* tensors.* in ([\d.]+) s \(")


class Log(threading.Thread):
    """Reads a server's output, and notes when what was said.

    Attributes:
        lines: (seconds on the monotonic clock, line).
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        super().__init__(daemon=True)
        self.lines: list[tuple[float, str]] = []
        self._process = process

    def run(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append((time.monotonic(), line))

    def first(self, text: str) -> float:
        """When a line with `text` was read first."""
        found = next((when for when, line in self.lines if text in line), None)
        if found is None:
            raise RuntimeError(
                f"the log has no line with {text!r}:\n{''.join(line for _, line in self.lines[:40])}"
            )
        return found

    def loaded(self) -> tuple[float, float, str]:
        """When the loader had finished, the seconds it says it took, and the line that says so."""
        for when, line in self.lines:
            if (match := _LOADED.search(line)) is not None:
                return when, float(match.group(1) or match.group(2)), line[match.start() :].strip()
        raise RuntimeError(
            "the log has no line about the load:\n" + "".join(line for _, line in self.lines[-20:])
        )


def peak_bytes(group: int) -> int:
    """Highest resident set that a process of a process group ever had."""
    peaks = [0]
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            if os.getpgid(int(directory.name)) == group:
                status = (directory / "status").read_text()
                peaks += [
                    int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM")
                ]
    return max(peaks)


def serve(arguments: list[str], environment: dict[str, str]) -> tuple[dict[str, float], int, str]:
    """Starts `vllm serve`, asks one question, and stops it.

    Returns:
        (seconds by phase, peak resident bytes of the largest process, what the loader says of the load)
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "vllm"), "serve", *arguments]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "128"]
    command += ["--max-num-seqs", "4", "--max-num-batched-tokens", "128"]
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    log = Log(process)
    log.start()
    try:
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            if process.poll() is not None or time.monotonic() > started + START_SECONDS:
                raise RuntimeError(
                    "the server did not start:\n" + "".join(line for _, line in log.lines[-20:])
                )
            time.sleep(0.1)
        healthy = time.monotonic()
        body = {"prompt": "a", "max_tokens": 1, "temperature": 0, "model": "served"}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            assert json.loads(answer.read())["choices"]
        answered = time.monotonic()
        peak = peak_bytes(process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    loaded, seconds, line = log.loaded()
    ends = (log.first(_ARGUMENTS), log.first(_ENGINE), loaded - seconds, loaded, healthy, answered)
    seconds_of = (b - a for a, b in zip((started, *ends), ends, strict=False))
    return dict(zip(PHASES, seconds_of, strict=True)), peak, line


def print_header(title: str) -> None:
    """The columns of `print_row`."""
    print(f"{title:<18}" + "".join(f"{phase:>15}" for phase in PHASES) + f"{'sum':>9}", flush=True)


def print_row(title: str, row: dict[str, float]) -> None:
    """One line: seconds by phase, and their sum."""
    cells = "".join(f"{row[phase]:>15.1f}" for phase in PHASES)
    print(f"{title:<18}{cells}{sum(row.values()):>9.1f}", flush=True)


def main() -> None:
    """Prints a table: a row per loader and cache."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=1.5, help="size of the weights")
    parser.add_argument("--cpu", action="store_true", help="JAX on the CPU")
    parser.add_argument(
        "--directory", type=Path, help="where to put the checkpoint; default: a temporary directory"
    )
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from tiny_tokenizer import write_tokenizer

    packages = ", ".join(f"{name} {version(name)}" for name in ("vllm-tpu", "jax", "tensorstore"))
    cores = len(os.sched_getaffinity(0))
    print(f"{platform.machine()}, {cores} cores, Python {platform.python_version()}, {packages}", flush=True)
    directory = Path(tempfile.mkdtemp(prefix="first-token-", dir=args.directory))
    try:
        checkpoint, hf = load.make_pair(directory, load.dims_for("26b", args.gib))
        tokenizer = str(write_tokenizer(directory / "tokenizer", vocab_size=shapes.VOCAB))
        common = ["--tokenizer", tokenizer, "--served-model-name", "served"]
        extra = json.dumps({"checkpoint": str(checkpoint)})
        ours = ["--load-format", "maxtext", "--model-loader-extra-config", extra]
        ways: dict[str, list[str]] = {"maxtext": [*ours, *common], "default": common}
        print_header("loader, cache")
        for name, arguments in ways.items():
            environment: dict[str, Any] = {
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "MODEL_IMPL_TYPE": "vllm",
                "VLLM_NO_USAGE_STATS": "1",
                "VLLM_XLA_CACHE_PATH": str(directory / f"cache-{name}"),
                **({"JAX_PLATFORMS": "cpu"} if args.cpu else {}),
            }
            for cache in ("cold", "warm"):
                row, *_ = serve([str(hf), *arguments], environment)
                print_row(f"{name}, {cache}", row)
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
