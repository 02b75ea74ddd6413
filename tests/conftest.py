"""Fixtures shared by all tests: Hugging Face twins of the checkpoints, and damaged copies of both."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from support import tpu_compile
from support.checkpoints import FIXTURES, Tree, cases, read_orbax, write_orbax
from vllm_maxtext_loader import cpu_kernels

if TYPE_CHECKING:
    from support.damage import Place

# Orbax, which writes test checkpoints, imports jax; without this it would look for a TPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
for _name, _value in cpu_kernels.ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="fail if a test was skipped (CI)")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """The engine's tests need tpu-inference; a contributor with the extra `cpu` does not have it."""
    if item.get_closest_marker("engine") and importlib.util.find_spec("tpu_inference") is None:
        pytest.skip("tpu-inference is not installed")


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and reporter.stats.get("skipped") and session.config.getoption("--no-skips"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the table of docs/compatibility.md, where programs were compiled for TPUs."""
    if tpu_compile.ROWS:
        terminalreporter.section("compiled for TPUs")
        for line in tpu_compile.table():
            terminalreporter.write_line(line)


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, FIXTURES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes (once) the Hugging Face directory of a fixture's twin: `twin("moe_v2")`."""
    root = tmp_path_factory.mktemp("twins")
    write_twin = _load("twin").write_twin

    @functools.cache
    def make(name: str) -> Path:
        case = cases()[name]
        out = root / case.facts["twin"]
        if not out.exists():
            write_twin(case.twin_config, out)
        return out

    return make


@pytest.fixture(params=["disk", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A directory tree on the disk, and the same in a bucket."""
    from support import gcs
    from support.damage import Place

    if request.param == "disk":
        yield Place(tmp_path, None)
        return
    proxy = gcs.shared()[1]
    proxy.clear()
    with gcs.environment(proxy.url, VLLM_MAXTEXT_TIMEOUT="5"):
        yield Place(tmp_path, tmp_path.name)


@pytest.fixture
def copy_case(tmp_path: Path) -> Callable[[str], Path]:
    """A writable copy of a fixture's directory: `copy_case("moe_v2")`."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(FIXTURES / name, tmp_path / name))

    return make


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """A fixture rewritten by Orbax after `edit(params)` changed its tree in place: `edited("moe_v2", edit)`."""

    def make(name: str, edit: Callable[[Tree], None], **kwargs: Any) -> Path:
        tree = read_orbax(cases()[name].items)
        edit(tree["params"]["params"])
        return write_orbax(tmp_path / f"edited-{name}" / "0", tree, **kwargs)

    return make
