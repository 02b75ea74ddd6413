"""The directory that vLLM takes as `model`: config.json made from the shapes, and what a published model has next to it.

With the default loader, vLLM finds generation_config.json, the chat template and the image processor's files next to
config.json. A MaxText checkpoint has none of them; they come from the tokenizer's repository or directory. The directory
lies on the disk of the node that made it, as does one that the user gives instead. Its files of configuration travel in the
ModelConfig, and a worker on another node writes them there again.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vllm.logger import init_logger

from vllm_maxtext_loader.atomic import temporary_name
from vllm_maxtext_loader.errors import EngineError
from vllm_maxtext_loader.options import TRAVELLING

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.config import ModelConfig
    from vllm.engine.arg_utils import EngineArgs

    from vllm_maxtext_loader.conversion.family import Preset
    from vllm_maxtext_loader.engine.probe import Probe

logger = init_logger("vllm." + __name__)

GENERATION_CONFIG = "generation_config.json"

CONFIG = "config.json"

GENERATION_FILES = (GENERATION_CONFIG, "chat_template*", "tokenizer_config.json")
"""What vLLM samples and chats by. Older repositories keep the chat template in tokenizer_config.json."""

PROCESSOR_FILES = (
    "*processor_config.json",
    "chat_template*",
    "tokenizer*",
    "special_tokens_map.json",
)
"""What transformers makes a multimodal processor of."""

MODALITIES = ("image", "video")
"""What a checkpoint with a vision tower can be given."""


def images_are_off(args: EngineArgs) -> bool:
    """Whether no request may hold an image or a video: vLLM then makes no processor."""
    limits = args.limit_mm_per_prompt or {}
    counts = [limits.get(modality, 1) for modality in MODALITIES]
    return args.language_model_only or all(
        (count.get("count", 1) if isinstance(count, Mapping) else count) == 0 for count in counts
    )


def processor_files(args: EngineArgs, checkpoint: Probe) -> list[Path]:
    """Files of the image processor: vLLM looks for them next to config.json; they come from the tokenizer's repository.

    Empty for a checkpoint without a vision tower, and where images are off.

    Raises:
        EngineError: the tokenizer's repository cannot be downloaded.
    """
    if not checkpoint.dims.has_vision or args.tokenizer is None or images_are_off(args):
        return []
    try:
        files = repository_files(args, PROCESSOR_FILES)
    except (OSError, ValueError) as error:
        raise EngineError(
            f"{checkpoint.items}: has a vision tower, and its image processor is taken from the tokenizer's repository; "
            f"{args.tokenizer} cannot be downloaded: {error}"
        ) from error
    if not any(path.name.endswith("processor_config.json") for path in files):
        logger.warning(
            "%s has a vision tower, but %s holds no image processor (processor_config.json): give the tokenizer of the "
            "multimodal model, or serve text only with --language-model-only.",
            checkpoint.items,
            args.tokenizer,
        )
    return files


def generation_files(args: EngineArgs) -> list[Path] | None:
    """generation_config.json and the chat template of the tokenizer's repository; None where it cannot be looked into."""
    if args.tokenizer is None:
        return None
    try:
        return repository_files(args, GENERATION_FILES)
    except (OSError, ValueError) as error:
        # vLLM loads the tokenizer next, with its own error where it cannot. It may also have been asked not to.
        logger.warning("%s of %s cannot be downloaded: %s", GENERATION_CONFIG, args.tokenizer, error)
        return None


def repository_files(args: EngineArgs, patterns: Sequence[str]) -> list[Path]:
    """Files in the tokenizer's directory or repository.

    Raises:
        OSError, ValueError: it cannot be downloaded.
    """
    assert args.tokenizer is not None
    if os.path.isdir(args.tokenizer):
        source = args.tokenizer
    else:
        from huggingface_hub import snapshot_download

        source = snapshot_download(
            args.tokenizer,
            # As vLLM's ModelConfig has it.
            revision=args.tokenizer_revision or args.revision,
            allow_patterns=list(patterns),
            cache_dir=args.download_dir,
            token=args.hf_token,
        )
    return sorted({path for pattern in patterns for path in Path(source).glob(pattern) if path.is_file()})


def kind_of_model(files: Sequence[Path] | None) -> Literal["chat", "base"]:
    """ "base" where the tokenizer has no chat template; "chat" also where there is no tokenizer to tell."""
    if files is None or any(file.name.startswith("chat_template") for file in files):
        return "chat"
    for file in files:
        if file.name == "tokenizer_config.json":
            with contextlib.suppress(OSError, ValueError):
                if json.loads(file.read_text()).get("chat_template"):
                    return "chat"
    return "base"


def _assumed_generation_config(
    preset: Preset | None, kind: Literal["chat", "base"], config: PretrainedConfig, where: str
) -> str:
    """generation_config.json for a tokenizer without one: where the published model stops; says so."""
    text: Any = config.get_text_config()
    if preset is None:
        stops, model = config.eos_token_id, "its config.json says"
    else:
        stops = list(preset.stops if kind == "chat" else preset.base_stops)
        base = "" if kind == "chat" else "'s base model (the tokenizer has no chat template)"
        model = f"{preset.published[0]}{base} does"
    logger.info(
        "%s: the tokenizer comes without a %s. Assumed: generation stops at token ids %s, as %s, and vLLM's default "
        "sampling. --generation-config DIR gives another file, --override-generation-config single values.",
        where,
        GENERATION_CONFIG,
        stops,
        model,
    )
    return json.dumps(
        {"bos_token_id": text.bos_token_id, "eos_token_id": stops, "pad_token_id": text.pad_token_id},
        indent=2,
    )


