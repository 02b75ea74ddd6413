"""Processes of a Ray cluster without TPUs: a node, and the process that starts the engine. And a vLLM plugin for tests.

    python ray_process.py node PORT NUMBER CHIPS DIRECTORY
    python ray_process.py drive REQUEST.json

What JAX's CPU backend lacks of a TPU slice is supplied by the plugin, in the workers only:
 1. The processes join (on a TPU, libtpu joins them).
 2. jax.devices("cpu") are the process's own (tpu-inference counts on that; on a TPU the host's processors are no part of the slice).
 3. Hosts are ordered by their process number (CPU devices have no coordinates).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

NODE = "RAY_TEST_NODE"
COORDINATOR = "RAY_TEST_COORDINATOR"
FAULT = "RAY_TEST_FAULT"
"""Path of a file that says what goes wrong on the second node: empty, "die", or the URL of a storage proxy to use."""

NODES = 2


def register() -> None:
    """Entry point vllm.general_plugins of the tests; does nothing in the process that starts the engine."""
    number = os.environ.get(NODE)
    if number is None:
        return
    import jax
    import wrapt

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    coordinator = Path(os.environ[COORDINATOR]).read_text()
    jax.distributed.initialize(coordinator, NODES, int(number), initialization_timeout=120)
    everywhere = jax.devices

    def devices(backend: str | None = None) -> list[jax.Device]:
        return everywhere() if backend is None else jax.local_devices(backend=backend)

    vars(jax)["devices"] = devices

    def order(module: ModuleType) -> None:
        vars(module)["get_device_topology_order_id"] = lambda local, _: local[0].process_index

    wrapt.register_post_import_hook(order, "tpu_inference.worker.tpu_worker")
    fault = Path(os.environ[FAULT]).read_text()
    if number == "1" and fault.startswith("http"):
        os.environ.update(STORAGE_EMULATOR_HOST=fault, TENSORSTORE_GCS_HTTP_URL=fault)
    elif number == "1" and fault == "die":
        wrapt.register_post_import_hook(_die_while_loading, "vllm_maxtext_loader.engine.loader")


def _die_while_loading(module: ModuleType) -> None:
    def load_weights(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    module.MaxTextModelLoader.load_weights = load_weights


def look(worker: Any) -> dict[str, Any]:
    """Runs in each worker: what it sees, and what it holds."""
    import google_crc32c
    import jax
    import numpy as np

    numbers = {device: index for index, device in enumerate(jax.devices())}
    return {
        "home": os.environ["HOME"],
        "model": worker.model_config.model,
        "environment": dict(os.environ),
        "shards": {
            f"{name} {numbers[shard.device]}": google_crc32c.value(np.asarray(shard.data).tobytes())
            for name, array in worker.model_runner.state.items()
            for shard in array.addressable_shards
        },
    }


def drive(request: dict[str, Any]) -> None:
    """Starts an engine, lets it answer, and writes down what it and its workers say."""
    from vllm import LLM, SamplingParams

    started = time.monotonic()
    answer: dict[str, Any] = {}
    try:
        llm = LLM(**request["arguments"])
        outputs = llm.generate(
            [{"prompt_token_ids": tokens} for tokens in request["prompts"]],
            SamplingParams(temperature=0, max_tokens=8, detokenize=False),
        )
        answer["tokens"] = [list(output.outputs[0].token_ids) for output in outputs]
        answer["workers"] = llm.collective_rpc(look)
    except Exception as error:
        answer["error"] = f"{type(error).__name__}: {error}"
    answer["seconds"] = time.monotonic() - started
    Path(request["answer"]).write_text(json.dumps(answer))
    # An orderly end would wait for workers that are gone.
    sys.stdout.flush()
    os._exit(0)


def run_node(port: int, number: int, chips: int, directory: str) -> None:
    """One Ray node on the loopback, until SIGTERM. (`ray start` gives a node on 127.0.0.1 the machine's own address.)"""
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    address = f"127.0.0.1:{port}"
    own: dict[str, Any] = (
        {"gcs_server_port": port, "temp_dir": f"{directory}/ray"}
        if number == 0
        else {
            "redis_address": address,
            "gcs_address": address,
            "node_manager_port": 0,
            "include_log_monitor": False,
        }
    )
    parameters = RayParams(
        node_ip_address="127.0.0.1",
        num_cpus=2,
        num_gpus=0,
        resources={"TPU": chips},
        object_store_memory=100_000_000,
        min_worker_port=0,
        max_worker_port=0,
        include_dashboard=False,
        **own,
    )
    node = Node(parameters, head=number == 0, shutdown_at_exit=False, spawn_reaper=False)
    Path(directory, f"up{number}").touch()
    signal.sigwait({signal.SIGTERM})
    node.kill_all_processes(check_alive=False, allow_graceful=True)


if __name__ == "__main__":
    if sys.argv[1] == "drive":
        drive(json.loads(Path(sys.argv[2]).read_text()))
    else:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        run_node(int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
