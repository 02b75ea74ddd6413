"""Names that Orbax and MaxText give to the files and directories of a checkpoint, and what they say."""

from __future__ import annotations

import re
from collections.abc import Iterable

TREE_METADATA = "_METADATA"
STEP_METADATA = "_CHECKPOINT_METADATA"
RUN_CHECKPOINTS = "checkpoints"
"""Where MaxText keeps the steps of a run, below the run's directory."""

COMMIT_FILE = "commit_success.txt"
TMP_MARK = ".orbax-checkpoint-tmp"
ITEM_NAMES = ("items", "model_params", "default", "state", "params", "pytree")
"""Item directories in order of preference: MaxText's, Tunix's, then Orbax's own defaults."""

WEIGHT_ITEMS = ITEM_NAMES[:2]
"""Items that are preferred where they hold a model, whatever the other items hold."""

STEP_NAME = re.compile(r"(?:(?P<prefix>.+)_)?(?P<number>[0-9]{1,18})")
"""Orbax's step directories: "30", "000030", "checkpoint_30"."""

_ARRAYS = re.compile(r"manifest\.ocdbt|ocdbt\.process_[0-9]+|array_metadatas|_sharding")

Steps = dict[int, list[str]]
"""Directory names by step number; more than one where they differ in zero padding."""


def is_marked(names: Iterable[str]) -> bool:
    """Whether a directory with these entries is one that Orbax was called to save to."""
    return any(name in (STEP_METADATA, COMMIT_FILE) for name in names)


def is_array_data(name: str) -> bool:
    """Whether Orbax gives this name to a part of an item."""
    return bool(_ARRAYS.fullmatch(name))


def holds_arrays(names: Iterable[str]) -> bool:
    """Whether a directory with these entries is an item: Orbax wrote arrays there."""
    return any(map(is_array_data, names))


def naming_schemes(names: Iterable[str]) -> dict[str, Steps]:
    """What could be steps, by the prefix of the directories' names; "" for plain numbers.

    As in Orbax, one run has one scheme (orbax-checkpoint 0.12.8, `step._StandardNameFormat`).
    """
    schemes: dict[str, Steps] = {}
    for name in names:
        # No writer puts non-printable characters there.
        match = STEP_NAME.fullmatch(name) if name.isprintable() else None
        if match and TMP_MARK not in name and not is_array_data(name):
            steps = schemes.setdefault(match["prefix"] or "", {})
            steps.setdefault(int(match["number"]), []).append(name)
    return schemes


def some(names: Iterable[str], most: int = 12) -> str:
    """The first of the names, and how many there are."""
    listed = list(names)
    return ", ".join(listed[:most]) + (f", … ({len(listed)} in all)" if len(listed) > most else "")
