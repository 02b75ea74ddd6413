"""Several hosts on a real Ray cluster: tpu-inference's two Ray executors over two nodes, from a bucket.

The nodes are processes of this machine, each with a home directory of its own and virtual CPU devices; tests/support/ray_process.py
lists what is patched for that. The second node reads the bucket through a proxy of its own, where faults happen.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vllm_maxtext_loader
from support import gcs
from support.checkpoints import FIXTURES, cases
from support.ray_cluster import Cluster, can_hide, other_version
from support.steps import FIRST, SECOND, write_run
from tiny_tokenizer import write_tokenizer
from vllm_maxtext_loader import errors
from vllm_maxtext_loader.checkpoint import checksums

pytestmark = pytest.mark.engine

CASE = "qwen3moe_scanned"
PREFIX = "several-hosts"
FORBIDDEN, HANGING, DELETED = 300, 400, 500
"""Steps that the second host cannot read."""

SILENT = """
import os

os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"

import ray
from vllm_maxtext_loader.engine.nodes import answers
from vllm_maxtext_loader.errors import EngineError

ray.init(num_cpus=1, include_dashboard=False, runtime_env={"py_executable": "no-such-python"}, log_to_driver=False)
nowhere = ray.remote(num_cpus=0)(lambda: None).remote()
here = ray.put(1)
try:
    answers([here, nowhere], ["10.0.0.1", "10.0.0.2"], 3)
except EngineError as error:
    print(error, flush=True)
"""
"""A Ray node that cannot start a worker; Ray's objects stand for the answers of two nodes."""

LIMIT = 3
"""Seconds without a byte (VLLM_MAXTEXT_TIMEOUT)."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run in the bucket, with two good steps."""
    storage, _ = gcs.shared()
    directory = write_run(tmp_path_factory.mktemp("run"), CASE)
    for step in (FIRST, SECOND):
        storage.upload(directory / str(step), gcs.BUCKET, f"{PREFIX}/checkpoints/{step}/")
    return f"gs://{gcs.BUCKET}/{PREFIX}/checkpoints"


@pytest.fixture(scope="module")
def bad(run: str) -> str:
    """The same run's first step under numbers that the second host cannot read; each where it is a run of its own."""
    storage, _ = gcs.shared()
    source = FIXTURES / CASE / "checkpoints" / "0"
    for step in (FORBIDDEN, HANGING, DELETED):
        storage.upload(source, gcs.BUCKET, f"{PREFIX}/bad/{step}/")
    return f"gs://{gcs.BUCKET}/{PREFIX}/bad"


@pytest.fixture(scope="module")
def cluster(run: str, bad: str) -> Iterator[Cluster]:
    storage, first = gcs.shared()
    second = gcs.Proxy(storage.port)
    second.faults += [
        gcs.Fault(f"read .*/{FORBIDDEN}/.*/d/", status=403),
        gcs.Fault(f"read .*/{HANGING}/.*/d/", hang=300),
        gcs.Fault(
            f"read .*/{DELETED}/.*/d/",
            before=lambda: storage.delete(gcs.BUCKET, f"{PREFIX}/bad/{DELETED}/"),
            times=1,
        ),
    ]
    # Sockets below pytest's own directories would have names that are too long.
    with tempfile.TemporaryDirectory(prefix="ray-") as directory:
        package = Path(vllm_maxtext_loader.__file__).parents[1]
        made = Cluster(Path(directory), package, (first.url, second.url))
        write_tokenizer(made.homes[0] / "tokenizer", vocab_size=320)
        try:
            made.start()
            yield made
        finally:
            made.stop()
            second.clear()


@pytest.fixture(scope="module")
def arguments(cluster: Cluster, run: str) -> dict[str, Any]:
    return {
        "model": run,
        "tokenizer": str(cluster.homes[0] / "tokenizer"),
        "load_format": "maxtext",
        "model_loader_extra_config": {"model_name": cases()[CASE].facts["model_name"], "step": FIRST},
        "max_model_len": 128,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 128,
    }


def of_step(arguments: dict[str, Any], step: int, run: str, **extra: Any) -> dict[str, Any]:
    """The arguments for another step."""
    options = {**arguments["model_loader_extra_config"], "step": step, **extra}
    return {**arguments, "model": run, "model_loader_extra_config": options}


@pytest.fixture(scope="module")
def alone(cluster: Cluster, arguments: dict[str, Any]) -> dict[str, Any]:
    answer = cluster.run("alone", arguments, version=None)
    assert "error" not in answer, answer["error"][-2000:]
    return answer


