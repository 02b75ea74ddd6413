"""The synthesised configuration against the published ones, field by field (tests/fixtures/published.json: MaxText 0.2.5)."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from transformers import Gemma4Config

from support.checkpoints import FIXTURES
from vllm_maxtext_loader.conversion.dims import LayerDims, ModelDims
from vllm_maxtext_loader.errors import ConfigMismatchError
from vllm_maxtext_loader.families.gemma4 import FAMILY
from vllm_maxtext_loader.families.gemma4_config import PUBLISHED_VOCAB
from vllm_maxtext_loader.huggingface.config import make_config, match_presets

PRESETS = {preset.name: preset for preset in FAMILY.presets}

PUBLISHED: dict[str, dict[str, Any]] = json.loads((FIXTURES / "published.json").read_text())

DIFFERENT: dict[str, dict[str, str]] = {
    # 26B's value, copied with the rest of its dictionary; a model without experts has no use for it.
    "gemma4-31b": {"text_config.moe_intermediate_size": "a leftover of 26B's"},
    # MaxText has no clip bounds and computes the unclipped function.
    "gemma4-e2b": {
        "vision_config.use_clipped_linears": "MaxText's vision tower does not clip",
        "text_config.expert_intermediate_size": "no field of transformers', and null",
    },
    "gemma4-e4b": {
        "vision_config.use_clipped_linears": "MaxText's vision tower does not clip",
        "text_config.expert_intermediate_size": "no field of transformers', and null",
    },
}
"""Fields that deliberately differ from the record, and why."""

IGNORED = ("transformers_version", "_name_or_path", "architectures", "audio_config")
"""Of the file, not of the model; and audio, which MaxText's Gemma 4 has no weights for."""


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Fields by dotted name, one level of sub-configurations deep."""
    fields: dict[str, Any] = {}
    for key, value in config.items():
        if key in IGNORED:
            continue
        if key in ("text_config", "vision_config"):
            fields |= flat(value, f"{key}.")
        else:
            fields[prefix + key] = value
    return fields


def published_dims(name: str) -> ModelDims:
    """Dimensions of a published model with its vision tower."""
    return FAMILY.from_config(Gemma4Config(**PUBLISHED[name]))


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_the_published_dimensions(name: str) -> None:
    dims = published_dims(name)
    assert dims.sizes["vocab"] == PUBLISHED_VOCAB
    assert dims.without_vision() == PRESETS[name].dims
    assert [preset.name for preset in match_presets(dims)] == [name]


def test_what_differs_is_named_in_words() -> None:
    dims = published_dims("gemma4-26b")
    layers = [
        dataclasses.replace(layer, sizes={**layer.sizes, "mlp": 999}) if index in (5, 7) else layer
        for index, layer in enumerate(dims.layers)
    ]
    with pytest.raises(ConfigMismatchError) as raised:
        make_config(dataclasses.replace(dims, layers=tuple(layers)).with_sizes(hidden=2048), None, "here")
    assert (
        "here: these dimensions are no published Gemma 4's, so sliding window, rope and top-k are unknown. Nearest: "
        "gemma4-26b, which differs in hidden_size: 2048 (published 2816); layer 5: full attention, 2 KV heads of 512, "
        "keys as values, MLP width 999 (published full attention, 2 KV heads of 512, keys as values, MLP width 2112). "
    ) in str(raised.value)


@pytest.mark.parametrize("name", PRESETS)
def test_configuration_is_the_published_one(name: str) -> None:
    made = flat(make_config(published_dims(name), None, "test").to_dict())
    # Through transformers, so that what the record leaves out is transformers' default on both sides.
    wanted = flat(Gemma4Config(**PUBLISHED[name]).to_dict())
    differences = {
        field: (made.get(field, "absent"), wanted.get(field, "absent"))
        for field in made.keys() | wanted.keys()
        if made.get(field, "absent") != wanted.get(field, "absent")
    }
    assert differences.keys() == DIFFERENT.get(name, {}).keys(), differences


def test_what_transformers_cannot_express_is_named_in_words() -> None:
    dims = published_dims("gemma4-26b").without_vision()
    last = dataclasses.replace(dims.layers[0])
    with pytest.raises(ConfigMismatchError) as raised:
        make_config(dataclasses.replace(dims, layers=(*dims.layers[:-1], last)), "gemma4-26b", "here")
    assert str(raised.value).startswith(
        "here: transformers cannot express this model. The checkpoint has layer 29: sliding-window attention, "
        "8 KV heads of 256, MLP width 2112 (transformers full attention, 2 KV heads of 512, keys as values, MLP width 2112)."
    )
    assert "LayerDims" not in str(raised.value)


def test_what_transformers_refuses_is_one_named_error() -> None:
    """A model whose layers all share keys and values with an earlier one: its configuration has no number for them."""
    dims = published_dims("gemma4-26b").without_vision()
    layers = tuple(
        LayerDims(
            {name: size for name, size in layer.sizes.items() if name != "kv_heads"},
            layer.tags - {"keys", "values"},
        )
        for layer in dims.layers
    )
    dims = dataclasses.replace(dims, layers=layers)
    with pytest.raises(ConfigMismatchError, match=r"here: transformers refuses .*num_key_value_heads"):
        make_config(dims, "gemma4-26b", "here")
