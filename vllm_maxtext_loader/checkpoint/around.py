"""What is near a path that is not a checkpoint: an error names what was meant. Nothing here fails."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from vllm_maxtext_loader.checkpoint.names import TMP_MARK, TREE_METADATA, some
from vllm_maxtext_loader.checkpoint.storage.path import Location
from vllm_maxtext_loader.errors import MaxTextLoadError

if TYPE_CHECKING:
    from vllm_maxtext_loader.checkpoint.find import ItemLocation

_MOST_LOOKED_INTO = 24
"""Directories of one level that are looked into; each costs a few requests."""

_MOST_ON_SECOND_LEVEL = 8
"""The same for each of so many directories, one level further down."""


def siblings(location: Location, most: int = 8) -> list[str]:
    """Names next to a path."""
    try:
        return location.parent.listdir(most=most) if location.parent is not None else []
    except (OSError, MaxTextLoadError):
        return []


def surrounding_item(location: Location) -> Location | None:
    """The item that a path is a part of, one or two levels above it."""
    outer = location.parent
    for _ in range(2):
        if outer is None:
            break
        try:
            if (outer / TREE_METADATA).is_file():
                return outer
        except (OSError, MaxTextLoadError):
            break
        outer = outer.parent
    return None


def describe_below(
    directory: Location, names: Sequence[str], find: Callable[[Location], ItemLocation | None]
) -> str:
    """A sentence on what would load one level below a directory, or else two levels; "" where nothing would.

    Args:
        directory: what was named.
        names: what is in it.
        find: finds the item that a path means.
    """

    def look(path: str) -> str | None:
        try:
            located = find(directory / path)
        except (OSError, MaxTextLoadError):
            return None
        if located is None:
            return None
        return path if located.step is None else f"{path} (step {located.step})"

    def inside(name: str) -> list[str]:
        try:
            deeper = (directory / name).listdir(most=_MOST_ON_SECOND_LEVEL)
        except (OSError, MaxTextLoadError):
            return []
        return [f"{name}/{entry}" for entry in _directories(directory / name, deeper)]

    first = _directories(directory, names)[:_MOST_LOOKED_INTO]
    with ThreadPoolExecutor(_MOST_ON_SECOND_LEVEL) as pool:
        found = [path for path in pool.map(look, first) if path]
        if not found:
            second = [path for paths in pool.map(inside, first[:_MOST_ON_SECOND_LEVEL]) for path in paths]
            found = [path for path in pool.map(look, second) if path]
    if not found:
        return ""
    example = directory / found[0].partition(" (step")[0]
    return f" Below it would load: {some(found)}. Give the path, e.g. {example}."


def _directories(directory: Location, names: Sequence[str]) -> list[str]:
    """Names that may be directories a user means; in a bucket a listing does not tell files from them."""
    return [
        name
        for name in names
        if not name.startswith((".", "_"))
        and TMP_MARK not in name
        and name.isprintable()
        and (directory.is_remote or os.path.isdir((directory / name).url))
    ]
