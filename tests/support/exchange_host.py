"""One of several processes that exchange regions of an array in memory.

    python exchange_host.py DIRECTORY HOST HOSTS VICTIM

The processes meet through files in DIRECTORY. The victim is killed when it has half of its regions. Prints {"error", "seconds"}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import tensorstore as ts

SHAPE, CHUNKS = (64, 256, 64), (1, 256, 64)


def make_values(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Values that differ everywhere."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


class Values:
    """An array in memory, as TensorStore opens one."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def opened(self) -> ts.TensorStore:
        """TensorStore's view of it."""
        return ts.array(self._array)


class Files:
    """A store of files in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def set(self, key: str, value: str) -> None:
        """Writes a value at once."""
        path = self._directory / key.replace("/", "-")
        path.with_suffix(".part").write_text(value)
        path.with_suffix(".part").rename(path)

    def get(self, key: str, seconds: float) -> str:
        """Waits for a value."""
        path, deadline = self._directory / key.replace("/", "-"), time.monotonic() + seconds
        while not path.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(key)
            time.sleep(0.01)
        return path.read_text()


def main() -> None:
    """Loads, as the command line says."""
    from vllm_maxtext_loader.checkpoint.exchange.exchange import Exchange
    from vllm_maxtext_loader.checkpoint.exchange.rendezvous import Terms, meet
    from vllm_maxtext_loader.checkpoint.exchange.sharing import Needs, assign
    from vllm_maxtext_loader.checkpoint.reader import read_regions
    from vllm_maxtext_loader.checkpoint.tree import Leaf

    directory, (host, hosts, victim) = Path(sys.argv[1]), map(int, sys.argv[2:])
    leaf = Leaf("a", ("a",), SHAPE, np.dtype(np.float32), CHUNKS)

    def needs_of(_: object, region: tuple[slice, ...]) -> Needs:
        return Needs(np.arange(hosts), np.array([[(part.start, part.stop) for part in region]] * hosts))

    terms = Terms(host, range(hosts), "127.0.0.1", 1, "here", 20.0)
    peers, assignment = meet(
        Files(directory), terms, lambda limit: assign([leaf], range(hosts), limit, needs_of, 0)
    )
    started, error = time.monotonic(), ""
    arrays = {"a": Values(make_values(SHAPE, 0)).opened()}
    try:
        with Exchange(assignment, peers) as exchange:
            regions = read_regions([leaf], arrays, 8 << 16, "here", exchange=exchange)
            for number, _ in enumerate(exchange.offer(regions)):
                if host == victim and number == len(assignment.shares) // 2:
                    os.kill(os.getpid(), signal.SIGKILL)
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    print(json.dumps({"error": error, "seconds": time.monotonic() - started}), flush=True)


if __name__ == "__main__":
    main()
