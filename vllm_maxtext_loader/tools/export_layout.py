"""Which tensor goes into which file of an export, where in it, and which machine writes the file.

All of it follows from the plan. So several machines agree without a word, and each recognises the others' files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory

from vllm_maxtext_loader.checkpoint.storage import gcs
from vllm_maxtext_loader.checkpoint.storage.path import Location
from vllm_maxtext_loader.checkpoint.storage.retry import to_storage_error
from vllm_maxtext_loader.conversion.plan import Plan, TensorSpec
from vllm_maxtext_loader.conversion.published import published_tensors
from vllm_maxtext_loader.errors import HuggingFaceDirectoryError, OptionError
from vllm_maxtext_loader.huggingface.directory import natural_order
from vllm_maxtext_loader.huggingface.safetensors_files import FileLayout, file_layout
from vllm_maxtext_loader.tools.leaf_groups import in_groups

TEMPORARY_PREFIX = ".incomplete-"
"""What a machine's temporary directory in a shared OUT_DIR begins with."""

_DIGEST_KEY = "vllm_maxtext_export"
"""Entry of a safetensors header's metadata, in the files that several machines write."""


@dataclasses.dataclass(frozen=True)
class Share:
    """One of several machines that write an export together.

    Attributes:
        number: from 1 to `count`.
        count: machines.
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Share:
        """The share "i/n".

        Raises:
            ValueError: it is no such thing.
        """
        match = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(
                f"{text!r} is no share; give i/n, for example 1/4 on the first of four machines and 4/4 on the last"
            )
        return cls(int(match[1]), int(match[2]))


@dataclasses.dataclass(frozen=True)
class OutputFile:
    """One safetensors file.

    Attributes:
        name: bare name.
        targets: its tensors, in the file's order.
        layout: where they lie in it.
    """

    name: str
    targets: tuple[TensorSpec, ...]
    layout: FileLayout


@dataclasses.dataclass(frozen=True)
class ExportLayout:
    """All safetensors files of an export.

    Attributes:
        files: in the order of their names.
        dtype: of all tensors; None means each one's own.
    """

    files: tuple[OutputFile, ...]
    dtype: np.dtype | None

    def share(self, share: Share, max_shard_bytes: int) -> tuple[OutputFile, ...]:
        """The files that one machine writes: neighbours, which share leaves.

        Raises:
            OptionError: there are fewer files than machines.
        """
        total = len(self.files)
        if total < share.count:
            raise OptionError(
                f"--shards {share.number}/{share.count}: the export has {total} file{'s' if total > 1 else ''} of "
                f"at most {max_shard_bytes} bytes, so at most {total} machine{'s' if total > 1 else ''} can share it. "
                f"Use fewer, or a smaller --max-shard-size."
            )
        first, end = ((share.number - 1) * total // share.count, share.number * total // share.count)
        return self.files[first:end]

    def index(self) -> bytes | None:
        """The content of the index; None where there is one file, which needs none."""
        if len(self.files) == 1:
            return None
        weight_map = {
            published: file.name
            for file in self.files
            for target in file.targets
            for published, _ in published_tensors(target)
        }
        total = sum(tensor_nbytes(target, self.dtype) for file in self.files for target in file.targets)
        return to_json({"metadata": {"total_size": total}, "weight_map": weight_map})


def make_layout(plan: Plan, dtype: np.dtype | None, limit: int) -> ExportLayout:
    """The files of an export by one machine to a disk, layer after layer.

    Args:
        plan: all tensors.
        dtype: of all of them; None means each one's own.
        limit: bytes of tensor data per file.
    """
    return _layout(split(plan, dtype, limit), dtype, {})


def make_grouped_layout(
    plan: Plan, dtype: np.dtype | None, limit: int, settings: Mapping[str, Any] | None
) -> ExportLayout:
    """The files of any other export: tensors that share leaves are neighbours.

    Args:
        plan: all tensors.
        dtype: of all of them; None means each one's own.
        limit: bytes of tensor data per file.
        settings: config.json's content, where several machines write the files, which then say so.
    """
    files = split(plan, dtype, limit, grouped=True)
    metadata: dict[str, str] = {}
    if settings is not None:
        contents = {
            file: [(target.name, target.shape, tensor_dtype(target, dtype).name) for target in targets]
            for file, targets in files.items()
        }
        decisive = json.dumps([plan.where, settings, contents], sort_keys=True)
        metadata[_DIGEST_KEY] = hashlib.sha256(decisive.encode()).hexdigest()[:32]
    return _layout(files, dtype, metadata)


def _layout(
    files: Mapping[str, list[TensorSpec]], dtype: np.dtype | None, metadata: Mapping[str, str]
) -> ExportLayout:
    made: list[OutputFile] = []
    for name, targets in files.items():
        layout = file_layout(
            [(target.name, target.shape, tensor_dtype(target, dtype)) for target in targets],
            {target.name: published_tensors(target) for target in targets},
            metadata,
        )
        by_name = {target.name: target for target in targets}
        made.append(OutputFile(name, tuple(by_name[tensor] for tensor in layout.tensors), layout))
    return ExportLayout(tuple(made), dtype)


def split(
    plan: Plan, dtype: np.dtype | None, limit: int, *, grouped: bool = False
) -> dict[str, list[TensorSpec]]:
    """Which tensors go into which file, by file name.

    Args:
        plan: all tensors.
        dtype: of all of them; None means each one's own.
        limit: bytes of tensor data per file.
        grouped: whether tensors that share leaves follow each other, instead of those of a layer.
    """
    if grouped:
        ordered = in_groups(plan)
    else:
        ordered = {name: plan.targets[name] for name in sorted(plan.targets, key=natural_order)}
    shards = split_state_dict_into_shards_factory(
        ordered,
        get_storage_size=lambda target: tensor_nbytes(target, dtype),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    return {file: [ordered[name] for name in names] for file, names in shards.filename_to_tensors.items()}


def tensor_dtype(target: TensorSpec, dtype: np.dtype | None) -> np.dtype:
    """The dtype a tensor is written in."""
    return target.dtype if dtype is None or target.keep_dtype else dtype


def tensor_nbytes(target: TensorSpec, dtype: np.dtype | None) -> int:
    """The bytes a tensor is written in."""
    return target.nbytes // target.dtype.itemsize * tensor_dtype(target, dtype).itemsize


def to_json(content: Mapping[str, Any]) -> bytes:
    """A JSON file's content."""
    return (json.dumps(content, indent=2) + "\n").encode()


