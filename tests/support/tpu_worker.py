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


def updates(engine: dry_load.DryEngine, topology: str) -> dict[str, Any]:
    """What loading compiles: a sixteenth of the largest weights with three and two axes, copied into a shard."""
    from vllm_maxtext_loader.tpu.compile import compile_update

    found = {}
    for axes in (2, 3):
        arrays = [array for array in engine.state.values() if array.ndim == axes]
        if not arrays:
            continue
        largest = max(arrays, key=lambda array: array.nbytes)
        shard = largest.sharding.shard_shape(largest.shape)
        block = (max(1, shard[0] // 16), *shard[1:])
        update = compile_update(topology, shard, block, largest.dtype, scaled=axes == 3)
        shard_bytes, block_bytes = (math.prod(shape) * largest.dtype.itemsize for shape in (shard, block))
        found[str(axes)] = {
            **dataclasses.asdict(update),
            "shard_bytes": shard_bytes,
            "block_bytes": block_bytes,
        }
    return found


def compiled(engine: dry_load.DryEngine, topology: str) -> dict[str, Any]:
    """What the compiler says of one topology."""
    from vllm_maxtext_loader.tpu.compile import compile_for

    try:
        found = compile_for(engine, topology)
    except MaxTextLoadError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "device_kind": found.device_kind,
        "programs": [dataclasses.asdict(program) for program in found.programs],
        "program_bytes": found.program_bytes,
        "unread": sorted(found.unread),
        "relaid": found.relaid,
        "updates": updates(engine, topology),
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
    try:
        engine = dry_load.start(
            job["model"], hbm_bytes=job["hbm_bytes"], used_bytes=job.get("used_bytes"), **job["arguments"]
        )
    except MaxTextLoadError as error:
        finish({"error": f"{type(error).__name__}: {error}"})
    if "ignore" in job:
        ignore(engine, job["ignore"])
    answer = {
        "state": described(engine.state),
        "bytes_per_device": dry_load.bytes_per_device(engine.state),
        "weights": sorted(engine.weights),
        "kv_tokens": engine.kv_tokens,
        "topologies": {topology: compiled(engine, topology) for topology in job["topologies"]},
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    finish(answer)


if __name__ == "__main__":
    main()
