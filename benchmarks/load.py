"""How fast, and in how much host memory, weights get into the engine; compared in one run.

    python benchmarks/load.py --gib 3 --shapes 26b --rounds 5
    python benchmarks/load.py --gib 3 --shapes llama3.1-8b --loaders default direct
    python benchmarks/load.py --gib 1.5 3 4 --rounds 3 --loaders direct --plot docs/images/load.svg

For every size it makes a checkpoint pair of real layer shapes (shapes.py): a MaxText v2 scanned checkpoint written by Orbax with
sharded chunks, as MaxText does, and the same weights as Hugging Face safetensors (by this package's export). Then each
loader in turn loads into the real engine (vLLM, tpu-inference, JAX on the CPU) in a fresh process:

    default       vLLM's default loader, from safetensors
    streaming     tpu-inference's incremental loader, from safetensors
    load_weights  this package through Hugging Face tensors and model.load_weights (VLLM_MAXTEXT_DIRECT=0)
    direct        this package, chunks straight to the device

and below them the floor: reading the files' bytes, decoding them with TensorStore alone, and decoding them with TensorStore into memory that is
kept, as weights must be: no loader can be faster than that. With --maxtext PYTHON (of an environment
that has MaxText 0.2.5) the offline route is run once: MaxText's to_huggingface, whose output the default loader would then load. Measured is the time
inside tpu-inference's load_weights, from an empty model to arrays on the device; memory is the highest resident set in
that time over the one before. On the CPU "device" memory is host memory, so it contains the weights once. Everything is
read from a warm page cache. Compare ratios, not seconds.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib.util
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shapes import DEVICES_OF_THE_WRITER, SHAPES, config_of, dims_for, leaves, values_of

GIB = 1 << 30
OURS = ("load_weights", "direct")
LOADERS = ("default", "streaming", *OURS)
PAUSE_SECONDS = 10
"""An engine's start takes at least that before it loads. On a virtual machine whose host takes freed memory back, memory is cheap just after
another process has ended, and dear by then: the floor is measured where a loader stands."""


def make_checkpoint(directory: Path, dims: dict[str, Any]) -> None:
    """Writes the MaxText checkpoint by Orbax, sharded over the first axis; run in a process of its own."""
    import jax
    import ml_dtypes
    import numpy as np
    import orbax.checkpoint as ocp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    rng = np.random.default_rng(0)
    tree: dict[str, Any] = {}
    for name, shape in leaves(dims).items():
        # Normally distributed weights: what zstd makes of real ones. Drawn once and repeated with another sign
        # pattern, for drawing gigabytes of them would take longer than everything else.
        count = int(np.prod(shape))
        base = (rng.standard_normal(min(count, 1 << 22)) * 0.02).astype(ml_dtypes.bfloat16)
        values = np.resize(base, count).reshape(shape)
        if name.endswith((".scale", "per_expert_scale", "layer_scalar")):
            values = (1 + values.astype(np.float32)).astype(ml_dtypes.bfloat16)
        split = shape[0] % len(jax.devices()) == 0 and shape[0] > 1
        sharding = NamedSharding(mesh, PartitionSpec("fsdp") if split else PartitionSpec())
        node = tree
        *parents, last = ("params", "params", *name.split("."))
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = jax.device_put(values, sharding)
    with ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(items=ocp.PyTreeCheckpointHandler(use_zarr3=True))
    ) as writer:
        writer.save(directory / "0", args=ocp.args.Composite(items=ocp.args.PyTreeSave(tree)))


def make_checkpoint_in_process(checkpoint: Path, dims: dict[str, Any]) -> Path:
    """Writes the MaxText checkpoint in a process that has the writer's devices."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES_OF_THE_WRITER}",
    }
    command = [sys.executable, os.path.abspath(__file__), "--make", str(checkpoint), json.dumps(dims)]
    subprocess.run(command, env=environment, check=True)
    return checkpoint


