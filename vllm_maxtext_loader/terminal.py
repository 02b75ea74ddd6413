"""What the commands share at the terminal: exit codes, errors as one message, progress, and where output goes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import typer

from vllm_maxtext_loader.errors import MaxTextLoadError

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_maxtext_loader.checkpoint.reader import Piece

DIFFERENT, UNUSABLE, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141
"""Exit codes beside 0; the last two are what a shell reports for SIGINT and SIGPIPE."""

_PIPED_WIDTH = 200
"""Columns of a table that goes to a file or a pipe."""

_SHOW_PROGRESS_AFTER = 2.0
"""Seconds."""


@contextlib.contextmanager
def tidy() -> Iterator[None]:
    """Errors as one message, no traceback, and the exit code that was promised."""
    try:
        yield
        sys.stdout.flush()
    except MaxTextLoadError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(UNUSABLE) from error
    except BrokenPipeError as error:
        # `| head` has seen enough. Python would complain once more when it flushes stdout at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(BROKEN_PIPE) from error
    except KeyboardInterrupt as error:
        typer.echo("interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from error


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """A preempted machine says SIGTERM first: time enough to remove what is half written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(*_: object) -> None:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def console() -> Console:
    """A console on stdout; a closed pipe is an error `tidy` knows."""
    from rich.console import Console

    class Piped(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    # In a file or a pipe there is no edge to fold names at, unless someone says so.
    terminal = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Piped(highlight=False, emoji=False, markup=False, width=None if terminal else _PIPED_WIDTH)


def print_json(content: dict[str, Any]) -> None:
    """One object on stdout; a NaN, which is no JSON, is refused."""
    sys.stdout.write(json.dumps(content, indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[Piece], None]]:
    """A bar on stderr for what takes longer than two seconds; none where stderr is no terminal."""
    from tqdm import tqdm

    with tqdm(
        total=total,
        desc=what,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        delay=_SHOW_PROGRESS_AFTER,
        disable=None,
        leave=False,
        file=sys.stderr,
    ) as bar:

        def on_piece(piece: Piece) -> None:
            bar.update(piece.array.nbytes)

        yield on_piece
