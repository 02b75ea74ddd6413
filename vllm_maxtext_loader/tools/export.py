"""A MaxText checkpoint as a Hugging Face directory: safetensors shards, index, config.json.

The plan knows every tensor's name, shape and dtype before a byte is read. So the files are laid out first
(`export_layout`), and then filled: on a disk in any order (`export_disk`), in a bucket as streams (`export_bucket`).
Several machines can share the files; whoever finds all of them complete writes the rest, the index last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from vllm_maxtext_loader.api import Checkpoint
from vllm_maxtext_loader.checkpoint.reader import DecodedRegion
from vllm_maxtext_loader.checkpoint.storage import gcs
from vllm_maxtext_loader.checkpoint.storage.path import Location
from vllm_maxtext_loader.checkpoint.storage.retry import redact
from vllm_maxtext_loader.conversion.plan import Plan
from vllm_maxtext_loader.conversion.published import published_tensors
from vllm_maxtext_loader.dtypes import FLOATS
from vllm_maxtext_loader.errors import CheckpointNotFoundError, HuggingFaceDirectoryError
from vllm_maxtext_loader.huggingface.directory import CONFIG_FILE, GENERATION_CONFIG_FILE, INDEX_FILE
from vllm_maxtext_loader.tools.export_bucket import BucketExport
from vllm_maxtext_loader.tools.export_config import main_dtype, make_configuration, set_dtype, tokenizer_files
from vllm_maxtext_loader.tools.export_disk import Writing, replace_file, write_directory, write_files
from vllm_maxtext_loader.tools.export_layout import (
    ExportLayout,
    Share,
    complete_files,
    make_grouped_layout,
    make_layout,
    tensor_nbytes,
    to_json,
)

DTYPES: dict[str, np.dtype | None] = {"stored": None, **FLOATS}
"""Values of `--dtype`."""

# huggingface_hub's parser of sizes knows neither KiB, MiB, GiB nor a plain number, and takes -1GB.
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """What was written.

    Attributes:
        path: the directory.
        tensors: number of tensors, by this machine.
        nbytes: bytes of tensor data, likewise.
        shards: number of safetensors files, likewise.
        notes: what differs from the configuration that was given, one sentence each.
        missing: names of safetensors files that other machines have yet to write; the last of them completes the
            directory.
    """

    path: Path | Location
    tensors: int
    nbytes: int
    shards: int
    notes: tuple[str, ...]
    missing: tuple[str, ...] = ()


def export(
    checkpoint: Checkpoint,
    out: str | os.PathLike[str],
    *,
    dtype: str = "stored",
    max_shard_bytes: int = 5 * 10**9,
    config: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    share: Share | None = None,
    memory_bytes: int | None = None,
    on_region: Callable[[DecodedRegion], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ExportResult:
    """Writes a directory that transformers and vLLM load.

    Args:
        checkpoint: opened checkpoint.
        out: directory to make, local or gs://; must not exist, or be empty, except for files of other machines.
        dtype: a key of `DTYPES`; "stored" keeps each tensor's dtype.
        max_shard_bytes: bytes of tensor data per file; a larger tensor has a file of its own.
        config: Hugging Face directory or config.json of the model; None means read off the shapes (and the
            checkpoint's `model_name`).
        tokenizer: local directory whose tokenizer and processor files are copied.
        share: the part of the files that this machine writes; None means all.
        memory_bytes: bytes of tensors that are held at a time where `out` is in a bucket; None means half of the
            memory that is free.
        on_region: told each region that has been converted.
        on_progress: told how many bytes of how many are done.

    Raises:
        HuggingFaceDirectoryError: `out` is in the way, the disk is full, `config` or `tokenizer` is unusable.
        ConfigMismatchError: the configuration contradicts the checkpoint, or none can be made.
        OptionError: `share` or `memory_bytes` does not fit the checkpoint.
        ReadError, StorageError: the checkpoint cannot be read, or the bucket not be written.
    """
    root = _destination(out)
    bucket = BucketExport(root, shared=share is not None) if root.is_remote else None
    if share is None or bucket is not None:
        _refuse_occupied(root, shared=share is not None)
    if bucket is not None:
        bucket.refuse_read_only()
    copied = tokenizer_files(tokenizer)
    settings, generation, checkpoint, notes = make_configuration(checkpoint, config)
    plan = checkpoint.trimmed_plan()
    wanted = DTYPES[dtype]
    set_dtype(settings, main_dtype(plan, wanted))
    if share is None and bucket is None:
        layout = make_layout(plan, wanted, max_shard_bytes)
    else:
        layout = make_grouped_layout(plan, wanted, max_shard_bytes, settings if share else None)
    documents = dict(copied)
    if generation:
        documents[GENERATION_CONFIG_FILE] = to_json(generation)
    documents[CONFIG_FILE] = to_json(settings)
    if (index := layout.index()) is not None:
        documents[INDEX_FILE] = index
    files, missing = layout.files, ()
    if share is not None:
        there = _files_of_others(root, layout, documents)
        files = tuple(file for file in layout.share(share, max_shard_bytes) if file.name not in there)
    write = Writing(checkpoint, plan, files, wanted, memory_bytes, on_region, on_progress)
    with _overflow_refused(plan, wanted):
        if share is not None:
            missing = _write_share(write, root, bucket, layout, documents)
        elif bucket is None:
            write_directory(write, Path(root.url), documents)
        else:
            with bucket.complete_or_removed():
                bucket.write_files(write)
                bucket.write_documents(documents)
    targets = [target for file in files for target in file.targets]
    return ExportResult(
        root if root.is_remote else Path(root.url),
        sum(len(published_tensors(target)) for target in targets),
        sum(tensor_nbytes(target, wanted) for target in targets),
        len(files),
        tuple(notes),
        missing,
    )


def parse_size(text: str) -> int:
    """Bytes of "5GB" (10^9), "512MiB" (2^20) or "1000".

    Raises:
        ValueError: it is no such size, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if (
        match is None
        or match[2].upper() not in _UNITS
        or (size := int(float(match[1]) * _UNITS[match[2].upper()])) < 1
    ):
        raise ValueError(f"{text!r} is no size; give for example 5GB, 512MB or 2GiB")
    return size


def _destination(out: str | os.PathLike[str]) -> Location:
    text = os.fspath(out)
    if "://" in text:
        try:
            return Location.parse(text)
        except CheckpointNotFoundError as error:
            raise HuggingFaceDirectoryError(str(error)) from error
    if re.match(r"(?i)\s*gc?s:", text):
        raise HuggingFaceDirectoryError(
            f"{redact(text)}: is neither a local path nor a gs:// URL. Give gs://BUCKET/path."
        )
    return Location(os.path.abspath(os.path.expanduser(text)))


def _refuse_occupied(root: Location, *, shared: bool) -> None:
    """Refuses a directory that is not empty; in a bucket also one that cannot be listed.

    Args:
        root: the directory.
        shared: whether other machines may have written files to it.
    """
    if root.is_remote:
        try:
            # Two: the first may be named like the "directory" itself, which is how some tools mark an empty one.
            found = gcs.list_objects(root.url, 2, recursive=True, write=True).keys() - {""}
        except CheckpointNotFoundError as error:
            raise HuggingFaceDirectoryError(str(error)) from error
        if found and not shared:
            raise HuggingFaceDirectoryError(
                f"{root}: is not empty (it holds {min(found)}); nothing is overwritten."
            )
        return
    path = Path(root.url)
    if path.is_dir() and not path.is_symlink():
        if any(path.iterdir()):
            raise HuggingFaceDirectoryError(f"{path}: exists and is not empty; nothing is overwritten.")
    elif os.path.lexists(path):
        raise HuggingFaceDirectoryError(f"{path}: exists and is no directory; nothing is overwritten.")


def _files_of_others(root: Location, layout: ExportLayout, documents: Mapping[str, bytes]) -> set[str]:
    """Names of the safetensors files that are there: of other machines, or of this one's last attempt."""
    there = complete_files(root, layout, documents)
    last = [*documents][-1]
    if last in there:
        raise HuggingFaceDirectoryError(
            f"{root}: is a complete model ({last} is there); nothing is overwritten."
        )
    return there


def _write_share(
    write: Writing,
    root: Location,
    bucket: BucketExport | None,
    layout: ExportLayout,
    documents: Mapping[str, bytes],
) -> tuple[str, ...]:
    """Writes one machine's files, and the rest where all files are there; returns the names of those that are not.

    Files that are complete stay, whatever happens to the rest: they are the same whichever run has written them.
    """
    if write.files and bucket is not None:
        with bucket.complete_or_removed():
            bucket.write_files(write)
    elif write.files:
        write_files(write, Path(root.url))
    there = complete_files(root, layout, documents)
    if missing := tuple(file.name for file in layout.files if file.name not in there):
        return missing
    # Several machines may come here at the same time: what they write is the same.
    if bucket is not None:
        bucket.write_documents(documents)
    else:
        for name, data in documents.items():
            replace_file(Path(root.url) / name, data)
    return ()


@contextlib.contextmanager
def _overflow_refused(plan: Plan, dtype: np.dtype | None) -> Iterator[None]:
    """Refuses values that a dtype cannot hold: of what is stored, only float16 has such; infinity would be a silent
    answer.
    """
    try:
        with np.errstate(over="raise"):
            yield
    except FloatingPointError as error:
        raise HuggingFaceDirectoryError(
            f"{plan.where}: has values too large for {dtype}. Use bfloat16."
        ) from error