@pytest.fixture(scope="module")
def first(cluster: Cluster, arguments: dict[str, Any], run: str, bad: str) -> dict[str, Any]:
    """Version 1 of the executor, on the first step; then the second one, by Python."""
    reloads = [
        {"how": "python", "run": bad, "step": FORBIDDEN},
        {"how": "python", "run": None, "step": None},
    ]
    answer = cluster.run("first", arguments, version=1, reloads=reloads)
    assert "error" not in answer, answer["error"][-2000:]
    return answer


@pytest.fixture(scope="module")
def second(cluster: Cluster, arguments: dict[str, Any], run: str, bad: str) -> dict[str, Any]:
    """Version 2, on the second step, with a Hugging Face directory as `model`; then the first one, by the routes of a server."""
    directory = cluster.homes[0] / "model"
    write_tokenizer(directory, vocab_size=320)
    case = cases()[CASE]
    checkpoint = vllm_maxtext_loader.open_checkpoint(case.items, model_name=case.facts["model_name"])
    checkpoint.hf_config().save_pretrained(directory)
    (directory / "model.safetensors").write_bytes(bytes(8))
    options = {**arguments["model_loader_extra_config"], "checkpoint": run, "step": SECOND}
    given = {**arguments, "model": str(directory), "model_loader_extra_config": options}
    del given["tokenizer"]
    reloads = [
        {"how": "routes", "run": bad, "step": FORBIDDEN},
        {"how": "update", "run": bad, "step": FORBIDDEN},
        {"how": "routes", "run": run, "step": FIRST},
    ]
    answer = cluster.run("second", given, version=2, reloads=reloads)
    assert "error" not in answer, answer["error"][-2000:]
    return answer


def test_nodes_hold_and_say_what_one_process_does(alone: dict[str, Any], first: dict[str, Any]) -> None:
    assert first["tokens"] == alone["tokens"]
    (whole,) = [worker["shards"] for worker in alone["workers"]]
    one, other = (worker["shards"] for worker in first["workers"])
    assert len(whole) > 100
    assert not set(one) & set(other)
    assert one | other == whole


def test_every_node_makes_what_it_lacks(
    cluster: Cluster, first: dict[str, Any], second: dict[str, Any]
) -> None:
    for answer in (first, second):
        by_home = {worker["home"]: worker for worker in answer["workers"]}
        assert set(by_home) == {str(home) for home in cluster.homes}
        for home, worker in by_home.items():
            assert worker["environment"]["GOOGLE_CLOUD_PROJECT"] == "a-project"
            assert worker["environment"]["JAX_PLATFORMS"] == "cpu"
            if can_hide():
                assert worker["model"].startswith(home)


def test_configuration_travels_and_weights_do_not(cluster: Cluster, second: dict[str, Any]) -> None:
    given, other = (
        next(worker for worker in second["workers"] if worker["home"] == str(home)) for home in cluster.homes
    )
    assert given["model"] == str(cluster.homes[0] / "model")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(given["files"])
    if can_hide():
        assert "config.json" in other["files"]
        assert not {"model.safetensors", "tokenizer.json"} & set(other["files"])


def test_one_line_for_all_hosts(first: dict[str, Any], second: dict[str, Any]) -> None:
    for answer in (first, second):
        assert answer["log"].count("Loaded on 2 hosts: read ") == 1
        # They have met through Ray's store: on a TPU there is no other.
        assert answer["log"].count("GiB in all, and sent each other ") == 1


def test_all_hosts_serve_another_step(first: dict[str, Any], second: dict[str, Any]) -> None:
    for answer, fresh, step in ((first, second, SECOND), (second, first, FIRST)):
        reloaded = answer["reloads"][-1]
        assert reloaded["error"] is None
        assert reloaded["step"] == step
        assert reloaded["version"] == f"step-{step}"
        assert shards(reloaded) == shards(fresh)
        assert reloaded["tokens"] == fresh["tokens"]
        assert reloaded["tokens"] != answer["tokens"]
        assert [state["step"] for state in reloaded["state"]] == [step, step]


