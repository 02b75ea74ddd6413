"""What the plugin adds to the start of vLLM, and how long planning the largest model takes.

    python benchmarks/startup.py

Prints medians of fresh processes: `import vllm_maxtext_loader.engine.plugin` and `register()`, after vLLM has been imported;
and planning the published 26B-A4B (30 layers, 128 experts, 262,144 rows) from leaf names and shapes alone.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version

import shapes

ROUNDS = 7

REGISTER = """
import time, vllm
started = time.perf_counter()
from vllm_maxtext_loader.engine.plugin import register
imported = time.perf_counter()
register()
print("RESULT", imported - started, time.perf_counter() - imported)
"""

BEFORE = """
import time
started = time.perf_counter()
from vllm_maxtext_loader.engine.plugin import register
register()
import sys
print("RESULT", time.perf_counter() - started, "vllm" in sys.modules)
"""


def plan_seconds() -> tuple[float, int, int]:
    """(seconds, leaves, Hugging Face tensors) of planning 26B-A4B."""
    import ml_dtypes
    import numpy as np

    from vllm_maxtext_loader.checkpoint.find import ItemLocation
    from vllm_maxtext_loader.checkpoint.storage.path import Location
    from vllm_maxtext_loader.checkpoint.tree import Leaf, Tree
    from vllm_maxtext_loader.conversion.plan import make_plan
    from vllm_maxtext_loader.families import identify

    dims = dict(shapes.dims_for("26b", 1), layers=30, experts=128, vocab=262_144)
    dtype = np.dtype(ml_dtypes.bfloat16)
    leaves = {
        name: Leaf(f"params.params.{name}", tuple(name.split(".")), shape, dtype, shape)
        for name, shape in shapes.leaves(dims).items()
    }
    tree = Tree(
        location=ItemLocation(Location("/synthetic"), Location("/synthetic/items"), step=0),
        writer="Linen (MaxText train state)",
        leaves=leaves,
        skipped=(),
        ocdbt=True,
        zarr3=True,
        complete=True,
        base=Location("/synthetic/items"),
        arrays={},
    )
    started = time.perf_counter()
    plan = make_plan(tree, identify(tree.leaves, "synthetic"))
    return time.perf_counter() - started, len(plan.leaves), len(plan.targets)


def in_fresh_process(code: str) -> list[str]:
    """What the code prints after RESULT."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    return next(line for line in done.stdout.splitlines() if line.startswith("RESULT ")).split()[1:]


def main() -> None:
    """Prints the figures."""
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, vllm-tpu {version('vllm-tpu')}"
    )
    rows = [[float(value) for value in in_fresh_process(REGISTER)] for _ in range(ROUNDS)]
    for position, name in enumerate(("import of the plugin", "register()")):
        values = [row[position] * 1000 for row in rows]
        print(
            f"{name:<24}{statistics.median(values):8.1f} ms ({min(values):.1f} to {max(values):.1f}), after `import vllm`"
        )
    alone = [float(in_fresh_process(BEFORE)[0]) * 1000 for _ in range(ROUNDS)]
    print(f"{'both':<24}{statistics.median(alone):8.1f} ms ({min(alone):.1f} to {max(alone):.1f}), before it")
    planned = [plan_seconds() for _ in range(ROUNDS)]
    times = [seconds * 1000 for seconds, _, _ in planned]
    _, leaves, targets = planned[-1]
    print(
        f"{'planning 26B-A4B':<24}{statistics.median(times):8.1f} ms ({min(times):.1f} to {max(times):.1f}), {leaves} leaves into {targets} tensors"
    )


if __name__ == "__main__":
    main()
