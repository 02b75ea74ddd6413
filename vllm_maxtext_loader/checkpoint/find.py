"""From what a user typed to the one directory that holds the weights.

MaxText writes `<run>/checkpoints/<step>/<item>/…`; a user may name the run, its checkpoint directory,
a step or the item itself. The item is `items` (MaxText) or `model_params` (Tunix), and is known by
its `_METADATA` file.

When a checkpoint counts as committed (orbax-checkpoint 0.12.8 `_src/path/atomicity.py`): in a bucket, it
holds `commit_success.txt`; on a disk, it has been renamed from its `….orbax-checkpoint-tmp…` name. Just
before, on both, its `_CHECKPOINT_METADATA` has received the commit time; a copy of a step that has none is
refused, wherever it lies. The mark belongs to the directory Orbax was told to save to: the step, or, where a
writer saved a single tree (MaxText's parameter-only checkpoints), the item.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Iterable, Sequence

from vllm_maxtext_loader.checkpoint.storage.path import Location
from vllm_maxtext_loader.checkpoint.substitutes import describe_substitute
from vllm_maxtext_loader.errors import (
    CheckpointNotFoundError,
    CorruptMetadataError,
    MaxTextLoadError,
    NotACheckpointError,
    StepNotFoundError,
    UncommittedCheckpointError,
)

logger = logging.getLogger("vllm." + __name__)

TREE_METADATA = "_METADATA"
STEP_METADATA = "_CHECKPOINT_METADATA"
RUN_CHECKPOINTS = "checkpoints"
"""Where MaxText keeps the steps of a run, below the run's directory."""

COMMIT_FILE = "commit_success.txt"
TMP_MARK = ".orbax-checkpoint-tmp"
ITEM_NAMES = ("items", "model_params", "default", "state", "params", "pytree")
"""Item directories in order of preference: MaxText's, Tunix's, then Orbax's own defaults."""

STEP_NAME = re.compile(r"(?:.+_)?([0-9]{1,18})")
"""Orbax's step directories: "30", "000030", "checkpoint_30"."""


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

    In a bucket this takes three requests for a step or an item, one more for a run's checkpoint directory, two
    more for the run's directory, and two more per step that is skipped because it is not committed.

    Args:
        path: items directory, step directory, run's checkpoint directory or run's directory; local or gs://.
        step: step to take from a run's checkpoint directory; None means the newest committed one.

    Raises:
        CheckpointNotFoundError, NotACheckpointError, UncommittedCheckpointError, StepNotFoundError,
        CorruptMetadataError, StorageError: each with what was found instead.
    """
    requested = Location.parse(path)
    _refuse_temporary(requested)
    names = _list(requested)
    items = _item_of(requested, names)
    if items is None and STEP_METADATA not in names and COMMIT_FILE not in names:
        return _from_run(*_checkpoints_of(requested, names), step)
    located = _committed(requested, requested, names, items)
    if step is not None and step != located.step:
        found = "names no step" if located.step is None else f"names step {located.step}"
        raise StepNotFoundError(
            f"{requested}: step {step} is wanted, but the path {found}. Give the run's checkpoint directory, "
            "or leave out the step."
        )
    return located


def _list(location: Location) -> list[str]:
    """Names in the directory the user means.

    Raises:
        CheckpointNotFoundError, NotACheckpointError: there is none, or it is empty.
    """
    try:
        if names := location.listdir():
            return names
        raise NotACheckpointError(
            f"{location}: the directory is empty; expected a checkpoint that Orbax wrote."
        )
    except NotADirectoryError:
        pass
    except FileNotFoundError:
        if not location.is_remote and os.path.islink(location.url):
            raise CheckpointNotFoundError(
                f"{location}: is a symbolic link to {os.readlink(location.url)}, which does not exist."
            ) from None
    if location.parent is not None and location.is_file():
        raise NotACheckpointError(
            f"{location}: is a file; expected a directory that Orbax wrote: an items directory, a step or a "
            "run's checkpoint directory."
        )
    raise CheckpointNotFoundError(f"{location}: no such checkpoint directory.{_beside(location)}")


def _beside(location: Location) -> str:
    """What lies where the directory was expected, to help with a mistyped name."""
    parent = location.parent
    try:
        siblings = parent.listdir(most=8) if parent is not None else []
    except (OSError, MaxTextLoadError):
        siblings = []
    return f" {parent} holds: {', '.join(siblings)}." if siblings else " Check the path."


def _item_of(directory: Location, names: Sequence[str]) -> Location | None:
    """The item that `directory` is or, as a step, holds; None where it is neither."""
    if TREE_METADATA in names:
        return directory
    candidates = [name for name in ITEM_NAMES if name in names]
    # An item of another name is taken only from a directory that Orbax marked as a step.
    if STEP_METADATA in names or COMMIT_FILE in names:
        candidates += [
            name
            for name in names
            if name not in candidates
            and not name.startswith(("_", "."))
            and "optimizer" not in name
            and name not in (COMMIT_FILE, "orbax.checkpoint")
        ]
    for name in candidates:
        if TMP_MARK not in name and name.isprintable() and (directory / name / TREE_METADATA).is_file():
            return directory / name
    return None


def _checkpoints_of(run: Location, names: Sequence[str]) -> tuple[Location, Sequence[str]]:
    """The directory of a run's steps, and what is in it: `run`, or its "checkpoints" where steps are not here."""
    if RUN_CHECKPOINTS not in names or any(TMP_MARK not in name and _step_of(name) for name in names):
        return run, names
    checkpoints = run / RUN_CHECKPOINTS
    logger.info("%s is a run's directory: using its checkpoints in %s.", run, checkpoints)
    return checkpoints, _list(checkpoints)


