"""A MaxText checkpoint as a Hugging Face directory: safetensors shards, index, config.json.

The plan knows every tensor's name, shape and dtype before a byte is read. So the files are laid out first, at
full size, and mapped into memory; each region that is read is then written straight to its place. However many
layers one leaf stacks, memory holds the regions in flight, and pages the kernel writes back as it likes.

All of it happens in a directory beside OUT_DIR, which gets its name by one rename when everything is on disk.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory

from vllm_maxtext_loader.api import Checkpoint
from vllm_maxtext_loader.atomic import sync, temporary_name, uninterrupted
from vllm_maxtext_loader.checkpoint.reader import DecodedRegion, read_regions
from vllm_maxtext_loader.conversion.config_check import refuse_sliding_end
from vllm_maxtext_loader.conversion.convert import convert
from vllm_maxtext_loader.conversion.plan import Plan, TensorSpec
from vllm_maxtext_loader.conversion.published import published_tensors
from vllm_maxtext_loader.dtypes import FLOATS
from vllm_maxtext_loader.errors import (
    HuggingFaceDirectoryError,
    IncompleteLoadError,
    MaxTextLoadError,
)
from vllm_maxtext_loader.huggingface.directory import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    INDEX_FILE,
    natural_order,
    read_config,
    read_json,
)
from vllm_maxtext_loader.huggingface.safetensors_files import create_file

DTYPES: dict[str, np.dtype | None] = {"stored": None, **FLOATS}
"""Values of `--dtype`."""

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
)
"""What `--tokenizer` copies, where it is there."""

# huggingface_hub's parser of sizes knows neither KiB, MiB, GiB nor a plain number, and takes -1GB.
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """What was written.

    Attributes:
        path: the directory.
        tensors: number of tensors.
        nbytes: bytes of tensor data.
        shards: number of safetensors files.
        notes: what differs from the configuration that was given, one sentence each.
    """

    path: Path
    tensors: int
    nbytes: int
    shards: int
    notes: tuple[str, ...]


def export(
    checkpoint: Checkpoint,
    out: str | os.PathLike[str],
    *,
    dtype: str = "stored",
    max_shard_bytes: int = 5 * 10**9,
    config: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    on_region: Callable[[DecodedRegion], None] | None = None,
) -> ExportResult:
    """Writes a directory that transformers and vLLM load.

    Args:
        checkpoint: opened checkpoint.
        out: directory to make; must not exist, or be empty.
        dtype: a key of `DTYPES`; "stored" keeps each tensor's dtype.
        max_shard_bytes: bytes of tensor data per file; a larger tensor has a file of its own.
        config: Hugging Face directory or config.json of the model; None means read off the shapes (and the
            checkpoint's `model_name`).
        tokenizer: local directory whose tokenizer and processor files are copied.
        on_region: told each region that has been written.

    Raises:
        HuggingFaceDirectoryError: `out` is in the way, the disk is full, `config` or `tokenizer` is unusable.
        ConfigMismatchError: the configuration contradicts the checkpoint, or none can be made.
        ReadError, StorageError: the checkpoint cannot be read.
    """
    target_dir = _free_place(out)
    copied = _tokenizer_files(tokenizer)
    settings, generation, checkpoint, notes = _configuration(checkpoint, config)
    plan = checkpoint.trimmed_plan()
    wanted = DTYPES[dtype]
    set_dtype(settings, _main_dtype(plan, wanted))
    with _temporary_directory(target_dir) as directory:
        shards = _write_weights(checkpoint, plan, directory, wanted, max_shard_bytes, on_region)
        for source in copied:
            shutil.copyfile(source, directory / source.name)
        if generation:
            _write_json(directory / GENERATION_CONFIG_FILE, generation)
        _write_json(directory / CONFIG_FILE, settings)
        for file in directory.iterdir():
            sync(file)
        sync(directory)
        # An empty directory of that name is replaced; anything else that has appeared meanwhile is not.
        os.rename(directory, target_dir)
        sync(target_dir.parent)
    nbytes = sum(_nbytes(target, wanted) for target in plan.targets.values())
    tensors = sum(len(published_tensors(target)) for target in plan.targets.values())
    return ExportResult(target_dir, tensors, nbytes, shards, tuple(notes))


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


def _free_place(out: str | os.PathLike[str]) -> Path:
    if "://" in os.fspath(out):
        raise HuggingFaceDirectoryError(
            f"{out}: OUT_DIR must be a local directory; copy it to the bucket afterwards."
        )
    path = Path(os.path.abspath(os.path.expanduser(out)))
    if path.is_dir() and not path.is_symlink():
        if any(path.iterdir()):
            raise HuggingFaceDirectoryError(f"{path}: exists and is not empty; nothing is overwritten.")
    elif os.path.lexists(path):
        raise HuggingFaceDirectoryError(f"{path}: exists and is no directory; nothing is overwritten.")
    return path


def _tokenizer_files(tokenizer: str | os.PathLike[str] | None) -> list[Path]:
    if tokenizer is None:
        return []
    directory = Path(tokenizer).expanduser()
    if not directory.is_dir():
        raise HuggingFaceDirectoryError(
            f"{tokenizer}: no such directory. --tokenizer copies files from a local one; a Hugging Face name "
            f"can be given to `vllm serve --tokenizer` instead."
        )
    files = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    if not any(file.name.startswith("tokenizer") for file in files):
        raise HuggingFaceDirectoryError(
            f"{tokenizer}: holds no tokenizer (none of tokenizer.json, tokenizer.model)."
        )
    return files


def _configuration(
    checkpoint: Checkpoint, source: str | os.PathLike[str] | None
) -> tuple[dict[str, Any], dict[str, Any], Checkpoint, list[str]]:
    """config.json, generation_config.json (may be empty), the checkpoint planned for them, and notes."""
    refuse_sliding_end(checkpoint.plan.family, checkpoint.plan.dims, checkpoint.plan.where)
    if source is None:
        settings = json.loads(checkpoint.hf_config().to_json_string())
        return settings, _token_ids(settings), checkpoint, []
    file = Path(source).expanduser()
    if file.is_dir():
        file = file / CONFIG_FILE
    if not file.is_file():
        raise HuggingFaceDirectoryError(
            f"{file}: no such file. --config takes a local directory with a config.json, or the file."
        )
    config, settings = read_config(file), read_json(file)
    checkpoint = checkpoint.with_config(config)
    notes = list(checkpoint.plan.notes)
    if "vision_config" in settings and not checkpoint.plan.dims.has_vision:
        ids = {key: settings[key] for key in _TOKEN_IDS if settings.get(key) is not None}
        settings = json.loads(config.get_text_config().to_json_string()) | ids
        settings["architectures"] = [next(iter(checkpoint.plan.family.architectures.values()))]
        notes.append("the exported configuration is the text model's")
    if settings.get("audio_config") is not None:
        settings["audio_config"] = None
        notes.append("MaxText has no audio tower: audio_config is null in the exported configuration")
    vision = settings.get("vision_config")
    if isinstance(vision, dict) and vision.get("use_clipped_linears"):
        vision["use_clipped_linears"] = False
        notes.append("MaxText has no clip bounds: use_clipped_linears is false in the exported configuration")
    beside = file.parent / GENERATION_CONFIG_FILE
    return settings, read_json(beside) if beside.is_file() else _token_ids(settings), checkpoint, notes


def _token_ids(settings: Mapping[str, Any]) -> dict[str, Any]:
    text = settings.get("text_config", {})
    ids = {key: settings.get(key, text.get(key)) for key in _TOKEN_IDS}
    return {key: value for key, value in ids.items() if value is not None}


def set_dtype(settings: dict[str, Any], dtype: str) -> None:
    """Names the dtype of the weights in a config.json, and in the configurations inside it that name one."""
    settings.pop("torch_dtype", None)
    settings["dtype"] = dtype
    for inner in settings.values():
        if isinstance(inner, dict) and ("dtype" in inner or "torch_dtype" in inner):
            set_dtype(inner, dtype)


def _main_dtype(plan: Plan, wanted: np.dtype | None) -> str:
    if wanted is not None:
        return wanted.name
    sizes: collections.Counter[str] = collections.Counter()
    for target in plan.targets.values():
        sizes[target.dtype.name] += target.nbytes
    return sizes.most_common(1)[0][0]


def _nbytes(target: TensorSpec, wanted: np.dtype | None) -> int:
    return target.nbytes // target.dtype.itemsize * _dtype(target, wanted).itemsize


def _dtype(target: TensorSpec, wanted: np.dtype | None) -> np.dtype:
    return target.dtype if wanted is None or target.keep_dtype else wanted


def split(plan: Plan, wanted: np.dtype | None, limit: int) -> dict[str, list[TensorSpec]]:
    """Which tensors go into which file, by file name, layer by layer.

    Args:
        plan: all tensors.
        wanted: dtype of all of them; None means each one's own.
        limit: bytes of tensor data per file.
    """
    ordered = {name: plan.targets[name] for name in sorted(plan.targets, key=natural_order)}
    shards = split_state_dict_into_shards_factory(
        ordered,
        get_storage_size=lambda target: _nbytes(target, wanted),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    return {file: [ordered[name] for name in names] for file, names in shards.filename_to_tensors.items()}


def _write_weights(
    checkpoint: Checkpoint,
    plan: Plan,
    directory: Path,
    wanted: np.dtype | None,
    limit: int,
    on_region: Callable[[DecodedRegion], None] | None,
) -> int:
    """Writes all shards, and the index where there are several; returns their number."""
    files = split(plan, wanted, limit)
    places: dict[str, np.ndarray] = {}
    maps: list[np.memmap] = []
    for name, targets in files.items():
        mapped, inside = create_file(
            directory / name,
            [(target.name, target.shape, _dtype(target, wanted)) for target in targets],
            {target.name: published_tensors(target) for target in targets},
        )
        maps.append(mapped)
        places |= inside
    regions = read_regions(
        [entry.leaf for entry in plan.leaves], checkpoint.tree.arrays, checkpoint.concurrent_bytes, plan.where
    )
    done: set[str] = set()
    try:
        # Only float16 has numbers too large for it among what is stored; infinity would be a silent answer.
        with np.errstate(over="raise"):
            for name, _ in convert(
                plan,
                regions,
                dtype=wanted,
                on_region=None if on_region is None else lambda decoded, _: on_region(decoded),
                allocate=lambda target, _: places.pop(target.name),
            ):
                done.add(name)
    except FloatingPointError as error:
        raise HuggingFaceDirectoryError(
            f"{plan.where}: has values too large for {wanted}. Use bfloat16."
        ) from error
    if lacking := set(plan.targets) - done:
        raise IncompleteLoadError(
            f"{plan.where}: {len(lacking)} tensors were not written, first {min(lacking)}."
        )
    for mapped in maps:
        mapped.flush()
    if len(files) > 1:
        weight_map = {
            published: name
            for name, targets in files.items()
            for target in targets
            for published, _ in published_tensors(target)
        }
        total = sum(_nbytes(target, wanted) for target in plan.targets.values())
        _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return len(files)


@contextlib.contextmanager
def _temporary_directory(target: Path) -> Iterator[Path]:
    """A temporary sibling, removed unless it was renamed: after an error, Ctrl-C, a signal that raises."""
    directory = temporary_name(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
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


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
