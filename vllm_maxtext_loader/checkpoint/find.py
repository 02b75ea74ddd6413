"""From what a user typed to the one directory that holds the weights.

MaxText writes `<run>/checkpoints/<step>/<item>/…`; a user may name the run, its checkpoint directory, a step
or the item itself. `run` says which directory is the step, `items` which item holds the model, `commit`
whether it was finished, `around` what is near a path that is not a checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Sequence

from vllm_maxtext_loader.checkpoint.around import describe_below, siblings, surrounding_item
from vllm_maxtext_loader.checkpoint.commit import (
    check_committed,
    refuse_temporary,
    refuse_without_tree,
)
from vllm_maxtext_loader.checkpoint.items import Item, choose_item, find_items
from vllm_maxtext_loader.checkpoint.names import (
    COMMIT_FILE,
    ITEM_NAMES,
    RUN_CHECKPOINTS,
    STEP_METADATA,
    STEP_NAME,
    TMP_MARK,
    TREE_METADATA,
    holds_arrays,
    is_marked,
    some,
)
from vllm_maxtext_loader.checkpoint.run import Run
from vllm_maxtext_loader.checkpoint.storage.path import Location
from vllm_maxtext_loader.checkpoint.storage.spelling import spelling_hint
from vllm_maxtext_loader.errors import (
    CheckpointNotFoundError,
    NotACheckpointError,
    StepNotFoundError,
    UncommittedCheckpointError,
)

__all__ = ["COMMIT_FILE", "STEP_METADATA", "TMP_MARK", "TREE_METADATA", "ItemLocation", "locate"]

logger = logging.getLogger("vllm." + __name__)

_MOST_REASONS = 3
"""Directories of which an error says why they are not steps."""


@dataclasses.dataclass(frozen=True)
class ItemLocation:
    """A committed Orbax PyTree.

    Attributes:
        requested: what the user named.
        items: the directory that holds `_METADATA`.
        step: training step, None where the directory names do not tell.
        scan_layers: MaxText's own record of whether layers are scanned (0.2.4 and later), else None.
        step_directory: the directory whose name tells the step, None where there is none.
    """

    requested: Location
    items: Location
    step: int | None
    scan_layers: bool | None = None
    step_directory: Location | None = None

    @property
    def is_of_run(self) -> bool:
        """Whether a run was named, and this is a step of it."""
        if self.step_directory is None:
            return False
        return not f"{self.requested.url}/".startswith(f"{self.step_directory.url}/")


def locate(path: str | os.PathLike[str], step: int | None = None) -> ItemLocation:
    """Finds the item directory that `path` means, and checks that it was committed.

    In a bucket this takes three requests for a step or an item, one more for a run's checkpoint directory, two
    more for the run's directory, and two more per step that is skipped because it is not committed.

    Args:
        path: items directory, step directory, run's checkpoint directory or run's directory; local or gs://.
        step: step to take from a run's checkpoint directory; None means the newest committed one.

    Raises:
        CheckpointNotFoundError, NotACheckpointError, UncommittedCheckpointError, StepNotFoundError,
        OldLayoutError, UnknownModelError, CorruptMetadataError, StorageError: each with what was found.
    """
    requested = Location.parse(path)
    search = _Search(requested, step)
    try:
        located = search.find()
    except CheckpointNotFoundError as error:
        if hint := spelling_hint(os.fsdecode(path), requested.url):
            raise CheckpointNotFoundError(f"{error}{hint}") from error
        raise
    finally:
        for level, note in search.notes:
            logger.log(level, "%s", note)
    if located is None:
        raise search.nothing_found()
    if step is not None and step != located.step:
        found = "names no step" if located.step is None else f"names step {located.step}"
        raise StepNotFoundError(
            f"{requested}: step {step} is wanted, but the path {found}. Give the run's checkpoint directory, "
            "or leave out the step."
        )
    return located


class _Search:
    """The search for the item that a path means.

    Args:
        requested: what the user named.
        step: the step that is wanted; None means the newest committed one.

    Attributes:
        notes: what a user should know of it, with a level of `logging`.
    """

    def __init__(self, requested: Location, step: int | None = None) -> None:
        self.notes: list[tuple[int, str]] = []
        self._requested = requested
        self._step = step
        self._runs: list[tuple[Run, Sequence[str]]] = []

    def find(self) -> ItemLocation | None:
        """The item; None where the path is a directory without a checkpoint.

        Raises:
            MaxTextLoadError: there is one that cannot be loaded, or no such directory.
        """
        refuse_temporary(self._requested)
        return self._find(self._requested)

    def _find(self, directory: Location) -> ItemLocation | None:
        names = _list(directory)
        if TREE_METADATA in names or is_marked(names):
            return _committed(self._requested, directory, names)
        run = Run(directory, names, self._in_step)
        self._runs.append((run, names))
        if holds_arrays(names):
            if surrounding_item(directory) is None:
                refuse_without_tree(directory, names)
            return None
        # Where there are numbers, a "params" next to them is an export.
        located = run.numbered(self._step)
        if located is None and (found := find_items(directory, names)):
            return _committed(self._requested, directory, names, found)
        if located is None and RUN_CHECKPOINTS in names and directory == self._requested:
            checkpoints = directory / RUN_CHECKPOINTS
            self.notes.append(
                (logging.INFO, f"{directory} is a run's directory: using its checkpoints in {checkpoints}.")
            )
            located = self._find(checkpoints)
        located = located or run.prefixed(self._step)
        self.notes += run.notes
        return located

    def _in_step(self, directory: Location) -> ItemLocation:
        """The committed item of one step of a run."""
        return _committed(self._requested, directory, _list(directory))

    def nothing_found(self) -> NotACheckpointError | UncommittedCheckpointError:
        """The error for a directory in which `find` found no checkpoint.

        Raises:
            OldLayoutError, UncommittedCheckpointError: it is a step, but none that can be loaded.
        """
        if (outer := surrounding_item(self._requested)) is not None:
            return NotACheckpointError(
                f"{self._requested}: is a part of a checkpoint. Give the path of all of it: {outer}"
            )
        run, names = self._runs[-1]
        directory = run.directory
        if not run.refused and any(TMP_MARK in name for name in names):
            return UncommittedCheckpointError(
                f"{directory}: holds only temporary directories ({some(names)}): no step was ever committed. The "
                "writer is still at work or died: wait for it."
            )
        with contextlib.suppress(NotACheckpointError):
            refuse_without_tree(directory, names)
        below = describe_below(directory, names, lambda path: _Search(path).find())
        why = "no numbered steps"
        if run.refused:
            why = "no numbered directory is a step"
            if not below:
                below = f" {' '.join(str(error) for error in list(run.refused.values())[:_MOST_REASONS])}"
        return NotACheckpointError(
            f"{directory}: is no Orbax checkpoint: no {TREE_METADATA} here, no {' or '.join(ITEM_NAMES[:2])} "
            f"directory and {why}. Found: {some(names)}.{below}"
        )


def _list(location: Location) -> list[str]:
    """Names in a directory.

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
    near = siblings(location)
    holds = f"{location.parent} holds: {', '.join(near)}." if near else "Check the path."
    raise CheckpointNotFoundError(f"{location}: no such checkpoint directory. {holds}")


