"""Processes of a Ray cluster without TPUs: a node, and the process that starts the engine. And a vLLM plugin for tests.

    python ray_process.py node PORT NUMBER CHIPS DIRECTORY
    python ray_process.py drive < REQUESTS

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
"""Path of a file that says what goes wrong on the second node: "die", or nothing."""

STORAGE = "RAY_TEST_STORAGE"
"""URL of the second node's storage."""

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
    if number == "1":
        os.environ.update(
            STORAGE_EMULATOR_HOST=os.environ[STORAGE], TENSORSTORE_GCS_HTTP_URL=os.environ[STORAGE]
        )
        if Path(os.environ[FAULT]).read_text() == "die":
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
        "files": sorted(os.listdir(worker.model_config.model)),
        "environment": dict(os.environ),
        "shards": {
            f"{name} {numbers[shard.device]}": google_crc32c.value(np.asarray(shard.data).tobytes())
            for name, array in worker.model_runner.state.items()
            for shard in array.addressable_shards
        },
    }


def drive() -> None:
    """Starts an engine for each line of standard input, lets it answer, and writes down what it and its workers say."""
    environment = dict(os.environ)
    for line in sys.stdin:
        request = json.loads(line)
        os.environ.update(request["environment"])
        started = time.monotonic()
        answer: dict[str, Any] = {}
        llm = None
        try:
            llm = _start(request)
            answer.update(_ask(llm, request["prompts"]))
            answer["reloads"] = [_reload(llm, request["prompts"], **each) for each in request["reloads"]]
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {error}"
        answer["seconds"] = time.monotonic() - started
        _stop(llm)
        os.environ.clear()
        os.environ.update(environment)
        sys.stdout.flush()
        sys.stderr.flush()
        written = Path(request["answer"])
        written.with_suffix(".part").write_text(json.dumps(answer))
        written.with_suffix(".part").rename(written)
    # An orderly end would wait for workers that are gone.
    os._exit(0)


def _start(request: dict[str, Any]) -> Any:
    from vllm import LLM

    return LLM(**request["arguments"])


def _stop(llm: Any) -> None:
    import ray

    if llm is not None:
        llm.llm_engine.engine_core.shutdown()
    # What a failed start leaves behind ends with the driver's connection, as it does with its process.
    ray.shutdown()


def _ask(llm: Any, prompts: list[list[int]]) -> dict[str, Any]:
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": tokens} for tokens in prompts],
        SamplingParams(temperature=0, max_tokens=8, detokenize=False),
    )
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "workers": llm.collective_rpc(look),
        "version": llm.get_weight_version(),
    }


def _reload(
    llm: Any, prompts: list[list[int]], how: str, run: str | None, step: int | None
) -> dict[str, Any]:
    """Brings another step into the engine: by `vllm_maxtext_loader.reload` ("python"), as `vllm-maxtext reload` and `follow` do
    ("routes"), or without staging it first ("update").
    """
    import vllm_maxtext_loader
    from vllm_maxtext_loader import MaxTextLoadError
    from vllm_maxtext_loader.checkpoint.find import locate
    from vllm_maxtext_loader.tools.reload import reload

    answer: dict[str, Any] = {"error": None}
    try:
        if how == "python":
            answer["step"] = vllm_maxtext_loader.reload(llm, step=step, path=run)
        elif how == "update":
            llm.start_weight_update()
            llm.update_weights({"update_info": {"path": run, "step": step}})
        else:
            assert run is not None
            answer["step"] = reload(_server(llm), locate(run, step)).step
    except MaxTextLoadError as error:
        answer["error"] = f"{type(error).__name__}: {error}"
    answer["state"] = llm.collective_rpc("weight_state")
    return {**answer, **_ask(llm, prompts)}


def _server(llm: Any) -> Any:
    """vLLM's server, without HTTP: each route calls what vLLM's does."""
    from vllm_maxtext_loader.tools.server import Server

    class Routes(Server):
        def drop(self) -> None:
            self._call("drop_weights")

        def _ask(
            self, verb: str, route: str, body: dict[str, Any] | None = None, method: str = ""
        ) -> dict[str, Any]:
            from vllm_maxtext_loader.errors import ReloadError

            try:
                match route.partition("?")[0]:
                    case "/collective_rpc":
                        assert body is not None
                        return {"results": llm.collective_rpc(body["method"], kwargs=body["kwargs"])}
                    case "/start_weight_update":
                        llm.start_weight_update()
                    case "/update_weights":
                        llm.update_weights(body)
                    case "/finish_weight_update":
                        llm.finish_weight_update(**(body or {}))
                return {}
            except Exception as error:
                raise ReloadError(str(error)) from error

    return Routes("http://127.0.0.1:1")


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
        drive()
    else:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        run_node(int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
