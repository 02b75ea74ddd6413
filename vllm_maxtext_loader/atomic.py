"""Output that is complete or absent: a file that gets its name when its content is on disk, and clean-up that ends."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from vllm_maxtext_loader.errors import MaxTextLoadError, OptionError, StorageError


def temporary_name(target: Path) -> Path:
    """A new hidden name in the target's directory."""
    return target.with_name(f".{target.name}.incomplete-{uuid.uuid4().hex[:8]}")


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[TextIO]:
    """A text file that replaces `path` when the block ends, and leaves `path` alone when the block raises.

    Args:
        path: local file; a symbolic link is followed.

    Raises:
        OptionError: the file cannot be made there. Raised before the block runs.
        StorageError: writing failed.
    """
    if "://" in os.fspath(path):
        raise OptionError(f"{path}: must be a local file; copy it to the bucket afterwards.")
    target = Path(os.path.realpath(os.path.expanduser(path)))
    if target.exists() and not target.is_file():
        raise OptionError(f"{path}: exists and is not a regular file; nothing is overwritten.")
    if target.exists() and not os.access(target, os.W_OK):
        raise OptionError(f"{path}: cannot be written: the file is read-only.")
    temporary = temporary_name(target)
    try:
        stream = temporary.open("x", encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{path}: cannot be written: {error.strerror or error}.") from error
    try:
        with stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
        sync(target.parent)
    except MaxTextLoadError:
        raise
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}.") from error
    finally:
        with uninterrupted():
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file or a directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignores SIGINT, SIGTERM and SIGHUP: a second Ctrl-C does not end a clean-up half-way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: the handler was not installed from Python, and cannot be put back from Python.
            if handler is not None:
                signal.signal(number, handler)