def _committed(
    requested: Location, listed: Location, names: Sequence[str], found: Sequence[Item] | None = None
) -> ItemLocation:
    """The item that holds the model, with the marks of a finished write checked.

    Args:
        requested: what the user named.
        listed: the item or the step that holds it.
        names: what is in `listed`.
        found: the items in it; None means that they are looked for.
    """
    if found is None:
        found = find_items(listed, names)
    if not found:
        refuse_without_tree(listed, names)
    if is_marked(names):
        # Before the choice: an unfinished step may lack the very item that holds the model.
        saved, metadata = check_committed(listed, names, found[0].location)
        items = choose_item(listed, found)
    else:
        items = choose_item(listed, found)
        saved, metadata = check_committed(listed, names, items)
    custom = metadata.get("custom_metadata")
    scan_layers = custom.get("scan_layers") if isinstance(custom, dict) else None
    step_directory = _step_directory(saved, items)
    return ItemLocation(
        requested=requested,
        items=items,
        step=None if step_directory is None else _number(step_directory.name),
        scan_layers=scan_layers if isinstance(scan_layers, bool) else None,
        step_directory=step_directory,
    )


def _step_directory(saved: Location, items: Location) -> Location | None:
    """The directory whose name tells the training step: the one with Orbax's marks, or near the item."""
    near = [saved] if saved != items else [each for each in (items, items.parent) if each is not None]
    named = [directory for directory in near if _number(directory.name) is not None]
    # An item may be called "params_2".
    return next((directory for directory in named if directory.name.isdigit()), named[0] if named else None)


def _number(name: str) -> int | None:
    match = STEP_NAME.fullmatch(name)
    return int(match["number"]) if match else None
