"""The compiler's own numbers for one engine and one topology, from a process of its own.

The number of JAX's devices is fixed when a process starts, and a compiler that gives up may take its process
along. The parent calls `measure`; the child is this module: a request on stdin, one marked line on stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from vllm_maxtext_loader.errors import MaxTextLoadError

_MARK = "vllm-maxtext-measure "


def measure(
    checkpoint: str, topology: str, *, hbm_bytes: int, model_name: str | None, arguments: dict[str, Any]
) -> dict[str, Any]:
    """Brings an engine up without weights and compiles its programs for a topology.

    Args:
        checkpoint: path or URL of the item directory.
        topology: libtpu's name.
        hbm_bytes: memory of one device.
        model_name: preset for what shapes cannot tell.
        arguments: of vLLM's EngineArgs.

    Returns:
        "weight_bytes", "program_bytes" (of one device), "kv_tokens" and "unread" (weights that no program
        reads); or "error", one sentence.
    """
    request = {
        "checkpoint": checkpoint,
        "topology": topology,
        "hbm_bytes": hbm_bytes,
        "model_name": model_name,
        "arguments": arguments,
    }
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={arguments['tensor_parallel_size']}",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        # libtpu guards a TPU against two processes; here there is none.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    environment.pop("MODEL_IMPL_TYPE", None)
    with tempfile.TemporaryFile("w+") as log:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "vllm_maxtext_loader.tpu.measure"],
            input=json.dumps(request),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            check=False,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
        if lines:
            return json.loads(lines[-1].removeprefix(_MARK))
        log.seek(0)
        last = " ".join(log.read().split())[-300:]
    return {"error": f"{topology}: the process that compiles ended with code {done.returncode}: {last}"}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What the child process does."""
    from vllm_maxtext_loader.tpu import dry_load
    from vllm_maxtext_loader.tpu.compile import compile_for

    extra = {} if request["model_name"] is None else {"model_name": request["model_name"]}
    try:
        engine = dry_load.start(
            request["checkpoint"],
            hbm_bytes=request["hbm_bytes"],
            model_loader_extra_config=extra,
            **request["arguments"],
        )
        compiled = compile_for(engine, request["topology"])
    except (MaxTextLoadError, ValueError, RuntimeError) as error:
        return {"error": " ".join(str(error).split())[:600]}
    step = compiled.programs[0]
    read = {name: engine.state[name] for name in step.layouts}
    return {
        # The step does not read a vision tower, which is there all the same.
        "weight_bytes": step.argument_bytes
        - step.kv_cache_bytes
        + dry_load.bytes_per_device(engine.state, read),
        "program_bytes": compiled.program_bytes,
        "kv_tokens": engine.kv_tokens,
        "unread": sorted(compiled.unread & engine.weights),
    }


if __name__ == "__main__":
    print("\n" + _MARK + json.dumps(answer(json.load(sys.stdin))), flush=True)
    # vLLM's threads would keep the process.
    os._exit(0)