def test_host_that_cannot_stage_leaves_all_as_they_were(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    for answer in (first, second):
        for refused in answer["reloads"][:-1]:
            assert "Host " in refused["error"]
            assert "403" in refused["error"]
            assert shards(refused) == shards(answer)
            assert refused["tokens"] == answer["tokens"]
            assert refused["version"] == answer["version"]
            assert [state["step"] for state in refused["state"]] == [
                int(answer["version"].removeprefix("step-"))
            ] * 2
        assert [state["staged"] for state in answer["reloads"][0]["state"]] == [None, None]


def shards(answer: dict[str, Any]) -> dict[str, int]:
    """The shards of both hosts."""
    one, other = (worker["shards"] for worker in answer["workers"])
    return one | other


def test_other_version_on_a_node_is_one_sentence(cluster: Cluster, arguments: dict[str, Any]) -> None:
    with other_version(cluster.site, "vllm-maxtext-loader", "9.9"):
        answer = cluster.run("version", arguments)
    assert answer["error"].startswith("EngineError: Node 127.0.0.1 (")
    assert "vllm-maxtext-loader 9.9 is installed there" in answer["error"]
    assert "Loading MaxText checkpoint" not in answer["log"]


def test_node_that_starts_no_process_is_named() -> None:
    asked = subprocess.run(
        [sys.executable, "-c", SILENT], capture_output=True, text=True, check=True, timeout=120
    )
    assert asked.stdout.splitlines()[-1] == (
        "No answer within 3 s from 10.0.0.2, where Ray starts a Python process for it. If it could not, its logs on that node say "
        "why (/tmp/ray/session_latest/logs, unless Ray was given another directory). It was to do so by `no-such-python`, in a copy "
        "of this directory. Where nodes have an installation of their own, set RAY_ENABLE_UV_RUN_RUNTIME_ENV=0."
    )


def test_what_is_on_the_first_node_only_is_refused(cluster: Cluster, arguments: dict[str, Any]) -> None:
    checkpoint = cluster.homes[0] / "checkpoint"
    checkpoint.symlink_to(FIXTURES / CASE / "checkpoints")
    answer = cluster.run("local", of_step(arguments, 0, str(checkpoint)))
    if not can_hide():
        # Without the right to mount, both nodes have the same files.
        assert "error" not in answer
        return
    assert answer["error"].startswith("EngineError: Node 127.0.0.1 (")
    assert f"the checkpoint {checkpoint}/0/items does not exist there" in answer["error"]


def test_host_that_may_not_read_ends_the_start(cluster: Cluster, arguments: dict[str, Any], bad: str) -> None:
    answer = cluster.run("forbidden", of_step(arguments, FORBIDDEN, bad), version=2)
    assert_ended(answer, "403")


def test_host_whose_connection_hangs_ends_the_start(
    cluster: Cluster, arguments: dict[str, Any], bad: str
) -> None:
    answer = cluster.run("hanging", of_step(arguments, HANGING, bad), VLLM_MAXTEXT_TIMEOUT=str(LIMIT))
    assert_ended(answer, f"nothing arrived for {LIMIT} s")


def test_step_that_is_deleted_meanwhile_ends_the_start(
    cluster: Cluster, arguments: dict[str, Any], bad: str
) -> None:
    answer = cluster.run(
        "deleted", of_step(arguments, DELETED, bad), version=2, VLLM_MAXTEXT_TIMEOUT=str(LIMIT)
    )
    # The other host may be opening it just then, with some of its objects gone.
    assert_ended(answer, "deleted", "has no _METADATA")


def test_host_with_other_checksums_ends_the_start(
    cluster: Cluster, arguments: dict[str, Any], run: str
) -> None:
    checkpoint = vllm_maxtext_loader.open_checkpoint(FIXTURES / CASE / "checkpoints")
    sums = cluster.homes[0] / "sums.json"
    text = checksums.dumps(checksums.compute(checkpoint), "a run")
    cluster.write(0, sums, text)
    parsed = json.loads(text)
    for leaf in parsed["leaves"].values():
        leaf["crc32c"] = "0" * len(leaf["crc32c"])
    cluster.write(1, sums, json.dumps(parsed))
    answer = cluster.run("checksums", of_step(arguments, FIRST, run, checksums=str(sums)))
    assert_ended(answer, "expected 00000000")


def test_host_that_dies_ends_the_start(cluster: Cluster, arguments: dict[str, Any]) -> None:
    cluster.fault.write_text("die")
    try:
        answer = cluster.run("dead", arguments)
    finally:
        cluster.fault.write_text("")
    assert "Died" in answer["error"] or "died" in answer["error"]
    assert answer["seconds"] < 120
    assert answer["left"] == []


def assert_ended(answer: dict[str, Any], *sentences: str) -> None:
    """The start ended soon, on all hosts, with one host's sentence: one of these."""
    kind, _, message = answer["error"].partition(": ")
    assert issubclass(getattr(errors, kind), errors.MaxTextLoadError)
    # Its own, or as it told the other host.
    assert re.match(rf"Host {socket.gethostname()}( \(process \d\) could not load)?: ", message)
    assert f"gs://{gcs.BUCKET}/{PREFIX}/" in message
    assert any(sentence in message for sentence in sentences), message
    assert answer["seconds"] < 120
    assert answer["left"] == []
