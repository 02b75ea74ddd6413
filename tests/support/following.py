"""Steps that appear in a run as a writer makes them, and `vllm-maxtext follow` while that happens."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from support.checkpoints import FIXTURES
from support.damage import CASE, Place
from vllm_maxtext_loader.checkpoint.names import STEP_METADATA, TMP_MARK
from vllm_maxtext_loader.cli.app import app
from vllm_maxtext_loader.tools import reload as reload_module


def vllm_maxtext(*arguments: object) -> Result:
    """Runs the command in this process, in the main thread."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def quicken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a reload ask and wait for fractions of what a real server takes."""
    monkeypatch.setattr(reload_module, "_ASK_SECONDS", 0.01)
    monkeypatch.setattr(reload_module, "_SETTLE_SECONDS", 0.2)


def one_step(directory: Path) -> Place:
    """A run with step 0."""
    place = Place(directory, None)
    write(place, 0)
    return place


def items(place: Place, step: int | str) -> str:
    """The item of a step."""
    return str(place.root / "run" / str(step) / "items")


def write(place: Place, step: int | str, parent: str = "run", source: str = CASE) -> Path:
    """Adds a step as Orbax does on a disk: under another name until it is complete."""
    return _temporary(place.root / parent / str(step), source).rename(place.root / parent / str(step))


def write_uncommitted(place: Place, step: int) -> Path:
    """Adds a step whose writer has everything done but to commit it."""
    path = place.root / "run" / str(step)
    temporary = _temporary(path, CASE)
    _set_commit_time(temporary, None)
    return temporary.rename(path)


def commit(step: Path) -> None:
    """Commits what `write_uncommitted` wrote."""
    _set_commit_time(step, 1)


def _temporary(target: Path, source: str) -> Path:
    return Path(
        shutil.copytree(FIXTURES / source / "checkpoints/0", target.with_name(f"{target.name}{TMP_MARK}-0"))
    )


def _set_commit_time(step: Path, nanoseconds: int | None) -> None:
    metadata = json.loads((step / STEP_METADATA).read_text())
    new = step / f"{STEP_METADATA}.new"
    new.write_text(json.dumps(metadata | {"commit_timestamp_nsecs": nanoseconds}))
    new.rename(step / STEP_METADATA)


def follow(
    run: str | Path,
    urls: Sequence[str],
    *script: Callable[[], object],
    options: Sequence[str] = (),
    most: float = 20,
) -> Result:
    """Runs `vllm-maxtext follow` until a script is over, and ends it by SIGTERM.

    Args:
        run: the run.
        urls: the servers.
        script: called one after the other meanwhile, each again while it returns False.
        options: of the command.
        most: seconds that the script may take.
    """
    late: list[int] = []

    def play() -> None:
        deadline = time.monotonic() + most
        try:
            for number, act in enumerate(script):
                while act() is False:
                    if time.monotonic() > deadline:
                        late.append(number)
                        return
                    time.sleep(0.02)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    player = threading.Thread(target=play)
    # For a command that ended by itself.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    player.start()
    try:
        result = vllm_maxtext("follow", run, *(part for url in urls for part in ("--url", url)), *options)
    finally:
        player.join()
        signal.signal(signal.SIGTERM, before)
    assert not late, (f"did not happen: {late}", result.output)
    assert result.exit_code == 0, (result.output, result.exception)
    return result
