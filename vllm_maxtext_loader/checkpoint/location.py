"""From what a user typed to the one directory that holds the weights.

MaxText writes `<run>/checkpoints/<step>/<item>/…`; a user may name the run's checkpoint directory,
a step or the item itself. The item is `items` (MaxText) or `model_params` (Tunix), and is known by
its `_METADATA` file.

When a checkpoint counts as committed (orbax-checkpoint 0.12.8 `_src/path/atomicity.py`):
in a bucket, `<step>/commit_success.txt` exists; on a disk, the directory has been renamed from its
`….orbax-checkpoint-tmp…` name. On both, `_CHECKPOINT_METADATA` has received its commit time.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re

from vllm_maxtext_loader.checkpoint.storage import Location
from vllm_maxtext_loader.errors import (
    CheckpointNotFoundError,
    CorruptMetadataError,
    NotACheckpointError,
    StepNotFoundError,
    UncommittedCheckpointError,
)

logger = logging.getLogger("vllm." + __name__)

TREE_METADATA = "_METADATA"
STEP_METADATA = "_CHECKPOINT_METADATA"
COMMIT_FILE = "commit_success.txt"
TMP_MARK = ".orbax-checkpoint-tmp"
ITEM_NAMES = ("items", "model_params", "default", "state", "params", "pytree")
"""Item directories in order of preference: MaxText's, Tunix's, then Orbax's own defaults."""

_STEP_NAME = re.compile(r"(?:.*[_-])?(\d+)")


@dataclasses.dataclass(frozen=True)
class ItemLocation:
    """A committed Orbax PyTree.

    Attributes:
        requested: what the user named.
        items: the directory that holds `_METADATA`.
        step: training step, None where the directory names do not tell.
        scan_layers: MaxText's own record of whether layers are scanned (0.2.4 and later), else None.
    """

    requested: Location
    items: Location
    step: int | None
    scan_layers: bool | None = None


def locate(path: str | os.PathLike[str], step: int | None = None) -> ItemLocation:
    """Finds the item directory that `path` means, and checks that it was committed.

    Args:
        path: items directory, step directory or run's checkpoint directory; local or gs://.
        step: step to take from a run's checkpoint directory; None means the newest committed one.

    Raises:
        CheckpointNotFoundError, NotACheckpointError, UncommittedCheckpointError, StepNotFoundError,
        StorageError: each with what was found instead.
    """
    requested = Location.parse(path)
    _refuse_temporary(requested)
    names = _list(requested)
    if TREE_METADATA in names:
        return _committed(requested, requested, requested.parent, step)
    if found := _item_of(requested, names):
        return _committed(requested, found, requested, step)
    return _from_run(requested, names, step)


def _list(location: Location) -> list[str]:
    try:
        names = location.listdir()
    except FileNotFoundError:
        names = []
    except NotADirectoryError:
        names = []
    if names:
        return names
    if not location.is_remote and os.path.isdir(location.url):
        raise NotACheckpointError(f"{location}: the directory is empty.")
    parent = location.parent
    beside = ""
    if parent is not None:
        try:
            siblings = parent.listdir()[:8]
            beside = f" {parent} holds: {', '.join(siblings)}." if siblings else ""
        except (FileNotFoundError, NotADirectoryError, ValueError):
            beside = ""
    raise CheckpointNotFoundError(f"{location}: no such checkpoint directory.{beside}")


def _item_of(directory: Location, names: list[str]) -> Location | None:
    """The item inside a step directory, None where this is not one."""
    candidates = [name for name in ITEM_NAMES if name in names]
    # An item of another name is taken only from a directory that Orbax marked as a step.
    if STEP_METADATA in names or COMMIT_FILE in names:
        candidates += [
            name
            for name in names
            if name not in candidates and not name.startswith(("_", ".")) and "optimizer" not in name
        ]
    for name in candidates:
        if TMP_MARK not in name and (directory / name / TREE_METADATA).is_file():
            return directory / name
    return None


