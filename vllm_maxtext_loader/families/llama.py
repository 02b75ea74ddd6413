"""Llama 2, 3 and 3.1, and Mistral.

Read the table against MaxText 0.2.5 `models/llama2.py`, `models/mistral.py`, `layers/attentions.py` (left) and transformers
5.19 `models/llama/modeling_llama.py` (right). Two values rules:

- the query's kernel holds the attention's 1/sqrt(head_dim) (`attentions.py` init_query_w); it is undone in float32 and
  rounded once. 85 % of bfloat16 values come back bit by bit at head_dim 128; all of them give what is stored again.
- Llama 3.1 rotates pairs that lie next to each other (`embeddings.py` LLaMARotaryEmbedding), all others halves, as Hugging
  Face does. The trees look alike. The configuration decides: rope_type "llama3" means adjacent pairs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vllm_maxtext_loader.conversion.dims import ModelDims
from vllm_maxtext_loader.conversion.family import Family, Preset, TagField, WeightConverter
from vllm_maxtext_loader.conversion.values import MultiplyByRoot
from vllm_maxtext_loader.families import standard

_PAIRS = "rope_pairs"
_LLAMA31_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
    "rope_type": "llama3",
}


def attention(pairs: str | None) -> tuple[WeightConverter, ...]:
    """The standard rows with a scaled query; `pairs` is the tag of models with adjacent rotary pairs."""
    changes: dict[str, dict[str, Any]] = {
        "self_attention.query.kernel": {"values": (MultiplyByRoot("head_dim"),), "pairs": pairs},
        "self_attention.key.kernel": {"pairs": pairs},
    }
    return tuple(dataclasses.replace(row, **changes.get(row.leaf, {})) for row in standard.ATTENTION)


def _from_config(config: Any) -> ModelDims:
    """Dimensions of a LlamaConfig or MistralConfig."""
    dims = standard.decoder_dims("llama", config, experts=None, expert_mlp=None)
    rope = config.rope_parameters or {}
    return dataclasses.replace(
        dims, tags=dims.tags | ({_PAIRS} if rope.get("rope_type") == "llama3" else set())
    )


def _config_fields(dims: ModelDims, preset: Preset) -> dict[str, Any]:
    fields = {
        **standard.decoder_fields(dims),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "mlp_bias": False,
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "use_cache": True,
        **preset.fields,
    }
    return {**fields, "architectures": [FAMILY.architectures[fields["model_type"]]]}


def _preset(
    name: str,
    published: tuple[str, ...],
    rope: float | dict[str, Any],
    positions: int,
    tokens: tuple[int, int],
    stops: tuple[int, ...],
    model_type: str = "llama",
    **dims: Any,
) -> Preset:
    """A published model.

    Args:
        name: MaxText's name.
        published: Hugging Face names.
        rope: theta, or all parameters of the rotary embedding.
        positions: longest context.
        tokens: bos_token_id and eos_token_id of config.json.
        stops: eos_token_id of the instruction-tuned model's generation_config.json.
        model_type: of config.json.
        dims: see `standard.preset_dims`.
    """
    parameters = rope if isinstance(rope, dict) else {"rope_theta": rope, "rope_type": "default"}
    fields = {
        "bos_token_id": tokens[0],
        "eos_token_id": tokens[1],
        "max_position_embeddings": positions,
        "model_type": model_type,
        "rope_parameters": parameters,
    }
    if model_type == "mistral":
        fields["sliding_window"] = None
    tags = frozenset({_PAIRS} if isinstance(rope, dict) else ())
    sizes = standard.preset_dims("llama", head_dim=128, tags=tags, **dims)
    return Preset(name, published, sizes, fields, stops=stops, base_stops=tokens[1:])


_LLAMA3: dict[str, Any] = {"tokens": (128_000, 128_001), "vocab": 128_256}
_SIZES: dict[str, dict[str, Any]] = {
    "8b": {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "mlp": 14_336},
    "70b": {"layers": 80, "hidden": 8192, "heads": 64, "kv_heads": 8, "mlp": 28_672},
    "405b": {"layers": 126, "hidden": 16_384, "heads": 128, "kv_heads": 8, "mlp": 53_248},
}

# fmt: off
PRESETS: tuple[Preset, ...] = (
    _preset("llama2-7b", ("meta-llama/Llama-2-7b-hf",), 10_000.0, 4096, (1, 2), (2,), vocab=32_000, layers=32, hidden=4096, heads=32, kv_heads=32, mlp=11_008),
    _preset("llama2-13b", ("meta-llama/Llama-2-13b-hf",), 10_000.0, 4096, (1, 2), (2,), vocab=32_000, layers=40, hidden=5120, heads=40, kv_heads=40, mlp=13_824),
    _preset("llama2-70b", ("meta-llama/Llama-2-70b-hf",), 10_000.0, 4096, (1, 2), (2,), vocab=32_000, layers=80, hidden=8192, heads=64, kv_heads=8, mlp=28_672),
    _preset("llama3-8b", ("meta-llama/Meta-Llama-3-8B",), 500_000.0, 8192, stops=(128_001, 128_009), **_LLAMA3, **_SIZES["8b"]),
    _preset("llama3-70b", ("meta-llama/Meta-Llama-3-70B",), 500_000.0, 8192, stops=(128_001, 128_009), **_LLAMA3, **_SIZES["70b"]),
    *(
        _preset(f"llama3.1-{size}", (f"meta-llama/Llama-3.1-{size.upper()}",), _LLAMA31_ROPE, 131_072, stops=(128_001, 128_008, 128_009), **_LLAMA3, **dims)
        for size, dims in _SIZES.items()
    ),
    _preset("mistral-7b", ("mistralai/Mistral-7B-v0.1",), 1_000_000.0, 32_768, (1, 2), (2,), model_type="mistral", vocab=32_000, **_SIZES["8b"]),
)
# fmt: on
"""Source: MaxText 0.2.5 configs/models/llama*.yml, mistral-7b.yml, checkpoint_conversion/utils/hf_model_configs.py. MaxText
gives Mistral a theta of 1e6 and no sliding window; that is what a run was trained with."""

FAMILY = Family(
    name="llama",
    title="Llama",
    decoder_block="llama2 or mistral",
    converters=(*standard.OUTSIDE, *standard.NORMS, *attention(_PAIRS), *standard.MLP),
    groups=standard.GROUPS,
    axes=standard.AXES,
    per_layer=frozenset({"head_dim", "kv_heads", "mlp"}),
    marks=("pre_self_attention_layer_norm.scale", "self_attention.query.kernel", "mlp.wi_0.kernel"),
    absent=("self_attention.query_norm.scale", "self_attention.query.bias"),
    prefixes=standard.PREFIXES,
    model_types={"llama": "LlamaConfig", "mistral": "MistralConfig"},
    architectures={"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"},
    from_config=_from_config,
    config_fields=_config_fields,
    presets=PRESETS,
    tag_fields={"untied": TagField("tie_word_embeddings", "False", "True")},
    kinds={"untied": "an output head of its own"},
    modules=standard.modules(),
    begins_with_bos=True,
    config_tags=frozenset({_PAIRS}),
    refused_names={
        "llama3.3-70b": (
            "MaxText 0.2.5 contradicts itself about this model: its configuration sets no rope_type, so that the model is "
            "computed with rotary halves and without scaling, while its converters write adjacent pairs for some sources. "
            "What a checkpoint of that name holds cannot be told. Give the configuration of the rotary embedding that was "
            "trained with (--model HF_DIR), or the model_name llama3-70b or llama3.1-70b"
        )
    },
)
