"""Several nodes: one process decides what is loaded, every node says first what it lacks, and compares before it reads.

On Ray, one node starts the engine and the others lend it a worker each (tpu-inference 0.32.0 executors/). Ray copies
variables named VLLM_… and HF_… to the workers, and no file. So, when the cluster stands and before a worker starts, each
node is asked for its versions, for the files that the load needs, and for its environment; what differs is one error on
the node that the user started. What was decided there travels in the ModelConfig, and each worker compares it with what
it finds.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import socket
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_maxtext_loader import versions
from vllm_maxtext_loader.engine.worker import is_maxtext
from vllm_maxtext_loader.errors import EngineError, MaxTextLoadError
from vllm_maxtext_loader.options import GIB, SERVED, Options

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

    from vllm_maxtext_loader.api import Checkpoint
    from vllm_maxtext_loader.engine.probe import Probe

logger = init_logger("vllm." + __name__)

CREDENTIALS = "GOOGLE_APPLICATION_CREDENTIALS"

CARRIED = (
    CREDENTIALS,
    "GOOGLE_CLOUD_PROJECT",
    "GOOGLE_CLOUD_QUOTA_PROJECT",
    "STORAGE_EMULATOR_HOST",
    "JAX_PLATFORMS",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
)
"""Variables that a load heeds and that vLLM does not copy to Ray's workers; with all that begin with TENSORSTORE_."""

LOADED = "_maxtext_loaded"
"""Attribute of a loaded model: {"seconds": of the load, "read_bytes": decoded, "received_bytes": from other hosts}."""

_EXTRA = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"
_DISTRIBUTIONS = ("vllm-maxtext-loader", "vllm-tpu", "vllm", "tpu-inference")
_SECONDS = 120
"""In which a node must answer; Ray starts a Python process for it."""


def refuse_newest(args: EngineArgs, checkpoint: Probe) -> None:
    """Refuses "the newest step" where nodes are started one by one: each would look it up at another time.

    Raises:
        EngineError: with the step found here, to be named on every node.
    """
    local = args.data_parallel_size_local
    one_by_one = (
        args.nnodes > 1
        or (local is not None and local < args.data_parallel_size)
        or args.data_parallel_rank is not None
        or args.data_parallel_start_rank is not None
        or args.data_parallel_external_lb
        or args.data_parallel_hybrid_lb
    )
    if one_by_one and checkpoint.newest:
        raise EngineError(
            f"{checkpoint.items}: no step was named, and this is the newest one just now. Nodes that are started one by one "
            f"(--nnodes, --headless, --data-parallel-…) may each find another. Name it on every node: "
            f"--model-loader-extra-config '{{\"step\": {checkpoint.step}}}'."
        )


