"""How a load onto an accelerator compares with decoding alone, and with vLLM's default loader.

    python benchmarks/accelerator.py --gib 5.6               on a TPU VM
    python benchmarks/accelerator.py --gib 1.5 --cpu         JAX on the CPU: its devices are filled as a TPU's are
    python benchmarks/accelerator.py --gib 1.5 4.5 --cpu --rounds 3 --ways direct
    python benchmarks/accelerator.py --gib 5.6 --cuda        JAX on a CUDA device; see `patch_for_cuda`

It makes a checkpoint of 26B-A4B's layer shapes and its export, as benchmarks/load.py does, and measures in a fresh
process each, for eight minutes per size at most:

    TensorStore     every chunk decoded, nothing kept, 4 and 16 chunks in flight: no loader is faster
    and device_put  every chunk decoded, 16 in flight, and copied into a new array on a device by jax.device_put: the
                    least that JAX takes to hold the weights on this backend, packed by nobody
    direct          this package as a TPU runs it: tiles are sent to the devices, which fill their arrays
    load_weights    this package by Hugging Face tensors and vLLM's load_weights (VLLM_MAXTEXT_DIRECT=0)
    default         vLLM's default loader, from safetensors

Measured is tpu-inference's load_weights, from an empty model until all arrays are on their devices. The arrays are
then compared by hash. Experts that this package folds scales into differ from the default loader's by design, and
are counted separately. On the CPU, device memory is host memory, so the weights are subtracted from the peak.
What is still resident when all arrays are there (modules, compiled programs, freed memory that malloc keeps) is printed
next to the peak. Everything is read from a warm page cache. With several rounds, all numbers are medians.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import load

SECONDS = 480
WAYS = {"direct": "device", "load_weights": "0", "default": "1"}
"""What is measured, and VLLM_MAXTEXT_DIRECT."""

FOLDED = ("w2_weight", "router.per_expert_scale")
"""Ends of the names of what folding expert scales changes."""

IN_FLIGHT = (4, 16)

MOVED = "and device_put"


def patch_for_cuda() -> None:
    """Lets vLLM, tpu-inference and this package load with JAX on a CUDA device, which none of them supports.

    The engine is never asked for an answer: its kernels are the CPU's. Must run before vLLM, torchax or
    tpu-inference is imported.
    """
    import jax
    import wrapt

    # tpu-inference refuses other platforms than tpu and cpu; JAX has read the variable by now.
    assert jax.config.jax_platforms == "cuda,cpu"
    os.environ["JAX_PLATFORMS"] = "cpu"
    # vLLM's TPU platform asks for an importable libtpu, and its CUDA platform must not be found next to it.
    libtpu: Any = types.ModuleType("libtpu")
    libtpu.get_library_path = lambda: None
    sys.modules["libtpu"] = libtpu

    def without_cuda(module: Any) -> None:
        module.builtin_platform_plugins["cuda"] = lambda: None

    wrapt.register_post_import_hook(without_cuda, "vllm.platforms")
    import torch

    torch.cuda.is_available = lambda: False
    torch.cuda.device_count = lambda: 0
    from vllm_maxtext_loader.cpu_kernels import devices, install

    install.require_cpu = lambda: None
    devices.require_cpu_devices = lambda devices: None
    devices.requested_devices = lambda: 1

    def host_copies(module: Any) -> None:
        # By dlpack, torch would be handed a tensor on the device.
        original = module.j2t
        module.j2t = lambda array, use_dlpack=False: original(array, use_dlpack=False)

    wrapt.register_post_import_hook(host_copies, "torchax.ops.mappings")
    # vLLM inspects model classes in a subprocess, which would know nothing of all this.
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda function: function()


def measure(way: str, checkpoint: str, hf: str, backend: str, devices: int) -> dict[str, Any]:
    """Loads in one way; run in a process of its own."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        HF_HUB_OFFLINE="1",
        VLLM_CPU_KVCACHE_SPACE="1",
        MODEL_IMPL_TYPE="vllm",
        VLLM_NO_USAGE_STATS="1",
        VLLM_MAXTEXT_DIRECT=WAYS[way],
        XLA_PYTHON_CLIENT_PREALLOCATE="false",
    )
    if backend == "cuda":
        patch_for_cuda()
    import jax
    from vllm import LLM
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from tpu_inference.models.vllm.vllm_model_wrapper import VllmModelWrapper

    arguments: dict[str, Any] = {}
    if way != "default":
        arguments = {"load_format": "maxtext", "model_loader_extra_config": {"checkpoint": checkpoint}}
    found: dict[str, Any] = {}
    compiled: list[float] = []

    def on_event(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(on_event)
    original = VllmModelWrapper.load_weights

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        compiled.clear()
        peak = load.Peak()
        peak.start()
        started, used = time.perf_counter(), time.process_time()
        state, *_ = original(self, *args, **kwargs)
        jax.block_until_ready(state)
        found.update(
            seconds=time.perf_counter() - started,
            cpu_seconds=time.process_time() - used,
            peak_bytes=peak.stop(),
            kept_bytes=load.resident_bytes() - peak.start_bytes,
            compiled=len(compiled),
            compile_seconds=sum(compiled),
            device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            device_peak=max(
                (device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.devices()
            ),
            device_bytes=max(
                (device.memory_stats() or {}).get("bytes_in_use", 0) for device in jax.devices()
            ),
            state_bytes=sum(
                shard.data.nbytes for array in state.values() for shard in array.addressable_shards
            ),
            hashes=hashes(state),
        )
        raise Loaded

    class Loaded(BaseException):
        """Ends the engine's start: what follows is not measured."""

    VllmModelWrapper.load_weights = timed
    with contextlib.suppress(Loaded):
        LLM(
            model=hf,
            skip_tokenizer_init=True,
            max_model_len=128,
            max_num_seqs=4,
            max_num_batched_tokens=128,
            tensor_parallel_size=devices,
            **arguments,
        )
    return found


def hashes(state: dict[str, Any]) -> dict[str, list[int]]:
    """A checksum of every shard of every array."""
    import google_crc32c
    import numpy as np

    return {
        name: [google_crc32c.value(np.asarray(shard.data).tobytes()) for shard in array.addressable_shards]
        for name, array in state.items()
    }


def decode(checkpoint: str) -> dict[str, Any]:
    """Seconds to decode all chunks with TensorStore, nothing kept; run in a process of its own."""
    from vllm_maxtext_loader import open_checkpoint

    opened = open_checkpoint(checkpoint)
    chunks = stored_chunks(opened)
    found: dict[str, Any] = {"chunks": len(chunks), "budget": opened.concurrent_bytes}
    # Once before, for the page cache.
    for in_flight in (IN_FLIGHT[-1], *IN_FLIGHT):
        started, used = time.perf_counter(), time.process_time()
        for _ in decoded(chunks, in_flight):
            pass
        found[f"{in_flight} seconds"] = time.perf_counter() - started
        found[f"{in_flight} cpu_seconds"] = time.process_time() - used
    return found


def move(checkpoint: str) -> dict[str, Any]:
    """Seconds to decode all chunks with TensorStore and to keep each on a device; run in a process of its own."""
    import jax

    from vllm_maxtext_loader import open_checkpoint

    chunks, devices = stored_chunks(open_checkpoint(checkpoint)), jax.local_devices()
    jax.block_until_ready(jax.device_put([0.0] * len(devices), devices))
    started, used = time.perf_counter(), time.process_time()
    # On the CPU, an array may otherwise be the decoder's memory itself.
    kept = [
        jax.device_put(values, devices[number % len(devices)], may_alias=False)
        for number, values in enumerate(decoded(chunks, IN_FLIGHT[-1]))
    ]
    jax.block_until_ready(kept)
    return {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}


def stored_chunks(opened: Any) -> list[Any]:
    """Every stored chunk of an opened checkpoint, as a TensorStore."""
    from vllm_maxtext_loader.checkpoint.regions import chunk_regions

    return [
        opened.tree.arrays[entry.leaf.key][region]
        for entry in opened.plan.leaves
        for region in chunk_regions(entry.leaf, limit=1)
    ]


def decoded(chunks: list[Any], in_flight: int) -> Iterator[Any]:
    """The chunks' values, so many decoded at a time."""
    flying: collections.deque[Any] = collections.deque()
    for chunk in chunks:
        if len(flying) == in_flight:
            yield flying.popleft().result()
        flying.append(chunk.read())
    while flying:
        yield flying.popleft().result()


def in_process(deadline: float, backend: str, devices: int, *arguments: str) -> dict[str, Any]:
    """One measurement in a fresh process; {} where it failed, or did not end in time."""
    environment = {**os.environ}
    if backend != "tpu":
        environment["JAX_PLATFORMS"] = "cuda,cpu" if backend == "cuda" else "cpu"
    if backend == "cpu":
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, __file__, *arguments]
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=max(1.0, deadline - time.monotonic()),
        )
    except subprocess.TimeoutExpired:
        print(f"{' '.join(arguments[:2])}: not done in the time that was left", file=sys.stderr)
        return {}
    return load.result(done)


