"""Whether a checkpoint was committed, and what a directory without tree metadata is.

When a checkpoint counts as committed (orbax-checkpoint 0.12.8 `_src/path/atomicity.py`): in a bucket, it
holds `commit_success.txt`; on a disk, it has been renamed from its `….orbax-checkpoint-tmp…` name, or holds
the file where the writer was set to commit so. Just before, its `_CHECKPOINT_METADATA` has received the
commit time; a step that has none is refused, wherever it is. The mark belongs to the directory Orbax was
called to save to: the step or, where a writer saved a single tree (MaxText's parameter-only checkpoints),
the item.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import NoReturn

from vllm_maxtext_loader.checkpoint.items import candidates
from vllm_maxtext_loader.checkpoint.names import (
    COMMIT_FILE,
    STEP_METADATA,
    TMP_MARK,
    TREE_METADATA,
    holds_arrays,
    is_marked,
    some,
)
from vllm_maxtext_loader.checkpoint.storage.path import Location
from vllm_maxtext_loader.checkpoint.substitutes import describe_substitute
from vllm_maxtext_loader.errors import (
    CorruptMetadataError,
    NotACheckpointError,
    OldLayoutError,
    UncommittedCheckpointError,
)

_ADVICE = (
    "The writer is still at work or died: wait for it, or choose another step "
    "(--step N, or --model-loader-extra-config '{\"step\": N}')."
)
_COPY_AGAIN = "Copy the checkpoint again, or choose another step."
_MOST_LOOKED_INTO = 4
"""Items of a step that are listed to say why it cannot be loaded."""

_LEAF = re.compile(r"\w+(?:\.\w+){2,}(?<!\.json)(?<!\.safetensors)")
"""A directory named by a leaf, "params.decoder.decoder_norm.scale"."""


def refuse_temporary(location: Location) -> None:
    """Refuses a path through a directory that Orbax has not renamed yet.

    Raises:
        UncommittedCheckpointError: the path has such a part.
    """
    for part in location.url.split("/"):
        if TMP_MARK in part:
            raise UncommittedCheckpointError(
                f"{location}: {part} is a temporary directory: its writer has not finished, or died. Wait "
                "for it, or choose another step."
            )


def check_committed(
    listed: Location, names: Sequence[str], items: Location
) -> tuple[Location, dict[str, object]]:
    """Checks the marks of a finished write.

    Args:
        listed: the item or the step that holds it.
        names: what is in `listed`.
        items: the item.

    Returns:
        The directory that bears the marks, and its metadata.

    Raises:
        UncommittedCheckpointError: it was never committed.
        CorruptMetadataError: its metadata is damaged.
    """
    refuse_temporary(items)
    saved, committed = listed, COMMIT_FILE in names
    raw = None
    if STEP_METADATA in names:
        raw = _read(saved / STEP_METADATA)
    elif listed == items:
        # The item was named directly. What lies above is its step only if Orbax marked it so.
        parent = items.parent
        if parent is not None and (raw := _read(parent / STEP_METADATA)) is not None:
            saved, committed = parent, (parent / COMMIT_FILE).is_file()
    elif not committed and (raw := _read(items / STEP_METADATA)) is not None:
        # The item was saved on its own, into a directory that only looks like a step.
        saved, committed = items, (items / COMMIT_FILE).is_file()
    if not committed and (items.is_remote or (saved != items and (items / COMMIT_FILE).is_file())):
        # Orbax writes the file into the item first and into the step last: on a disk, the second case is a
        # copy of a bucket's step that was not finished, or a mounted bucket.
        raise UncommittedCheckpointError(
            f"{saved}: {COMMIT_FILE} is missing: never committed. {_ADVICE} If it was copied here from a "
            f"disk, where a commit is a rename, put an empty {COMMIT_FILE} into it."
        )
    metadata = {} if raw is None else _parse(saved / STEP_METADATA, raw)
    if "commit_timestamp_nsecs" in metadata and metadata["commit_timestamp_nsecs"] is None:
        raise UncommittedCheckpointError(
            f"{saved}: {STEP_METADATA} has no commit time: never committed. {_ADVICE}"
        )
    return saved, metadata


def refuse_without_tree(listed: Location, names: Sequence[str]) -> NoReturn:
    """Raises what a step without a readable item, or an item without tree metadata, is.

    Args:
        listed: the step or the item.
        names: what is in it.

    Raises:
        UncommittedCheckpointError: its writer has not finished.
        CorruptMetadataError: Orbax committed it, and the tree metadata was lost.
        OldLayoutError: an old Orbax wrote it.
        NotACheckpointError: another program wrote it.
    """
    itself = holds_arrays(names)
    saved, marks = listed, names
    if itself and listed.parent is not None:
        # Orbax also marks the items of a step, before the step.
        above = _names(listed.parent)
        if is_marked(above):
            saved, marks = listed.parent, above
    inside = {listed: names}
    # In a bucket, a missing commit file says enough.
    if not itself and not (listed.is_remote and STEP_METADATA in names):
        inside |= {listed / name: _names(listed / name) for name in candidates(names)[:_MOST_LOOKED_INTO]}
    if STEP_METADATA not in marks:
        for directory, entries in inside.items():
            _refuse_old_layout(directory, entries)
    if any(TMP_MARK in name for name in names):
        raise UncommittedCheckpointError(
            f"{listed}: holds no finished item: never committed. Found: {some(names)}. {_ADVICE}"
        )
    if _was_committed(saved, marks):
        what = f"{listed.name} has no" if itself else "no item in it has a"
        raise CorruptMetadataError(
            f"{saved}: Orbax finished it, but {what} {TREE_METADATA}. Found: {some(names)}. {_COPY_AGAIN}"
        )
    arrays = [directory for directory, entries in inside.items() if holds_arrays(entries)]
    if not arrays and STEP_METADATA not in names:
        raise NotACheckpointError(f"{listed}: holds no item with a {TREE_METADATA}. Found: {some(names)}.")
    lacks = [f"{directory} has arrays but no {TREE_METADATA}" for directory in arrays]
    if STEP_METADATA in marks:
        lacks.append(
            f"{COMMIT_FILE} is missing" if saved.is_remote else f"{STEP_METADATA} has no commit time"
        )
    advice = _ADVICE if STEP_METADATA in marks else f"{_ADVICE} If it is a copy, copy it again."
    raise UncommittedCheckpointError(
        f"{saved}: holds no finished item: never committed ({', and '.join(lacks)}). Found: {some(names)}. "
        f"{advice}"
    )


def _was_committed(directory: Location, names: Sequence[str]) -> bool:
    """Whether Orbax's marks say so; where its metadata is damaged as well, nothing does."""
    if COMMIT_FILE in names:
        return True
    if directory.is_remote or STEP_METADATA not in names:
        return False
    try:
        metadata = _parse(directory / STEP_METADATA, _read(directory / STEP_METADATA) or b"")
    except CorruptMetadataError:
        return False
    return metadata.get("commit_timestamp_nsecs") is not None


