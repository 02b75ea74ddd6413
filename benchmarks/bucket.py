"""How fast array data comes from a bucket, against what the network gives; compared in one run.

    python benchmarks/bucket.py --gib 1
    python benchmarks/bucket.py --gib 1 --layouts 16 --formats ocdbt-zarr3 --request-mb-s 3 10 50 --latency-ms 5 50 200 --plot FILE.svg

Orbax writes checkpoints of large leaves in several layouts (chunks per leaf) and formats. `slow_bucket.py` serves them from the
loopback, with a latency and a rate for every request. Then each reader in turn reads in a fresh process:

    ours      this package as the engine reads, with its defaults: fetched and decoded, from opened arrays to the last region
    before    TensorStore alone, one request per chunk, 16 chunks at a time: what this package did before it fetched ranges
    GET n     plain ranged GETs of 8 MiB, n at a time, of the same files; nothing is decoded or kept
    run:ai n  run:ai's model streamer (where it is installed), n at a time: as many bytes, uncompressed, as safetensors
    decode    TensorStore alone from the local files, which are in the page cache: what the cores take to decode

"/both" is ours as a part of GET 128 and decode, one after the other: what a reader takes that fetches first and then decodes.
Everything runs on one machine, so that reader and bucket share its cores. Compare ratios, not seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from load import Peak

GIB = 1 << 30
RANGE = 8 << 20
LAYOUTS = (16, 1, 512)
FORMATS = ("ocdbt-zarr3", "ocdbt-zarr2", "files-zarr3", "files-zarr2")
GETS = (32, 128)
RUNAI = (8, 32, 64, 128)
LEAF = (4096, 10, 2816)
"""Shape of a leaf: 220 MiB. Large leaves are what a scanned model has."""


@dataclasses.dataclass(frozen=True)
class Network:
    """What the bucket is like: latency, bytes per second of a request, and of all of them."""

    latency_ms: float
    request_mb_s: float
    total_mb_s: float = float("inf")

    def __str__(self) -> str:
        total = "" if self.total_mb_s == float("inf") else f", {self.total_mb_s:g} MB/s in all"
        return f"{self.latency_ms:g} ms, {self.request_mb_s:g} MB/s{total}"


def make(directory: str, gib: str, chunks: str, form: str) -> None:
    """Writes a checkpoint by Orbax; run in a process that has as many devices as a leaf has chunks."""
    import jax
    import ml_dtypes
    import numpy as np
    import orbax.checkpoint as ocp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    rng = np.random.default_rng(0)
    # What zstd makes of normally distributed weights is what it makes of real ones; see load.py.
    base = (rng.standard_normal(1 << 22) * 0.02).astype(ml_dtypes.bfloat16)
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("fsdp",)), PartitionSpec("fsdp"))
    values = jax.device_put(np.resize(base, int(np.prod(LEAF))).reshape(LEAF), sharding)
    count = max(2, round(float(gib) * GIB / values.nbytes))
    layers = {f"layers_{number}": {"mlp": {"wi": {"kernel": values}}} for number in range(count - 1)}
    tree = {"params": {"params": {"token_embedder": {"embedding": values}, "decoder": layers}}}
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt="ocdbt" in form, use_zarr3="zarr3" in form)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(items=handler)) as writer:
        writer.save(Path(directory).resolve() / "0", args=ocp.args.Composite(items=ocp.args.PyTreeSave(tree)))


def make_in_process(directory: Path, gib: float, chunks: int, form: str) -> None:
    """Runs `make` with the devices it needs."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={chunks}",
    }
    command = [sys.executable, __file__, "--run", "make", str(directory), str(gib), str(chunks), form]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)


def _open(url: str) -> Any:
    from vllm_maxtext_loader.checkpoint.find import locate
    from vllm_maxtext_loader.checkpoint.storage.path import tensorstore_context
    from vllm_maxtext_loader.checkpoint.tree import read_tree

    return read_tree(locate(url, None), tensorstore_context())


