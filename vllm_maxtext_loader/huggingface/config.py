"""A Hugging Face configuration for a checkpoint that comes with none.

MaxText's checkpoint metadata holds neither model name nor dimensions. Dimensions are read off the shapes; what shapes
cannot tell (sliding window, rope, top-k, epsilon, token ids) is the only published model's of those dimensions. Where
there is none, or several that differ, a `model_name` or a configuration has to say.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from vllm_maxtext_loader import families
from vllm_maxtext_loader.conversion.config_check import VOCAB
from vllm_maxtext_loader.conversion.dims import LayerDims, ModelDims
from vllm_maxtext_loader.conversion.family import Family, Preset
from vllm_maxtext_loader.errors import ConfigMismatchError, EngineError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def match_presets(dims: ModelDims) -> list[Preset]:
    """Published models of these dimensions; vocabulary padding and the vision tower do not count."""
    family = families.by_name(dims.family)
    text = _shown(family, dims.without_vision())
    return [
        preset
        for preset in family.presets
        if text.with_sizes(vocab=preset.dims.sizes[VOCAB]) == _shown(family, preset.dims)
        and preset.dims.sizes[VOCAB] <= text.sizes[VOCAB]
    ]


def _shown(family: Family, dims: ModelDims) -> ModelDims:
    """`dims` without what shapes do not show."""
    return dataclasses.replace(dims, tags=dims.tags - family.config_tags)


def config_classes(family: Family) -> dict[str, type[PretrainedConfig]]:
    """transformers' configuration classes of a family, by model_type.

    Raises:
        EngineError: the installed transformers does not have them.
    """
    import transformers

    try:
        return {kind: getattr(transformers, name) for kind, name in family.model_types.items()}
    except (AttributeError, ImportError) as error:
        raise EngineError(
            f"the installed transformers does not have {family.title} ({error}). Install the version that "
            f"vllm-maxtext-loader requires: pip install --upgrade vllm-maxtext-loader."
        ) from error


def make_config(dims: ModelDims, model_name: str | None, where: str) -> PretrainedConfig:
    """Configuration of a model of the given dimensions.

    Args:
        dims: read from the checkpoint's shapes.
        model_name: preset to take the rest from; None means the one of the same dimensions.
        where: path, for messages.

    Returns:
        A configuration of the family's class, its `architectures` vLLM's.

    Raises:
        OptionError: no preset has that name.
        ConfigMismatchError: no published model, or several, have these dimensions, or transformers cannot express them.
        EngineError: the installed transformers does not have the family.
    """
    family = families.by_name(dims.family)
    preset = choose_preset(dims, model_name, where)
    dims = with_config_tags(dims, preset)
    fields = family.config_fields(dims, preset)
    kind = fields.pop("model_type")
    try:
        config: Any = config_classes(family)[kind](**fields)
        expressed = family.from_config(config)
    except EngineError:
        raise
    except Exception as error:  # transformers validates with several libraries, each with errors of its own.
        detail = " ".join(str(error).split())[:400]
        raise ConfigMismatchError(
            f"{where}: transformers refuses a configuration of these dimensions ({type(error).__name__}: {detail})."
        ) from error
    if expressed.sizes[VOCAB] - dims.sizes[VOCAB] in range(1, family.added_vocab + 1):
        expressed = expressed.with_sizes(vocab=dims.sizes[VOCAB])
    if expressed != dims:
        end = (
            f" (The {family.title} of transformers always ends in a full-attention layer.)"
            if family.ends_in_full_attention
            else ""
        )
        raise ConfigMismatchError(
            f"{where}: transformers cannot express this model. The checkpoint has "
            f"{'; '.join(_differences(family, dims, expressed, 'transformers'))}.{end} hf_weights() of the Python "
            f"interface still converts such a checkpoint."
        )
    return config


def with_config_tags(dims: ModelDims, preset: Preset) -> ModelDims:
    """`dims` with the tags that shapes do not show, as a preset has them."""
    family = families.by_name(dims.family)
    return dataclasses.replace(
        dims, tags=(dims.tags - family.config_tags) | (preset.dims.tags & family.config_tags)
    )


def choose_preset(dims: ModelDims, model_name: str | None, where: str) -> Preset:
    """The published model to take from what shapes cannot tell. See `make_config` for arguments and errors."""
    family = families.by_name(dims.family)
    if model_name is not None:
        return _named_preset(family, dims, model_name, where)
    matched = match_presets(dims)
    if len(matched) == 1:
        return matched[0]
    advice = (
        f"Give the model's own configuration (--model HF_DIR --model-loader-extra-config "
        f'\'{{"checkpoint": "…"}}\'), or a model_name '
        f"({', '.join(preset.name for preset in matched or family.presets)}) to take the rest from."
    )
    if matched:
        raise ConfigMismatchError(
            f"{where}: several published models have these dimensions, and shapes do not tell them apart: "
            f"{'; '.join(_distinctions(matched))}. {advice}"
        )
    text = dims.without_vision()
    nearest = min(family.presets, key=lambda preset: len(_differences(family, text, preset.dims)))
    raise ConfigMismatchError(
        f"{where}: these dimensions are no published {family.title}'s, so {_UNKNOWN} are unknown. Nearest: "
        f"{nearest.name}, which differs in {'; '.join(_differences(family, text, nearest.dims))}. {advice}"
    )


_UNKNOWN = "sliding window, rope and top-k"


def _named_preset(family: Family, dims: ModelDims, model_name: str, where: str) -> Preset:
    other, preset = families.find_preset(model_name)
    if other is not family:
        raise ConfigMismatchError(
            f"{where}: model_name {preset.name} is a {other.title}, the checkpoint a {family.title} "
            f"({', '.join(known.name for known in family.presets)})."
        )
    text = dims.without_vision()
    for tag, what in family.kinds.items():
        has, should = tag in text.tags, tag in preset.dims.tags
        if has != should:
            raise ConfigMismatchError(
                f"{where}: model_name {preset.name} {'has' if should else 'has no'} {what}, the checkpoint "
                f"{'has them' if has else 'has none'}."
            )
    experts = dims.sizes.get("experts")
    if preset.top_k and experts and preset.top_k > experts:
        raise ConfigMismatchError(
            f"{where}: {preset.name} routes each token to {preset.top_k} experts, the checkpoint has {experts}. "
            f"Give a Hugging Face configuration instead of model_name."
        )
    return preset


def _distinctions(presets: list[Preset]) -> list[str]:
    """Each preset with the settings in which it differs from another."""
    keys = sorted({key for preset in presets for key in preset.fields})
    differing = [key for key in keys if len({json.dumps(p.fields.get(key)) for p in presets}) > 1]
    return [
        f"{preset.name} ({', '.join(preset.published)}: "
        f"{', '.join(f'{key} {json.dumps(preset.fields.get(key))}' for key in differing)})"
        for preset in presets
    ]


def _differences(
    family: Family, found: ModelDims, published: ModelDims, source: str = "published"
) -> list[str]:
    """What differs between two models' dimensions, in words; `source` names the second."""
    pairs: dict[str, tuple[Any, Any]] = {"layers": (len(found.layers), len(published.layers))}
    for axis in dict.fromkeys([*published.sizes, *found.sizes]):
        if axis != VOCAB:
            pairs[family.axes.get(axis, axis)] = (found.sizes.get(axis), published.sizes.get(axis))
    for index, (layer, wanted) in enumerate(zip(found.layers, published.layers, strict=False)):
        if layer != wanted:
            pairs[f"layer {index}"] = (_describe_layer(family, layer), _describe_layer(family, wanted))
            break
    return [f"{name}: {a} ({source} {b})" for name, (a, b) in pairs.items() if a != b]


def _describe_layer(family: Family, layer: LayerDims) -> str:
    """A layer in words."""
    kind, *words = [field.words[tag not in layer.tags] for tag, field in family.tag_fields.items()] or [""]
    sizes = layer.sizes
    heads = f"{sizes['kv_heads']} KV heads" if "kv_heads" in sizes else "heads"
    heads = f"{heads} of {sizes['head_dim']}" if "head_dim" in sizes else ""
    width = f"MLP width {sizes['mlp']}" if "mlp" in sizes else ""
    return ", ".join(word for word in (kind, heads, *words, width) if word)
