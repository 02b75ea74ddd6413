"""The registry of model families. A family is one file here and one line in `FAMILIES`; see docs/families.md."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from vllm_maxtext_loader.conversion.dims import ModelDims
from vllm_maxtext_loader.conversion.family import Family, Preset
from vllm_maxtext_loader.errors import ConfigMismatchError, OptionError, UnknownModelError
from vllm_maxtext_loader.families import gemma3, gemma4, gpt_oss, llama, mixtral, qwen2, qwen3

FAMILIES: tuple[Family, ...] = (
    gemma4.FAMILY,
    gemma3.FAMILY,
    qwen3.FAMILY,
    qwen2.FAMILY,
    llama.FAMILY,
    mixtral.FAMILY,
    gpt_oss.FAMILY,
)

UNSUPPORTED: dict[str, str] = {
    "pre_self_attention_norm_local": "Gemma 2",
    "wkv_a": "DeepSeek or Kimi (multi-head latent attention)",
    "in_proj_qkvz": "Qwen3-Next or Qwen3.5 (gated delta net)",
    "Llama4MoEBlock_0": "Llama 4",
}
"""Parts of leaf names by which models that MaxText writes and this package cannot load are recognised."""

_BY_NAME = {family.name: family for family in FAMILIES}


def by_name(name: str) -> Family:
    """The family with a name of `FAMILIES`."""
    return _BY_NAME[name]


def identify(leaves: Collection[str], where: str) -> Family:
    """The family that a tree is of: the one that none of the leaves speaks against.

    Args:
        leaves: dotted paths inside the model.
        where: path, for messages.

    Raises:
        UnknownModelError: no family, with what spoke against each; or, by a fault of the registry, several.
    """
    objections = {family.title: family.objections(leaves) for family in FAMILIES}
    fitting = [family for family in FAMILIES if not objections[family.title]]
    if len(fitting) == 1:
        return fitting[0]
    first = ", ".join(list(leaves)[:4])
    if fitting:
        raise UnknownModelError(
            f"{where}: fits several model families: {', '.join(family.title for family in fitting)}. This is a fault of "
            f"vllm-maxtext-loader; first leaves: {first}."
        )
    parts = {part for leaf in leaves for part in leaf.split(".")}
    for part, title in UNSUPPORTED.items():
        if part in parts:
            raise UnknownModelError(
                f"{where}: is {title}, which vllm-maxtext-loader does not load yet. Convert it with MaxText's to_huggingface "
                f"and serve the result with vLLM's default loader."
            )
    against = "; ".join(f"not {title} ({', '.join(found)})" for title, found in objections.items())
    raise UnknownModelError(
        f"{where}: is not a model of a family this version knows: {against}. It has {len(leaves)} leaves, first {first}."
    )


def of_model_type(found: Any, where: str) -> Family:
    """The family whose configurations have a model_type.

    Raises:
        ConfigMismatchError: there is none.
    """
    for family in FAMILIES:
        if found in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise ConfigMismatchError(f"{where}: model_type is {found!r}, expected one of {known}.")


def dims_of_config(config: Any, where: str) -> ModelDims:
    """Dimensions that a transformers configuration demands.

    Args:
        config: of a class that some family names.
        where: path of the checkpoint or file, for messages.

    Raises:
        ConfigMismatchError: no family has its model_type.
    """
    return of_model_type(getattr(config, "model_type", None), where).from_config(config)


def find_preset(model_name: str) -> tuple[Family, Preset]:
    """The published model with MaxText's name ("gemma4-26b"); "_" and a trailing "-it" do not matter.

    Raises:
        OptionError: there is none; with the names there are.
    """
    name = model_name.lower().replace("_", "-").removesuffix("-it")
    for family in FAMILIES:
        if name in family.refused_names:
            raise OptionError(f"model_name {model_name!r} is not supported: {family.refused_names[name]}.")
        for preset in family.presets:
            if preset.name == name:
                return family, preset
    raise OptionError(f"model_name {model_name!r} is unknown; known: {', '.join(preset_names())}.")


def preset_names() -> list[str]:
    """MaxText's names of all published models this version knows."""
    return [preset.name for family in FAMILIES for preset in family.presets]
