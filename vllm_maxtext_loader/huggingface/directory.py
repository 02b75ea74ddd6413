"""A Hugging Face model directory, local or in a bucket: which tensors its safetensors files hold, its config.json."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_maxtext_loader import families
from vllm_maxtext_loader.checkpoint.storage import gcs
from vllm_maxtext_loader.checkpoint.storage.path import Location
from vllm_maxtext_loader.errors import (
    CheckpointNotFoundError,
    HuggingFaceDirectoryError,
    MaxTextLoadError,
)
from vllm_maxtext_loader.huggingface.config import config_classes
from vllm_maxtext_loader.huggingface.safetensors_files import HfTensor, read_header, read_remote_header

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"

_HEADERS = 16
"""Headers that are read from a bucket at a time."""


@dataclasses.dataclass(frozen=True)
class HfDirectory:
    """A model directory.

    Attributes:
        path: where it is.
        tensors: by `canonical` name.
        config_file: its config.json, None where it has none.
    """

    path: Path | Location
    tensors: dict[str, HfTensor]
    config_file: Path | Location | None


def canonical(name: str) -> str:
    """One name for text tensors: a text-only checkpoint's `model.…`, elsewhere `model.language_model.…`."""
    for prefix in ("model.language_model.", "language_model.model."):
        if name.startswith(prefix):
            return f"model.{name.removeprefix(prefix)}"
    return name


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key of a dotted name that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def read_hf_directory(path: str | os.PathLike[str]) -> HfDirectory:
    """Reads the headers of all safetensors files of a directory, no tensor data.

    Args:
        path: directory, local or gs://, with model.safetensors, or model.safetensors.index.json and its shards, or
            other .safetensors files.

    Raises:
        HuggingFaceDirectoryError: it does not exist, holds no safetensors files, or one is missing, truncated
            or damaged.
        StorageError: the bucket refuses or does not answer.
    """
    directory, sizes = _list_directory(path)
    tensors: dict[str, HfTensor] = {}
    files = _files(directory, sizes)
    for (name, wanted), header in zip(files.items(), _headers(directory, files, sizes), strict=True):
        file = directory / name
        if wanted is not None and (absent := wanted - {tensor.name for tensor in header}):
            raise HuggingFaceDirectoryError(
                f"{file}: lacks {min(absent)} ({len(absent)} tensors in all), which {INDEX_FILE} says it "
                f"holds. Download the directory again."
            )
        for tensor in header:
            if wanted is not None and tensor.name not in wanted:
                continue
            common = canonical(tensor.name)
            if common in tensors:
                raise HuggingFaceDirectoryError(
                    f"{directory}: {common} is there twice: {tensors[common].name} in {tensors[common].file.name}, "
                    f"{tensor.name} in {name}."
                )
            tensors[common] = tensor
    return HfDirectory(directory, tensors, directory / CONFIG_FILE if CONFIG_FILE in sizes else None)


def _headers(
    directory: Path | Location, files: Iterable[str], sizes: Mapping[str, int]
) -> Iterator[list[HfTensor]]:
    """The header of each file, in order; several at a time from a bucket."""
    if not isinstance(directory, Location):
        yield from (read_header(directory / name) for name in files)
        return
    with ThreadPoolExecutor(_HEADERS) as pool:
        try:
            yield from pool.map(lambda name: read_remote_header(directory / name, sizes[name]), files)
        finally:
            pool.shutdown(cancel_futures=True)


