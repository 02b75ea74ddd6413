"""vLLM's side: `model` may be a MaxText checkpoint. `plugin` patches EngineArgs; what it then does is here.

vLLM expects `model` to be a Hugging Face name or directory: it would mirror a bucket, or look for config.json. Before
vLLM makes its configuration, `model` is replaced by a small local directory that holds the checkpoint's
configuration, and the checkpoint's path travels in `model_loader_extra_config`. Written against vLLM 0.32.0
engine/arg_utils.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from vllm_maxtext_loader.atomic import atomic_file
from vllm_maxtext_loader.errors import CheckpointNotFoundError, EngineError, NotACheckpointError, OptionError
from vllm_maxtext_loader.options import Options

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.engine.arg_utils import EngineArgs

    from vllm_maxtext_loader.engine.probe import Probe

logger = init_logger("vllm." + __name__)

_PREPARED = "_maxtext_prepared"


def make_model_config(args: EngineArgs, create: Callable[[], ModelConfig]) -> ModelConfig:
    """vLLM's ModelConfig for a checkpoint.

    Args:
        args: the engine's arguments; `model` is replaced (see `prepare`).
        create: vLLM's own `args.create_model_config`.

    Raises:
        MaxTextLoadError: the checkpoint cannot be served; in the user's terminal, before a process is started.
    """
    from vllm_maxtext_loader import families
    from vllm_maxtext_loader.conversion.config_check import reconcile

    checkpoint = prepare(args)
    model_config = create()
    if _serve_as_text(args, checkpoint, model_config):
        model_config = create()
    refuse_unsupported_model(model_config)
    wanted = families.dims_of_config(model_config.hf_config, checkpoint.items)
    family = families.by_name(checkpoint.dims.family)
    reconcile(family, checkpoint.dims, wanted, checkpoint.items)
    if family.begins_with_bos:
        warn_without_bos(model_config, family.title)
    return model_config


def prepare(args: EngineArgs) -> Probe:
    """Opens the checkpoint and makes `model` a directory vLLM understands; once per EngineArgs."""
    if (done := getattr(args, _PREPARED, None)) is not None:
        return done
    from vllm_maxtext_loader.engine.probe import probe

    _check_model_impl()
    refuse_unsupported(args)
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
            f"MODEL_IMPL_TYPE={asked}: --load-format maxtext loads into vLLM's own model (torchax), not into "
            f"tpu-inference's JAX model, whose parameters have other names and layouts. Unset MODEL_IMPL_TYPE, or set it "
            f"to vllm."
        )


_DRAFTS_WITHOUT_WEIGHTS = ("ngram", "[ngram]", "ngram_gpu", "suffix")
"""Methods of speculative decoding that propose tokens from the text so far."""


def refuse_unsupported(args: EngineArgs) -> None:
    """Refuses engine arguments that this loader cannot serve, before anything is read.

    Raises:
        EngineError: with the option, and what to do instead.
    """
    if args.pipeline_parallel_size > 1:
        raise EngineError(
            f"--pipeline-parallel-size {args.pipeline_parallel_size}: --load-format maxtext cannot fill a model that is split "
            f"into pipeline stages yet. Use --tensor-parallel-size (and --enable-expert-parallel) instead."
        )
    if args.quantization is not None:
        raise EngineError(f"--quantization {args.quantization}: {_NOT_QUANTIZED}")
    if (args.additional_config or {}).get("quantization"):
        raise EngineError(f'--additional-config with "quantization" (qwix): {_NOT_QUANTIZED}')
    if str(args.model_impl).rpartition(".")[2].lower() in ("transformers", "terratorch"):
        raise EngineError(
            f"--model-impl {args.model_impl}: --load-format maxtext loads into vLLM's own model class only. Leave the "
            f"option out."
        )
    speculative = dict(args.speculative_config or {})
    method = speculative.get("method") or args.spec_method
    draft = speculative.get("model") or args.spec_model
    if (method or draft) and not {method, draft} & set(_DRAFTS_WITHOUT_WEIGHTS):
        raise EngineError(
            f"--speculative-config (method {method}, model {draft}): a MaxText checkpoint holds no draft model, and "
            f"--load-format maxtext cannot load one from elsewhere yet. Use a method without weights (ngram, suffix), or "
            f"export the checkpoint (`vllm-maxtext export`) and serve it with the default load format."
        )


def refuse_unsupported_model(model_config: ModelConfig) -> None:
    """Refuses a configuration that asks for quantized weights.

    Raises:
        EngineError: with the method found.
    """
    if model_config.quantization is not None:
        raise EngineError(
            f"{model_config.model}: its configuration asks for quantization ({model_config.quantization}): {_NOT_QUANTIZED}"
        )


_NOT_QUANTIZED = (
    "--load-format maxtext serves weights in the dtype they are loaded in (--dtype), not quantized: the unquantized weights "
    "would have to fit the host's memory, and tpu-inference 0.32 quantizes no bfloat16 checkpoint on its torchax path. "
    "Leave it out; --kv-cache-dtype fp8 is not affected."
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
    from vllm_maxtext_loader import families

    config = model_config.hf_config
    if checkpoint.dims.has_vision or getattr(config, "vision_config", None) is None:
        return False
    family = families.of_model_type(config.model_type, checkpoint.items)
    text_architecture = next(iter(family.architectures.values()))
    if config.architectures == [text_architecture]:
        return False
    if callable(args.hf_overrides):
        raise EngineError(
            f"{checkpoint.items}: has no vision tower, but the configuration has. Let hf_overrides set "
            f'architectures to ["{text_architecture}"].'
        )
    logger.warning(
        "%s has no vision tower: serving text only (%s), though the configuration is multimodal.",
        checkpoint.items,
        text_architecture,
    )
    args.hf_overrides = {**args.hf_overrides, "architectures": [text_architecture]}
    return True


def warn_without_bos(model_config: ModelConfig, family: str) -> None:
    """Says once if completion prompts will start without <bos>, which the family was trained to see first.

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
            "Tokenizer %s does not put <bos> before a completion prompt. %s was trained with it and answers badly "
            "without: begin prompts with <bos>, or give the tokenizer of the published model. Chat completions are as their "
            "template writes them.",
            model_config.tokenizer,
            family,
        )


