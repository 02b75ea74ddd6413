"""What the hosts of a multi-host engine read: each for itself, and where they exchange what they read.

    python benchmarks/hosts.py --gib 2 --devices 8
    python benchmarks/hosts.py --published qwen3-235b-a22b --chips 32 64 128 --chips-of-a-host 4 2 1
    python benchmarks/hosts.py --load --gib 1 --processes 2 4

Makes a MaxText v2 checkpoint of 26B layer shapes and starts the real engine on that many virtual devices, with tensor
parallelism and with expert parallelism. When loading begins, the devices are dealt out to 1, 2, 4, … hosts in order, and it is
computed who would read which regions, as the loader does (`sharing.assign`). Nothing is loaded.

With --published the checkpoint is metadata only, of a published model's layers (written by 16 devices), and the engine is one
without weights; a host has four chips. (Fewer show what more hosts would read than the engine can be spread over.)

With --load, processes that make up one engine really load, from a bucket on the loopback (slow_bucket.py), with and without
exchange, in turn. The bucket counts requests and bytes, metadata included. All processes share this machine's cores.
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
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import load

CHIPS_OF_A_HOST = 4
BENCHMARKS = Path(__file__).parent

Counted = dict[str, dict[str, Any]]
"""By number of hosts: share of the checkpoint's bytes that each reads ("alone", "exchanged"), and seconds to compute who does."""


