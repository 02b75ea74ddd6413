"""A tokenizer given as a path or a gs:// URL: is there one, and where will it be on this machine?

vLLM mirrors everything below a gs:// URL but *.safetensors and the like. Where that is a run, or lies next to one, it
would copy every step and its optimizer state. Only the tokenizer's own files are copied here.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
from pathlib import Path

from vllm_maxtext_loader.atomic import temporary_name
from vllm_maxtext_loader.checkpoint.find import ItemLocation, locate
from vllm_maxtext_loader.checkpoint.storage.path import Location
from vllm_maxtext_loader.engine.probe import no_tokenizer
from vllm_maxtext_loader.errors import (
    CheckpointNotFoundError,
    EngineError,
    MaxTextLoadError,
    NotACheckpointError,
    StorageError,
)

TOKENIZER_FILES = (
    "tokenizer.*",
    "tokenizer_config.json",
    "tekken.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "*.model",
)
"""A directory with one of these holds a tokenizer."""

COPIED_FILES = (*TOKENIZER_FILES, "*.json", "*.jinja", "*.txt", "*.py")
"""What is copied of a tokenizer in a bucket: files directly below the URL."""


def local_tokenizer(tokenizer: str, checkpoint: ItemLocation, cache: str) -> str:
    """The tokenizer's directory on this machine.

    Args:
        tokenizer: path or gs:// URL.
        checkpoint: the checkpoint that will be served.
        cache: directory below which a tokenizer from a bucket is stored.

    Raises:
        EngineError: it is a checkpoint (or a part of one), or a URL at which there is no tokenizer.
        StorageError: it cannot be listed or read.
    """
    try:
        place = Location.parse(tokenizer)
        names = place.listdir()
    except NotADirectoryError:
        return tokenizer
    except (FileNotFoundError, CheckpointNotFoundError) as error:
        raise EngineError(f"--tokenizer {tokenizer}: there is no such directory. Check the path.") from error
    if not _matching(names, TOKENIZER_FILES):
        if _is_inside(place, checkpoint.items) or _is_checkpoint(place):
            raise no_tokenizer(str(place))
        if place.is_remote:
            raise EngineError(
                f"--tokenizer {place}: holds no tokenizer (none of {', '.join(TOKENIZER_FILES)}). It holds: "
                f"{', '.join(names[:8])}{', …' if len(names) > 8 else ''}."
            )
    return _copy(place, _matching(names, COPIED_FILES), Path(cache)) if place.is_remote else place.url


def refuse_checkpoint_as_draft(draft: str) -> None:
    """Refuses a draft model whose weights are a MaxText checkpoint.

    Raises:
        EngineError: it is one, committed or not.
        StorageError: it cannot be listed.
    """
    if _is_checkpoint(place := Location.parse(draft)):
        raise EngineError(
            f"--speculative-config (draft {place}): is a checkpoint that Orbax wrote; a draft model cannot be loaded from one "
            f"yet. Name a draft in Hugging Face format, or use a method without weights (ngram)."
        )


def _matching(names: list[str], patterns: tuple[str, ...]) -> list[str]:
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def _is_inside(place: Location, items: Location) -> bool:
    """Whether `place` is the item directory, or below it."""
    inner, outer = (
        location.url if location.is_remote else os.path.realpath(location.url) for location in (place, items)
    )
    return f"{inner}/".startswith(f"{outer}/")


def _is_checkpoint(place: Location) -> bool:
    """Whether Orbax wrote what is here, committed or not."""
    try:
        locate(place.url)
    except (CheckpointNotFoundError, NotACheckpointError):
        return False
    except StorageError:
        raise
    except MaxTextLoadError:
        return True
    return True


def _copy(place: Location, names: list[str], cache: Path) -> str:
    """Copies files of a bucket's "directory" to one below `cache` and returns its path."""
    directory = cache / hashlib.sha256(place.url.encode()).hexdigest()[:16]
    for file in directory.glob("*"):
        if file.name not in names:
            file.unlink(missing_ok=True)  # It has been deleted in the bucket since.
    for name in names:
        try:
            content = (place / name).read_bytes()
        except FileNotFoundError:
            continue  # A "directory" of that name, or deleted meanwhile.
        target = directory / name
        try:
            directory.mkdir(parents=True, exist_ok=True)
            temporary = temporary_name(target)
            temporary.write_bytes(content)
            os.replace(temporary, target)
        except OSError as error:
            raise EngineError(
                f"{target}: the tokenizer of {place} cannot be stored here ({error}). Set VLLM_CACHE_ROOT to a directory "
                f"that this user may write to."
            ) from error
    return str(directory)