PROCESSOR_FILES = (
    "*processor_config.json",
    "chat_template*",
    "tokenizer*",
    "special_tokens_map.json",
)
"""What transformers makes a multimodal processor of."""


def processor_files(args: EngineArgs, checkpoint: Probe) -> list[Path]:
    """Files of the image processor: vLLM looks for them next to config.json; they come from the tokenizer's repository.

    Empty for a checkpoint without a vision tower.

    Raises:
        EngineError: the tokenizer's repository cannot be downloaded.
    """
    if not checkpoint.dims.has_vision or args.tokenizer is None:
        return []
    from huggingface_hub import snapshot_download

    try:
        source = (
            args.tokenizer
            if os.path.isdir(args.tokenizer)
            else snapshot_download(
                args.tokenizer,
                revision=args.tokenizer_revision,
                allow_patterns=list(PROCESSOR_FILES),
                cache_dir=args.download_dir,
                token=args.hf_token,
            )
        )
    except (OSError, ValueError) as error:
        raise EngineError(
            f"{checkpoint.items}: has a vision tower, and its image processor is taken from the tokenizer's repository; "
            f"{args.tokenizer} cannot be downloaded: {error}"
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

    from vllm_maxtext_loader.huggingface.config import choose_preset, make_config

    config = make_config(checkpoint.dims, model_name, checkpoint.items)
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True)
    links = {file.name: file.resolve() for file in beside}
    digest = hashlib.sha256(f"{text}{sorted(links.items())}".encode()).hexdigest()[:16]
    directory = Path(vllm.envs.VLLM_CACHE_ROOT) / "maxtext" / digest
    path = directory / "config.json"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with atomic_file(path) as file:
                file.write(text)
        for name, target in links.items():
            with contextlib.suppress(FileExistsError):
                (directory / name).symlink_to(target)
    except (OSError, OptionError) as error:
        raise EngineError(
            f"{directory}: the checkpoint's config.json cannot be written here ({error}). Set "
            f"VLLM_CACHE_ROOT to a directory that this user may write to."
        ) from error
    logger.info(
        "Configuration read from the checkpoint's shapes; what they cannot tell (sliding window, rope, top-k) is %s's: %s",
        choose_preset(checkpoint.dims, model_name, checkpoint.items).name,
        path,
    )
    return directory