def ours(url: str) -> dict[str, float]:
    """This package's reader."""
    from vllm_maxtext_loader.checkpoint.reader import read_regions
    from vllm_maxtext_loader.options import read_budget

    tree = _open(url)
    leaves = list(tree.leaves.values())
    chunk = max(leaf.chunk_nbytes for leaf in leaves)
    budget = read_budget(None, tree.nbytes, chunk, len(os.sched_getaffinity(0)), remote=True)
    peak = Peak()
    peak.start()
    started = time.perf_counter()
    regions = read_regions(leaves, tree.arrays, budget, url, in_parts=True)
    nbytes = sum(decoded.array.nbytes for decoded in regions)
    seconds = time.perf_counter() - started
    assert nbytes == tree.nbytes
    return {"seconds": seconds, "memory": peak.stop() / tree.nbytes}


def before(url: str) -> dict[str, float]:
    """TensorStore alone, 16 chunks at a time; from a bucket, a request per chunk."""
    from vllm_maxtext_loader.checkpoint.regions import chunk_regions

    tree = _open(url)
    reads = ((leaf, region) for leaf in tree.leaves.values() for region in chunk_regions(leaf, 1))
    pending: collections.deque[Any] = collections.deque()
    started = time.perf_counter()
    for leaf, region in reads:
        pending.append(tree.arrays[leaf.key][region].read())
        if len(pending) == 16:
            pending.popleft().result()
    while pending:
        pending.popleft().result()
    return {"seconds": time.perf_counter() - started}


async def _gets(port: int, ranges: Iterator[tuple[str, int, int]], count: int) -> None:
    loop = asyncio.get_running_loop()

    async def worker() -> None:
        memory = memoryview(bytearray(RANGE))
        with socket.socket() as connection:
            connection.setblocking(False)
            await loop.sock_connect(connection, ("127.0.0.1", port))
            for name, start, stop in ranges:
                path = f"/storage/v1/b/bucket/o/{urllib.parse.quote(name, safe='')}?alt=media"
                request = f"GET {path} HTTP/1.1\r\nHost: bucket\r\nRange: bytes={start}-{stop - 1}\r\n\r\n"
                await loop.sock_sendall(connection, request.encode())
                head = b""
                while b"\r\n\r\n" not in head:
                    head += await loop.sock_recv(connection, 4096)
                received = len(head.partition(b"\r\n\r\n")[2])
                while received < stop - start:
                    received += await loop.sock_recv_into(connection, memory[received:])

    await asyncio.gather(*(worker() for _ in range(count)))


def gets(root: str, prefix: str, port: str, count: str) -> dict[str, float]:
    """Plain ranged GETs of all files below a directory."""
    files = [path for path in sorted((Path(root) / prefix).rglob("*")) if path.is_file()]
    sizes = {str(path.relative_to(root)): path.stat().st_size for path in files}
    ranges = iter(
        [
            (name, start, min(size, start + RANGE))
            for name, size in sizes.items()
            for start in range(0, size, RANGE)
        ]
    )
    started = time.perf_counter()
    asyncio.run(_gets(int(port), ranges, int(count)))
    return {"seconds": time.perf_counter() - started}


def runai(url: str) -> dict[str, float]:
    """run:ai's model streamer; its concurrency comes from the environment."""
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        started = time.perf_counter()
        streamer.stream_files([url])
        nbytes = sum(tensor.nbytes for _, tensor in streamer.get_tensors())
        seconds = time.perf_counter() - started
    assert nbytes
    return {"seconds": seconds}


def write_safetensors(path: Path, nbytes: int) -> None:
    """As many bytes as a checkpoint has stored, in tensors of 64 MiB."""
    import numpy as np
    from safetensors.numpy import save_file

    part = np.random.default_rng(0).integers(0, 256, 64 << 20, np.uint8)
    whole, rest = divmod(nbytes, part.nbytes)
    tensors = {str(number): part.copy() for number in range(whole)} | (
        {"rest": part[:rest].copy()} if rest else {}
    )
    path.parent.mkdir()
    save_file(tensors, path)


@contextlib.contextmanager
def bucket(root: Path, network: Network) -> Iterator[int]:
    """The slow bucket in a process of its own; yields its port."""
    command = [sys.executable, str(Path(__file__).with_name("slow_bucket.py")), str(root)]
    for name, value in dataclasses.asdict(network).items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.terminate()


