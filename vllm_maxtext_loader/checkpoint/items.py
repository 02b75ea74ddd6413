"""Which item of a step holds the model.

An item is a directory with a `_METADATA` file. Where a step holds one, it is taken. Where it holds several,
their tree metadata decides, not their names; `items` (MaxText) and `model_params` (Tunix) come first.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from vllm_maxtext_loader.checkpoint.names import (
    COMMIT_FILE,
    ITEM_NAMES,
    TMP_MARK,
    TREE_METADATA,
    WEIGHT_ITEMS,
    is_array_data,
    is_marked,
    some,
)
from vllm_maxtext_loader.checkpoint.storage.path import Location
from vllm_maxtext_loader.checkpoint.tree import holds_model
from vllm_maxtext_loader.errors import CorruptMetadataError, UnknownModelError

_MOST_ITEMS = 16
"""Items of a step that are looked into; each costs a request."""


@dataclasses.dataclass(frozen=True)
class Item:
    """A directory with tree metadata.

    Attributes:
        location: the directory.
        keys: names of the tree's leaves; None where the metadata was not read or is damaged.
    """

    location: Location
    keys: Sequence[tuple[str, ...]] | None = None


def candidates(names: Sequence[str]) -> list[str]:
    """Entries of a directory that may be items, in order of preference."""
    found = [name for name in ITEM_NAMES if name in names]
    # An item of another name is taken only from a directory that Orbax marked as a step.
    if is_marked(names):
        found += [
            name
            for name in names
            if name not in found
            and not name.startswith(("_", "."))
            and name not in (COMMIT_FILE, "orbax.checkpoint")
            and not is_array_data(name)
        ]
    found = [name for name in found if TMP_MARK not in name and name.isprintable()]
    return [name for name in found if "optimizer" not in name] or found


def find_items(directory: Location, names: Sequence[str]) -> list[Item]:
    """The items that `directory` is or, as a step, holds; one alone where it is MaxText's or Tunix's.

    A single candidate is looked up only. Where there are several, their tree metadata is read.
    """
    if TREE_METADATA in names:
        return [Item(directory)]
    possible = candidates(names)
    if len(possible) == 1:
        item = directory / possible[0]
        return [Item(item)] if (item / TREE_METADATA).is_file() else []
    found: list[Item] = []
    for name in possible[:_MOST_ITEMS]:
        try:
            raw = (directory / name / TREE_METADATA).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
        item = Item(directory / name, _keys(raw))
        if name in WEIGHT_ITEMS and (item.keys is None or holds_model(item.keys)):
            return [item]
        found.append(item)
    return found


def _keys(raw: bytes) -> list[tuple[str, ...]] | None:
    """Names of the leaves of a tree; None where its metadata is damaged: reading the tree says how."""
    try:
        entries = json.loads(raw)["tree_metadata"].values()
        keys = [tuple(str(part["key"]) for part in entry["key_metadata"]) for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return [key for key in keys if key]


def choose_item(directory: Location, found: Sequence[Item]) -> Location:
    """The item that holds the model.

    Args:
        directory: what holds the items.
        found: at least one.

    Raises:
        UnknownModelError: none of several holds a model, or more than one does.
        CorruptMetadataError: metadata of one of several items is damaged.
    """
    if len(found) == 1:
        return found[0].location
    if damaged := [item.location.name for item in found if item.keys is None]:
        raise CorruptMetadataError(
            f"{directory}: holds several items, and the {TREE_METADATA} of {some(damaged)} is damaged. Give the "
            f"path of the item that holds the model ({_paths(found)}), copy the checkpoint again, or choose "
            "another step."
        )
    models = [item for item in found if holds_model(item.keys or ())]
    if len(models) == 1:
        return models[0].location
    if models:
        named = some(item.location.name for item in models)
        raise UnknownModelError(
            f"{directory}: {len(models)} items hold a MaxText model ({named}). "
            f"Give the path of the one to load: {_paths(models)}."
        )
    inside = "; ".join(f"{item.location.name} (top-level keys: {_top(item)})" for item in found)
    raise UnknownModelError(
        f"{directory}: no item holds a MaxText model. Items: {inside}. If the model is in one of them, give its "
        f"path, e.g. {found[0].location}."
    )


def _paths(items: Sequence[Item]) -> str:
    return " or ".join(str(item.location) for item in items)


def _top(item: Item) -> str:
    return some(dict.fromkeys(key[0] for key in item.keys or ())) or "none"
