"""Shared by all tests: the checkpoints MaxText wrote, their Hugging Face twins, and damaged copies of both."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_maxtext_loader.plugin import CPU_ENVIRONMENT

# Orbax, which writes test checkpoints, imports jax; without this it would look for a TPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
for _name, _value in CPU_ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

FIXTURES = Path(__file__).parent / "fixtures"


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, FIXTURES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@dataclasses.dataclass(frozen=True)
class Case:
    """A checkpoint that MaxText wrote.

    Attributes:
        name: directory under tests/fixtures.
        facts: its case.json.
    """

    name: str
    facts: dict[str, Any]

    @property
    def items(self) -> Path:
        """The item directory."""
        return FIXTURES / self.name / self.facts["items"]

    @property
    def twin_config(self) -> Path:
        """Directory of the twin's config.json."""
        return FIXTURES / "hf" / self.facts["twin"]


@functools.cache
def cases() -> dict[str, Case]:
    """All fixtures by name."""
    found = sorted(FIXTURES.glob("*/case.json"))
    return {path.parent.name: Case(path.parent.name, json.loads(path.read_text())) for path in found}


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


@pytest.fixture
def copy_case(tmp_path: Path) -> Callable[[str], Path]:
    """A writable copy of a fixture's directory: `copy_case("moe_v2")`."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(FIXTURES / name, tmp_path / name))

    return make


Tree = dict[str, Any]


def read_orbax(items: Path) -> Tree:
    """A checkpoint's whole tree, restored by Orbax itself."""
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler()
    metadata = handler.metadata(items)
    import jax
    import numpy as np

    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree)
    return handler.restore(items, args=ocp.args.PyTreeRestore(restore_args=restore_args))


def write_orbax(
    step: Path, tree: Tree, *, item: str = "items", ocdbt: bool = True, zarr3: bool = True
) -> Path:
    """Writes a step the way MaxText does, by Orbax itself; returns the item directory."""
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**{item: handler})) as checkpointer:
        checkpointer.save(step, args=ocp.args.Composite(**{item: ocp.args.PyTreeSave(tree)}))
    return step / item


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """A fixture rewritten by Orbax after `edit(params)` changed its tree in place: `edited("moe_v2", edit)`."""

    def make(name: str, edit: Callable[[Tree], None], **kwargs: Any) -> Path:
        tree = read_orbax(cases()[name].items)
        edit(tree["params"]["params"])
        return write_orbax(tmp_path / f"edited-{name}" / "0", tree, **kwargs)

    return make