def compare(model_config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Compares what a worker finds with what was decided where the engine was started, before anything is read.

    Raises:
        EngineError: with the host, what it has, and what was expected.
    """
    decided: Mapping[str, Any] | None = vars(model_config).get(SERVED)
    if decided is None:
        return
    for name, version in decided["versions"].items():
        if (own := versions.installed(name)) != version:
            raise EngineError(_other_version(f"Host {socket.gethostname()}", name, own, version))
    if checkpoint.digest != decided["digest"]:
        raise EngineError(
            f"Host {socket.gethostname()}: {checkpoint.plan.where} has other leaves, shapes, dtypes or chunks here (digest "
            f"{checkpoint.digest}) than where the engine was started (digest {decided['digest']}). Is the path the same "
            f"directory on every node, and was the step written anew meanwhile? Start the engine again."
        )


def decided(checkpoint: Probe) -> dict[str, Any]:
    """What every worker compares with what it finds, the checkpoint's digest and the versions of this node; and the start's name."""
    found = {name: version for name in _DISTRIBUTIONS if (version := versions.installed(name)) is not None}
    return {"digest": checkpoint.digest, "versions": found, "engine": secrets.token_hex(8)}


def extend_executor(module: ModuleType) -> None:
    """Lets tpu-inference's Ray executor look at the nodes before it starts a worker on one; for `maxtext` only.

    Args:
        module: tpu_inference.executors.ray_distributed_executor, or its second version.
    """
    executor = next(
        value
        for name, value in vars(module).items()
        if name in ("RayDistributedExecutor", "RayDistributedExecutorV2")
    )
    initialize_cluster, initialize = executor._initialize_ray_cluster, executor._init_executor

    @functools.wraps(initialize_cluster)
    def initialize_ray_cluster(self: Any) -> None:
        initialize_cluster(self)
        if is_maxtext(self.vllm_config):
            reports = _ask_nodes(self.vllm_config)
            check(self.vllm_config, reports)
            _carry(reports)

    @functools.wraps(initialize)
    def init_executor(self: Any) -> None:
        if not is_maxtext(self.vllm_config):
            initialize(self)
            return
        with _restored(_EXTRA), _own_error():
            initialize(self)
        summarize(self.collective_rpc(load_report))

    executor._initialize_ray_cluster = initialize_ray_cluster
    executor._init_executor = init_executor


def check(vllm_config: VllmConfig, reports: Sequence[Mapping[str, Any]]) -> None:
    """Refuses nodes that lack what the load needs.

    Args:
        vllm_config: of the engine.
        reports: see `node_report.report`; the one of the node that starts the engine may be among them.

    Raises:
        EngineError: one sentence per node and fault.
    """
    wanted = vars(vllm_config.model_config)[SERVED]["versions"]
    faults = []
    for found in reports:
        where = f"Node {found['ip']} ({found['host']})"
        different = [name for name in wanted if found["versions"].get(name) != wanted[name]]
        faults += [
            _other_version(where, name, found["versions"].get(name), wanted[name]) for name in different
        ]
        plugins = found["environment"].get("VLLM_PLUGINS")
        if plugins is not None and "maxtext" not in plugins.split(",") and "VLLM_PLUGINS" not in os.environ:
            faults.append(
                f"{where}: VLLM_PLUGINS={plugins} there keeps vllm-maxtext-loader out. Add maxtext to the list, or unset it."
            )
        for path in found["missing"]:
            faults.append(_missing(where, path, found["environment"], vllm_config))
    if faults:
        raise EngineError(" ".join(faults))


def _missing(where: str, path: str, environment: Mapping[str, str], vllm_config: VllmConfig) -> str:
    if path in (environment.get(CREDENTIALS), os.environ.get(CREDENTIALS)):
        return (
            f"{where}: {CREDENTIALS} names {path}, which does not exist there. Put the file on every node (on Kubernetes: mount "
            f"the secret in every pod), or unset the variable where nodes have a service account."
        )
    if path == Options.parse(vllm_config.load_config.model_loader_extra_config).checksums:  # type: ignore[arg-type]
        return f"{where}: the checksum file {path} does not exist there. Put it on every node."
    return (
        f"{where}: the checkpoint {path} does not exist there. Every node reads its own part: put the checkpoint in a bucket or "
        f"on a file system that all nodes have at the same path."
    )


def _other_version(where: str, name: str, own: str | None, expected: str) -> str:
    found = f"{name} is not installed there" if own is None else f"{name} {own} is installed there"
    return (
        f"{where}: {found}, and {name} {expected} on the node where the engine was started. Install {name}=={expected} on "
        f"every node."
    )


def _ask_nodes(vllm_config: VllmConfig) -> list[dict[str, Any]]:
    """What each node that will have a worker says of itself."""
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from vllm_maxtext_loader.engine import node_report

    group: Any = vllm_config.parallel_config.placement_group
    options = Options.parse(vllm_config.load_config.model_loader_extra_config)  # type: ignore[arg-type]
    checkpoint = options.checkpoint or ""
    is_remote = "://" in checkpoint
    files = [] if is_remote else [checkpoint]
    if options.checksums is not None and "://" not in options.checksums:
        files.append(options.checksums)
    variables = [*CARRIED, *(name for name in os.environ if name.startswith("TENSORSTORE_")), "VLLM_PLUGINS"]
    if is_remote and (credentials := os.environ.get(CREDENTIALS)):
        files.append(credentials)
    # By value: a node without this package could not import it.
    cloudpickle.register_pickle_by_value(node_report)
    try:
        task = ray.remote(num_cpus=0)(node_report.report)
        asked = [
            task.options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=group, placement_group_bundle_index=index
                )
            ).remote(list(_DISTRIBUTIONS), files, variables)
            for index in range(group.bundle_count)
        ]
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        placed = ray.util.placement_group_table(group)["bundles_to_node_id"]
        nodes = [addresses.get(placed[index], "unknown") for index in range(group.bundle_count)]
        reports = answers(asked, nodes)
    finally:
        cloudpickle.unregister_pickle_by_value(node_report)
    return [{**found, "ip": ip} for found, ip in zip(reports, nodes, strict=True)]


def answers(asked: list[Any], nodes: Sequence[str], seconds: float = _SECONDS) -> list[Any]:
    """What Ray's tasks return.

    Args:
        asked: one task per node.
        nodes: their addresses.
        seconds: in which all must have answered.

    Raises:
        EngineError: with the nodes that did not.
    """
    import ray

    _, silent = ray.wait(asked, num_returns=len(asked), timeout=seconds)
    if not silent:
        return ray.get(asked)
    names = ", ".join(node for task, node in zip(asked, nodes, strict=True) if task in silent)
    message = (
        f"No answer within {seconds:g} s from {names}, where Ray starts a Python process for it. If it could not, its logs on that "
        f"node say why (/tmp/ray/session_latest/logs, unless Ray was given another directory)."
    )
    # Ray's hook finds `uv run` among the parents of this process (ray 2.60.0 _private/runtime_env/uv_runtime_env_hook.py).
    if python := ray.get_runtime_context().runtime_env.get("py_executable"):
        message += (
            f" It was to do so by `{python}`, in a copy of this directory. Where nodes have an installation of their own, "
            f"set RAY_ENABLE_UV_RUN_RUNTIME_ENV=0."
        )
    raise EngineError(message)


def _carry(reports: Sequence[Mapping[str, Any]]) -> None:
    """Has vLLM copy variables to the workers; not one that a node sets itself to another value: its own is right there."""
    carried = [
        name
        for name, value in os.environ.items()
        if (name in CARRIED or name.startswith("TENSORSTORE_"))
        and all(found["environment"].get(name, value) == value for found in reports)
    ]
    asked = [name for name in os.environ.get(_EXTRA, "").split(",") if name.strip()]
    os.environ[_EXTRA] = ",".join(dict.fromkeys([*asked, *carried]))
    if carried:
        logger.info("Copied to every node: %s.", ", ".join(sorted(carried)))


def load_report(worker: Any) -> dict[str, Any]:
    """What a worker loaded; runs in it.

    Returns:
        {"host", "seconds", "read_bytes", "received_bytes"}
    """
    return {"host": socket.gethostname(), **vars(worker.model_runner.model.model.vllm_model)[LOADED]}


def summarize(reports: Sequence[Mapping[str, Any]]) -> None:
    """One line for all hosts."""
    slowest = max(reports, key=lambda found: found["seconds"])
    received = sum(found["received_bytes"] for found in reports)
    logger.info(
        "Loaded on %d hosts: read %.3g GiB in all%s; the slowest, %s, took %.1f s for %.3g GiB.",
        len(reports),
        sum(found["read_bytes"] for found in reports) / GIB,
        f", and sent each other {received / GIB:.3g} GiB" if received else "",
        slowest["host"],
        slowest["seconds"],
        slowest["read_bytes"] / GIB,
    )


@contextlib.contextmanager
def _own_error() -> Iterator[None]:
    """Raises the error of ours that a worker raised: its sentence ends what the user sees, after Ray's account of it.

    Ray's error has the worker's traceback for a message, and the worker's error as `cause` (ray 2.60.0 exceptions.py).
    """
    try:
        yield
    except Exception as error:
        if isinstance(cause := getattr(error, "cause", None), MaxTextLoadError):
            raise cause from error
        raise


@contextlib.contextmanager
def _restored(variable: str) -> Iterator[None]:
    """Gives a variable of the environment its value back."""
    before = os.environ.get(variable)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = before
