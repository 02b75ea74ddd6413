"""vLLM's side: `model` may be a MaxText checkpoint. `plugin` patches EngineArgs; what it then does is here.

vLLM expects `model` to be a Hugging Face name or directory: it would mirror a bucket, or look for config.json. While
vLLM makes its configuration, `model` is a small local directory that holds the checkpoint's configuration, and the
checkpoint's path travels in `model_loader_extra_config`. Afterwards the EngineArgs are again what the user gave, so that
they can be changed and used once more. Written against vLLM 0.32.0 engine/arg_utils.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_maxtext_loader.engine import config_dir, nodes
from vllm_maxtext_loader.engine.probe import Probe, check_vocabulary, no_tokenizer, probe
from vllm_maxtext_loader.engine.published_config import find_config, matching_config
from vllm_maxtext_loader.errors import CheckpointNotFoundError, EngineError, NotACheckpointError
from vllm_maxtext_loader.options import LOAD_FORMAT, SERVED, Options

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.config import ModelConfig
    from vllm.engine.arg_utils import EngineArgs

    from vllm_maxtext_loader.conversion.family import Family

logger = init_logger("vllm." + __name__)

_PREPARED = "_maxtext_prepared"

_REPLACED = ("model", "model_loader_extra_config", "served_model_name", "tokenizer", "hf_overrides")
"""Fields of EngineArgs that are others while vLLM makes its configuration."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What EngineArgs have been prepared for.

    Attributes:
        checkpoint: that will be served.
        source: the checkpoint, as the user gave it.
    """

    checkpoint: Probe
    source: str


@contextlib.contextmanager
def prepared(args: EngineArgs) -> Iterator[Prepared]:
    """Opens the checkpoint and, for the duration, makes `model` a directory vLLM understands.

    Inside itself (vLLM's create_engine_config calls create_model_config) it opens nothing again.

    Raises:
        MaxTextLoadError: the checkpoint cannot be served; in the user's terminal, before a process is started.
    """
    if (outer := vars(args).get(_PREPARED)) is not None:
        yield outer
        return
    before = {name: getattr(args, name) for name in _REPLACED}
    try:
        vars(args)[_PREPARED] = found = _prepare(args)
        yield found
    finally:
        vars(args).pop(_PREPARED, None)
        for name, value in before.items():
            setattr(args, name, value)


def make_model_config(args: EngineArgs, create: Callable[[], ModelConfig]) -> ModelConfig:
    """vLLM's ModelConfig for a checkpoint.

    Args:
        args: the engine's arguments; see `prepared`.
        create: vLLM's own `args.create_model_config`.

    Raises:
        MaxTextLoadError: the checkpoint cannot be served; in the user's terminal, before a process is started.
    """
    from vllm_maxtext_loader import families
    from vllm_maxtext_loader.conversion.config_check import VOCAB, reconcile

    with prepared(args) as found:
        checkpoint = found.checkpoint
        model_config = create()
        if _serve_as_text(args, checkpoint, model_config):
            model_config = create()
        refuse_unsupported_model(model_config)
        wanted = families.dims_of_config(model_config.hf_config, checkpoint.items)
        family = families.by_name(checkpoint.dims.family)
        reconcile(family, checkpoint.dims, wanted, checkpoint.items)
        if checkpoint.dims.sizes[VOCAB] > wanted.sizes[VOCAB]:
            check_vocabulary(checkpoint.items, wanted.sizes[VOCAB])
        if family.begins_with_bos:
            warn_without_bos(model_config, family.title)
        if checkpoint.dims.has_vision:
            warn_of_images(model_config, family)
        vars(model_config)[SERVED] = {
            "path": found.source,
            "items": checkpoint.items,
            "step": checkpoint.step,
            "model": model_config.model,
            **nodes.decided(checkpoint),
        }
        config_dir.attach(model_config)
        return model_config


def _prepare(args: EngineArgs) -> Prepared:
    """Opens the checkpoint and replaces the fields in `_REPLACED`."""
    import vllm.envs

    _check_model_impl()
    refuse_unsupported(args)
    options = Options.parse(args.model_loader_extra_config)
    source = options.checkpoint or args.model
    is_made = options.checkpoint is None and args.hf_config_path is None
    published = find_config(args) if is_made and options.model_name is None else None
    look = functools.partial(
        probe,
        source,
        options.step,
        model_name=options.model_name,
        tokenizer=args.tokenizer,
        cache=Path(vllm.envs.VLLM_CACHE_ROOT) / "maxtext" / "tokenizers",
        draft=_speculative(args).get("model"),
    )
    config = None
    try:
        checkpoint = look(trim=is_made and published is None)
        if published is not None:
            config = matching_config(published, checkpoint.dims, checkpoint.items)
            checkpoint = checkpoint if config is not None else look(trim=True)
    except (CheckpointNotFoundError, NotACheckpointError) as error:
        if options.checkpoint is None and _is_hugging_face(args.model):
            raise type(error)(
                f"{error} To load a checkpoint under this Hugging Face configuration, name it: "
                f'--model-loader-extra-config \'{{"checkpoint": "gs://… or a path"}}\'.'
            ) from error
        raise
    nodes.refuse_newest(args, checkpoint)
    # All processes and hosts must load the same step, whatever is committed meanwhile.
    args.model_loader_extra_config = {**options.given(), "checkpoint": checkpoint.items}
    args.tokenizer = checkpoint.tokenizer or args.tokenizer
    if options.checkpoint is not None:
        return Prepared(checkpoint, source=source)
    if args.tokenizer is None and not args.skip_tokenizer_init:
        raise no_tokenizer(source)
    if args.served_model_name is None:
        args.served_model_name = [args.model]
    if args.hf_config_path is not None:
        args.model = args.hf_config_path
        return Prepared(checkpoint, source=source)
    args.model = str(_make_config_dir(args, checkpoint, options.model_name, config))
    return Prepared(checkpoint, source=source)


def _make_config_dir(
    args: EngineArgs, checkpoint: Probe, model_name: str | None, published: PretrainedConfig | None
) -> Path:
    """Writes the directory of configuration, with what the tokenizer's repository has for it."""
    found = config_dir.generation_files(args)
    files = [file for file in found or () if file.name != "tokenizer_config.json"]
    # With a directory given, vLLM looks there and nowhere else.
    is_used = args.generation_config in ("auto", "vllm")
    return config_dir.write_config_dir(
        checkpoint,
        model_name,
        list(dict.fromkeys([*files, *config_dir.processor_files(args, checkpoint)])),
        config_dir.kind_of_model(found) if is_used else None,
        published,
    )


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
    speculative = _speculative(args)
    method, draft = speculative.get("method"), speculative.get("model")
    if not (method or draft) or {method, draft} & set(_DRAFTS_WITHOUT_WEIGHTS):
        return
    if draft is None:
        raise EngineError(
            f"--speculative-config (method {method}): a MaxText checkpoint holds no draft model. Name one that is in Hugging "
            f'Face format ("method": "eagle3", "model": HF_ID_OR_DIR), or use a method without weights (ngram).'
        )
    if method != "eagle3":
        raise EngineError(
            f"--speculative-config (method {method}, model {draft}): of the methods with a draft model, --load-format maxtext "
            f'serves "method": "eagle3" only. Use that, or a method without weights (ngram).'
        )
    load_format = _field(speculative.get("draft_load_config"), "load_format")
    if str(load_format).lower() == LOAD_FORMAT:
        raise EngineError(
            f"--speculative-config (draft {draft}, draft_load_config with load_format {LOAD_FORMAT}): a draft model cannot be "
            f"loaded from a MaxText checkpoint yet. Name one in Hugging Face format."
        )


def _speculative(args: EngineArgs) -> dict[str, Any]:
    """--speculative-config with the single options in it, as vLLM's create_speculative_config has it."""
    given = {key.replace("-", "_"): value for key, value in (args.speculative_config or {}).items()}
    single = {"method": args.spec_method, "model": args.spec_model}
    return {**{key: value for key, value in single.items() if value is not None}, **given}


def _field(config: Any, name: str) -> Any:
    """A value of a configuration that is a dictionary or an object."""
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


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


def warn_of_images(model_config: ModelConfig, family: Family) -> None:
    """Says once what tpu-inference 0.32 does not compute of a model with images, whatever the load format."""
    from vllm.platforms import current_platform

    config: Any = model_config.hf_config.get_text_config()
    if not (model_config.is_multimodal_model and current_platform.is_tpu()):
        return
    if getattr(config, "hidden_size_per_layer_input", 0):
        # Found by compiling: the program of such a step does not read the table.
        logger.warning_once(
            "%s: tpu-inference 0.32 leaves out the per-layer embeddings of every token in a step that holds an image, with any "
            "load format: answers about images are wrong. Steps without images are right; --language-model-only serves text.",
            family.title,
        )
    both_ways = family.both_ways_in_images or getattr(config, "use_bidirectional_attention", None) == "vision"
    if both_ways:
        logger.warning_once(
            "%s was trained with tokens of an image that attend to the whole image. tpu-inference 0.32 computes causal attention "
            "there, with any load format: answers about images deviate a little.",
            family.title,
        )


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
