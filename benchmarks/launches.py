"""What a launch costs a thread that fills devices, besides the bytes: Python, JAX's dispatch.

    python benchmarks/launches.py --devices 8

Tiles are small, so that their bytes cost next to nothing. Threads run Python one after another: the processor time of one
thread bounds what all of them launch. JAX on the CPU, no checkpoint.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

ROWS = 1000
TILE = (16, 1024)
"""Rows and columns of a tile; bfloat16."""

ROUNDS = 5


def measure(count: int) -> None:
    """Prints milliseconds per launch, for tiles of all devices and of one."""
    import jax
    import ml_dtypes
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from vllm_maxtext_loader.tpu.columns import ColumnRange
    from vllm_maxtext_loader.tpu.device_shards import fill_on_devices
    from vllm_maxtext_loader.tpu.shards import Block, PendingArray

    devices = jax.devices()
    assert len(devices) == count
    dtype = np.dtype(ml_dtypes.bfloat16)
    array = PendingArray(
        parameters=("weight",),
        shape=(ROWS, TILE[0], TILE[1] * count),
        sharding=NamedSharding(Mesh(np.array(devices), ("model",)), PartitionSpec(None, None, "model")),
        axis_groups={"leaf": ((0,), (1,), (2,))},
        column_ranges=[ColumnRange("leaf", 0, 0, TILE[1] * count)],
        missing_leaves={"leaf"},
        on_complete=lambda _: None,
        dtype=dtype,
    )
    fill_on_devices([array])
    values = np.ones((1, *TILE), dtype)

    def tasks(holders: Callable[[int], list[Any]]) -> list[Callable[[], None]]:
        blocks = [[Block(device, values, (row, 0, 0)) for device in holders(row)] for row in range(ROWS)]
        return [task for own in blocks for task in array.tasks(own)]

    ways: dict[str, Callable[[int], list[Any]]] = {"a tile for every device": lambda row: devices}
    if count > 1:
        ways["a tile for one of them"] = lambda row: [devices[row % count]]
    for name, holders in ways.items():
        launches = tasks(holders)
        # Once before: programs are compiled, and memory is touched.
        rounds = [timed(launches) for _ in range(ROUNDS + 1)][1:]
        seconds, cpu_seconds = (statistics.median(part) / len(launches) for part in zip(*rounds, strict=True))
        print(f"{name:<26}{seconds * 1e3:>8.2f} ms, of which {cpu_seconds * 1e3:.2f} ms of the thread's time")


def timed(launches: list[Callable[[], None]]) -> tuple[float, float]:
    """Seconds, and the thread's processor time in seconds, of some launches."""
    started, used = time.perf_counter(), time.thread_time()
    for launch in launches:
        launch()
    return time.perf_counter() - started, time.thread_time() - used


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=1, help="devices of JAX's CPU backend")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices}"
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores, jax {version('jax')}, {args.devices} devices; medians of {ROUNDS}")
    measure(args.devices)


if __name__ == "__main__":
    main()
