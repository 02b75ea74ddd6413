"""What a reload costs: a 26B-like model on JAX's CPU backend, one process, one run.

    python benchmarks/reload.py --gib 3

It makes a run with two steps, starts an engine on the first, and lets it answer one request after the other. Meanwhile the
second step is staged and exchanged, back and forth. Printed are the first load's time (tpu-inference's load_weights), staging's
time, the pause (the exchange alone), and how long a step of the engine takes without and with staging next to it.

Everything is read from a warm page cache. "Device" memory is the host's here: the exchange hands memory over, where a TPU would
copy it (--copy makes it copy). Compare ratios, not seconds.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from load import make_checkpoint_in_process, write_config
from shapes import dims_for

GIB = 1 << 30


def start(config: Path, run: Path) -> tuple[Any, float]:
    """An engine on the run's step 0, and the seconds its weights took."""
    from vllm import LLM
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from tpu_inference.models.vllm.vllm_model_wrapper import VllmModelWrapper

    original = VllmModelWrapper.load_weights
    seconds: list[float] = []

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = original(self, *args, **kwargs)
        seconds.append(time.perf_counter() - started)
        return result

    VllmModelWrapper.load_weights = timed
    llm = LLM(
        model=str(config),
        load_format="maxtext",
        model_loader_extra_config={"checkpoint": str(run), "step": 0},
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=1,
        max_num_batched_tokens=128,
    )
    VllmModelWrapper.load_weights = original
    return llm, seconds[0]


def steps(llm: Any, go_on: Callable[[int], bool]) -> list[float]:
    """Seconds of each step that makes a token, while `go_on(number of steps)`; requests run one after the other."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    parameters = SamplingParams(max_tokens=32, ignore_eos=True, temperature=0, detokenize=False)
    taken: list[float] = []
    number = 0
    while go_on(len(taken)):
        if not engine.has_unfinished_requests():
            number += 1
            engine.add_request(str(number), {"prompt_token_ids": [2, 7, 11, 13]}, parameters)
            engine.step()
            continue
        started = time.perf_counter()
        engine.step()
        taken.append(time.perf_counter() - started)
    while engine.has_unfinished_requests():
        engine.step()
    return taken


def exchange(llm: Any, step: int) -> tuple[float, float, list[float]]:
    """Seconds of staging, seconds of the exchange, and of the engine's steps meanwhile."""

    def pull() -> dict[str, Any]:
        return llm.collective_rpc("pull_weights", kwargs={"update_info": {"step": step}})[0]

    found = pull()

    def is_staging(_: int) -> bool:
        nonlocal found
        found = pull()
        return found["state"] == "staging"

    meanwhile = steps(llm, is_staging)
    if found["state"] != "staged":
        raise SystemExit(f"staging: {found}")
    llm.collective_rpc("start_weight_update", kwargs={"free_kv_cache": False})
    started = time.perf_counter()
    llm.update_weights({"update_info": {"step": step}})
    pause = time.perf_counter() - started
    llm.finish_weight_update()
    return found["seconds"], pause, meanwhile


def copy_when_placing() -> None:
    """Makes the exchange copy every shard, as it is copied to a TPU."""
    from vllm_maxtext_loader.tpu.swap import StagedArray

    values = StagedArray.values
    StagedArray.values = lambda self, device, region: np.array(values(self, device, region))  # type: ignore[method-assign]


def report(
    first: float, gib: float, found: list[tuple[float, float, list[float]]], alone: list[float]
) -> None:
    """Prints the table."""
    staging = statistics.median(row[0] for row in found)
    pause = statistics.median(row[1] for row in found)
    meanwhile = [seconds for row in found for seconds in row[2]]
    print(
        f"\n{gib:.2f} GiB, {len(os.sched_getaffinity(0))} cores, {platform.machine()}, vllm-tpu "
        f"{version('vllm-tpu')}, jax {version('jax')}; median of {len(found)} exchanges\n"
    )
    print("| what | seconds | of the first load |\n|---|---|---|")
    for name, seconds in (("first load", first), ("staging, next to an engine that answers", staging)):
        print(f"| {name} | {seconds:.2f} | {seconds / first:.2f} |")
    print(f"| pause | {pause:.3f} ({pause / gib:.3f} per GiB) | {pause / first:.3f} |")
    print(
        "\n| a step of the engine | median ms | 95th percentile ms | longest ms | steps |\n|---|---|---|---|---|"
    )
    for name, taken in (("alone", alone), ("while a step is staged", meanwhile)):
        ms = sorted(1000 * seconds for seconds in taken)
        print(
            f"| {name} | {statistics.median(ms):.0f} | {ms[int(0.95 * (len(ms) - 1))]:.0f} | {ms[-1]:.0f} | {len(ms)} |"
        )


def main() -> None:
    """Makes the run, and measures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--copy", action="store_true", help="copy when placing")
    parser.add_argument("--directory", help="for the checkpoints")
    arguments = parser.parse_args()
    os.environ.update(
        JAX_PLATFORMS="cpu",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        HF_HUB_OFFLINE="1",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_NO_USAGE_STATS="1",
    )
    with tempfile.TemporaryDirectory(dir=arguments.directory) as temporary:
        dims = dims_for("26b", arguments.gib)
        run = make_checkpoint_in_process(Path(temporary) / "run", dims)
        shutil.copytree(run / "0", run / "1")
        config = Path(temporary) / "config"
        config.mkdir()
        write_config(config, run / "0", dims)
        llm, first = start(config, run)
        if arguments.copy:
            copy_when_placing()
        steps(llm, lambda count: count < 3)
        alone = steps(llm, lambda count: count < 30)
        # The first exchange finds memory that no process has used yet.
        found = [exchange(llm, 1 - number % 2) for number in range(arguments.rounds + 1)][1:]
        from vllm_maxtext_loader import open_checkpoint

        report(first, open_checkpoint(run).plan.nbytes / GIB, found, alone)
        llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