def make_pair(directory: Path, dims: dict[str, Any]) -> tuple[Path, Path]:
    """The checkpoint and its Hugging Face export."""
    exported = directory / "hf"
    checkpoint = make_checkpoint_in_process(directory / "maxtext", dims)
    config = directory / "config"
    config.mkdir()
    write_config(config, checkpoint, dims)
    subprocess.run(
        [
            str(Path(sys.executable).parent / "vllm-maxtext"),
            "export",
            checkpoint,
            exported,
            "--config",
            config,
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return checkpoint, exported


def write_config(directory: Path, checkpoint: Path, dims: dict[str, Any]) -> None:
    """config.json of the cut-down model: the preset's settings with the checkpoint's dimensions."""
    config = config_of(dims, checkpoint)
    # The published positions make a rope table of up to a gigabyte, which has nothing to do with loading.
    config.max_position_embeddings = 4096
    config.save_pretrained(directory)


class Peak(threading.Thread):
    """Highest resident set while it runs, sampled; VmHWM would include what was before."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = self.peak_bytes = resident_bytes()
        self._stop_event = threading.Event()

    def run(self) -> None:
        while not self._stop_event.wait(0.01):
            self.peak_bytes = max(self.peak_bytes, resident_bytes())

    def stop(self) -> int:
        """Bytes over the start."""
        self._stop_event.set()
        self.join()
        return max(self.peak_bytes, resident_bytes()) - self.start_bytes


def resident_bytes() -> int:
    """Resident set of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(loader: str, checkpoint: str, hf: str) -> dict[str, float]:
    """Starts the engine with one loader and measures its load_weights; run in a process of its own."""
    os.environ.update(
        JAX_PLATFORMS="cpu",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        HF_HUB_OFFLINE="1",
        VLLM_CPU_KVCACHE_SPACE="1",
        MODEL_IMPL_TYPE="vllm",
        VLLM_NO_USAGE_STATS="1",
        VLLM_MAXTEXT_DIRECT="0" if loader == "load_weights" else "1",
    )
    arguments: dict[str, Any] = {}
    if loader == "streaming":
        arguments["load_format"] = "tpu_streaming_loader"
    elif loader in OURS:
        arguments["load_format"] = "maxtext"
        options: dict[str, Any] = {"checkpoint": checkpoint}
        if budget := os.environ.get("CONCURRENT_GIB"):
            options["concurrent_gib"] = float(budget)
        arguments["model_loader_extra_config"] = options
    from vllm import LLM
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from tpu_inference.models.vllm.vllm_model_wrapper import VllmModelWrapper

    found: dict[str, float] = {}
    original = VllmModelWrapper.load_weights

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        peak = Peak()
        peak.start()
        cpu, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        original(self, *args, **kwargs)
        import jax

        jax.effects_barrier()
        found["seconds"] = time.perf_counter() - wall
        after = resource.getrusage(resource.RUSAGE_SELF)
        found["cpu_seconds"] = after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime
        found["peak_bytes"] = peak.stop()
        found["chunks"] = decoded_chunks()
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
            **arguments,
        )
    return found


def decoded_chunks() -> int:
    """Chunks that TensorStore has decoded in this process, by its own count; metadata is not among them."""
    import tensorstore as ts

    metrics = ts.experimental_collect_matching_metrics("/tensorstore/cache/chunk_cache/reads")
    return sum(int(value["value"]) for metric in metrics for value in metric["values"])


def floor(checkpoint: str) -> dict[str, float]:
    """Reading the bytes of the checkpoint's files, and decoding them with TensorStore alone."""
    from vllm_maxtext_loader import open_checkpoint
    from vllm_maxtext_loader.checkpoint.regions import chunk_regions

    started = time.perf_counter()
    for path in Path(checkpoint).rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(8 << 20):
                    pass
    raw = time.perf_counter() - started
    time.sleep(PAUSE_SECONDS)
    opened = open_checkpoint(checkpoint)
    arrays = opened.tree.arrays
    # Chunk by chunk, four in flight, as anyone would read with TensorStore; nothing of this package's reader.
    chunks = [
        arrays[entry.leaf.key][region]
        for entry in opened.plan.leaves
        for region in chunk_regions(entry.leaf, limit=1)
    ]
    return {
        "raw_seconds": raw,
        "tensorstore_seconds": _read(chunks, keep=False),
        "kept_seconds": _read(chunks, keep=True),
        "chunks": len(chunks),
    }


def _read(chunks: list[Any], keep: bool) -> float:
    """Seconds to decode all chunks, four in flight."""
    kept: collections.deque[Any] = collections.deque(maxlen=None if keep else 0)
    started = time.perf_counter()
    flying: collections.deque[Any] = collections.deque()
    for chunk in chunks:
        flying.append(chunk.read())
        if len(flying) == 4:
            kept.append(flying.popleft().result())
    while flying:
        kept.append(flying.popleft().result())
    return time.perf_counter() - started


def offline(python: Path, directory: Path, dims: dict[str, Any], checkpoint: Path) -> dict[str, float]:
    """MaxText's own conversion to Hugging Face files, in its own environment (benchmarks/offline.py)."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from tiny_tokenizer import write_tokenizer

    # The converter copies a tokenizer.
    write_tokenizer(directory / "config", 320)
    values: dict[str, Any] = {
        "weight_dtype": "bfloat16",
        "base_num_decoder_layers": dims["layers"],
        "base_emb_dim": dims["hidden"],
        "base_num_query_heads": dims["heads"],
        "base_num_kv_heads": dims["kv"],
        "global_num_kv_heads": dims["global_kv"],
        "base_mlp_dim": dims["mlp"],
        "head_dim": dims["head_dim"],
        "global_head_dim": dims["global_head_dim"],
        "vocab_size": dims["vocab"],
    }
    if dims["experts"]:
        values |= {
            "num_experts": dims["experts"],
            "num_experts_per_tok": 8,
            "base_moe_mlp_dim": dims["expert_mlp"],
        }
    done = subprocess.run(
        [
            str(python),
            str(Path(__file__).with_name("offline.py")),
            str(checkpoint / "0" / "items"),
            str(directory / "offline"),
            str(directory / "config"),
            "gemma4-26b" if dims["experts"] else "gemma4-31b",
            *(f"{key}={value}" for key, value in values.items()),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    return result(done)


def in_process(*arguments: str) -> dict[str, float]:
    """Runs one measurement in a fresh process. See `result`."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    return result(done)


def result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What a measurement's process printed after RESULT; {} where it died, with its last words on stderr."""
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        print(done.stderr[-1500:], file=sys.stderr)
        return {}
    return json.loads(lines[-1].removeprefix("RESULT "))


def report(gib: float, results: dict[str, list[dict[str, float]]], floors: list[dict[str, float]]) -> None:
    """Prints medians and ratios."""

    def median(rows: list[dict[str, float]], key: str) -> float:
        return statistics.median(row[key] for row in rows)

    base = results.get("default")
    print(f"\n{gib:.2f} GiB of bfloat16 weights, median (min to max) of {len(floors)} rounds")
    print(
        f"{'loader':<12}{'seconds':>22}{'CPU s':>8}{'GiB/s':>8}{'peak/weights':>14}{'time/default':>14}{'time/read':>11}"
    )
    read = median(floors, "tensorstore_seconds")
    for loader, rows in results.items():
        if not rows:
            print(f"{loader:<12}{'failed':>22}")
            continue
        seconds = median(rows, "seconds")
        span = (
            f"{seconds:.2f} ({min(r['seconds'] for r in rows):.2f} to {max(r['seconds'] for r in rows):.2f})"
        )
        ratio = f"{seconds / median(base, 'seconds'):.2f}" if base else "-"
        peak = median(rows, "peak_bytes") / GIB / gib
        print(
            f"{loader:<12}{span:>22}{median(rows, 'cpu_seconds'):>8.1f}{gib / seconds:>8.2f}{peak:>14.2f}"
            f"{ratio:>14}{seconds / read:>11.2f}"
        )
    for name, key in (
        ("TensorStore", "tensorstore_seconds"),
        ("and kept", "kept_seconds"),
        ("raw read", "raw_seconds"),
    ):
        seconds = median(floors, key)
        ratio = f"{seconds / median(base, 'seconds'):.2f}" if base else "-"
        print(
            f"{name:<12}{seconds:>22.2f}{'':>8}{gib / seconds:>8.2f}{'':>14}{ratio:>14}{seconds / read:>11.2f}"
        )
    for loader in OURS:
        if rows := results.get(loader):
            counts = ", ".join(f"{count:.0f}" for count in sorted({row["chunks"] for row in rows}))
            print(f"chunks decoded by {loader}: {counts}, of {floors[0]['chunks']} that are stored")


def plot(
    file: Path, sizes: list[float], measured: dict[str, list[list[dict[str, float]]]], title: str
) -> None:
    """Draws load time and peak host memory over size, one line per loader.

    Args:
        file: where to; its suffix chooses the format.
        sizes: GiB of weights.
        measured: loader -> rounds per size, with "seconds" and, for loaders, "peak_bytes".
        title: what was measured, and on what.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # Without a salt the ids in an SVG differ from run to run.
    matplotlib.rcParams["svg.hashsalt"] = "load"
    figure = Figure(figsize=(9, 4), layout="constrained")
    figure.suptitle(title, fontsize="small")
    time_axes, memory_axes = figure.subplots(1, 2)
    for name, rounds in measured.items():
        points = [(gib, rows) for gib, rows in zip(sizes, rounds, strict=True) if rows]
        if not points:
            continue
        x = [gib for gib, _ in points]
        seconds = [[row["seconds"] for row in rows] for _, rows in points]
        medians = [statistics.median(values) for values in seconds]
        below = [median - min(values) for median, values in zip(medians, seconds, strict=True)]
        above = [max(values) - median for median, values in zip(medians, seconds, strict=True)]
        style = "o-" if name in LOADERS else "o--"
        time_axes.errorbar(x, medians, yerr=(below, above), fmt=style, capsize=3, label=name)
        if name in LOADERS:
            peaks = [statistics.median(row["peak_bytes"] for row in rows) / GIB for _, rows in points]
            memory_axes.plot(x, peaks, style, label=name)
    memory_axes.plot(sizes, sizes, "k:", label="the weights themselves")
    for axes, label in ((time_axes, "seconds, median and range"), (memory_axes, "peak host memory, GiB")):
        axes.set(xlabel="weights, GiB", ylabel=label, xlim=(0, None), ylim=(0, None))
        axes.legend()
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def main() -> None:
    """Parses the command line; `--make`, `--measure` and `--floor` are what it calls itself with."""
    if len(sys.argv) > 1 and sys.argv[1] == "--make":
        make_checkpoint(Path(sys.argv[2]), json.loads(sys.argv[3]))
        return
    if len(sys.argv) > 1 and sys.argv[1] in ("--measure", "--floor"):
        result = measure(*sys.argv[2:5]) if sys.argv[1] == "--measure" else floor(sys.argv[2])
        print("RESULT " + json.dumps(result), flush=True)
        os._exit(0)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, nargs="+", default=[3.0], help="sizes to measure, in GiB")
    parser.add_argument("--shapes", choices=SHAPES, default="26b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--loaders", nargs="+", choices=LOADERS, default=["default", "load_weights", "direct"]
    )
    parser.add_argument(
        "--directory", type=Path, help="where to put checkpoints; default: a temporary directory"
    )
    parser.add_argument(
        "--maxtext", type=Path, help="python of an environment with MaxText, for the offline route"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw time and memory over size; needs matplotlib"
    )
    args = parser.parse_args()
    if args.maxtext and args.shapes not in ("26b", "31b"):
        parser.error("--maxtext is for the shapes 26b and 31b")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is among the development dependencies")
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        + ", ".join(
            f"{name} {version(name)}" for name in ("vllm-tpu", "jax", "orbax-checkpoint", "tensorstore")
        )
    )
    print(machine)
    sizes: list[float] = []
    measured: dict[str, list[list[dict[str, float]]]] = {name: [] for name in (*args.loaders, "TensorStore")}
    for gib in args.gib:
        directory = Path(tempfile.mkdtemp(prefix="load-", dir=args.directory))
        try:
            dims = dims_for(args.shapes, gib)
            checkpoint, hf = make_pair(directory, dims)
            actual = 2 * values_of(dims) / GIB
            results: dict[str, list[dict[str, float]]] = {loader: [] for loader in args.loaders}
            floors: list[dict[str, float]] = []
            for _ in range(args.rounds):
                floors.append(in_process("--floor", str(checkpoint)))
                for loader in args.loaders:
                    if row := in_process("--measure", loader, str(checkpoint), str(hf)):
                        results[loader].append(row)
            report(actual, results, floors)
            sizes.append(actual)
            for loader, rows in results.items():
                measured[loader].append(rows)
            measured["TensorStore"].append([{"seconds": row["tensorstore_seconds"]} for row in floors])
            if args.maxtext and (route := offline(args.maxtext, directory, dims, checkpoint)):
                print(
                    f"{'offline':<12}{route['seconds']:>22.2f}, once: to_huggingface alone, without imports; peak/weights "
                    f"{route['peak_bytes'] / GIB / actual:.2f}; the default loader comes after it"
                )
        finally:
            shutil.rmtree(directory)
    if args.plot:
        title = f"{args.shapes} layer shapes, {args.rounds} rounds; JAX on the CPU, where device memory is host memory"
        plot(args.plot, sizes, measured, f"{title}\n{machine}")


if __name__ == "__main__":
    main()