def median(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The rounds' medians; what is not a number is the last round's. {} where a round failed."""
    if not all(rounds):
        return {}
    return {
        key: statistics.median(row[key] for row in rounds) if isinstance(value, int | float) else value
        for key, value in rounds[-1].items()
    }


def report(
    gib: float,
    rounds: int,
    floor: dict[str, Any],
    moved: dict[str, Any],
    rows: dict[str, dict[str, Any]],
    on_cpu: bool,
) -> None:
    """Prints seconds, ratios and memory, and what the hashes say."""
    print(
        f"\n{gib:.2f} GiB of bfloat16 weights in {floor['chunks']:.0f} chunks, "
        f"read budget {floor['budget'] / load.GIB:.2f} GiB; medians of {rounds}"
    )
    print(
        f"{'':<24}{'seconds':>9}{'CPU s':>8}{'/ TensorStore':>15}{'/ device_put':>14}{'/ default':>11}"
        f"{'host peak GiB':>15}{'/ budget':>10}{'kept GiB':>10}{'compiled':>10}"
    )
    names = {f"TensorStore, {number} in flight": str(number) for number in IN_FLIGHT}
    times = {name: (floor[f"{key} seconds"], floor[f"{key} cpu_seconds"]) for name, key in names.items()}
    base = floor[f"{IN_FLIGHT[-1]} seconds"]
    times |= {
        name: (row["seconds"], row["cpu_seconds"]) for name, row in [(MOVED, moved), *rows.items()] if row
    }
    default = rows.get("default", {}).get("seconds")
    for name in [*names, MOVED, *rows]:
        if name not in times:
            print(f"{name:<24}{'failed':>9}")
            continue
        seconds, cpu_seconds = times[name]
        line = f"{name:<24}{seconds:>9.2f}{cpu_seconds:>8.1f}{seconds / base:>15.2f}"
        line += f"{seconds / moved['seconds']:>14.2f}" if moved else f"{'-':>14}"
        if row := rows.get(name):
            # The weights are not the host's to hold, except where the device's memory is the host's.
            weights = row["state_bytes"] if on_cpu else 0
            peak, kept = row["peak_bytes"] - weights, row["kept_bytes"] - weights
            line += f"{seconds / default:>11.2f}" if default else f"{'-':>11}"
            line += f"{peak / load.GIB:>15.2f}{peak / floor['budget']:>10.2f}{kept / load.GIB:>10.2f}"
            line += f"{row['compiled']:>5.0f} {row['compile_seconds']:.1f} s"
        print(line)
        if row and row["device_peak"]:
            print(
                f"{'':<24}device: {row['device_bytes'] / load.GIB:.2f} GiB, "
                f"peak {row['device_peak'] / load.GIB:.2f} GiB"
            )
    if on_cpu:
        print("host peak, kept: without the weights, which are in the same memory")
    ours = rows.get("direct", {}).get("hashes", {})
    for way in ("load_weights", "default"):
        if not ours or not (theirs := rows.get(way, {}).get("hashes")):
            continue
        names = ours.keys() | theirs.keys()
        different = sorted(name for name in names if ours.get(name) != theirs.get(name))
        folded = [name for name in different if way == "default" and name.endswith(FOLDED)]
        left = [name for name in different if name not in folded]
        print(
            f"direct and {way}: {len(names) - len(different)} of {len(names)} arrays have the same bits"
            + (f", {len(folded)} differ by folded expert scales" if folded else "")
            + (f"; {len(left)} DIFFER: {', '.join(left[:5])}" if left else "")
        )


def main() -> None:
    """Parses the command line; `--decode`, `--move` and `--measure` are what it calls itself with."""
    own = {
        "--decode": decode,
        "--move": move,
        "--measure": lambda *words: measure(*words[:-1], devices=int(words[-1])),
    }
    if len(sys.argv) > 1 and sys.argv[1] in own:
        print("RESULT " + json.dumps(own[sys.argv[1]](*sys.argv[2:])), flush=True)
        os._exit(0)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, nargs="+", default=[1.5], help="sizes of the weights")
    parser.add_argument("--rounds", type=int, default=1, help="how often each is measured")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS], help="what to load by")
    parser.add_argument("--devices", type=int, default=1, help="tensor parallel size")
    parser.add_argument(
        "--directory", type=Path, help="where to put the checkpoint; default: a temporary directory"
    )
    backends = parser.add_mutually_exclusive_group()
    backends.add_argument("--cpu", dest="backend", action="store_const", const="cpu", help="JAX on the CPU")
    backends.add_argument(
        "--cuda", dest="backend", action="store_const", const="cuda", help="JAX on a CUDA device"
    )
    args = parser.parse_args()
    backend = args.backend or "tpu"
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("vllm-tpu", "jax", "orbax-checkpoint", "tensorstore")
    )
    cores = len(os.sched_getaffinity(0))
    print(f"{platform.machine()}, {cores} cores, Python {platform.python_version()}, {versions}", flush=True)
    for gib in args.gib:
        measure_size(gib, backend, args)


def measure_size(gib: float, backend: str, args: argparse.Namespace) -> None:
    """Makes a checkpoint, measures everything and prints the table."""
    deadline = time.monotonic() + SECONDS
    directory = Path(tempfile.mkdtemp(prefix="accelerator-", dir=args.directory))
    try:
        dims = load.dims_for("26b", gib)
        checkpoint, hf = map(str, load.make_pair(directory, dims))
        floors: list[dict[str, Any]] = []
        moves: list[dict[str, Any]] = []
        measured: dict[str, list[dict[str, Any]]] = {way: [] for way in args.ways}
        for _ in range(args.rounds):
            floors.append(in_process(deadline, "cpu", 1, "--decode", checkpoint))
            moves.append(in_process(deadline, backend, args.devices, "--move", checkpoint))
            for way, rows in measured.items():
                words = ("--measure", way, checkpoint, hf, backend, str(args.devices))
                rows.append(in_process(deadline, backend, args.devices, *words))
    finally:
        shutil.rmtree(directory)
    medians = {way: median(rows) for way, rows in measured.items()}
    device = next((row["device"] for row in medians.values() if row), "none")
    filled = ", filled as a TPU's are (VLLM_MAXTEXT_DIRECT=device)" if backend == "cpu" else ""
    print(f"devices: {device}{filled}")
    if floor := median(floors):
        actual = 2 * load.values_of(dims) / load.GIB
        report(actual, args.rounds, floor, median(moves), medians, backend == "cpu")


if __name__ == "__main__":
    main()
