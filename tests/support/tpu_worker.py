"""Starts one engine without weights, compiles its programs for TPUs, and writes down what the compiler says.

    python tpu_worker.py JOB.json ANSWER.json

A job: {"model", "hbm_bytes", "used_bytes": n or null, "arguments": {…}, "topologies": [name],
"ignore": end of a weight's name, "load": whether to load in earnest and compile nothing}.
The number of JAX's devices is fixed per process, so every engine has a process.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import resource
import sys
from pathlib import Path
from typing import Any, NoReturn

from vllm_maxtext_loader.errors import MaxTextLoadError
from vllm_maxtext_loader.tpu import dry_load


def ignore(engine: dry_load.DryEngine, suffix: str) -> None:
    """Makes the model's layers compute with ones in place of a weight, as an engine that ignores it does."""
    import jax.numpy as jnp
    from torchax.interop import torch_view

    for module in engine.runner.model.model.modules():
        if suffix not in dict(module.named_parameters(recurse=False)) | dict(
            module.named_buffers(recurse=False)
        ):
            continue
        forward = module.forward

        @functools.wraps(forward)
        def without(*args: Any, _module: Any = module, _forward: Any = forward, **kwargs: Any) -> Any:
            holder = _module._parameters if suffix in _module._parameters else _module._buffers
            weight = holder[suffix]
            holder[suffix] = torch_view(jnp.ones(weight.shape, jnp.bfloat16))
            try:
                return _forward(*args, **kwargs)
            finally:
                holder[suffix] = weight

        module.forward = without


@dataclasses.dataclass
class Loading:
    """What the load of this process did.

    Attributes:
        writers: what places arrays directly.
        compiled: programs that were compiled meanwhile.
    """

    writers: list[Any] = dataclasses.field(default_factory=list)
    compiled: int = 0


def observe() -> Loading:
    """Observes the loads that follow."""
    import jax
    from tpu_inference.models.vllm.vllm_model_wrapper import VllmModelWrapper

    from vllm_maxtext_loader.tpu.placement import ShardWriter

    found, events = Loading(), list[str]()
    jax.monitoring.register_event_duration_secs_listener(lambda event, _, **__: events.append(event))
    make, load = ShardWriter.__init__, VllmModelWrapper.load_weights

    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        found.writers.append(self)

    def loaded(self: Any, *args: Any, **kwargs: Any) -> Any:
        events.clear()
        answer = load(self, *args, **kwargs)
        found.compiled = events.count("/jax/core/compile/backend_compile_duration")
        return answer

    vars_of: Any = ShardWriter
    vars_of.__init__ = made
    VllmModelWrapper.load_weights = loaded
    return found