def _step_of(name: str) -> re.Match[str] | None:
    """Matches the name of a step's directory; no writer puts non-printable characters there."""
    return STEP_NAME.fullmatch(name) if name.isprintable() else None


def _from_run(run: Location, names: Sequence[str], step: int | None) -> ItemLocation:
    """Picks a step of a run's checkpoint directory: the wanted one, or the newest committed."""
    steps = _steps(run, names)
    if step is not None:
        if step not in steps:
            raise StepNotFoundError(f"{run}: has no step {step}. Steps: {_some(map(str, sorted(steps)))}.")
        return _in_step(run, run / steps[step])
    refused: list[str] = []
    for number in sorted(steps, reverse=True):
        try:
            located = _in_step(run, run / steps[number])
        except (UncommittedCheckpointError, NotACheckpointError, CheckpointNotFoundError) as error:
            # A step may also be deleted while its neighbours are looked at: writers keep the newest few.
            refused.append(str(error))
            continue
        if refused:
            logger.warning("Skipped newer steps of %s: %s", run, " ".join(refused))
        return located
    raise UncommittedCheckpointError(f"{run}: no step is committed: {' '.join(refused)}")


def _steps(run: Location, names: Iterable[str]) -> dict[int, str]:
    """Directory names of a run's steps, by number."""
    names = list(names)
    steps: dict[int, str] = {}
    for name in names:
        match = _step_of(name)
        # Of "30" and "checkpoint_30" the former is what MaxText writes.
        if match and TMP_MARK not in name and (int(match.group(1)) not in steps or name.isdigit()):
            steps[int(match.group(1))] = name
    if steps:
        return steps
    if any(TMP_MARK in name for name in names):
        raise UncommittedCheckpointError(
            f"{run}: holds only temporary directories ({_some(names)}): no step was ever committed. The "
            "writer is still at work or died: wait for it."
        )
    raise NotACheckpointError(
        f"{run}: is no Orbax checkpoint: no {TREE_METADATA} here, no {' or '.join(ITEM_NAMES[:2])} "
        f"directory and no numbered steps. Found: {_some(names)}."
    )


def _in_step(run: Location, directory: Location) -> ItemLocation:
    """The committed item of one step of a run."""
    names = _list(directory)
    return _committed(run, directory, names, _item_of(directory, names))


_ADVICE = (
    "The writer is still at work or died: wait for it, or choose another step "
    "(--step N, or --model-loader-extra-config '{\"step\": N}')."
)


