"""Several hosts on a real Ray cluster: tpu-inference's two Ray executors over two nodes, from a bucket.

The nodes are processes of this machine, each with a home directory of its own and virtual CPU devices; tests/support/ray_process.py
lists what is patched for that.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vllm_maxtext_loader
from support import gcs
from support.checkpoints import FIXTURES, cases
from support.ray_cluster import Cluster, can_hide, other_version
from tiny_tokenizer import write_tokenizer

pytestmark = pytest.mark.engine

CASE = "moe_v2"
PREFIX = "several-hosts"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Sockets below pytest's own directories would have names that are too long.
    with tempfile.TemporaryDirectory(prefix="ray-") as directory:
        made = Cluster(Path(directory), Path(vllm_maxtext_loader.__file__).parents[1])
        write_tokenizer(made.homes[0] / "tokenizer", vocab_size=320)
        try:
            made.start()
            yield made
        finally:
            made.stop()


@pytest.fixture(scope="module")
def bucket() -> gcs.Proxy:
    storage, proxy = gcs.shared()
    storage.upload(FIXTURES / CASE / "checkpoints", gcs.BUCKET, f"{PREFIX}/checkpoints/")
    return proxy


@pytest.fixture(scope="module")
def arguments(cluster: Cluster) -> dict[str, Any]:
    return {
        "model": f"gs://{gcs.BUCKET}/{PREFIX}/checkpoints",
        "tokenizer": str(cluster.homes[0] / "tokenizer"),
        "load_format": "maxtext",
        "model_loader_extra_config": {"model_name": cases()[CASE].facts["model_name"]},
        "max_model_len": 128,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 128,
    }


@pytest.fixture(scope="module")
def storage(bucket: gcs.Proxy) -> dict[str, str]:
    """What only the process that starts the engine has in its environment."""
    return {
        "STORAGE_EMULATOR_HOST": bucket.url,
        "TENSORSTORE_GCS_HTTP_URL": bucket.url,
        "GOOGLE_CLOUD_PROJECT": "a-project",
    }


@pytest.fixture(scope="module")
def alone(cluster: Cluster, arguments: dict[str, Any], storage: dict[str, str]) -> dict[str, Any]:
    answer = cluster.run("alone", arguments, ray=False, **storage)
    assert "error" not in answer, answer["error"][-2000:]
    return answer


@pytest.fixture(scope="module", params=[1, 2])
def together(
    request: pytest.FixtureRequest, cluster: Cluster, arguments: dict[str, Any], storage: dict[str, str]
) -> dict[str, Any]:
    answer = cluster.run(f"together{request.param}", arguments, version=request.param, **storage)
    assert "error" not in answer, answer["error"][-2000:]
    return answer


def test_nodes_hold_and_say_what_one_process_does(alone: dict[str, Any], together: dict[str, Any]) -> None:
    assert together["tokens"] == alone["tokens"]
    (whole,) = [worker["shards"] for worker in alone["workers"]]
    first, second = (worker["shards"] for worker in together["workers"])
    assert len(whole) > 400
    assert not set(first) & set(second)
    assert first | second == whole


def test_every_node_makes_what_it_lacks(cluster: Cluster, together: dict[str, Any]) -> None:
    by_home = {worker["home"]: worker for worker in together["workers"]}
    assert set(by_home) == {str(home) for home in cluster.homes}
    for home, worker in by_home.items():
        assert worker["environment"]["GOOGLE_CLOUD_PROJECT"] == "a-project"
        assert worker["environment"]["JAX_PLATFORMS"] == "cpu"
        if can_hide():
            assert worker["model"].startswith(home)


def test_one_line_for_all_hosts(together: dict[str, Any]) -> None:
    assert together["log"].count("Loaded on 2 hosts: read ") == 1


def test_other_version_on_a_node_is_one_sentence(
    cluster: Cluster, arguments: dict[str, Any], storage: dict[str, str]
) -> None:
    with other_version(cluster.site, "vllm-maxtext-loader", "9.9"):
        answer = cluster.run("version", arguments, **storage)
    assert answer["error"].startswith("EngineError: Node 127.0.0.1 (")
    assert "vllm-maxtext-loader 9.9 is installed there" in answer["error"]
    assert "Loading MaxText checkpoint" not in answer["log"]


def test_what_is_on_the_first_node_only_is_refused(cluster: Cluster, arguments: dict[str, Any]) -> None:
    checkpoint = cluster.homes[0] / "checkpoint"
    checkpoint.symlink_to(FIXTURES / CASE / "checkpoints")
    answer = cluster.run("local", {**arguments, "model": str(checkpoint)})
    if not can_hide():
        # Without the right to mount, both nodes have the same files.
        assert "error" not in answer
        return
    assert answer["error"].startswith("EngineError: Node 127.0.0.1 (")
    assert f"the checkpoint {checkpoint}/0/items does not exist there" in answer["error"]


def test_host_that_may_not_read_ends_the_start(
    cluster: Cluster, arguments: dict[str, Any], storage: dict[str, str]
) -> None:
    server, _ = gcs.shared()
    proxy = gcs.Proxy(server.port)
    proxy.faults.append(gcs.Fault("read .*/d/", status=403))
    cluster.fault.write_text(proxy.url)
    try:
        answer = cluster.run("forbidden", arguments, version=2, **storage)
    finally:
        cluster.fault.write_text("")
    assert "403" in answer["error"] or "403" in answer["log"]
    assert answer["seconds"] < 300


def test_host_that_dies_ends_the_start(
    cluster: Cluster, arguments: dict[str, Any], storage: dict[str, str]
) -> None:
    cluster.fault.write_text("die")
    try:
        answer = cluster.run("dead", arguments, **storage)
    finally:
        cluster.fault.write_text("")
    assert "Died" in answer["error"] or "died" in answer["error"]
    assert answer["seconds"] < 300
