"""Two processes that make up one engine, as the hosts of a TPU slice do, hold together what one process holds, bit by bit."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from support import gcs
from support.checkpoints import cases, read_orbax, write_orbax
from support.steps import FIRST, SECOND, write_run
from vllm_maxtext_loader import open_checkpoint
from vllm_maxtext_loader.checkpoint import checksums

pytestmark = pytest.mark.engine

HOST = Path(__file__).parent / "support" / "engine_host.py"
CASE = "moe_v2"
DEVICES = 4
SETTINGS = {
    "tensor parallel": (False, "1"),
    "tensor parallel, by devices": (False, "device"),
    "expert parallel, by devices": (True, "device"),
}
"""Whether experts are parallel, and how the several processes fill their arrays (VLLM_MAXTEXT_DIRECT)."""


EXCHANGED = {
    "tensor parallel": (True, False, "1"),
    "expert parallel, by devices": (False, True, "device"),
}
"""Settings that are loaded from a bucket, too; first, whether each leaf is an object there."""

HELD = ("moe_v2", "dense_vocabpad", "llama31_unscanned", "llama3_scanned", "gptoss_scanned", "qwen3_scanned")
"""Fixtures with whatever decides where values go: scanned and single layers, padding, rotary pairs, biases."""

LIMIT = 20
"""VLLM_MAXTEXT_TIMEOUT of the loads from a bucket."""


def _start(
    processes: int, jobs: Path, directory: Path, proxies: Sequence[gcs.Proxy] = ()
) -> list[dict[str, Any]]:
    """The answers of an engine's processes, each with a way to the bucket of its own."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // processes}",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_MAXTEXT_TIMEOUT": str(LIMIT),
    }
    address = f"127.0.0.1:{gcs.free_port()}"
    answers = [directory / f"{number}-of-{processes}.json" for number in range(processes)]
    started = []
    for number, answer in enumerate(answers):
        command = [sys.executable, str(HOST), address, str(processes), str(number), str(jobs), str(answer)]
        own = dict(environment)
        if proxies:
            url = proxies[number].url
            own |= {**gcs.ENVIRONMENT, "STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}
        with answer.with_suffix(".log").open("w") as log:
            started.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT))
    for process, answer in zip(started, answers, strict=True):
        process.wait(timeout=400)
        assert answer.exists(), answer.with_suffix(".log").read_text()[-3000:]
    return [json.loads(answer.read_text()) for answer in answers]


def _uploaded(items: Path, name: str) -> str:
    """URL of a copy of a checkpoint, for one job: its requests are told apart by it."""
    gcs.shared()[0].upload(items, gcs.BUCKET, f"{_prefix(name)}0/items/")
    return f"gs://{gcs.BUCKET}/{_prefix(name)}0/items"


def _prefix(name: str) -> str:
    return f"hosts/{name.replace(' ', '-').replace(',', '')}/"


def _checksums(directory: Path, items: Path, name: str, leaf: str | None = None) -> str:
    """Path of a file with a checkpoint's checksums; one of `leaf`'s is wrong, where that is given."""
    sums = checksums.compute(open_checkpoint(items))
    if leaf is not None:
        key = next(key for key in sums if key.endswith(leaf))
        first, *rest = sums[key].crc32c
        sums[key] = dataclasses.replace(sums[key], crc32c=(first ^ 1, *rest))
    path = directory / f"{name}.json"
    path.write_text(checksums.dumps(sums, "here"))
    return str(path)


