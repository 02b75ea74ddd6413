"""Which directory of a run is its step: the one that was asked for, or the newest that was committed.

As in Orbax, the steps of a run are named alike: by a number, or by one prefix and a number. Where there are
numbers, what has a prefix is a backup or an export. Only directories that hold a checkpoint count.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vllm_maxtext_loader.checkpoint.names import Steps, naming_schemes, some
from vllm_maxtext_loader.checkpoint.storage.path import Location
from vllm_maxtext_loader.errors import (
    CheckpointNotFoundError,
    MaxTextLoadError,
    NotACheckpointError,
    StepNotFoundError,
    StorageError,
    UncommittedCheckpointError,
)

if TYPE_CHECKING:
    from vllm_maxtext_loader.checkpoint.find import ItemLocation

_MOST_STRANGE = 64
"""Directories without a checkpoint that are looked into, newest first, before a naming scheme is given up."""

_MOST_PER_PREFIX = 3
"""The same where several prefixes could be the run's."""

_NO_CHECKPOINT = (NotACheckpointError, CheckpointNotFoundError)
"""What a directory without a checkpoint raises; it may also be deleted while its neighbours are looked at."""


class Run:
    """The directory of a run's steps.

    Args:
        directory: where it is.
        names: what is in it.
        look: finds the item of a step's directory.

    Attributes:
        notes: what was passed over, with a level of `logging`.
        refused: why a directory is not a step that can be loaded.
    """

    def __init__(
        self, directory: Location, names: Sequence[str], look: Callable[[Location], ItemLocation]
    ) -> None:
        self.directory = directory
        self.notes: list[tuple[int, str]] = []
        self.refused: dict[str, MaxTextLoadError] = {}
        self._located: dict[str, ItemLocation] = {}
        self._look_into = look
        self._schemes = naming_schemes(names)

    def numbered(self, step: int | None) -> ItemLocation | None:
        """The step among the directories named by a number alone; None where none holds a checkpoint.

        Raises:
            StepNotFoundError: the wanted step is not there, or two directories have its number.
            UncommittedCheckpointError: the wanted step, or every step, was never committed.
            MaxTextLoadError: the step is damaged or cannot be read.
        """
        return self._of_scheme("", step) if "" in self._schemes else None

    def prefixed(self, step: int | None) -> ItemLocation | None:
        """The step among the directories that are named by a prefix and a number, as `numbered`.

        Raises:
            StepNotFoundError: directories with different prefixes hold checkpoints.
        """
        prefixes = [prefix for prefix in self._schemes if prefix]
        if len(prefixes) > 1:
            prefixes = [prefix for prefix in prefixes if self._hold(self._schemes[prefix], _MOST_PER_PREFIX)]
        if len(prefixes) > 1:
            newest = [self._schemes[prefix][max(self._schemes[prefix])][0] for prefix in prefixes]
            raise StepNotFoundError(
                f"{self.directory}: holds checkpoints under several names, newest of each: {some(newest)}. Which "
                f"of them are the run's steps is not recorded. Give the path of a step's directory, e.g. "
                f"{self.directory / newest[0]}."
            )
        return self._of_scheme(prefixes[0], step) if prefixes else None

    def _of_scheme(self, prefix: str, step: int | None) -> ItemLocation | None:
        steps = self._schemes[prefix]
        others = [
            name
            for other, named in self._schemes.items()
            if other != prefix
            for number in sorted(named)
            for name in named[number]
        ]
        located = self._newest(steps) if step is None else self._wanted(steps, step, others)
        strange = [name for name, error in self.refused.items() if isinstance(error, NotACheckpointError)]
        if located is not None and (passed := list(dict.fromkeys([*others, *strange]))):
            note = (
                f"{self.directory}: passed over {some(passed)}: not named as the steps are, or no checkpoint. "
                "To load one of them, give its path."
            )
            self.notes.append((logging.INFO, note))
        return located

    def _newest(self, steps: Steps) -> ItemLocation | None:
        """The newest committed step; None where no directory holds a checkpoint."""
        refused: list[MaxTextLoadError] = []
        for number in sorted(steps, reverse=True):
            found = self._one(number, steps[number])
            if not isinstance(found, MaxTextLoadError):
                if skipped := [str(error) for error in refused if not isinstance(error, NotACheckpointError)]:
                    note = f"Skipped newer steps of {self.directory}: {' '.join(skipped)}"
                    self.notes.append((logging.WARNING, note))
                return found
            refused.append(found)
            if len(refused) >= _MOST_STRANGE and all(isinstance(error, _NO_CHECKPOINT) for error in refused):
                return None
        if all(isinstance(error, _NO_CHECKPOINT) for error in refused):
            return None
        raise UncommittedCheckpointError(
            f"{self.directory}: no step is committed: {' '.join(map(str, refused))}"
        )

    def _wanted(self, steps: Steps, step: int, others: Sequence[str]) -> ItemLocation | None:
        """The wanted step; None where no directory holds a checkpoint."""
        found = self._one(step, steps[step]) if step in steps else None
        if isinstance(found, UncommittedCheckpointError):
            raise found
        if found is not None and not isinstance(found, MaxTextLoadError):
            return found
        if not self._hold(steps, _MOST_STRANGE):
            return None
        if found is not None:
            raise found
        named = [name for number in sorted(steps) for name in steps[number]]
        hint = f" Not named as the steps are: {some(others)}; to load one, give its path." if others else ""
        raise StepNotFoundError(f"{self.directory}: has no step {step}. Steps: {some(named)}.{hint}")

    def _one(self, number: int, names: Sequence[str]) -> ItemLocation | MaxTextLoadError:
        """The step of a number, or why it is skipped.

        Raises:
            StepNotFoundError: several directories of this number hold checkpoints.
            MaxTextLoadError: it is damaged or cannot be read.
        """
        if len(names) > 1 and len(holding := [name for name in names if self._holds(name)]) > 1:
            raise StepNotFoundError(
                f"{self.directory}: {' and '.join(holding)} are both step {number}. Give the path of the one to "
                f"load, e.g. {self.directory / holding[0]}."
            )
        found = [self._look(name) for name in names]
        best = next((each for each in found if not isinstance(each, _NO_CHECKPOINT)), found[0])
        if isinstance(best, MaxTextLoadError) and not isinstance(
            best, (*_NO_CHECKPOINT, UncommittedCheckpointError)
        ):
            raise best
        return best

    def _hold(self, steps: Steps, most: int) -> bool:
        """Whether one of the newest directories holds a checkpoint, committed or not."""
        newest = [name for number in sorted(steps, reverse=True) for name in steps[number]]
        return any(self._holds(name) for name in newest[:most])

    def _holds(self, name: str) -> bool:
        return not isinstance(self._look(name), _NO_CHECKPOINT)

    def _look(self, name: str) -> ItemLocation | MaxTextLoadError:
        """The item of a directory, or why there is none; each directory is looked into once."""
        if name not in self._located and name not in self.refused:
            try:
                self._located[name] = self._look_into(self.directory / name)
            except StorageError:
                raise
            except MaxTextLoadError as error:
                self.refused[name] = error
        return self._located.get(name) or self.refused[name]