def in_process(port: int, *arguments: str, **environment: str) -> dict[str, float]:
    """Runs one of this file's readers in a fresh process."""
    url = f"http://127.0.0.1:{port}"
    variables = {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,
        "RUNAI_STREAMER_GCS_USE_ANONYMOUS_CREDENTIALS": "true",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
        "NO_GCE_CHECK": "true",
        "NO_PROXY": "127.0.0.1",
    }
    with urllib.request.urlopen(f"{url}/reset"):
        pass
    done = subprocess.run(
        [sys.executable, __file__, "--run", *arguments],
        env={**os.environ, **variables, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr[-3000:]}")
    with urllib.request.urlopen(f"{url}/statistics") as answer:
        served = json.load(answer)
    row = json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))
    return row | {"bytes": served["bytes"], "in_flight": served["mean"]}


Rows = dict[str, list[dict[str, float]]]


def measure(root: Path, prefix: str, network: Network, rounds: int, readers: list[tuple[str, int]]) -> Rows:
    """This package and the other readers (name, requests at a time), `rounds` times in turn."""
    rows: Rows = collections.defaultdict(list)
    url = f"gs://bucket/{prefix}"
    with bucket(root, network) as port:
        for _ in range(rounds):
            rows["ours"].append(in_process(port, "ours", url))
            for reader, count in readers:
                match reader:
                    case "GET":
                        row = in_process(port, "gets", str(root), prefix, str(port), str(count))
                    case "run:ai":
                        file = "gs://bucket/safetensors/model.safetensors"
                        row = in_process(port, "runai", file, RUNAI_STREAMER_CONCURRENCY=str(count))
                    case "decode":
                        row = in_process(port, "before", str(root / prefix))
                    case _:
                        row = in_process(port, "before", url)
                rows[f"{reader} {count}"].append(row)
    return rows


def median(rows: list[dict[str, float]], key: str) -> float:
    """Over the rounds."""
    return statistics.median(row[key] for row in rows)


def report(name: str, rows: Rows) -> None:
    """One line: seconds of ours, of plain GETs and of run:ai's best, and ours as a part of the others' time."""
    own = median(rows["ours"], "seconds")
    get = median(rows["GET 128"], "seconds")
    best = min(
        (median(rows[key], "seconds") for key in rows if key.startswith("run:ai")), default=float("nan")
    )
    before = median(rows["before 16"], "seconds") if "before 16" in rows else float("nan")
    decode = median(rows["decode 16"], "seconds")
    print(
        f"{name:<52}{own:>7.2f}{get:>9.2f}{decode:>8.2f}{best:>9.2f}{median(rows['ours'], 'bytes') / own / 1e6:>7.0f}"
        f"{median(rows['ours'], 'in_flight'):>6.0f}{median(rows['ours'], 'memory'):>8.2f}{own / get:>9.2f}"
        f"{own / (get + decode):>7.2f}{own / best:>10.2f}{own / before:>9.2f}",
        flush=True,
    )


HEADER = (
    f"{'chunks per leaf, format, network':<52}{'s':>7}{'GET 128':>9}{'decode':>8}{'run:ai':>9}{'MB/s':>7}{'open':>6}{'memory':>8}{'/GET 128':>9}"
    f"{'/both':>7}{'/run:ai':>10}{'/before':>9}"
)