def _refuse_old_layout(directory: Location, names: Sequence[str]) -> None:
    """Refuses an item of an Orbax without tree metadata: its msgpack file, or a zarr array by leaf name.

    Raises:
        OldLayoutError: it is one.
    """
    if TREE_METADATA in names:
        return
    leaves = [name for name in names if _LEAF.fullmatch(name)]
    # TensorFlow has a file of this name next to its index.
    is_tensorflow = any(name.endswith(".index") for name in names)
    expected = [f"{name}/.zarray" for name in leaves[:1]]
    if "checkpoint" in names and not is_tensorflow and (leaves or holds_arrays(names) or len(names) == 1):
        expected.insert(0, "checkpoint")
    for found in expected:
        if (directory / found).is_file():
            raise OldLayoutError(
                f"{directory}: has {found} but no {TREE_METADATA}: it was written by an Orbax of 2023 or before, "
                "which recorded no tree metadata. Re-save it: restore it with the Orbax and MaxText that wrote "
                "it, and save it with a current Orbax."
            )


def _names(directory: Location) -> list[str]:
    """What is in a directory; nothing where there is none."""
    try:
        return directory.listdir()
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read(location: Location) -> bytes | None:
    """The file's content, None where there is none."""
    try:
        return location.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _parse(location: Location, raw: bytes) -> dict[str, object]:
    try:
        parsed = json.loads(raw)
    except (ValueError, RecursionError) as error:
        if found := describe_substitute(raw, is_json=True):
            raise CorruptMetadataError(f"{location}: is not valid JSON: it {found}") from error
        raise CorruptMetadataError(f"{location}: is not valid JSON ({error}). {_COPY_AGAIN}") from error
    if not isinstance(parsed, dict):
        raise CorruptMetadataError(f"{location}: is not a JSON object, found {type(parsed).__name__}.")
    return parsed
