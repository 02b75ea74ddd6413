"""GPT-OSS (20B, 120B), in bfloat16 as MaxText trains it.

Read the table against MaxText 0.2.5 `models/gpt_oss.py` (left) and transformers 5.19 `models/gpt_oss/modeling_gpt_oss.py`
(right). No value changes. Gate and up take turns on the last axis of the published tensor; the experts' matrices are
published as [in, out], as MaxText has them. Every other layer, from the first, attends to a sliding window. MaxText keeps
norms in float32.
"""

from __future__ import annotations

from typing import Any

from vllm_maxtext_loader.conversion.dims import LayerDims, ModelDims
from vllm_maxtext_loader.conversion.family import (
    Family,
    LayerGroup,
    PackedModule,
    Preset,
    TagField,
    WeightConverter,
    converter,
)
from vllm_maxtext_loader.conversion.infer import set_layer_tags
from vllm_maxtext_loader.conversion.layout import Layout
from vllm_maxtext_loader.families import standard

_ATTENTION, _MLP = "GptOssAttention", "GptOssMlp"
_PERIOD = 2

# fmt: off
_ROWS: tuple[WeightConverter, ...] = (
    converter(f"{_ATTENTION}.query.kernel", "self_attn.q_proj.weight", "hidden heads head_dim -> (heads head_dim) hidden"),
    converter(f"{_ATTENTION}.query.bias", "self_attn.q_proj.bias", "heads head_dim -> (heads head_dim)"),
    converter(f"{_ATTENTION}.key.kernel", "self_attn.k_proj.weight", "hidden kv_heads head_dim -> (kv_heads head_dim) hidden"),
    converter(f"{_ATTENTION}.key.bias", "self_attn.k_proj.bias", "kv_heads head_dim -> (kv_heads head_dim)"),
    converter(f"{_ATTENTION}.value.kernel", "self_attn.v_proj.weight", "hidden kv_heads head_dim -> (kv_heads head_dim) hidden"),
    converter(f"{_ATTENTION}.value.bias", "self_attn.v_proj.bias", "kv_heads head_dim -> (kv_heads head_dim)"),
    converter(f"{_ATTENTION}.out.kernel", "self_attn.o_proj.weight", "heads head_dim hidden -> hidden (heads head_dim)"),
    converter(f"{_ATTENTION}.out.bias", "self_attn.o_proj.bias", "hidden -> hidden"),
    converter(f"{_ATTENTION}.sinks", "self_attn.sinks", "heads -> heads"),
    converter(f"{_MLP}.gate.kernel", "mlp.router.weight", "hidden experts -> experts hidden"),
    converter(f"{_MLP}.gate.bias", "mlp.router.bias", "experts -> experts"),
    converter(f"{_MLP}.wi_0", "mlp.experts.gate_up_proj", "experts hidden expert_mlp -> experts hidden (expert_mlp part)", part=0),
    converter(f"{_MLP}.wi_1", "mlp.experts.gate_up_proj", "experts hidden expert_mlp -> experts hidden (expert_mlp part)", part=1),
    converter(f"{_MLP}.wi_0_bias", "mlp.experts.gate_up_proj_bias", "experts expert_mlp -> experts (expert_mlp part)", part=0),
    converter(f"{_MLP}.wi_1_bias", "mlp.experts.gate_up_proj_bias", "experts expert_mlp -> experts (expert_mlp part)", part=1),
    converter(f"{_MLP}.wo", "mlp.experts.down_proj", "experts expert_mlp hidden -> experts expert_mlp hidden"),
    converter(f"{_MLP}.wo_bias", "mlp.experts.down_proj_bias", "experts hidden -> experts hidden"),
)
# fmt: on


def _layers(count: int, sizes: dict[str, int]) -> tuple[LayerDims, ...]:
    return tuple(
        LayerDims(sizes, frozenset(() if (index + 1) % _PERIOD == 0 else {"sliding"}))
        for index in range(count)
    )