def _list_directory(path: str | os.PathLike[str]) -> tuple[Path | Location, dict[str, int]]:
    """A directory, and the bytes of each of its files by name."""
    text = os.fspath(path)
    if "://" in text:
        try:
            location = Location.parse(text)
            if location.is_remote:
                found = {name: int(item["size"]) for name, item in gcs.list_objects(location.url).items()}
                found.pop("", None)
                if not found:
                    raise HuggingFaceDirectoryError(f"{location}: no such directory, or it holds no file.")
                return location, found
        except CheckpointNotFoundError as error:
            raise HuggingFaceDirectoryError(str(error)) from error
        text = location.url
    directory = Path(text).expanduser()
    if not directory.is_dir():
        raise HuggingFaceDirectoryError(
            f"{path}: no such directory. Give a Hugging Face model directory, local or gs:// (`hf download NAME "
            f"--local-dir DIR` makes one)."
        )
    return directory, {file.name: file.stat().st_size for file in directory.iterdir() if file.is_file()}


def _files(directory: Path | Location, sizes: Mapping[str, int]) -> dict[str, set[str] | None]:
    """Names of the safetensors files, and which tensors of each count (None: all)."""
    if SINGLE_FILE in sizes:
        return {SINGLE_FILE: None}
    if INDEX_FILE in sizes:
        index = directory / INDEX_FILE
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise HuggingFaceDirectoryError(f"{index}: has no weight_map; the file is damaged.")
        files: dict[str, set[str] | None] = {}
        for name, file in weight_map.items():
            wanted = files.setdefault(_bare_name(index, file), set())
            assert wanted is not None
            wanted.add(name)
        if lost := [file for file in files if file not in sizes]:
            raise HuggingFaceDirectoryError(
                f"{directory}: {len(lost)} of {len(files)} shards are missing ({lost[0]}). Download it again."
            )
        return files
    found: dict[str, set[str] | None] = dict.fromkeys(
        sorted(name for name in sizes if name.endswith(".safetensors"))
    )
    if not found:
        names = ", ".join(sorted(sizes)[:8]) or "nothing"
        raise HuggingFaceDirectoryError(
            f"{directory}: holds no .safetensors files (found: {names}). PyTorch .bin files are not read."
        )
    return found


def _bare_name(index: Path | Location, file: object) -> str:
    """A file name from an index.json, which comes from whoever made the model: it must stay in the directory."""
    if isinstance(file, str) and file not in ("", ".", "..") and not re.search(r"[/\\\0]", file):
        return file
    raise HuggingFaceDirectoryError(
        f"{index}: weight_map names {file!r}, expected the bare name of a file in the same directory. "
        f"Download the directory again, from a source you trust."
    )


def read_json(file: Path | Location) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        HuggingFaceDirectoryError: it cannot be read, or is none.
        StorageError: the bucket refuses or does not answer.
    """
    try:
        parsed = json.loads(file.read_bytes())
    except MaxTextLoadError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise HuggingFaceDirectoryError(f"{file}: cannot be read as JSON ({error}).") from error
    if not isinstance(parsed, dict):
        raise HuggingFaceDirectoryError(f"{file}: is not a JSON object.")
    return parsed


def ends_in_full_attention(file: Path | Location) -> bool:
    """Whether transformers takes a config.json's layer types as they are: it changes a sliding last layer."""
    raw = read_json(file)
    text = raw.get("text_config", raw)
    types = text.get("layer_types") if isinstance(text, dict) else None
    return not isinstance(types, list) or types[-1:] == ["full_attention"]


def read_config(file: Path | Location) -> PretrainedConfig:
    """The configuration in a config.json.

    Raises:
        HuggingFaceDirectoryError: it cannot be read, or transformers cannot make sense of it.
        ConfigMismatchError: it is of no family that this version knows.
        EngineError: the installed transformers does not have the family.
    """
    raw = read_json(file)
    found = str(raw.get("model_type"))
    config_class = config_classes(families.of_model_type(found, str(file)))[found]
    try:
        return config_class.from_dict(raw)
    except Exception as error:  # transformers validates with several libraries, each with errors of its own.
        detail = " ".join(str(error).split())[:400]
        raise HuggingFaceDirectoryError(
            f"{file}: transformers refuses it ({type(error).__name__}: {detail})."
        ) from error
