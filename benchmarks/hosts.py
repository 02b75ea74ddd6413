"""How many bytes each host of a multi-host engine would read.

    python benchmarks/hosts.py --gib 2 --devices 8

Makes a MaxText v2 checkpoint of 26B layer shapes and starts the real engine on that many virtual devices, with tensor
parallelism and with expert parallelism. When loading begins, the devices are dealt out to 1, 2, 4, … hosts in order, and
the regions of the checkpoint that some device of a host holds a part of are counted: what `DirectPlacer.needs` lets a host
read. Nothing is loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import load


def count(checkpoint: str, config: str, devices: int, experts: bool) -> dict[str, list[float]]:
    """Share of the checkpoint's bytes that each host reads, by number of hosts; run in a process of its own."""
    os.environ.update(
        JAX_PLATFORMS="cpu",
        XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        HF_HUB_OFFLINE="1",
        VLLM_CPU_KVCACHE_SPACE="1",
        USE_MOE_EP_KERNEL="0",
    )
    from vllm import LLM
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    import jax

    from vllm_maxtext_loader.checkpoint.reader import chunk_regions, region_nbytes
    from vllm_maxtext_loader.tpu.placement import ShardWriter

    shares: dict[str, list[float]] = {}

    class Counted(BaseException):
        """Ends the engine's start."""

    def stream(shard_writer: ShardWriter, *_: Any, **__: Any) -> Any:
        total = shard_writer.plan.nbytes
        hosts = 1
        while hosts <= devices:
            each = devices // hosts
            found = []
            for host in range(hosts):
                mine = frozenset(jax.devices()[host * each : (host + 1) * each])
                nbytes = 0
                for entry in shard_writer.plan.leaves:
                    for region in chunk_regions(entry.leaf, limit=1):
                        if shard_writer.is_local(entry.leaf, region, mine):
                            nbytes += region_nbytes(region, entry.leaf.dtype.itemsize)
                found.append(nbytes / total)
            shares[str(hosts)] = found
            hosts *= 2
        raise Counted

    ShardWriter.stream = stream  # type: ignore[method-assign]
    with contextlib.suppress(Counted):
        LLM(
            model=config,
            load_format="maxtext",
            model_loader_extra_config={"checkpoint": checkpoint},
            tensor_parallel_size=devices,
            enable_expert_parallel=experts,
            skip_tokenizer_init=True,
            max_model_len=128,
            max_num_seqs=8,
            max_num_batched_tokens=128,
        )
    return shares


def main() -> None:
    """Parses the command line; `--count` is what it calls itself with."""
    if len(sys.argv) > 1 and sys.argv[1] == "--count":
        result = count(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5] == "ep")
        print("RESULT " + json.dumps(result), flush=True)
        os._exit(0)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--devices", type=int, default=8)
    args = parser.parse_args()
    print(f"{platform.machine()}, vllm-tpu {version('vllm-tpu')}, jax {version('jax')}")
    with tempfile.TemporaryDirectory() as directory:
        dims = load.dims_for("26b", args.gib)
        checkpoint, hf = load.make_pair(Path(directory), dims)
        print(
            f"{args.devices} devices, {dims['experts']} experts, written by {load.DEVICES_OF_THE_WRITER} devices"
        )
        print(f"{'parallelism':<14}{'hosts':>6}  share of the checkpoint that each host reads")
        for kind in ("tp", "ep"):
            command = [sys.executable, __file__, "--count", str(checkpoint), str(hf), str(args.devices), kind]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if not (counted := load.result(done)):
                raise SystemExit(f"{kind}: nothing was counted")
            for hosts, shares in counted.items():
                name = "tensor" if kind == "tp" else "expert"
                print(f"{name:<14}{hosts:>6}  {min(shares):.3f} to {max(shares):.3f}")


if __name__ == "__main__":
    main()
