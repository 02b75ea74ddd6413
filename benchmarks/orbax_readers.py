"""Could Orbax's public readers replace ours for step names, commit marks and tree metadata?

    PYTHONPATH=tests python benchmarks/orbax_readers.py

Finds the newest committed step of a run and reads its tree's metadata, by this package and by Orbax, each time in a
fresh process: from a disk, from a GCS server on the loopback, and with faults in front of that server. The limit for
faults is VLLM_MAXTEXT_TIMEOUT=10; a reader that has not ended after 60 s is stopped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version

from support import gcs
from support.checkpoints import FIXTURES

CASE = "moe_v2"
ROUNDS = 3
LIMIT = 10
STOPPED_AFTER = 60

OURS = """
from vllm_maxtext_loader.checkpoint.find import locate
from vllm_maxtext_loader.checkpoint.storage.path import tensorstore_context
from vllm_maxtext_loader.checkpoint.tree import read_tree

def read(run):
    return len(read_tree(locate(run), tensorstore_context()).leaves)
"""

ORBAX = """
import orbax.checkpoint as ocp
from orbax.checkpoint.path import step as steps

def read(run):
    newest = steps.latest_step_metadata(run, steps.standard_name_format())
    if not steps.is_path_finalized(newest.path):
        raise ValueError("not committed")
    ocp.metadata.get_step_metadata(newest.path)
    tree = ocp.PyTreeCheckpointHandler().metadata(newest.path / "items").tree
    import jax
    return len(jax.tree.leaves(tree))
"""

TIMED = """
import json, sys, time
started = time.perf_counter()
{reader}
imported = time.perf_counter()
try:
    found = str(read(sys.argv[1])) + " leaves"
except Exception as error:
    found = type(error).__name__ + ": " + " ".join(str(error).split())
print("RESULT", json.dumps([imported - started, time.perf_counter() - imported, found]))
"""

FAULTS: dict[str, dict[str, object] | None] = {
    "no fault": None,
    "403 when listing": {"match": "list ", "status": 403},
    "hang when listing": {"match": "list ", "hang": 600},
    "403 for `_METADATA`": {"match": "read .*/items/_METADATA", "status": 403},
    "hang for `_METADATA`": {"match": "read .*/items/_METADATA", "hang": 600},
    "503 for `_METADATA`": {"match": "read .*/items/_METADATA", "status": 503},
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one process did.

    Attributes:
        import_seconds: seconds of its imports; NaN where it was stopped.
        seconds: seconds of reading.
        found: what it read, or its error.
    """

    import_seconds: float
    seconds: float
    found: str


def measure(reader: str, run: str) -> Outcome:
    """Runs a reader in a fresh process."""
    started = time.perf_counter()
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "FSSPEC_GCS_TOKEN": "anon",
        "VLLM_MAXTEXT_TIMEOUT": str(LIMIT),
    }
    command = [sys.executable, "-c", TIMED.format(reader=reader), run]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=STOPPED_AFTER, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome(float("nan"), time.perf_counter() - started, "no end, stopped")
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(done.stderr)
    return Outcome(*json.loads(lines[-1].removeprefix("RESULT ")))


def main() -> None:
    """Prints two Markdown tables, and the versions they are of."""
    server, proxy = gcs.shared()
    server.upload(FIXTURES / CASE / "checkpoints", gcs.BUCKET, "run/")
    readers = {"ours": OURS, "Orbax": ORBAX}
    print("| reader | import, s | local disk, s | bucket, s | requests (list, stat, read) |")
    print("|---|---|---|---|---|")
    with gcs.environment(proxy.url):
        run = f"gs://{gcs.BUCKET}/run"
        for name, reader in readers.items():
            local = [measure(reader, str(FIXTURES / CASE / "checkpoints")) for _ in range(ROUNDS)]
            remote = []
            for _ in range(ROUNDS):
                proxy.clear()
                remote.append(measure(reader, run))
            counts = proxy.counts()
            kinds = ", ".join(str(counts[kind]) for kind in ("list", "stat", "read"))
            imports = statistics.median(outcome.import_seconds for outcome in local + remote)
            seconds = [
                statistics.median(outcome.seconds for outcome in outcomes) for outcomes in (local, remote)
            ]
            print(
                f"| {name} | {imports:.2f} | {seconds[0]:.3f} | {seconds[1]:.3f} | {counts.total()} ({kinds}) |"
            )
        print()
        print("| fault | reader | ends after, s | requests | with |")
        print("|---|---|---|---|---|")
        for fault, what in FAULTS.items():
            for name, reader in readers.items():
                proxy.clear()
                proxy.faults = [] if what is None else [gcs.Fault(**what)]  # type: ignore[arg-type]
                outcome = measure(reader, run)
                requests = proxy.counts().total()
                print(f"| {fault} | {name} | {outcome.seconds:.1f} | {requests} | {outcome.found[:110]} |")
    packages = ("orbax-checkpoint", "gcsfs", "tensorstore")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    print(
        f"\n{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, {versions}"
    )


if __name__ == "__main__":
    main()