def _from_run(run: Location, names: list[str], step: int | None) -> ItemLocation:
    """Picks a step of a run's checkpoint directory: the wanted one, or the newest committed."""
    steps: dict[int, str] = {}
    for name in names:
        match = _STEP_NAME.fullmatch(name)
        if match and TMP_MARK not in name:
            steps[int(match.group(1))] = name
    if not steps:
        if any(TMP_MARK in name for name in names):
            raise UncommittedCheckpointError(
                f"{run}: holds only temporary directories ({_some(names)}): no step was ever committed."
            )
        if "checkpoints" in names:
            raise NotACheckpointError(
                f"{run}: is a run's directory; its checkpoints are in {run / 'checkpoints'}."
            )
        raise NotACheckpointError(
            f"{run}: is no Orbax checkpoint: no {TREE_METADATA} here, no {' or '.join(ITEM_NAMES[:2])} "
            f"directory and no numbered steps. Found: {_some(names)}."
        )
    if step is not None and step not in steps:
        raise StepNotFoundError(f"{run}: has no step {step}. Steps: {_some(map(str, sorted(steps)))}.")
    refused: list[str] = []
    for number in [step] if step is not None else sorted(steps, reverse=True):
        directory = run / steps[number]
        found = _item_of(directory, _list(directory))
        if found is None:
            refused.append(f"step {number}: holds no {TREE_METADATA}")
            continue
        try:
            located = _committed(run, found, directory, step)
        except UncommittedCheckpointError as error:
            if step is not None:
                raise
            refused.append(str(error))
            continue
        if refused:
            logger.warning("Skipped newer steps of %s: %s", run, "; ".join(refused))
        return located
    if step is not None:
        raise NotACheckpointError(f"{run}: {refused[0]}.")
    raise UncommittedCheckpointError(f"{run}: no step is committed: {'; '.join(refused)}")


def _committed(requested: Location, items: Location, step_dir: Location | None, step: int | None) -> ItemLocation:
    """Checks the marks of a finished write and reads the step's metadata."""
    _refuse_temporary(items)
    metadata: dict[str, object] = {}
    step_names: list[str] = []
    if step_dir is not None:
        try:
            step_names = step_dir.listdir()
        except (FileNotFoundError, NotADirectoryError):
            step_names = []
        # A bare items directory may lie anywhere; its parent is a step only if Orbax marked it so.
        if STEP_METADATA in step_names:
            metadata = _read_json(step_dir / STEP_METADATA)
    advice = (
        "The writer is still at work or died: wait for it, or choose another step "
        '(--model-loader-extra-config \'{"step": N}\').'
    )
    if metadata and "commit_timestamp_nsecs" in metadata and metadata["commit_timestamp_nsecs"] is None:
        raise UncommittedCheckpointError(f"{step_dir}: {STEP_METADATA} has no commit time. {advice}")
    if COMMIT_FILE not in step_names:
        inner = (items / COMMIT_FILE).is_file()
        is_step = STEP_METADATA in step_names or requested != items
        # Orbax writes the file into the item first and into the step last, in the same fashion.
        if (is_step and (items.is_remote or inner)) or (not is_step and items.is_remote and not inner):
            raise UncommittedCheckpointError(
                f"{step_dir if is_step else items}: {COMMIT_FILE} is missing: never committed. {advice}"
            )
    number = None
    if step_dir is not None and (match := _STEP_NAME.fullmatch(step_dir.name)):
        number = int(match.group(1))
    if step is not None and number is not None and step != number:
        raise StepNotFoundError(
            f"{requested}: step {step} is wanted, but the path names step {number}. Give the run's checkpoint "
            f"directory, or leave out the step."
        )
    custom = metadata.get("custom_metadata")
    scan_layers = custom.get("scan_layers") if isinstance(custom, dict) else None
    return ItemLocation(
        requested=requested,
        items=items,
        step=number,
        scan_layers=scan_layers if isinstance(scan_layers, bool) else None,
    )


def _refuse_temporary(location: Location) -> None:
    for part in location.url.split("/"):
        if TMP_MARK in part:
            raise UncommittedCheckpointError(
                f"{location}: {part} is a temporary directory: its writer has not finished, or died."
            )


def _read_json(location: Location) -> dict[str, object]:
    try:
        parsed = json.loads(location.read_bytes())
    except FileNotFoundError as error:
        raise CorruptMetadataError(f"{location}: disappeared while it was being read.") from error
    except (ValueError, RecursionError) as error:
        raise CorruptMetadataError(f"{location}: is not valid JSON ({error}).") from error
    if not isinstance(parsed, dict):
        raise CorruptMetadataError(f"{location}: is not a JSON object.")
    return parsed


def _some(names: object, most: int = 12) -> str:
    listed = list(names)  # type: ignore[call-overload]
    return ", ".join(listed[:most]) + (f", … ({len(listed)} in all)" if len(listed) > most else "")