def write_config_dir(
    checkpoint: Probe,
    model_name: str | None,
    files: Sequence[Path] = (),
    assume: Literal["chat", "base"] | None = "chat",
    published: PretrainedConfig | None = None,
) -> Path:
    """A directory with the checkpoint's config.json, for vLLM to take as `model`.

    Its name is a digest of its content, so that restarts and several engines share it.

    Args:
        checkpoint: what was found.
        model_name: preset to take from what shapes cannot tell.
        files: files that vLLM looks for in the same directory; they are linked.
        published: configuration to take instead of one made from the shapes.
        assume: kind of model whose generation_config.json is made where `files` has none; None makes none.

    Raises:
        ConfigMismatchError: no configuration can be made; see `huggingface.config.make_config`.
        EngineError: the directory cannot be written.
    """
    from vllm_maxtext_loader.huggingface.config import choose_preset, make_config

    if published is not None:
        config, preset = published, None
    else:
        config = make_config(checkpoint.dims, model_name, checkpoint.items)
        preset = choose_preset(checkpoint.dims, model_name, checkpoint.items)
    contents = {CONFIG: json.dumps(config.to_dict(), indent=2, sort_keys=True)}
    links = {file.name: file.resolve() for file in files}
    if assume is not None and GENERATION_CONFIG not in links:
        contents[GENERATION_CONFIG] = _assumed_generation_config(preset, assume, config, checkpoint.items)
    directory = _directory(f"{sorted(contents.items())}{sorted(links.items())}")
    _write(directory, {name: text.encode() for name, text in contents.items()}, links)
    if preset is None:
        source = "config.json of the tokenizer's repository, whose dimensions are the checkpoint's"
    else:
        source = (
            f"read from the checkpoint's shapes; what they cannot tell (sliding window, rope, top-k) is "
            f"{preset.published[0]}'s"
        )
    logger.info("Configuration: %s: %s", source, directory / CONFIG)
    return directory


def attach(model_config: ModelConfig) -> None:
    """Lets the directory's files of configuration travel with the ModelConfig, which vLLM pickles for its workers.

    Does nothing where `model` is not a directory with a config.json. Weights do not travel, nor a tokenizer unless a processor of images needs it.
    """
    directory = Path(model_config.model)
    if not (directory / CONFIG).is_file():
        return
    names = {CONFIG, *GENERATION_FILES, *(PROCESSOR_FILES if model_config.is_multimodal_model else ())}
    vars(model_config)[TRAVELLING] = {
        file.name: file.read_bytes()
        for file in sorted(directory.iterdir())
        if file.is_file() and any(fnmatch.fnmatchcase(file.name, name) for name in names)
    }


def restore(model_config: ModelConfig) -> None:
    """Writes the directory on a node that does not have it, or has another one there, and points the ModelConfig to it.

    Does nothing for a ModelConfig that `attach` has left alone.

    Raises:
        EngineError: the directory cannot be written.
    """
    contents: dict[str, bytes] | None = vars(model_config).get(TRAVELLING)
    if contents is None or _holds(Path(model_config.model), contents):
        return
    directory = _directory(str(sorted(contents.items())))
    _write(directory, contents, {})
    logger.info("%s is not on this node: written again as %s", model_config.model, directory)
    if model_config.hf_config_path == model_config.model:
        model_config.hf_config_path = str(directory)
    model_config.model = str(directory)
    tokenizer: Any = model_config.tokenizer
    if (
        isinstance(tokenizer, str)
        and os.path.isabs(tokenizer)
        and not os.path.exists(tokenizer)
        and any(name.startswith("tokenizer.") for name in contents)
    ):
        model_config.tokenizer = str(directory)


def _holds(directory: Path, contents: Mapping[str, bytes]) -> bool:
    """Whether a directory is there with this config.json."""
    try:
        return (directory / CONFIG).read_bytes() == contents[CONFIG]
    except OSError:
        return False


def _directory(content: str) -> Path:
    import vllm.envs

    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    return Path(vllm.envs.VLLM_CACHE_ROOT) / "maxtext" / digest


def _write(directory: Path, contents: Mapping[str, bytes], links: Mapping[str, Path]) -> None:
    """Fills the directory; what is there already has this content, because its name says so.

    Raises:
        EngineError: it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, target in links.items():
            with contextlib.suppress(FileExistsError):
                (directory / name).symlink_to(target)
        # config.json last: where it is, everything is.
        for name, content in sorted(contents.items(), key=lambda item: item[0] == CONFIG):
            path = directory / name
            if not path.exists():
                temporary = temporary_name(path)
                temporary.write_bytes(content)
                os.replace(temporary, path)
    except OSError as error:
        raise EngineError(
            f"{directory}: the checkpoint's config.json cannot be written here ({error}). Set "
            f"VLLM_CACHE_ROOT to a directory that this user may write to."
        ) from error