def _bucket_jobs(directory: Path, model: str) -> Iterator[dict[str, Any]]:
    """Loads from a bucket: two that exchange, one that does not, and two that fail on one host."""

    # The same model with each leaf in an object of its own: who reads what can be seen at the bucket.
    objects = write_orbax(directory / "0", read_orbax(cases()[CASE].items), ocdbt=False, zarr3=False)

    def job(
        name: str, is_object: bool, expert_parallel: bool, direct: str, wrong: str | None = None, **more: Any
    ) -> dict[str, Any]:
        items = objects if is_object else cases()[CASE].items
        # A budget of a few chunks: hosts have to wait for each other.
        extra = {
            "checkpoint": _uploaded(items, name),
            "checksums": _checksums(directory, items, name, wrong),
            "concurrent_gib": 0.004,
        }
        arguments = {
            "load_format": "maxtext",
            "tensor_parallel_size": DEVICES,
            "enable_expert_parallel": expert_parallel,
            "model_loader_extra_config": extra,
        }
        return {"name": name, "model": model, "arguments": arguments, "direct": direct, **more}

    for name, (is_object, expert_parallel, direct) in EXCHANGED.items():
        yield job(f"exchanged {name}", is_object, expert_parallel, direct)
    yield job("alone", True, False, "1", alone=[1])
    yield job("forbidden", True, False, "1")
    yield job("changed", False, False, "1", wrong="local_layers.mlp.moe_block.MoeBlock_0.wi_0")


@pytest.fixture(scope="module")
def proxies() -> list[gcs.Proxy]:
    """Each host's way to the bucket. Of one job, the second host may not read the data."""
    server, _ = gcs.shared()
    made = [gcs.Proxy(server.port) for _ in range(2)]
    made[1].faults.append(gcs.Fault(r"read .*hosts/forbidden/.*MoeBlock_0\.w\w+/[0-9.]+$", status=403))
    return made