def count(start: Callable[[], Any], devices: int, each: Iterable[int]) -> Counted:
    """Who reads how much, by number of hosts.

    Args:
        start: starts an engine; ended when loading begins.
        devices: of the engine.
        each: devices of a host, to be counted for.
    """
    import jax

    from vllm_maxtext_loader.checkpoint.exchange.sharing import assign, small_nbytes
    from vllm_maxtext_loader.tpu.placement import ShardWriter

    counted: Counted = {}

    class Ended(BaseException):
        """Ends the engine's start."""

    def stream(shard_writer: ShardWriter, *_: Any, **__: Any) -> Any:
        plan, numbers = shard_writer.plan, {device: number for number, device in enumerate(jax.devices())}
        leaves = [entry.leaf for entry in plan.leaves]
        for own in each:
            started = time.perf_counter()
            holdings = shard_writer.holdings(lambda device, own=own: numbers[device] // own)
            hosts = range(devices // own)
            found = assign(leaves, hosts, 1, holdings, small_nbytes(plan.nbytes))
            found.digest()
            counted[str(len(hosts))] = {
                "alone": [found.alone[host] / plan.nbytes for host in hosts],
                "exchanged": [found.read[host] / plan.nbytes for host in hosts],
                "regions": len(found.shares),
                "seconds": time.perf_counter() - started,
            }
        raise Ended

    ShardWriter.stream = stream  # type: ignore[method-assign]
    with contextlib.suppress(Ended):
        start()
    return counted


def count_made(checkpoint: str, config: str, devices: int, experts: bool) -> Counted:
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


def count_published(name: str, layers: int, chips: int, experts: bool, each: Sequence[int]) -> Counted:
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

        return count(start, chips, each)


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


def in_process(*arguments: str) -> Counted | str:
    """Counts in a fresh process; where the engine refuses, what it says."""
    done = subprocess.run(
        [sys.executable, __file__, "--count", *arguments], capture_output=True, text=True, check=False
    )
    if done.stdout.rpartition("RESULT ")[1]:
        return load.result(done)
    said = [line.strip() for line in done.stderr.splitlines() if "rror, " in line or "Error: " in line]
    return said[-1].partition(" [type=")[0] if said else done.stderr[-500:]


def report(kind: str, chips: int, counted: Counted | str) -> None:
    """A line per number of hosts."""
    name = "tensor" if kind == "tp" else "expert"
    if isinstance(counted, str):
        print(f"{name:<9}{chips:>6}  refused: {counted[:200]}", flush=True)
        return
    for hosts, found in counted.items():
        shares = [
            f"{min(found[way]):.4f} to {max(found[way]):.4f}; {sum(found[way]):.2f} in all"
            for way in ("alone", "exchanged")
        ]
        print(
            f"{name:<9}{chips:>6}{hosts:>6}  {shares[0]:<34}{shares[1]:<34}{found['regions']:>6} in {found['seconds']:.2f} s",
            flush=True,
        )


@contextlib.contextmanager
def serve(root: Path, *options: str) -> Iterator[str]:
    """URL of a bucket on the loopback."""
    command = [sys.executable, str(BENCHMARKS / "slow_bucket.py"), str(root), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        finally:
            server.terminate()


def ask(url: str, what: str) -> dict[str, Any]:
    """The bucket's answer about itself."""
    with urllib.request.urlopen(f"{url}/{what}") as answer:
        return json.loads(answer.read())


def load_together(
    directory: Path, url: str, config: Path, processes: int, devices: int, exchange: bool
) -> list[dict[str, Any]]:
    """Loads once by processes that make up one engine; each one's answer (tests/support/engine_host.py)."""
    sys.path.insert(0, str(BENCHMARKS.parent / "tests"))
    from support import gcs

    job = {
        "name": "load",
        "model": str(config),
        "arguments": {
            "load_format": "maxtext",
            "tensor_parallel_size": devices,
            "model_loader_extra_config": {"checkpoint": "gs://bucket/0/items"},
        },
        "direct": "device",
        "alone": [] if exchange else list(range(processes)),
    }
    jobs = directory / "jobs.json"
    jobs.write_text(json.dumps([job]))
    environment = {
        **os.environ,
        **gcs.ENVIRONMENT,
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // processes}",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "USE_MOE_EP_KERNEL": "0",
    }
    address = f"127.0.0.1:{gcs.free_port()}"
    script = BENCHMARKS.parent / "tests" / "support" / "engine_host.py"
    answers = [directory / f"{number}-of-{processes}.json" for number in range(processes)]
    started = []
    for number, answer in enumerate(answers):
        answer.unlink(missing_ok=True)
        command = [sys.executable, str(script), address, str(processes), str(number), str(jobs), str(answer)]
        with answer.with_suffix(".log").open("w") as log:
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    for process in started:
        process.wait()
    found = [json.loads(answer.read_text())["load"] for answer in answers]
    if errors := [each["error"] for each in found if "error" in each]:
        raise SystemExit("\n".join(errors))
    return found


def compare_loads(gib: float, devices: int, processes: Sequence[int], options: Sequence[str]) -> None:
    """Loads with and without exchange, and prints what the bucket has counted."""
    dims = load.dims_for("26b", gib)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        checkpoint = load.make_checkpoint_in_process(directory / "maxtext", dims)
        config = directory / "config"
        config.mkdir()
        load.write_config(config, checkpoint, dims)
        stored = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
        print(
            f"{stored / load.GIB:.3f} GiB stored; {devices} devices; tensor parallel; bucket: {' '.join(options)}"
        )
        print(
            f"{'processes':>9}  {'exchange':<9}{'requests':>9}{'GiB stored':>11}{'read, GiB':>10}{'received':>9}{'seconds':>8}"
        )
        with serve(checkpoint, *options) as url:
            for number in processes:
                for exchange in (False, True):
                    ask(url, "reset")
                    found = [
                        each["loaded"]
                        for each in load_together(directory, url, config, number, devices, exchange)
                    ]
                    counted = ask(url, "statistics")
                    print(
                        f"{number:>9}  {'yes' if exchange else 'no':<9}{counted['requests']:>9}{counted['bytes'] / load.GIB:>11.3f}"
                        f"{sum(each['read_bytes'] for each in found) / load.GIB:>10.3f}"
                        f"{sum(each['received_bytes'] for each in found) / load.GIB:>9.3f}"
                        f"{max(each['seconds'] for each in found):>8.1f}",
                        flush=True,
                    )


def main() -> None:
    """Parses the command line; `--count` is what it calls itself with."""
    if len(sys.argv) > 1 and sys.argv[1] == "--count":
        which, *given, number, kind = sys.argv[2:]
        experts = kind == "ep"
        if which == "made":
            result = count_made(given[0], given[1], int(number), experts)
        else:
            each = [int(own) for own in given[2:]] or [CHIPS_OF_A_HOST]
            result = count_published(given[0], int(given[1]), int(number), experts, each)
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
    parser.add_argument("--chips-of-a-host", type=int, nargs="+", default=[CHIPS_OF_A_HOST])
    parser.add_argument("--load", action="store_true", help="really load, from a bucket on the loopback")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--latency-ms", type=float, default=50)
    parser.add_argument("--request-mb-s", type=float, default=10)
    parser.add_argument("--total-mb-s", type=float, default=float("inf"))
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    print(f"{platform.machine()}, {cores} cores, vllm-tpu {version('vllm-tpu')}, jax {version('jax')}")
    if args.load:
        options = [
            text
            for name in ("latency_ms", "request_mb_s", "total_mb_s")
            for text in (f"--{name.replace('_', '-')}", f"{getattr(args, name):g}")
        ]
        compare_loads(args.gib, args.devices, args.processes, options)
        return
    print(
        f"{'parallel':<9}{'chips':>6}{'hosts':>6}  {'each for itself':<34}{'with exchange':<34}regions assigned"
    )
    if args.published:
        from vllm_maxtext_loader.families import find_preset

        moe = "experts" in find_preset(args.published)[1].dims.sizes
        for kind in ("tp", "ep") if moe else ("tp",):
            for chips in args.chips:
                given = (args.published, str(args.layers), *map(str, args.chips_of_a_host))
                report(kind, chips, in_process("published", *given, str(chips), kind))
        return
    with tempfile.TemporaryDirectory() as directory:
        dims = load.dims_for("26b", args.gib)
        checkpoint, hf = load.make_pair(Path(directory), dims)
        print(
            f"{args.devices} devices, {dims['experts']} experts, written by {load.DEVICES_OF_THE_WRITER} devices"
        )
        for kind in ("tp", "ep"):
            report(kind, args.devices, in_process("made", str(checkpoint), str(hf), str(args.devices), kind))


if __name__ == "__main__":
    main()
