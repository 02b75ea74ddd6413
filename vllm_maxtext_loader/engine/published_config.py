"""The configuration next to the tokenizer: config.json of its repository or directory, where it is the checkpoint's.

Several published models share their shapes and differ in what shapes do not show (Qwen3-30B-A3B: rope theta 1e6 or 1e7).
Whoever names a model's tokenizer means that model, so its config.json is taken before a preset, if its dimensions are the
checkpoint's. Only for text models: a published vision tower may have parts that MaxText does not train.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from vllm_maxtext_loader import families
from vllm_maxtext_loader.conversion.config_check import list_differences
from vllm_maxtext_loader.engine.config_dir import repository_files
from vllm_maxtext_loader.errors import MaxTextLoadError
from vllm_maxtext_loader.huggingface.directory import read_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.engine.arg_utils import EngineArgs

    from vllm_maxtext_loader.conversion.dims import ModelDims

logger = init_logger("vllm." + __name__)


def find_config(args: EngineArgs) -> Path | None:
    """config.json next to the tokenizer; None where there is none of a family that this package knows."""
    if args.tokenizer is None or "://" in args.tokenizer:
        return None
    try:
        files = repository_files(args, ("config.json",))
        for file in files:
            read_config(file)
    except (OSError, ValueError):
        # No such repository, or a model of another kind: vLLM says what is wrong with the tokenizer.
        return None
    return files[0] if files else None


def matching_config(file: Path, dims: ModelDims, where: str) -> PretrainedConfig | None:
    """The configuration of a file, where its dimensions are the checkpoint's.

    Args:
        file: from `find_config`.
        dims: of the checkpoint.
        where: the checkpoint's path, for the log.
    """
    family = families.by_name(dims.family)
    try:
        config = read_config(file)
        wanted = families.dims_of_config(config, str(file))
    except MaxTextLoadError:
        return None
    if dims.has_vision or wanted.has_vision or wanted.family != dims.family:
        return None
    differences = list_differences(family, dims, wanted)
    # What no shape shows is what the configuration is asked for.
    if differences or (family.ends_in_full_attention and wanted.has("sliding", len(wanted.layers) - 1)):
        logger.info(
            "%s is not used: it is not the configuration of %s: %s.", file, where, "; ".join(differences)
        )
        return None
    return config
