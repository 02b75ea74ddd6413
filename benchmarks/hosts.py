"""How many bytes each host of a multi-host engine would read.

    python benchmarks/hosts.py --gib 2 --devices 8
    python benchmarks/hosts.py --published qwen3-235b-a22b --chips 16 32 64

Makes a MaxText v2 checkpoint of 26B layer shapes and starts the real engine on that many virtual devices, with tensor
parallelism and with expert parallelism. When loading begins, the devices are dealt out to 1, 2, 4, … hosts in order, and
the regions of the checkpoint that some device of a host holds a part of are counted: what `ShardWriter.is_local` lets a host
read. Nothing is loaded.

With --published the checkpoint is metadata only, of a published model's layers (written by 16 devices), and the engine is one
without weights; a host has four chips.
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
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import load

CHIPS_OF_A_HOST = 4


def count(start: Callable[[], Any], devices: int, each: Iterable[int]) -> dict[str, list[float]]:
    """Share of the checkpoint's bytes that each host reads, by devices of a host.

    Args:
        start: starts an engine; ended when loading begins.
        devices: of the engine.
        each: devices of a host, to be counted for.
    """
    import jax

    from vllm_maxtext_loader.checkpoint.reader import chunk_regions, region_nbytes
    from vllm_maxtext_loader.tpu.placement import ShardWriter

    shares: dict[str, list[float]] = {}

    class Counted(BaseException):
        """Ends the engine's start."""

    def stream(shard_writer: ShardWriter, *_: Any, **__: Any) -> Any:
        total = shard_writer.plan.nbytes
        for own in each:
            found = []
            for first in range(0, devices, own):
                mine = frozenset(jax.devices()[first : first + own])
                nbytes = 0
                for entry in shard_writer.plan.leaves:
                    for region in chunk_regions(entry.leaf, limit=1):
                        if shard_writer.is_local(entry.leaf, region, mine):
                            nbytes += region_nbytes(region, entry.leaf.dtype.itemsize)
                found.append(nbytes / total)
            shares[str(devices // own)] = found
        raise Counted

    ShardWriter.stream = stream  # type: ignore[method-assign]
    with contextlib.suppress(Counted):
        start()
    return shares


def count_made(checkpoint: str, config: str, devices: int, experts: bool) -> dict[str, list[float]]:
    """For a checkpoint that was made; run in a process of its own."""
    _prepare(devices)
    from vllm import LLM

    def start() -> None:
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

    powers = [1 << power for power in range(devices.bit_length())]
    return count(start, devices, [own for own in reversed(powers) if own <= devices])


def count_published(name: str, layers: int, chips: int, experts: bool) -> dict[str, list[float]]:
    """For the first layers of a published model; run in a process of its own."""
    _prepare(chips)
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from support import metadata_only
    from vllm_maxtext_loader.huggingface.config import make_config
    from vllm_maxtext_loader.tpu import dry_load

    dims = metadata_only.published(name, layers=layers)
    with tempfile.TemporaryDirectory() as directory:
        run = metadata_only.write(Path(directory) / "run", metadata_only.leaves(dims))
        make_config(dims, name, name).save_pretrained(Path(directory) / "config")

        def start() -> None:
            dry_load.start(
                str(Path(directory) / "config"),
                hbm_bytes=96 * load.GIB,
                model_loader_extra_config={"checkpoint": str(run)},
                tensor_parallel_size=chips,
                enable_expert_parallel=experts,
                max_model_len=128,
                max_num_seqs=8,
                max_num_batched_tokens=128,
            )

        return count(start, chips, [CHIPS_OF_A_HOST])


def _prepare(devices: int) -> None:
    """Sets the environment of an engine on virtual devices, before JAX is imported."""
    os.environ.update(
        JAX_PLATFORMS="cpu",
        XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        HF_HUB_OFFLINE="1",
        VLLM_CPU_KVCACHE_SPACE="1",
        USE_MOE_EP_KERNEL="0",
    )
    from vllm.plugins import load_general_plugins

    load_general_plugins()


def in_process(*arguments: str) -> dict[str, list[float]]:
    """Counts in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--count", *arguments], capture_output=True, text=True, check=False
    )
    if not (counted := load.result(done)):
        raise SystemExit(f"{' '.join(arguments)}: nothing was counted")
    return counted


def report(kind: str, counted: dict[str, list[float]]) -> None:
    """A line per number of hosts."""
    name = "tensor" if kind == "tp" else "expert"
    for hosts, shares in counted.items():
        print(f"{name:<14}{hosts:>6}  {min(shares):.3f} to {max(shares):.3f}; {sum(shares):.2f} in all")


def main() -> None:
    """Parses the command line; `--count` is what it calls itself with."""
    if len(sys.argv) > 1 and sys.argv[1] == "--count":
        which, *given, number, kind = sys.argv[2:]
        experts = kind == "ep"
        if which == "made":
            result = count_made(given[0], given[1], int(number), experts)
        else:
            result = count_published(given[0], int(given[1]), int(number), experts)
        print("RESULT " + json.dumps(result), flush=True)
        os._exit(0)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--published", help="MaxText's name of a published model, instead of 26B's shapes")
    parser.add_argument(
        "--layers", type=int, default=2, help="of the published model; shares depend little on it"
    )
    parser.add_argument("--chips", type=int, nargs="+", default=[16, 32, 64])
    args = parser.parse_args()
    print(f"{platform.machine()}, vllm-tpu {version('vllm-tpu')}, jax {version('jax')}")
    print(f"{'parallelism':<14}{'hosts':>6}  share of the checkpoint that each host reads")
    if args.published:
        from vllm_maxtext_loader.families import find_preset

        moe = "experts" in find_preset(args.published)[1].dims.sizes
        for kind in ("tp", "ep") if moe else ("tp",):
            for chips in args.chips:
                report(kind, in_process("published", args.published, str(args.layers), str(chips), kind))
        return
    with tempfile.TemporaryDirectory() as directory:
        dims = load.dims_for("26b", args.gib)
        checkpoint, hf = load.make_pair(Path(directory), dims)
        print(
            f"{args.devices} devices, {dims['experts']} experts, written by {load.DEVICES_OF_THE_WRITER} devices"
        )
        for kind in ("tp", "ep"):
            report(kind, in_process("made", str(checkpoint), str(hf), str(args.devices), kind))


if __name__ == "__main__":
    main()
