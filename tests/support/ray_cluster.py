"""A Ray cluster of two nodes on one machine, each with a HOME of its own, for tpu-inference's Ray executors."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from support import gcs
from support.ray_process import COORDINATOR, FAULT, NODE, NODES, STORAGE

PROCESS = Path(__file__).with_name("ray_process.py")
CHIPS = 2
"""Devices of a node."""


class Cluster:
    """Two nodes, and a process that starts engines on them, one after the other.

    Args:
        directory: for homes, logs and answers; a short path, since Ray puts sockets below it.
        package: directory that is on the nodes' Python path, with this package in it.
        storage: URLs of the storage, for the first node and the second one.

    Attributes:
        fault: file that says what goes wrong on the second node; see `ray_process`.
        site: a directory on the second node's Python path only.
    """

    def __init__(self, directory: Path, package: Path, storage: tuple[str, str]) -> None:
        self.directory = directory
        self.homes = [directory / f"home{number}" for number in range(NODES)]
        self.fault = directory / "fault"
        self.site = directory / "site1"
        self._coordinator = directory / "coordinator"
        self._port = gcs.free_port()
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._driver: subprocess.Popen[str] | None = None
        self._log = directory / "driver.log"
        self._storage = storage[0]
        for path in (*self.homes, self.site):
            path.mkdir()
        known = Path("~/.cache/vllm/modelinfos").expanduser()
        if known.is_dir():
            # Otherwise vLLM imports the model's class in a process of its own, once per home.
            shutil.copytree(known, self.homes[0] / ".cache" / "vllm" / "modelinfos")
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
            # Below `uv run`, Ray would start the nodes' processes by the same command, from a copy of the driver's directory.
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_memory_monitor_refresh_ms": "0",
            "VLLM_HOST_IP": "127.0.0.1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            COORDINATOR: str(self._coordinator),
            FAULT: str(self.fault),
            STORAGE: storage[1],
        }

    def start(self) -> None:
        """Starts both nodes, and meanwhile the process that starts engines."""
        self._start_driver()
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
            _wait_for(self.directory / f"up{number}", self._nodes[-1], log, 90)

    def stop(self) -> None:
        """Ends all of them."""
        processes = [*reversed(self._nodes), *([self._driver] if self._driver else [])]
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()

    def run(
        self,
        name: str,
        arguments: dict[str, Any],
        *,
        version: int | None = 1,
        reloads: Sequence[dict[str, Any]] = (),
        **environment: str,
    ) -> dict[str, Any]:
        """Starts an engine, asks it, and ends it.

        Args:
            name: of the answer's file.
            arguments: the engine's.
            version: of the Ray executor; None means one process with as many devices.
            reloads: what is brought into the engine afterwards; see `ray_process`.
            environment: of the process that starts it, in addition.

        Returns:
            What `ray_process.drive` writes; "log"; and "left", processes of the engine that have not ended.
        """
        self._coordinator.write_text(f"127.0.0.1:{gcs.free_port()}")
        answer = self.directory / f"{name}.json"
        own = {} if version is None else {"TPU_MULTIHOST_BACKEND": "ray", **_executor(version)}
        request = {
            "arguments": {"tensor_parallel_size": CHIPS * NODES, **arguments},
            "prompts": [[2, 5, 7, 11, 13], [2, 100, 90, 80, 70, 60, 50]],
            "reloads": list(reloads),
            "environment": {**own, **environment},
            "answer": str(answer),
        }
        if self._driver is None or self._driver.poll() is not None:
            self._start_driver()
        assert self._driver is not None
        assert self._driver.stdin is not None
        begins = self._log.stat().st_size
        self._driver.stdin.write(json.dumps(request) + "\n")
        self._driver.stdin.flush()
        _wait_for(answer, self._driver, self._log, 300)
        with self._log.open("rb") as log:
            log.seek(begins)
            said = log.read().decode(errors="replace")
        return {**json.loads(answer.read_text()), "log": said, "left": self._left()}

    def write(self, number: int, path: Path, text: str) -> None:
        """Writes a file as one of the nodes sees it."""
        # The second one has an empty directory of its own in the place of the first one's home.
        (Path(f"/proc/{self._nodes[number].pid}/root") / path.relative_to("/")).write_text(text)

    def _start_driver(self) -> None:
        with self._log.open("a") as out:
            self._driver = subprocess.Popen(
                [sys.executable, str(PROCESS), "drive"],
                env={
                    **self._common,
                    "HOME": str(self.homes[0]),
                    "JAX_PLATFORMS": "cpu",
                    "XLA_FLAGS": f"--xla_force_host_platform_device_count={CHIPS * NODES}",
                    "RAY_ADDRESS": f"127.0.0.1:{self._port}",
                    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
                    "VLLM_CPU_KVCACHE_SPACE": "1",
                    # vLLM sets it, too late in a process where Ray's graphs are imported already.
                    "RAY_CGRAPH_get_timeout": "300",
                    # What only the process that starts the engine has in its environment.
                    "STORAGE_EMULATOR_HOST": self._storage,
                    "TENSORSTORE_GCS_HTTP_URL": self._storage,
                    "GOOGLE_CLOUD_PROJECT": "a-project",
                },
                cwd=self.homes[0],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def _left(self) -> list[str]:
        """Processes on the nodes that have loaded JAX, and have not ended 20 seconds after their engine."""
        deadline = time.monotonic() + 20
        while found := [str(process) for process in Path("/proc").glob("[0-9]*") if self._is_worker(process)]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return found

    def _is_worker(self, process: Path) -> bool:
        try:
            environment = (process / "environ").read_text(errors="replace").split("\0")
            return (
                f"{COORDINATOR}={self._coordinator}" in environment
                and any(variable.startswith(f"{NODE}=") for variable in environment)
                and "jaxlib" in (process / "maps").read_text(errors="replace")
            )
        except OSError:
            return False  # It has ended.


def _executor(version: int) -> dict[str, str]:
    return {"VLLM_USE_RAY_V2_EXECUTOR_BACKEND": str(version - 1)}


def _wait_for(path: Path, process: subprocess.Popen[Any], log: Path, seconds: float) -> None:
    """Returns when a process has made a file."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, log.read_text(errors="replace")[-5000:]
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"no {path} after {seconds:g} s: {log.read_text(errors='replace')[-5000:]}")
        time.sleep(0.05)


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