def complete_files(root: Location, layout: ExportLayout, documents: Collection[str]) -> set[str]:
    """Names of the files of an export that are there.

    Args:
        root: the directory.
        layout: of its safetensors files.
        documents: names of its other files.

    Raises:
        HuggingFaceDirectoryError: something else is there.
        StorageError: the storage refuses or does not answer.
    """
    files = {file.name: file.layout for file in layout.files}
    complete: set[str] = set()
    for name, nbytes in _sizes(root).items():
        if name in documents:
            complete.add(name)
            continue
        expected = files.get(name)
        if expected is None:
            raise HuggingFaceDirectoryError(
                f"{root}: is not empty: it holds {name}, which is no file of this export; nothing is overwritten."
            )
        start = len(expected.prefix)
        if nbytes != expected.nbytes or _first_bytes(root / name, start) != expected.prefix:
            raise HuggingFaceDirectoryError(
                f"{root / name}: is of another export; nothing is overwritten. All machines must give the same "
                f"checkpoint path, step, configuration, --dtype and --max-shard-size."
            )
        complete.add(name)
    return complete


def _sizes(root: Location) -> dict[str, int]:
    """Bytes of the files in a directory, by name; of directories, 0. Without what machines are at work on."""
    if root.is_remote:
        # An object named like the "directory" itself is how some tools mark an empty one.
        return {name: int(found["size"]) for name, found in gcs.list_objects(root.url).items() if name}
    if not os.path.isdir(root.url):
        return {}
    try:
        with os.scandir(root.url) as entries:
            return {
                entry.name: entry.stat().st_size if entry.is_file() else 0
                for entry in entries
                if not entry.name.startswith(TEMPORARY_PREFIX)
            }
    except OSError as error:
        raise to_storage_error(f"cannot list {root}", error) from error


def _first_bytes(file: Location, count: int) -> bytes:
    if file.is_remote:
        return gcs.read_range(file.url, 0, count)
    with open(file.url, "rb") as stream:
        return stream.read(count)
