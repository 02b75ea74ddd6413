"""Qwen2.5 (1.5B, 7B, 14B): as Qwen3 without norms of query and key, and with biases of query, key and value.

Read the table against MaxText 0.2.5 `models/qwen2.py` (left) and transformers 5.19 `models/qwen2/modeling_qwen2.py` (right).
No value changes.
"""

from __future__ import annotations

from typing import Any

from vllm_maxtext_loader.conversion.dims import ModelDims
from vllm_maxtext_loader.conversion.family import Family, Preset, TagField, converter
from vllm_maxtext_loader.families import standard


def _from_config(config: Any) -> ModelDims:
    """Dimensions of a Qwen2Config."""
    return standard.decoder_dims("qwen2", config, experts=None, expert_mlp=None)


def _config_fields(dims: ModelDims, preset: Preset) -> dict[str, Any]:
    fields = {
        **standard.decoder_fields(dims),
        **preset.fields,
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": "qwen2",
        "rms_norm_eps": 1e-6,
        "sliding_window": None,
        "use_cache": True,
        "use_sliding_window": False,
    }
    # Its head size is hidden_size / num_attention_heads, and no field.
    del fields["head_dim"]
    return fields


def _preset(name: str, published: str, **dims: Any) -> Preset:
    fields = {
        "max_position_embeddings": 32_768,
        "rope_parameters": {"rope_theta": 1_000_000.0, "rope_type": "default"},
    }
    sizes = standard.preset_dims("qwen2", head_dim=128, **dims)
    return Preset(
        name, (f"Qwen/{published}",), sizes, fields, stops=(151_645, 151_643), base_stops=(151_643,)
    )


# fmt: off
PRESETS: tuple[Preset, ...] = (
    _preset("qwen2.5-1.5b", "Qwen2.5-1.5B-Instruct", vocab=151_936, layers=28, hidden=1536, heads=12, kv_heads=2, mlp=8960, tied=True),
    _preset("qwen2.5-7b", "Qwen2.5-7B-Instruct", vocab=152_064, layers=28, hidden=3584, heads=28, kv_heads=4, mlp=18_944),
    _preset("qwen2.5-14b", "Qwen2.5-14B-Instruct", vocab=152_064, layers=48, hidden=5120, heads=40, kv_heads=8, mlp=13_824),
)
# fmt: on
"""Source: MaxText 0.2.5 configs/models/qwen2.5-*.yml, checkpoint_conversion/utils/hf_model_configs.py."""

FAMILY = Family(
    name="qwen2",
    title="Qwen2.5",
    decoder_block="qwen2",
    converters=(
        *standard.OUTSIDE,
        *standard.NORMS,
        *standard.ATTENTION,
        converter("self_attention.query.bias", "self_attn.q_proj.bias", "heads head_dim -> (heads head_dim)"),
        converter(
            "self_attention.key.bias", "self_attn.k_proj.bias", "kv_heads head_dim -> (kv_heads head_dim)"
        ),
        converter(
            "self_attention.value.bias", "self_attn.v_proj.bias", "kv_heads head_dim -> (kv_heads head_dim)"
        ),
        *standard.MLP,
    ),
    groups=standard.GROUPS,
    axes=standard.AXES,
    per_layer=frozenset({"head_dim", "kv_heads", "mlp"}),
    marks=("pre_self_attention_layer_norm.scale", "self_attention.query.bias"),
    absent=("self_attention.query_norm.scale",),
    prefixes=standard.PREFIXES,
    model_types={"qwen2": "Qwen2Config"},
    architectures={"qwen2": "Qwen2ForCausalLM"},
    from_config=_from_config,
    config_fields=_config_fields,
    presets=PRESETS,
    tag_fields={"untied": TagField("tie_word_embeddings", "False", "True")},
    kinds={"untied": "an output head of its own"},
    modules=standard.modules(),
)
