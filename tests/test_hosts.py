"""Two processes that make up one engine, as the hosts of a TPU slice do, hold together what one process holds, bit by bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import gcs
from support.checkpoints import cases
from support.steps import FIRST, SECOND, write_run

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


def _start(processes: int, jobs: Path, directory: Path) -> list[dict[str, Any]]:
    """The answers of an engine's processes."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // processes}",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    address = f"127.0.0.1:{gcs.free_port()}"
    answers = [directory / f"{number}-of-{processes}.json" for number in range(processes)]
    started = []
    for number, answer in enumerate(answers):
        command = [sys.executable, str(HOST), address, str(processes), str(number), str(jobs), str(answer)]
        with answer.with_suffix(".log").open("w") as log:
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    for process, answer in zip(started, answers, strict=True):
        process.wait(timeout=400)
        assert answer.exists(), answer.with_suffix(".log").read_text()[-3000:]
    return [json.loads(answer.read_text()) for answer in answers]


@pytest.fixture(scope="module")
def hosts(
    twin: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
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
    for processes, own in ((1, [{**job, "direct": "1"} for job in jobs]), (2, jobs)):
        (directory / f"jobs-{processes}.json").write_text(json.dumps(own))
    (alone,) = _start(1, directory / "jobs-1.json", directory)
    return alone, _start(2, directory / "jobs-2.json", directory)


@pytest.mark.parametrize("name", SETTINGS)
def test_hosts_hold_together_what_one_holds(
    hosts: tuple[dict[str, Any], list[dict[str, Any]]], name: str
) -> None:
    alone, several = hosts
    wanted = alone[name]["shards"]
    assert len(wanted) > 100
    for number, host in enumerate(several):
        own = [str(number * DEVICES // 2 + device) for device in range(DEVICES // 2)]
        assert host[name]["shards"] == {
            parameter: {device: sums[device] for device in own} for parameter, sums in wanted.items()
        }


def test_each_host_exchanges_its_shards(hosts: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    for answer in (hosts[0], *hosts[1]):
        assert answer["reload"] == answer["second step"]
        assert answer["reload"] != answer["expert parallel, by devices"]
