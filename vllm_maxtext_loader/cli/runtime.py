"""What the commands share at the terminal: exit codes, errors as one message, progress, and where output goes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import typer

from vllm_maxtext_loader.checkpoint.storage.retry import summarize
from vllm_maxtext_loader.errors import MaxTextLoadError

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_maxtext_loader.checkpoint.reader import DecodedRegion

DIFFERENT, UNUSABLE, INTERNAL, INTERRUPTED, BROKEN_PIPE = 1, 2, 70, 130, 141
"""Non-zero exit codes. 70 is EX_SOFTWARE of sysexits.h; a shell reports the last two for SIGINT and SIGPIPE."""

DEBUG_VARIABLE = "VLLM_MAXTEXT_DEBUG"
"""Environment variable: 1 prints the traceback of an error to stderr."""

_PIPED_WIDTH = 200
"""Columns of a table that goes to a file or a pipe."""

_SHOW_PROGRESS_AFTER = 2.0
"""Seconds."""


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Errors as one message, no traceback, and the exit code that was promised."""
    try:
        yield
        sys.stdout.flush()
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except MaxTextLoadError as error:
        _print_traceback()
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(UNUSABLE) from error
    except BrokenPipeError as error:
        # `| head` has seen enough.
        _discard_stdout()
        raise typer.Exit(BROKEN_PIPE) from error
    except KeyboardInterrupt as error:
        typer.echo("interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from error
    except Exception as error:
        _print_traceback()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            _discard_stdout()
            typer.echo(f"error: the output cannot be written: {error.strerror}.", err=True)
            raise typer.Exit(UNUSABLE) from error
        typer.echo(
            f"internal error: {type(error).__name__}: {summarize(str(error), 300)}. This is a fault of "
            f"vllm-maxtext-loader, not of your input. Please report it with the traceback, which "
            f"{DEBUG_VARIABLE}=1 prints.",
            err=True,
        )
        raise typer.Exit(INTERNAL) from error


def _print_traceback() -> None:
    """Prints the traceback of the error that is being handled, where the user asked for it."""
    if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
        traceback.print_exc()


def _discard_stdout() -> None:
    """Keeps Python from complaining once more when it flushes stdout at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Raises SystemExit on SIGTERM (preemption) and SIGHUP (lost connection), so that clean-up runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: object) -> None:
        sys.exit(128 + number)

    # nohup has SIGHUP ignored: that stays.
    numbers = [
        number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN
    ]
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def console() -> Console:
    """A console on stdout; a closed pipe is an error `exit_codes` knows."""
    from rich.console import Console

    class Piped(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    # In a file or a pipe there is no edge to fold names at, unless someone says so.
    terminal = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Piped(highlight=False, emoji=False, markup=False, width=None if terminal else _PIPED_WIDTH)


def print_json(content: dict[str, Any] | list[Any]) -> None:
    """One object, or one list, on stdout; a NaN, which is no JSON, is refused."""
    sys.stdout.write(json.dumps(content, indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[DecodedRegion], None]]:
    """A bar on stderr for what takes longer than two seconds; none where stderr is not a terminal."""
    from vllm_maxtext_loader.progress import byte_bar

    with byte_bar(total, what, delay=_SHOW_PROGRESS_AFTER, leave=False) as bar:

        def on_region(decoded: DecodedRegion) -> None:
            bar.update(decoded.array.nbytes)

        yield on_region


@contextlib.contextmanager
def byte_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Like `progress`, for what tells how many bytes of how many are done."""
    from vllm_maxtext_loader.progress import byte_bar

    with byte_bar(0, what, delay=_SHOW_PROGRESS_AFTER, leave=False) as bar:

        def on_progress(done: int, total: int) -> None:
            bar.total = max(done, total)
            bar.update(done - bar.n)

        yield on_progress
