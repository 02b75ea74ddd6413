"""Writes an export's files to a disk: mapped into memory, in a temporary directory.

Files are made at full size. Each region that is read is then written straight to its place, so memory holds the regions
in flight, and pages that the kernel writes back as it likes. What is complete gets its name by a rename.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vllm_maxtext_loader.api import Checkpoint
from vllm_maxtext_loader.atomic import sync, temporary_name, uninterrupted
from vllm_maxtext_loader.checkpoint.reader import DecodedRegion, read_regions
from vllm_maxtext_loader.conversion.convert import convert
from vllm_maxtext_loader.conversion.plan import Plan
from vllm_maxtext_loader.errors import HuggingFaceDirectoryError, IncompleteLoadError, MaxTextLoadError
from vllm_maxtext_loader.huggingface.safetensors_files import create_file
from vllm_maxtext_loader.tools.export_layout import TEMPORARY_PREFIX, OutputFile
from vllm_maxtext_loader.tools.leaf_groups import is_needed, read_nbytes, restrict


@dataclasses.dataclass(frozen=True)
class Writing:
    """What is read, and which files are made of it.

    Attributes:
        checkpoint: what is read.
        plan: of all its tensors.
        files: what is written.
        dtype: of all tensors; None means each one's own.
        memory_bytes, on_region, on_progress: see `export`.
    """

    checkpoint: Checkpoint
    plan: Plan
    files: Sequence[OutputFile]
    dtype: np.dtype | None
    memory_bytes: int | None
    on_region: Callable[[DecodedRegion], None] | None
    on_progress: Callable[[int, int], None] | None


def write_directory(write: Writing, target: Path, documents: Mapping[str, bytes]) -> None:
    """Writes a whole directory to a disk."""
    with _temporary_directory(target, temporary_name(target)) as directory:
        _write_weights(write, directory)
        for name, data in documents.items():
            (directory / name).write_bytes(data)
        for file in directory.iterdir():
            sync(file)
        sync(directory)
        # An empty directory of that name is replaced; anything else that has appeared meanwhile is not.
        os.rename(directory, target)
        sync(target.parent)


def write_files(write: Writing, path: Path) -> None:
    """Writes files into a directory in which other machines write, too; all of them appear when all are complete."""
    with _temporary_directory(path, path / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex[:8]}") as directory:
        _write_weights(write, directory)
        for file in directory.iterdir():
            sync(file)
        with uninterrupted():
            for file in directory.iterdir():
                os.rename(file, path / file.name)
        sync(path)


def replace_file(file: Path, data: bytes) -> None:
    """Writes a file that appears when it is complete."""
    temporary = file.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_bytes(data)
        sync(temporary)
        os.replace(temporary, file)
        sync(file.parent)
    except OSError as error:
        raise HuggingFaceDirectoryError(f"{file}: cannot be written: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _write_weights(write: Writing, directory: Path) -> None:
    """Writes files to a disk."""
    places: dict[str, np.ndarray] = {}
    maps: list[np.memmap] = []
    for file in write.files:
        mapped, inside = create_file(directory / file.name, file.layout)
        maps.append(mapped)
        places |= inside
    plan = restrict(write.plan, [target.name for file in write.files for target in file.targets])
    total, read = read_nbytes(plan), 0

    def on_region(decoded: DecodedRegion, _: float) -> None:
        nonlocal read
        read += decoded.array.nbytes
        if write.on_progress is not None:
            write.on_progress(read, total)
        if write.on_region is not None:
            write.on_region(decoded)

    regions = read_regions(
        [entry.leaf for entry in plan.leaves],
        write.checkpoint.tree.arrays,
        write.checkpoint.concurrent_bytes,
        plan.where,
        needed=is_needed(plan),
    )
    done: set[str] = set()
    for name, _ in convert(
        plan,
        regions,
        dtype=write.dtype,
        on_region=on_region,
        allocate=lambda target, _: places.pop(target.name),
    ):
        done.add(name)
    if lacking := set(plan.targets) - done:
        raise IncompleteLoadError(
            f"{plan.where}: {len(lacking)} tensors were not written, first {min(lacking)}."
        )
    for mapped in maps:
        mapped.flush()


@contextlib.contextmanager
def _temporary_directory(target: Path, directory: Path) -> Iterator[Path]:
    """Makes a temporary directory, removed unless it was renamed: after an error, Ctrl-C, a signal that raises.

    Args:
        target: what is made in it in the end, for messages.
        directory: its path; the one above is made where it does not exist.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir()
    except OSError as error:
        raise HuggingFaceDirectoryError(f"{directory}: cannot be made: {error.strerror}.") from error
    try:
        yield directory
    except MaxTextLoadError:
        raise
    except OSError as error:
        raise HuggingFaceDirectoryError(f"{target}: cannot be written: {error.strerror or error}.") from error
    finally:
        with uninterrupted():
            shutil.rmtree(directory, ignore_errors=True)
