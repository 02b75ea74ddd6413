"""A Ray cluster of two nodes on one machine, each with a HOME of its own, for tpu-inference's Ray executors."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support import gcs
from support.ray_process import COORDINATOR, FAULT, NODE, NODES

PROCESS = Path(__file__).with_name("ray_process.py")
CHIPS = 2
"""Devices of a node."""


class Cluster:
    """Two nodes.

    Args:
        directory: for homes, logs and answers; a short path, since Ray puts sockets below it.
        package: directory that is on the nodes' Python path, with this package in it.

    Attributes:
        fault: file that says what goes wrong on the second node; see `ray_process`.
        site: a directory on the second node's Python path only.
    """

    def __init__(self, directory: Path, package: Path) -> None:
        self.directory = directory
        self.homes = [directory / f"home{number}" for number in range(NODES)]
        self.fault = directory / "fault"
        self.site = directory / "site1"
        self._coordinator = directory / "coordinator"
        self._port = gcs.free_port()
        self._nodes: list[subprocess.Popen[bytes]] = []
        for path in (*self.homes, self.site):
            path.mkdir()
        self.fault.touch()
        self._plugin = _plugin_site(directory / "plugin")
        self._common = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{self._plugin}:{package}",
            **gcs.ENVIRONMENT,
            "no_proxy": "127.0.0.1",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={CHIPS}",
            "TPU_ACCELERATOR_TYPE": "v6e-1",
            "TPU_SKIP_MDS_QUERY": "1",
            "RAY_EXPERIMENTAL_NOSET_TPU_VISIBLE_CHIPS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_memory_monitor_refresh_ms": "0",
            "VLLM_HOST_IP": "127.0.0.1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            COORDINATOR: str(self._coordinator),
            FAULT: str(self.fault),
        }

    def start(self) -> None:
        """Starts both nodes."""
        for number in range(NODES):
            environment = {**self._common, "HOME": str(self.homes[number]), NODE: str(number)}
            command = [sys.executable, str(PROCESS), "node", str(self._port), str(number), str(CHIPS)]
            command.append(str(self.directory))
            if number == 1:
                environment["PYTHONPATH"] = f"{self.site}:{environment['PYTHONPATH']}"
                # Another machine does not have the first one's files.
                command = [*_without(self.homes[0]), *command]
            log = self.directory / f"node{number}.log"
            with log.open("w") as out:
                self._nodes.append(
                    subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
                )
            deadline = time.monotonic() + 90
            while not (self.directory / f"up{number}").exists():
                assert self._nodes[-1].poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)

    def stop(self) -> None:
        """Ends both."""
        for node in reversed(self._nodes):
            node.terminate()
        for node in self._nodes:
            try:
                node.wait(20)
            except subprocess.TimeoutExpired:
                node.kill()

    def run(
        self, name: str, arguments: dict[str, Any], *, version: int = 1, ray: bool = True, **environment: str
    ) -> dict[str, Any]:
        """Starts an engine over both nodes, or in one process with as many devices, and asks it.

        Returns:
            What `ray_process.drive` writes, and "log".
        """
        self._coordinator.write_text(f"127.0.0.1:{gcs.free_port()}")
        request = {
            "arguments": {"tensor_parallel_size": CHIPS * NODES, **arguments},
            "prompts": [[2, 5, 7, 11, 13], [2, 100, 90, 80, 70, 60, 50]],
            "answer": str(self.directory / f"{name}.json"),
        }
        (self.directory / "request.json").write_text(json.dumps(request))
        own = (
            {"TPU_MULTIHOST_BACKEND": "ray", "RAY_ADDRESS": f"127.0.0.1:{self._port}"}
            if ray
            else {"XLA_FLAGS": f"--xla_force_host_platform_device_count={CHIPS * NODES}"}
        )
        log = self.directory / f"{name}.log"
        with log.open("w") as out:
            subprocess.run(
                [sys.executable, str(PROCESS), "drive", str(self.directory / "request.json")],
                env={
                    **self._common,
                    "HOME": str(self.homes[0]),
                    "JAX_PLATFORMS": "cpu",
                    "VLLM_USE_RAY_V2_EXECUTOR_BACKEND": str(version - 1),
                    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
                    "VLLM_CPU_KVCACHE_SPACE": "1",
                    **own,
                    **environment,
                },
                cwd=self.homes[0],
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=400,
                check=True,
            )
        answer = json.loads(Path(request["answer"]).read_text())
        return {**answer, "log": log.read_text(errors="replace")}


def can_hide() -> bool:
    """Whether this user may hide a directory from a process."""
    return (
        shutil.which("unshare") is not None
        and subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0
    )


def _without(directory: Path) -> list[str]:
    """A command that runs its arguments where a directory is empty; nothing where that is not permitted."""
    if not can_hide():
        return []
    hide = f'mount -t tmpfs none {directory} && exec "$@"'
    return ["unshare", "-m", "--propagation", "private", "sh", "-c", hide, "sh"]


def _plugin_site(directory: Path) -> Path:
    """A directory for the Python path, with `ray_process` as an installed plugin of vLLM."""
    info = directory / "ray_test_hosts-0.dist-info"
    info.mkdir(parents=True)
    shutil.copy(PROCESS, directory)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ray-test-hosts\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nray_test_hosts = ray_process:register\n")
    return directory


@contextlib.contextmanager
def other_version(site: Path, distribution: str, version: str) -> Iterator[None]:
    """For the duration, another version of a distribution is what a Python path holds first."""
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    try:
        yield
    finally:
        shutil.rmtree(info)
