"""A published model at its full size, served from a MaxText checkpoint with no configuration given.

    python benchmarks/full_size.py --cpu

It writes a checkpoint of Gemma 4 E2B's published shapes (10 GiB, random weights) by Orbax, as MaxText does, starts
`vllm serve` on it, asks one question, and prints the time by phase and the highest resident set of a process. It
needs a checkout (shapes come from tests/support), 12 GiB of disk and 24 GiB of memory. `--layers` tries a smaller one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import first_token
import load

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]

MODEL = "gemma4-e2b"
DEVICES_OF_THE_WRITER = 8


def write(directory: Path, layers: int | None) -> None:
    """Writes the checkpoint; run in a process of its own, which has the writer's devices."""
    import jax
    import ml_dtypes
    import numpy as np
    import orbax.checkpoint as ocp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from support import metadata_only

    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    base = np.random.default_rng(0).standard_normal(1 << 22, np.float32) * np.float32(0.02)
    base = base.astype(ml_dtypes.bfloat16)
    tree: dict[str, object] = {}
    for name, shape in metadata_only.leaves(metadata_only.published(MODEL, layers=layers)).items():

        def part(index: Any, shape: tuple[int, ...] = shape) -> np.ndarray:
            # One device's part at a time: the whole of a table is half of the model.
            lengths = [len(range(*where.indices(size))) for where, size in zip(index, shape, strict=True)]
            return np.resize(base, lengths)

        split = shape[0] % len(jax.devices()) == 0 and shape[0] > 1
        sharding = NamedSharding(mesh, PartitionSpec("fsdp") if split else PartitionSpec())
        node: dict[str, object] = tree
        *parents, last = ("params", "params", *name.split("."))
        for key in parents:
            node = node.setdefault(key, {})  # type: ignore[assignment]
        node[last] = jax.make_array_from_callback(shape, sharding, part)
    items = ocp.CompositeCheckpointHandler(items=ocp.PyTreeCheckpointHandler(use_zarr3=True))
    with ocp.Checkpointer(items) as writer:
        writer.save(directory / "0", args=ocp.args.Composite(items=ocp.args.PyTreeSave(tree)))


def main() -> None:
    """Writes, serves, and prints; `--write` is what it calls itself with."""
    if len(sys.argv) > 1 and sys.argv[1] == "--write":
        write(Path(sys.argv[2]), json.loads(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", help="JAX on the CPU")
    parser.add_argument("--layers", type=int, help="the model's first layers only")
    parser.add_argument("--directory", type=Path, help="where to put it; default: a temporary directory")
    args = parser.parse_args()
    from tiny_tokenizer import write_tokenizer

    directory = Path(tempfile.mkdtemp(prefix="full-size-", dir=args.directory))
    try:
        checkpoint = directory / "run"
        devices = {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES_OF_THE_WRITER}",
        }
        command = [sys.executable, __file__, "--write", str(checkpoint), json.dumps(args.layers)]
        subprocess.run(command, env={**os.environ, **devices}, check=True)
        tokenizer = write_tokenizer(directory / "tokenizer", vocab_size=262144)
        arguments = [str(checkpoint), "--load-format", "maxtext", "--tokenizer", str(tokenizer)]
        if args.layers is not None:
            arguments += ["--model-loader-extra-config", json.dumps({"model_name": MODEL})]
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_XLA_CACHE_PATH": str(directory / "cache"),
            **({"JAX_PLATFORMS": "cpu"} if args.cpu else {}),
        }
        size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
        first_token.print_header(MODEL)
        row, peak, line = first_token.serve([*arguments, "--served-model-name", "served"], environment)
        first_token.print_row("cold cache", row)
        print(line)
        print(f"stored {size / load.GIB:.1f} GiB; peak resident set of a process {peak / load.GIB:.1f} GiB")
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
