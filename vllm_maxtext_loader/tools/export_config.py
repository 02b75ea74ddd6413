"""What an export holds besides weights: config.json, generation_config.json, and a tokenizer's files."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vllm_maxtext_loader.api import Checkpoint
from vllm_maxtext_loader.conversion.config_check import refuse_sliding_end
from vllm_maxtext_loader.conversion.plan import Plan
from vllm_maxtext_loader.errors import HuggingFaceDirectoryError
from vllm_maxtext_loader.huggingface.directory import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    read_config,
    read_json,
)

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

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def tokenizer_files(tokenizer: str | os.PathLike[str] | None) -> dict[str, bytes]:
    """Content of a directory's tokenizer and processor files, by name; nothing where no directory is given.

    Raises:
        HuggingFaceDirectoryError: it has none, or one cannot be read.
    """
    if tokenizer is None:
        return {}
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
    try:
        return {file.name: file.read_bytes() for file in files}
    except OSError as error:
        raise HuggingFaceDirectoryError(f"{tokenizer}: cannot be read: {error.strerror or error}.") from error


def make_configuration(
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


def main_dtype(plan: Plan, wanted: np.dtype | None) -> str:
    """The dtype of most of the weights, as config.json names it."""
    if wanted is not None:
        return wanted.name
    sizes: collections.Counter[str] = collections.Counter()
    for target in plan.targets.values():
        sizes[target.dtype.name] += target.nbytes
    return sizes.most_common(1)[0][0]
