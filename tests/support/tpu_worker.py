"""Starts one engine without weights, compiles its programs for TPUs, and writes down what the compiler says.

    python tpu_worker.py JOB.json ANSWER.json

A job: {"model", "hbm_bytes", "used_bytes": n or null, "arguments": {…}, "topologies": [name], "ignore": suffix of a weight's
name}. The number of JAX devices is fixed per process, so every engine has a process.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

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
    }


def main() -> None:
    """Runs the job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    engine = dry_load.start(
        job["model"], hbm_bytes=job["hbm_bytes"], used_bytes=job.get("used_bytes"), **job["arguments"]
    )
    if "ignore" in job:
        ignore(engine, job["ignore"])
    answer = {
        "state": {
            name: f"{array.shape} {array.dtype} {array.sharding.spec}" for name, array in engine.state.items()
        },
        "bytes_per_device": dry_load.bytes_per_device(engine.state),
        "weights": sorted(engine.weights),
        "kv_tokens": engine.kv_tokens,
        "topologies": {topology: compiled(engine, topology) for topology in job["topologies"]},
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    Path(sys.argv[2]).write_text(json.dumps(answer))
    sys.stdout.flush()
    # JAX and vLLM take seconds to take themselves apart.
    os._exit(0)


if __name__ == "__main__":
    main()