def filling(writer: Any) -> tuple[Any, dict[str, Any]]:
    """What it would take to fill the model's arrays on their devices; nothing is read, and nothing filled."""
    import numpy as np

    from vllm_maxtext_loader import open_checkpoint
    from vllm_maxtext_loader.checkpoint.reader import DecodedRegion
    from vllm_maxtext_loader.checkpoint.regions import chunk_regions
    from vllm_maxtext_loader.conversion.convert import keep_scales
    from vllm_maxtext_loader.tpu.device_shards import fill_on_devices

    budget = open_checkpoint(writer.plan.where).concurrent_bytes
    (staging,) = fill_on_devices(writer.arrays)
    launches = tiles = sent = valid = 0
    for entry in writer.plan.leaves:
        for region in chunk_regions(entry.leaf, budget // 4):
            lengths = [part.stop - part.start for part in region]
            values = np.broadcast_to(np.zeros((), entry.leaf.dtype), lengths)
            decoded = DecodedRegion(entry.leaf, region, values, last=False)
            keep_scales(entry, decoded, writer.scales)
            for task in writer.tasks(entry, decoded) if writer.handles(entry) else ():
                array, program, together = task.args
                given = [tile for tile in together if tile is not None]
                launches += 1
                tiles += len(given)
                sent += len(given) * math.prod(program.tile) * array.kind.dtype.itemsize
                valid += sum(
                    math.prod(b - a for a, b in zip(tile.start, tile.stop, strict=True)) for tile in given
                )
    return staging, {
        "budget": budget,
        "kinds": len({array.kind for array in staging.arrays}),
        "programs": len(staging.programs) + 1,
        "launches": launches,
        "tiles": tiles,
        "sent_bytes": sent,
        "valid_bytes": valid * 2,
        "staged_bytes": staging.buffers * staging.tile_nbytes,
        "tile_bytes": staging.tile_nbytes,
        "device_bytes": sum(array.kind.nbytes for array in staging.arrays),
    }


def compiled_updates(staging: Any, topology: str) -> dict[str, Any]:
    """What the TPU's compiler says of the programs that loading compiles."""
    from vllm_maxtext_loader.tpu.compile import compile_allocation, compile_update

    devices = len(staging.local.devices)
    updates = {}
    for kind, program in staging.programs.items():
        update = compile_update(topology, kind, program.tile, devices)
        updates[f"{kind.shape} {program.tile}"] = {
            **dataclasses.asdict(update),
            "shard_bytes": kind.nbytes,
            "tile_bytes": math.prod(program.tile) * kind.dtype.itemsize,
            "row_major": kind.row_major,
        }
    kinds = [array.kind for array in staging.arrays]
    return {"allocation_bytes": compile_allocation(topology, kinds, devices), "updates": updates}


def compiled(engine: dry_load.DryEngine, staging: Any, topology: str) -> dict[str, Any]:
    """What the compiler says of one topology."""
    from vllm_maxtext_loader.tpu.compile import compile_for

    try:
        found = compile_for(engine, topology)
    except MaxTextLoadError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    read = {name: engine.state[name] for name in found.programs[0].layouts}
    return {
        "device_kind": found.device_kind,
        "step_bytes": dry_load.bytes_per_device(read),
        "programs": [dataclasses.asdict(program) for program in found.programs],
        "program_bytes": found.program_bytes,
        "unread": sorted(found.unread),
        "relaid": found.relaid,
        **compiled_updates(staging, topology),
    }


def loaded(job: dict[str, Any]) -> dict[str, Any]:
    """What an engine that really loads holds."""
    from vllm import LLM

    llm: Any = LLM(model=job["model"], load_format="maxtext", skip_tokenizer_init=True, **job["arguments"])
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.state


def described(state: dict[str, Any]) -> dict[str, str]:
    """Shape, dtype and sharding of every parameter and buffer."""
    return {name: f"{array.shape} {array.dtype} {array.sharding.spec}" for name, array in state.items()}


def finish(answer: dict[str, Any]) -> NoReturn:
    """Writes the answer and ends the process: JAX and vLLM take seconds to take themselves apart."""
    Path(sys.argv[2]).write_text(json.dumps(answer))
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    """Runs the job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    if job.get("load"):
        finish({"state": described(loaded(job))})
    loading = observe()
    try:
        engine = dry_load.start(
            job["model"], hbm_bytes=job["hbm_bytes"], used_bytes=job.get("used_bytes"), **job["arguments"]
        )
    except MaxTextLoadError as error:
        finish({"error": f"{type(error).__name__}: {error}"})
    if "ignore" in job:
        ignore(engine, job["ignore"])
    staging, steps = filling(loading.writers[0])
    answer = {
        "filling": {**steps, "compiled_besides": loading.compiled},
        "state": described(engine.state),
        "bytes_per_device": dry_load.bytes_per_device(engine.state),
        "weights": sorted(engine.weights),
        "kv_tokens": engine.kv_tokens,
        "topologies": {topology: compiled(engine, staging, topology) for topology in job["topologies"]},
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    finish(answer)


if __name__ == "__main__":
    main()