@pytest.fixture(scope="module")
def hosts(
    twin: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, proxies: list[gcs.Proxy]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What one process holds, and what each of two does."""
    directory = tmp_path_factory.mktemp("hosts")
    jobs = [
        {
            "name": name,
            "model": str(twin(CASE)),
            "arguments": {
                "load_format": "maxtext",
                "tensor_parallel_size": DEVICES,
                "enable_expert_parallel": expert_parallel,
                "model_loader_extra_config": {"checkpoint": str(cases()[CASE].items)},
            },
            "direct": direct,
        }
        for name, (expert_parallel, direct) in SETTINGS.items()
    ]
    run = write_run(tmp_path_factory.mktemp("run"), CASE)
    parallel = {"load_format": "maxtext", "tensor_parallel_size": DEVICES, "enable_expert_parallel": True}
    for name, step, then in (
        ("second step", SECOND, {}),
        ("reload", FIRST, {"reload": str(run / str(SECOND))}),
    ):
        extra = {"checkpoint": str(run), "step": step}
        arguments = {**parallel, "model_loader_extra_config": extra}
        jobs.append({"name": name, "model": str(twin(CASE)), "arguments": arguments, "direct": "1", **then})
    bucket = list(_bucket_jobs(directory, str(twin(CASE))))
    alone = [*({**job, "direct": "1"} for job in jobs), {"name": "held", "cases": HELD}]
    for processes, own in ((1, alone), (2, [*jobs, *bucket])):
        (directory / f"jobs-{processes}.json").write_text(json.dumps(own))
    (alone,) = _start(1, directory / "jobs-1.json", directory)
    return alone, _start(2, directory / "jobs-2.json", directory, proxies)


@pytest.mark.parametrize("name", [*SETTINGS, *(f"exchanged {name}" for name in EXCHANGED)])
def test_hosts_hold_together_what_one_holds(
    hosts: tuple[dict[str, Any], list[dict[str, Any]]], name: str
) -> None:
    alone, several = hosts
    wanted = alone[name.removeprefix("exchanged ")]["shards"]
    assert len(wanted) > 100
    for number, host in enumerate(several):
        own = [str(number * DEVICES // 2 + device) for device in range(DEVICES // 2)]
        assert "error" not in host[name], host[name]["error"]
        assert host[name]["shards"] == {
            parameter: {device: sums[device] for device in own} for parameter, sums in wanted.items()
        }


@pytest.mark.parametrize("case", HELD)
def test_hosts_are_sent_all_they_hold(hosts: tuple[dict[str, Any], list[dict[str, Any]]], case: str) -> None:
    found = hosts[0]["held"][case]
    assert found["differences"] == []
    assert found["regions"] > 300
    # No more than need be, but where a chunk ends within a head.
    assert found["larger"] < found["regions"]


def _times_read(proxies: list[gcs.Proxy], name: str) -> dict[str, int]:
    """By leaf, how often both hosts together have read its object."""
    pattern = re.compile(rf"{gcs.BUCKET}/{_prefix(name)}0/items/(.+)/[0-9.]+$")
    found = [pattern.match(request.name) for proxy in proxies for request in proxy.reads()]
    return collections.Counter(match[1] for match in found if match)


@pytest.mark.parametrize("name", EXCHANGED)
def test_what_is_read_is_spread(hosts: tuple[dict[str, Any], list[dict[str, Any]]], name: str) -> None:
    loaded = [host[f"exchanged {name}"]["loaded"] for host in hosts[1]]
    nbytes = open_checkpoint(cases()[CASE].items).plan.nbytes
    assert nbytes <= sum(each["read_bytes"] for each in loaded) < 1.02 * nbytes
    assert max(each["read_bytes"] for each in loaded) < 0.6 * nbytes
    for host, each in zip(hosts[1], loaded, strict=True):
        assert each["received_bytes"] > 0
        (line,) = (line for line in host[f"exchanged {name}"]["log"] if "Loaded gs://" in line)
        assert "for other hosts" in line
        assert line.endswith(" from other hosts.")


def test_large_objects_are_read_once(
    hosts: tuple[dict[str, Any], list[dict[str, Any]]], proxies: list[gcs.Proxy]
) -> None:
    together, alone = (_times_read(proxies, name) for name in ("exchanged tensor parallel", "alone"))
    plan = open_checkpoint(cases()[CASE].items).plan
    large = re.compile(r"embedding|self_attention\.\w+\.kernel|\.wi_[01]|\.wo")
    once = [entry.leaf for entry in plan.leaves if large.search(entry.leaf.key)]
    assert sum(leaf.nbytes for leaf in once) > 0.98 * plan.nbytes
    for entry in plan.leaves:
        assert together[entry.leaf.key] == (1 if entry.leaf in once else 2), entry.leaf.key
        assert alone[entry.leaf.key] == 2, entry.leaf.key


def test_host_that_takes_no_part_leaves_all_to_themselves(
    hosts: tuple[dict[str, Any], list[dict[str, Any]]],
) -> None:
    first, second = ([line for line in host["alone"]["log"] if "for itself" in line] for host in hosts[1])
    (line,) = first
    assert re.fullmatch(
        rf"WARNING gs://\S+: every host reads for itself, 0\.0\d+ GiB in all instead of 0\.00\d+: host {socket.gethostname()}: "
        "VLLM_MAXTEXT_EXCHANGE turns the exchange off",
        line,
    )
    assert second == []


def test_host_that_may_not_read_ends_both(hosts: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    first, second = (host["forbidden"] for host in hosts[1])
    start = f"StorageError: Host {socket.gethostname()}: "
    assert second["error"].startswith(f"{start}cannot read leaf ")
    own = second["error"].removeprefix(start)
    assert first["error"] == f"StorageError: Host {socket.gethostname()} (process 1) could not load: {own}"
    assert "403" in own
    assert max(first["seconds"], second["seconds"]) < 3 * LIMIT


def test_changed_data_ends_both(hosts: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    """The host that reads a chunk compares it; the other one gets no part of it."""
    errors = sorted((host["changed"]["error"] for host in hosts[1]), key=len)
    own = errors[0].removeprefix(f"ReadError: Host {socket.gethostname()}: ")
    assert "MoeBlock_0.wi_0, chunk [0, 0, 0, 0, 0]: CRC-32C is " in own
    assert re.fullmatch(
        rf"ReadError: Host {socket.gethostname()} \(process [01]\) could not load: {re.escape(own)}",
        errors[1],
    )


def test_each_host_exchanges_its_shards(hosts: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    for answer in (hosts[0], *hosts[1]):
        assert answer["reload"]["shards"] == answer["second step"]["shards"]
        assert answer["reload"]["shards"] != answer["expert parallel, by devices"]["shards"]
