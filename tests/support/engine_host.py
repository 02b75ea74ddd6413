"""One of several processes that make up one engine, as the hosts of a TPU slice do: each holds the shards of its own devices.

    python engine_host.py ADDRESS PROCESSES PROCESS JOBS.json ANSWERS.json

A job: {"name", "model", "arguments": {…}, "direct": VLLM_MAXTEXT_DIRECT, "alone": processes with VLLM_MAXTEXT_EXCHANGE=0, "reload": path}. Its
weights are exchanged for those of `reload`, where that is given. Its engine loads and is then given up: what follows asks for a collective of the
engine's own hosts (Ray).
Or {"name", "cases": fixtures}, for a single process: its answer is what `holdings.compare` says of each.
An answer: {"shards": {parameter: {device number: CRC-32C of its shard}}, "loaded": what the loader says of the load, "log": its lines}, or
{"error"}.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

sys.path.append(str(Path(__file__).parents[1]))

import google_crc32c
import jax
import numpy as np
from engine_worker import COMMON, Records

from support import holdings


class Loaded(BaseException):
    """Ends an engine's start."""


def join(address: str, processes: int, process: int) -> None:
    """Joins the other processes."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, processes, process)
    everywhere = jax.devices

    def devices(backend: str | None = None) -> list[jax.Device]:
        # The slice's devices are those of all processes. Its hosts' processors are not among them: "cpu" is what a process has
        # for itself. tpu-inference relies on that (vllm_model_wrapper.py: jax.devices("cpu")[0]).
        return everywhere() if backend is None else jax.local_devices(backend=backend)

    vars(jax)["devices"] = devices


def exchange_weights(model: Any, state: dict[str, Any], path: str) -> None:
    """Puts another checkpoint's weights in the place of a model's, as `update_weights` does."""
    from vllm_maxtext_loader.engine.origin import Origin
    from vllm_maxtext_loader.engine.staging import Request, Staging
    from vllm_maxtext_loader.tpu.swap import exchange, find_slots

    origin = Origin.of(model)
    assert origin is not None
    slots = find_slots(model, state)
    staging = Staging(Request(path, None, None, path), origin, slots, None)
    staging.wait()
    exchange(slots, staging.arrays.items(), path)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Loads one model."""
    if "cases" in job:
        return {case: holdings.compare(case) for case in job["cases"]}
    from tpu_inference.models.vllm.vllm_model_wrapper import VllmModelWrapper
    from vllm import LLM

    answer: dict[str, Any] = {}
    original = VllmModelWrapper.load_weights

    def load_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        # What makes tpu-inference put arrays on the devices of several hosts. From the start it would ask for Ray.
        os.environ["TPU_MULTIHOST_BACKEND"] = "ray"
        numbers = {device: index for index, device in enumerate(jax.devices())}
        state, _ = original(self, *args, **kwargs)
        if "reload" in job:
            exchange_weights(self.model.vllm_model, state, job["reload"])
        answer["loaded"] = vars(self.model.vllm_model)["_maxtext_loaded"]
        answer["shards"] = {
            name: {
                numbers[shard.device]: google_crc32c.value(np.asarray(shard.data).tobytes())
                for shard in array.addressable_shards
            }
            for name, array in state.items()
        }
        raise Loaded

    VllmModelWrapper.load_weights = load_weights
    os.environ["VLLM_MAXTEXT_DIRECT"] = job["direct"]
    os.environ["VLLM_MAXTEXT_EXCHANGE"] = "0" if jax.process_index() in job.get("alone", ()) else "1"
    records, logger = Records(), logging.getLogger("vllm.vllm_maxtext_loader")
    logger.addHandler(records)
    started = time.monotonic()
    try:
        with contextlib.suppress(Loaded):
            LLM(model=job["model"], **COMMON, **job["arguments"])
    except Exception as error:
        answer["error"] = f"{type(error).__name__}: {error}"
    finally:
        answer["log"], answer["seconds"] = records.lines, time.monotonic() - started
        logger.removeHandler(records)
        VllmModelWrapper.load_weights = original
        os.environ.pop("TPU_MULTIHOST_BACKEND", None)
    return answer


def main() -> None:
    """Runs all jobs."""
    address, processes, process, jobs, answers = sys.argv[1:]
    if int(processes) > 1:
        join(address, int(processes), int(process))
    found = {job["name"]: run(job) for job in json.loads(Path(jobs).read_text())}
    Path(answers).write_text(json.dumps(found))
    # The first process coordinates the others: JAX ends them where it is gone before they have written.
    everyone = [Path(answers).with_name(f"{number}-of-{processes}.json") for number in range(int(processes))]
    deadline = time.monotonic() + 300
    while not all(path.exists() for path in everyone) and time.monotonic() < deadline:
        time.sleep(0.05)
    # An orderly end would wait for the others.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
