"""A run with two steps of one model: a fixture, and the same leaves with other values."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from support.checkpoints import cases, read_orbax, write_orbax

FIRST, SECOND = 100, 200


def write_run(directory: Path, name: str, other: str | None = None) -> Path:
    """A run with the fixture as step 100, and `other_values` of it as step 200.

    Args:
        directory: where.
        name: the fixture.
        other: fixture of the same model, in another layout, that step 200 is made of; None means the same.

    Returns:
        The run's checkpoint directory.
    """
    run = directory / "checkpoints"
    shutil.copytree(cases()[name].items.parent, run / str(FIRST))
    write_step(run, SECOND, other or name)
    return run


def write_step(run: Path, step: int, name: str, factor: float = -1) -> Path:
    """Adds a step: a fixture's leaves times `factor`, and half of it for vectors; returns its item."""

    def changed(value: Any) -> Any:
        if not isinstance(value, np.ndarray) or value.dtype.kind in "iu":
            return value
        return (value * np.asarray(factor if value.ndim > 1 else abs(factor) / 2, value.dtype)).astype(
            value.dtype
        )

    import jax

    return write_orbax(run / str(step), jax.tree.map(changed, read_orbax(cases()[name].items)))