def _committed(
    requested: Location, listed: Location, names: Sequence[str], items: Location | None
) -> ItemLocation:
    """Checks the marks of a finished write and reads the checkpoint's metadata.

    Args:
        requested: what the user named.
        listed: the item or the step that holds it.
        names: what is in `listed`.
        items: the item; None where `listed` is a step without one.
    """
    if items is None:
        unfinished = listed.is_remote and STEP_METADATA in names and COMMIT_FILE not in names
        if unfinished or any(TMP_MARK in name for name in names):
            raise UncommittedCheckpointError(
                f"{listed}: holds no finished item: never committed. Found: {_some(names)}. {_ADVICE}"
            )
        if STEP_METADATA in names or COMMIT_FILE in names:
            raise CorruptMetadataError(
                f"{listed}: Orbax finished it, but no item in it has a {TREE_METADATA}. Found: "
                f"{_some(names)}. Copy the checkpoint again, or choose another step."
            )
        raise NotACheckpointError(f"{listed}: holds no item with a {TREE_METADATA}. Found: {_some(names)}.")
    _refuse_temporary(items)
    saved, committed = listed, COMMIT_FILE in names
    raw = None
    if STEP_METADATA in names:
        raw = _read(saved / STEP_METADATA)
    elif listed == items:
        # The item was named directly. What lies above is its step only if Orbax marked it so.
        parent = items.parent
        if parent is not None and (raw := _read(parent / STEP_METADATA)) is not None:
            saved, committed = parent, (parent / COMMIT_FILE).is_file()
    elif not committed and (raw := _read(items / STEP_METADATA)) is not None:
        # The item was saved on its own, into a directory that only looks like a step.
        saved, committed = items, (items / COMMIT_FILE).is_file()
    if not committed and (items.is_remote or (saved != items and (items / COMMIT_FILE).is_file())):
        # Orbax writes the file into the item first and into the step last: on a disk, the second case is a
        # copy of a bucket's step that was not finished.
        raise UncommittedCheckpointError(
            f"{saved}: {COMMIT_FILE} is missing: never committed. {_ADVICE} If it was copied here from a "
            f"disk, where a commit is a rename, put an empty {COMMIT_FILE} into it."
        )
    metadata = {} if raw is None else _parse(saved / STEP_METADATA, raw)
    if "commit_timestamp_nsecs" in metadata and metadata["commit_timestamp_nsecs"] is None:
        raise UncommittedCheckpointError(
            f"{saved}: {STEP_METADATA} has no commit time: never committed. {_ADVICE}"
        )
    custom = metadata.get("custom_metadata")
    scan_layers = custom.get("scan_layers") if isinstance(custom, dict) else None
    return ItemLocation(
        requested=requested,
        items=items,
        step=_step_number(items),
        scan_layers=scan_layers if isinstance(scan_layers, bool) else None,
    )


def _step_number(items: Location) -> int | None:
    """The training step as the names of the item's directory, or the one above, tell it."""
    for directory in (items, items.parent):
        if directory is not None and (match := STEP_NAME.fullmatch(directory.name)):
            return int(match.group(1))
    return None


def _refuse_temporary(location: Location) -> None:
    for part in location.url.split("/"):
        if TMP_MARK in part:
            raise UncommittedCheckpointError(
                f"{location}: {part} is a temporary directory: its writer has not finished, or died. Wait "
                "for it, or choose another step."
            )


def _read(location: Location) -> bytes | None:
    """The file's content, None where there is none."""
    try:
        return location.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _parse(location: Location, raw: bytes) -> dict[str, object]:
    try:
        parsed = json.loads(raw)
    except (ValueError, RecursionError) as error:
        if found := describe_substitute(raw, is_json=True):
            raise CorruptMetadataError(f"{location}: is not valid JSON: it {found}") from error
        raise CorruptMetadataError(
            f"{location}: is not valid JSON ({error}). Copy the checkpoint again, or choose another step."
        ) from error
    if not isinstance(parsed, dict):
        raise CorruptMetadataError(f"{location}: is not a JSON object, found {type(parsed).__name__}.")
    return parsed


def _some(names: Iterable[str], most: int = 12) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (f", … ({len(listed)} in all)" if len(listed) > most else "")
