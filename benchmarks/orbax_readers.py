"""Orbax's public readers against ours: start-up, requests to a bucket, and what happens when the bucket fails.

    uv run --extra tpu python benchmarks/orbax_readers.py

Both find the newest step of a run and read its tree: the run, its steps, shapes and dtypes; no array data. The bucket
is fake-gcs-server on the loopback, behind the tests' counting proxy.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support import gcs  # noqa: E402

ROUNDS = 5
GIVE_UP = 60.0
"""Seconds after which a reader is stopped."""

READERS = {
    "this package": """
import sys
from vllm_maxtext_loader.checkpoint.location import locate
from vllm_maxtext_loader.checkpoint.storage import tensorstore_context
from vllm_maxtext_loader.checkpoint.tree import read_tree
print(len(read_tree(locate(sys.argv[1]), tensorstore_context()).leaves))
""",
    "Orbax": """
import sys
import orbax.checkpoint as ocp
from etils import epath
names = ocp.path.step.standard_name_format()
(step,) = [ocp.path.step.latest_step_metadata(epath.Path(sys.argv[1]), names)]
print(len(ocp.tree.to_flat_dict(ocp.PyTreeCheckpointHandler().metadata(step.path / "items").tree)))
""",
}

IMPORTS = {"this package": "vllm_maxtext_loader.api", "Orbax": "orbax.checkpoint"}

FAULTS = {
    "403 for everything": gcs.Fault(".*/orbax/.*|list .*", status=403),
    "every request hangs": gcs.Fault(".*", hang=600.0),
}


def run(code: str, *arguments: str) -> tuple[float, str]:
    """Seconds, and how it ended."""
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            timeout=GIVE_UP,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return time.perf_counter() - started, f"still waiting after {GIVE_UP:g} s"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return time.perf_counter() - started, lines[-1][:90] if lines else f"exit {done.returncode}"


def main() -> None:
    """Prints one table per question."""
    server, proxy = gcs.shared()
    server.upload(ROOT / "tests/fixtures/dense_v2/checkpoints", gcs.BUCKET, "orbax/")
    url = f"gs://{gcs.BUCKET}/orbax"
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("orbax-checkpoint", "gcsfs", "jax")
    )
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}\n")
    with gcs.environment(proxy.url, JAX_PLATFORMS="cpu", VLLM_MAXTEXT_TIMEOUT="10"):
        print(f"{'reader':<14}{'import s':>10}{'requests':>10}  requests by kind")
        for name, code in READERS.items():
            seconds = statistics.median(run(f"import {IMPORTS[name]}")[0] for _ in range(ROUNDS))
            proxy.clear()
            ended = run(code, url)[1]
            counts = proxy.counts()
            print(f"{name:<14}{seconds:>10.2f}{counts.total():>10}  {dict(counts)}; answer: {ended}")
        print(f"\n{'fault':<22}{'reader':<14}{'seconds':>8}  how it ended (time limit 10 s)")
        for fault, what in FAULTS.items():
            for name, code in READERS.items():
                proxy.clear()
                proxy.faults = [what]
                seconds, ended = run(code, url)
                print(f"{fault:<22}{name:<14}{seconds:>8.1f}  {ended}")
        proxy.clear()


if __name__ == "__main__":
    main()