def plot(file: Path, measured: dict[Network, Rows], title: str) -> None:
    """Draws stored bytes per second over the rate of a request, one panel per latency."""
    import matplotlib
    from matplotlib.figure import Figure

    # Without a salt the ids in an SVG differ from run to run.
    matplotlib.rcParams["svg.hashsalt"] = "bucket"
    networks = [network for network in measured if network.total_mb_s == float("inf")]
    latencies = sorted({network.latency_ms for network in networks})
    figure = Figure(figsize=(9, 4), layout="constrained")
    figure.suptitle(title, fontsize="small")
    panels = figure.subplots(1, len(latencies), sharey=True, squeeze=False)[0]
    for panel, latency in zip(panels, latencies, strict=True):
        points = sorted((n for n in networks if n.latency_ms == latency), key=lambda n: n.request_mb_s)
        for reader in next(iter(measured.values())):
            if reader == "decode 16":
                continue
            rates = [
                median(measured[n]["ours"], "bytes") / median(measured[n][reader], "seconds") / 1e6
                for n in points
            ]
            style = "o-" if reader == "ours" else "o--" if reader.startswith("GET") else "o:"
            panel.loglog([n.request_mb_s for n in points], rates, style, label=reader)
        panel.set(xlabel="MB/s of a request", title=f"latency {latency:g} ms")
        panel.set_xticks([n.request_mb_s for n in points], [f"{n.request_mb_s:g}" for n in points])
        panel.minorticks_off()
    panels[0].set(ylabel="stored MB/s")
    ticks = [base * 10**power for power in range(1, 4) for base in (1, 2, 3, 5)]
    low, high = panels[0].get_ylim()
    ticks = [tick for tick in ticks if low <= tick <= high]
    panels[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panels[-1].legend(fontsize="small")
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def main() -> None:
    """Parses the command line; `--run` is what it calls itself with."""
    if sys.argv[1:2] == ["--run"]:
        run = {"make": make, "ours": ours, "before": before, "gets": gets, "runai": runai}[sys.argv[2]]
        print("RESULT " + json.dumps(run(*sys.argv[3:])), flush=True)
        os._exit(0)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=1.0, help="decoded size of a checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--layouts", type=int, nargs="+", choices=LAYOUTS, default=LAYOUTS, help="chunks per leaf"
    )
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--request-mb-s", type=float, nargs="+", default=[10])
    parser.add_argument("--latency-ms", type=float, nargs="+", default=[50])
    parser.add_argument("--total-mb-s", type=float, nargs="+", default=[float("inf")])
    parser.add_argument("--gets", type=int, nargs="+", default=GETS)
    parser.add_argument(
        "--runai", type=int, nargs="*", default=RUNAI, help="requests at a time; none leaves it out"
    )
    parser.add_argument("--no-before", action="store_true", help="leave out what takes a request per chunk")
    parser.add_argument(
        "--directory", type=Path, help="where to put checkpoints; default: a temporary directory"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the first layout and format")
    args = parser.parse_args()
    installed = importlib.util.find_spec("runai_model_streamer") is not None
    readers = [("GET", count) for count in sorted({*args.gets, 128})]
    readers += [("run:ai", count) for count in args.runai] if installed else []
    readers += [("decode", 16)] + ([] if args.no_before else [("before", 16)])
    with_runai = any(reader == "run:ai" for reader, _ in readers)
    versions = [f"{name} {version(name)}" for name in ("tensorstore", "orbax-checkpoint", "zstandard")]
    versions += [f"runai-model-streamer {version('runai-model-streamer')}"] if with_runai else []
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {', '.join(versions)}"
    networks = [
        Network(*values) for values in itertools.product(args.latency_ms, args.request_mb_s, args.total_mb_s)
    ]
    print(f"{machine}; {args.gib:g} GiB, medians of {args.rounds} rounds\n{HEADER}", flush=True)
    curve: dict[Network, Rows] = {}
    for chunks, form in itertools.product(args.layouts, args.formats):
        root = Path(tempfile.mkdtemp(prefix="bucket-", dir=args.directory))
        try:
            make_in_process(root / "run", args.gib, chunks, form)
            stored = sum(path.stat().st_size for path in (root / "run").rglob("*") if path.is_file())
            if with_runai:
                write_safetensors(root / "safetensors/model.safetensors", stored)
            for network in networks:
                rows = measure(root, "run", network, args.rounds, readers)
                report(f"{chunks}, {form}, {network}", rows)
                if (chunks, form) == (args.layouts[0], args.formats[0]):
                    curve[network] = rows
        finally:
            shutil.rmtree(root)
    if args.plot:
        title = (
            f"{args.layouts[0]} chunks per leaf, {args.formats[0]}, {args.gib:g} GiB, {args.rounds} rounds"
        )
        plot(args.plot, curve, f"{title}\n{machine}")


if __name__ == "__main__":
    main()
