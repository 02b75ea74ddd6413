"""Keeps servers on the newest committed step of a run, while training goes on.

Each round lists the run once. Each server is asked each time what it answers with: it may have been
restarted, or given a step by hand.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Iterator, Sequence

from vllm_maxtext_loader.checkpoint.find import ItemLocation, locate
from vllm_maxtext_loader.checkpoint.names import (
    RUN_CHECKPOINTS,
    STEP_NAME,
    TREE_METADATA,
    Steps,
    is_marked,
    naming_schemes,
    some,
)
from vllm_maxtext_loader.checkpoint.storage.path import Location
from vllm_maxtext_loader.errors import (
    CheckpointNotFoundError,
    EngineError,
    MaxTextLoadError,
    NotACheckpointError,
    OptionError,
    StepNotFoundError,
    StorageError,
    UncommittedCheckpointError,
)
from vllm_maxtext_loader.tools.reload import Reloaded, close_update, reload, resume, version_of
from vllm_maxtext_loader.tools.server import InFlight, Server, Serving

_ATTEMPTS = 2
"""A step that failed as often is set aside."""

_PAUSED_SECONDS = 30.0
"""A server that is found paused, and still is after this time, was left so by a client that was killed."""

_TORN = (
    "a swap failed halfway; the weights are of two steps, and the engine refuses to answer. The next step, or the "
    "same one, takes their place; else restart the server."
)

_NOT_YET = (UncommittedCheckpointError, NotACheckpointError, CheckpointNotFoundError, StepNotFoundError)
"""What is raised for a step that is not committed yet, or was deleted meanwhile."""


@dataclasses.dataclass(frozen=True)
class Notice:
    """What a person should know.

    Attributes:
        message: a sentence or two; names the server or the run.
        problem: whether something did not work.
    """

    message: str
    problem: bool = False


def follow(
    run: str,
    servers: Sequence[Server],
    *,
    every: float = 30.0,
    in_flight: InFlight = "wait",
    first: int | None = None,
) -> Iterator[Notice | Reloaded]:
    """Brings each newer committed step of a run into servers, one server after the other. Never ends.

    Of several new steps the newest is taken, and none older than what a server has. A step that fails twice
    on a server is set aside there until its directory is gone.

    Args:
        run: a run's checkpoint directory.
        servers: to bring them into.
        every: seconds between two looks.
        in_flight: what happens to requests in flight.
        first: the first step to take; None means any newer one.

    Yields:
        What happened. A state that lasts is said once.

    Raises:
        CheckpointNotFoundError: `run` is no path.
        OptionError: `run` is one step.
        EngineError: a server, when it first answers, takes no new weights as it was started.
    """
    watched = _Run(Location.parse(run))
    followers = [_Follower(server, in_flight, first) for server in servers]
    said = ""
    while True:
        problem = ""
        try:
            watched.look()
        except OptionError:
            raise
        except MaxTextLoadError as error:
            problem = str(error)
        if problem and problem != said:
            yield Notice(f"No step to take: {problem}", problem=True)
        said = problem
        for follower in followers:
            yield from follower.advance(watched)
        time.sleep(every)


class _Run:
    """The steps of a run, as of the last look.

    Args:
        requested: what the user named: the directory of the steps, or the one above.

    Attributes:
        steps: directory names by number; empty where there is no step, or the run could not be listed.
    """

    def __init__(self, requested: Location) -> None:
        self.requested = requested
        self.steps: Steps = {}
        self._directory = requested
        self._numbered: Location | None = None
        self._prefix = ""
        self._found: dict[int, ItemLocation | MaxTextLoadError] = {}

    def look(self) -> None:
        """Lists the run: one listing, of a directory above the steps once two.

        Raises:
            OptionError: it is one step.
            MaxTextLoadError: there is no step yet, or it cannot be listed.
        """
        self.steps, self._found = {}, {}
        directory = self._numbered or self.requested
        names = _list(directory)
        if TREE_METADATA in names or is_marked(names):
            raise OptionError(
                f"{directory}: is one checkpoint; no newer step will appear in it. Give the run's directory"
                + (f", e.g. {directory.parent}." if directory.parent else ".")
            )
        schemes = naming_schemes(names)
        # As in `find`: numbers, then the directory where MaxText keeps them, then names with a prefix.
        if "" not in schemes and RUN_CHECKPOINTS in names:
            directory = directory / RUN_CHECKPOINTS
            schemes = naming_schemes(names := _list(directory))
        if not schemes:
            raise NotACheckpointError(f"{directory}: has no numbered step yet. Found: {some(names)}.")
        if "" in schemes:
            self._prefix, self._numbered = "", directory
        elif self._prefix not in schemes:
            self._prefix = next(iter(schemes)) if len(schemes) == 1 else _prefix(directory)
        self._directory = directory
        self.steps = schemes[self._prefix]

    def step(self, number: int) -> ItemLocation | None:
        """A step; None where it is not committed, or gone. Each is looked into once per look.

        Raises:
            MaxTextLoadError: the step is damaged, or cannot be read.
        """
        if number not in self._found:
            try:
                self._found[number] = locate(self._directory.url, number)
            except MaxTextLoadError as error:
                self._found[number] = error
        found = self._found[number]
        # Of one number there may be two directories, which a person has to look into.
        if isinstance(found, _NOT_YET) and len(self.steps[number]) == 1:
            return None
        if isinstance(found, MaxTextLoadError):
            raise found
        return found

    def __contains__(self, items: str) -> bool:
        return items.startswith(f"{self.requested.url}/")


def _list(directory: Location) -> list[str]:
    try:
        return directory.listdir()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFoundError(f"{directory}: no such directory.") from error


def _prefix(directory: Location) -> str:
    """The prefix of the steps' names, where directories have several.

    Raises:
        StepNotFoundError: several could be the run's.
    """
    step = locate(directory.url).step_directory
    match = step and STEP_NAME.fullmatch(step.name)
    return (match and match["prefix"]) or ""


class _Follower:
    """One server, and what is known of it.

    Args:
        server: the server.
        in_flight: what happens to its requests in flight.
        first: the first step to take; None means any newer one.
    """

    def __init__(self, server: Server, in_flight: InFlight, first: int | None) -> None:
        self._server = server
        self._in_flight: InFlight = in_flight
        self._first = first
        self._failures: collections.Counter[int] = collections.Counter()
        self._said = ""
        self._met = self._answers = False
        self._paused_since: float | None = None

    def advance(self, run: _Run) -> Iterator[Notice | Reloaded]:
        """Brings the newest step that the server can take into it, where that is newer than what it has.

        Raises:
            EngineError: the server, when it first answers, takes no new weights as it was started.
        """
        try:
            serving = self._server.serving()
            if not self._answers:
                yield from self._greet(run, serving)
            if self._paused_since is not None:
                yield from self._resume_abandoned(serving)
            if self._paused_since is not None:
                return
            if serving.torn:
                yield from self._say_once(f"{self._server.name}: {_TORN}")
        except MaxTextLoadError as error:
            if isinstance(error, EngineError) and not self._met:
                raise
            self._answers = False
            yield from self._say_once(str(error))
            return
        if run.steps:
            self._failures = collections.Counter(
                {step: n for step, n in self._failures.items() if step in run.steps}
            )
        yield from self._take_newest(run, serving)

    def _say_once(self, problem: str) -> Iterator[Notice]:
        if problem != self._said:
            yield Notice(problem, problem=True)
        self._said = problem

    def _greet(self, run: _Run, serving: Serving) -> Iterator[Notice]:
        """Says what the server answers with, at the first contact and when it is back."""
        elsewhere = (
            "" if serving.items in run else f", which is not of {run.requested}: only newer numbers are taken"
        )
        yield Notice(f"{self._server.name}: serves {_title(serving.step)}, {serving.items}{elsewhere}.")
        if not self._met and self._server.is_paused():
            self._paused_since = time.monotonic()
            yield Notice(
                f"{self._server.name}: is paused. If nobody resumes it within {_PAUSED_SECONDS:g} s, "
                "a client was killed in the middle of an update, and it is resumed here.",
                problem=True,
            )
        self._met = self._answers = True
        self._said = ""

    def _resume_abandoned(self, serving: Serving) -> Iterator[Notice]:
        """Resumes a server that was found paused, once that lasts."""
        assert self._paused_since is not None
        if self._server.is_paused():
            if time.monotonic() - self._paused_since < _PAUSED_SECONDS:
                return
            close_update(self._server, serving.items, version_of(serving.items, serving.step))
            resume(self._server)
            yield Notice(f"{self._server.name}: was left paused; resumed.")
        self._paused_since = None

    def _take_newest(self, run: _Run, serving: Serving) -> Iterator[Notice | Reloaded]:
        least = max(-1 if serving.step is None else serving.step - serving.torn, (self._first or 0) - 1)
        for number in sorted(run.steps, reverse=True):
            if number <= least:
                return
            if self._failures[number] >= _ATTEMPTS:
                continue
            try:
                target = run.step(number)
                if target is None:
                    continue
                if serving.torn or target.items.url != serving.items:
                    yield reload(self._server, target, in_flight=self._in_flight)
                    self._said = ""
            except StorageError as error:
                # The bucket's fault, not the step's.
                yield from self._say_once(str(error))
            except MaxTextLoadError as error:
                self._failures[number] += 1
                again = self._failures[number] < _ATTEMPTS
                what = "is tried once more" if again else f"is set aside after {_ATTEMPTS} failures"
                yield Notice(f"{self._server.name}: step {number} {what}. {error}", problem=True)
            return


def _title(step: int | None) -> str:
    return "a checkpoint without a step" if step is None else f"step {step}"