def _refine(dims: ModelDims, layout: Layout, where: str) -> ModelDims:
    """Every other layer has full attention; no shape shows it."""
    return set_layer_tags(dims, [set(layer.tags) for layer in _layers(len(dims.layers), {})], frozenset())


def _from_config(config: Any) -> ModelDims:
    """Dimensions of a GptOssConfig."""
    layer = {"head_dim": config.head_dim, "kv_heads": config.num_key_value_heads}
    layers = tuple(
        LayerDims(layer, frozenset({"sliding"} if kind == "sliding_attention" else ()))
        for kind in config.layer_types
    )
    sizes = {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "experts": config.num_local_experts,
        "expert_mlp": config.intermediate_size,
    }
    return ModelDims("gpt_oss", sizes, layers, frozenset(() if config.tie_word_embeddings else {"untied"}))


def _config_fields(dims: ModelDims, preset: Preset) -> dict[str, Any]:
    return {
        **standard.decoder_fields(dims),
        **preset.fields,
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 200_002,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "intermediate_size": dims.sizes["expert_mlp"],
        "layer_types": [
            "sliding_attention" if "sliding" in layer.tags else "full_attention" for layer in dims.layers
        ],
        "max_position_embeddings": 131_072,
        "model_type": "gpt_oss",
        "num_experts_per_tok": preset.top_k,
        "num_local_experts": dims.sizes["experts"],
        "output_router_logits": False,
        "pad_token_id": 199_999,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_theta": 150_000.0,
            "rope_type": "yarn",
            "truncate": False,
        },
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "use_cache": True,
    }


def _preset(name: str, layers: int, experts: int) -> Preset:
    sizes = {"vocab": 201_088, "hidden": 2880, "heads": 64, "experts": experts, "expert_mlp": 2880}
    dims = ModelDims(
        "gpt_oss", sizes, _layers(layers, {"head_dim": 64, "kv_heads": 8}), frozenset({"untied"})
    )
    return Preset(
        name, (f"openai/{name}",), dims, {}, top_k=4, stops=(200_002, 199_999, 200_012), base_stops=(200_002,)
    )


PRESETS: tuple[Preset, ...] = (_preset("gpt-oss-20b", 24, 32), _preset("gpt-oss-120b", 36, 128))
"""Source: MaxText 0.2.5 configs/models/gpt-oss-*.yml, checkpoint_conversion/utils/hf_model_configs.py."""

FAMILY = Family(
    name="gpt_oss",
    title="GPT-OSS",
    decoder_block="gpt_oss",
    converters=(*standard.OUTSIDE, *standard.NORMS, *_ROWS),
    groups=(
        # A sliding-window layer and one with full attention, each stacked over the blocks.
        LayerGroup(r"decoder\.layers\.layers_(\d)", stacked=("block",), base="block", name="scanned"),
        LayerGroup(r"decoder\.layers_(\d{1,4})", name="unscanned"),
    ),
    axes={**standard.AXES, "experts": "num_local_experts", "expert_mlp": "intermediate_size"},
    per_layer=frozenset({"head_dim", "kv_heads"}),
    marks=("pre_self_attention_layer_norm.scale", f"{_MLP}.gate.kernel"),
    prefixes=standard.PREFIXES,
    refine=_refine,
    model_types={"gpt_oss": "GptOssConfig"},
    architectures={"gpt_oss": "GptOssForCausalLM"},
    from_config=_from_config,
    config_fields=_config_fields,
    presets=PRESETS,
    tag_fields={
        "sliding": TagField(
            "layer_types",
            "sliding_attention",
            "full_attention",
            ("sliding-window attention", "full attention"),
        ),
        "untied": TagField("tie_word_embeddings", "False", "True"),
    },
    kinds={"untied": "an output head of its own"},
    compiled_in="attention sinks",
    modules=(
        PackedModule(
            "attn.qkv_proj",
            ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        ),
        PackedModule("attn.o_proj", ("self_attn.o_proj.weight",)),
        PackedModule(
            "mlp.experts.routed_experts",
            ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
            is_experts=True,
        ),
    ),
)
