"""What verifying checksums while streaming costs.

    python benchmarks/checksum.py --gib 1

Reads a MaxText v2 checkpoint of 26B layer shapes from a warm page cache, as a load does, with and without comparing every
chunk with the checksum file, in turn, and prints medians.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import load

from vllm_maxtext_loader import open_checkpoint
from vllm_maxtext_loader.checkpoint.checksums import Verifier
from vllm_maxtext_loader.checkpoint.reader import DecodedRegion, read_regions

ROUNDS = 7
StallDetector = Callable[[Iterator[DecodedRegion]], Iterator[DecodedRegion]]


def read(checkpoint: Path, sums: Path | None) -> tuple[float, float]:
    """(seconds, CPU seconds) of reading everything."""
    opened = open_checkpoint(checkpoint)
    leaves = [entry.leaf for entry in opened.plan.leaves]
    watch: StallDetector = lambda regions: regions  # noqa: E731
    if sums is not None:
        verifier = Verifier(sums, opened.plan.where)
        verifier.expect(leaves)
        watch = verifier.watch
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for _ in watch(read_regions(leaves, opened.tree.arrays, opened.concurrent_bytes, opened.plan.where)):
        pass
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - started, cpu


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=1.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        dims = load.dims_for("26b", args.gib)
        checkpoint = load.make_checkpoint_in_process(Path(directory) / "maxtext", dims)
        sums = Path(directory) / "sums.json"
        command = [str(Path(sys.executable).parent / "vllm-maxtext"), "checksum", str(checkpoint)]
        with sums.open("w") as file:
            subprocess.run(command, stdout=file, stderr=subprocess.DEVNULL, check=True)
        gib = open_checkpoint(checkpoint).plan.nbytes / load.GIB
        rows: dict[str, list[tuple[float, float]]] = {"plain": [], "verified": []}
        for _ in range(ROUNDS):
            rows["plain"].append(read(checkpoint, None))
            rows["verified"].append(read(checkpoint, sums))
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, tensorstore {version('tensorstore')}, {gib:.2f} GiB, "
        f"medians of {ROUNDS} rounds"
    )
    print(f"{'':<10}{'seconds':>9}{'CPU s':>8}")
    medians = {
        name: [statistics.median(column) for column in zip(*values, strict=True)]
        for name, values in rows.items()
    }
    for name, (seconds, cpu) in medians.items():
        print(f"{name:<10}{seconds:>9.2f}{cpu:>8.2f}")
    extra = medians["verified"][1] - medians["plain"][1]
    print(
        f"cost: {extra / gib:.2f} CPU s per GiB, {medians['verified'][0] / medians['plain'][0] - 1:.0%} more time"
    )


if __name__ == "__main__":
    main()
