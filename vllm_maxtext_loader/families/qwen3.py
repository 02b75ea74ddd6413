"""Qwen3, dense (0.6B to 32B) and mixture of experts (30B-A3B, 235B-A22B, Coder 480B-A35B).

Read the table against MaxText 0.2.5 `models/qwen3.py` (left) and transformers 5.19 `models/qwen3/modeling_qwen3.py`,
`models/qwen3_moe/modeling_qwen3_moe.py` (right). No value changes: the query's 1/sqrt(head_dim) is applied when the model
runs, rotary pairs are split in halves on both sides, and the embedding is not scaled. Every layer of a mixture-of-experts
model has experts; there is no shared expert.
"""

from __future__ import annotations

from typing import Any

from vllm_maxtext_loader.conversion.dims import ModelDims
from vllm_maxtext_loader.conversion.family import Family, Preset, TagField, converter
from vllm_maxtext_loader.families import standard

_FUSED = ("gate_up_proj", "down_proj")
_VOCAB = 151_936
_STOPS = (151_645, 151_643)


def _from_config(config: Any) -> ModelDims:
    """Dimensions of a Qwen3Config or Qwen3MoeConfig."""
    # A dense configuration has no field num_experts.
    experts = getattr(config, "num_experts", None)
    width = getattr(config, "moe_intermediate_size", None)
    return standard.decoder_dims("qwen3", config, experts=experts, expert_mlp=width)


def _config_fields(dims: ModelDims, preset: Preset) -> dict[str, Any]:
    fields = {
        **standard.decoder_fields(dims),
        **preset.fields,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "sliding_window": None,
        "use_cache": True,
        "use_sliding_window": False,
    }
    if "moe" not in dims.tags:
        return {**fields, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    return {
        **fields,
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": dims.sizes["expert_mlp"],
        "norm_topk_prob": True,
        "num_experts": dims.sizes["experts"],
        "num_experts_per_tok": preset.top_k,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }


def _preset(
    name: str,
    *published: str,
    theta: float = 1_000_000.0,
    positions: int = 40_960,
    top_k: int | None = None,
    **dims: Any,
) -> Preset:
    """A published model; `theta` is of its rotary embedding, `positions` the longest context."""
    fields = {
        "max_position_embeddings": positions,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
    }
    sizes = standard.preset_dims("qwen3", head_dim=128, vocab=_VOCAB, **dims)
    return Preset(
        name, tuple(f"Qwen/{model}" for model in published), sizes, fields, top_k, _STOPS, (151_643,)
    )


# fmt: off
_30B = {"layers": 48, "hidden": 2048, "heads": 32, "kv_heads": 4, "experts": 128, "expert_mlp": 768, "top_k": 8}
_4B = {"layers": 36, "hidden": 2560, "heads": 32, "kv_heads": 8, "mlp": 9728, "tied": True}

PRESETS: tuple[Preset, ...] = (
    _preset("qwen3-0.6b", "Qwen3-0.6B", layers=28, hidden=1024, heads=16, kv_heads=8, mlp=3072, tied=True),
    _preset("qwen3-1.7b", "Qwen3-1.7B", layers=28, hidden=2048, heads=16, kv_heads=8, mlp=6144, tied=True),
    _preset("qwen3-4b", "Qwen3-4B", **_4B),
    _preset("qwen3-4b-thinking-2507", "Qwen3-4B-Thinking-2507", "Qwen3-4B-Instruct-2507", theta=5_000_000.0, positions=262_144, **_4B),
    _preset("qwen3-8b", "Qwen3-8B", layers=36, hidden=4096, heads=32, kv_heads=8, mlp=12_288),
    _preset("qwen3-14b", "Qwen3-14B", layers=40, hidden=5120, heads=40, kv_heads=8, mlp=17_408),
    _preset("qwen3-32b", "Qwen3-32B", layers=64, hidden=5120, heads=64, kv_heads=8, mlp=25_600),
    _preset("qwen3-30b-a3b", "Qwen3-30B-A3B-Thinking-2507", "Qwen3-30B-A3B-Instruct-2507", theta=10_000_000.0, positions=262_144, **_30B),
    _preset("qwen3-30b-a3b-base", "Qwen3-30B-A3B-Base", "Qwen3-30B-A3B", positions=32_768, **_30B),
    _preset("qwen3-235b-a22b", "Qwen3-235B-A22B-Thinking-2507", "Qwen3-235B-A22B-Instruct-2507", theta=5_000_000.0, positions=262_144,
            layers=94, hidden=4096, heads=64, kv_heads=4, experts=128, expert_mlp=1536, top_k=8),
    _preset("qwen3-480b-a35b", "Qwen3-Coder-480B-A35B-Instruct", theta=10_000_000.0, positions=262_144,
            layers=62, hidden=6144, heads=96, kv_heads=8, experts=160, expert_mlp=2560, top_k=8),
)
# fmt: on
"""Source: MaxText 0.2.5 configs/models/qwen3-*.yml, checkpoint_conversion/utils/hf_model_configs.py; a preset stands for all
published models with its rotary embedding. MaxText trains with the theta of its own .yml, whatever a repository says."""

FAMILY = Family(
    name="qwen3",
    title="Qwen3",
    decoder_block="qwen3 or qwen3_moe",
    converters=(
        *standard.OUTSIDE,
        *standard.NORMS,
        *standard.ATTENTION,
        converter("self_attention.query_norm.scale", "self_attn.q_norm.weight", "head_dim -> head_dim"),
        converter("self_attention.key_norm.scale", "self_attn.k_norm.weight", "head_dim -> head_dim"),
        *standard.MLP,
        *standard.moe_rows("moe_block", "mlp", "gate_proj", "up_proj", "down_proj", _FUSED),
    ),
    groups=standard.GROUPS,
    axes=standard.AXES,
    per_layer=frozenset({"head_dim", "kv_heads", "mlp"}),
    derived=standard.DERIVED,
    marks=("pre_self_attention_layer_norm.scale", "self_attention.query_norm.scale"),
    absent=("self_attention.query.bias",),
    prefixes=standard.PREFIXES,
    model_types={"qwen3": "Qwen3Config", "qwen3_moe": "Qwen3MoeConfig"},
    architectures={"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"},
    from_config=_from_config,
    config_fields=_config_fields,
    presets=PRESETS,
    tag_fields={"untied": TagField("tie_word_embeddings", "False", "True")},
    kinds={"moe": "experts", "untied": "an output head of its own"},
    modules=standard.modules(
        "mlp.experts.routed_experts", (f"mlp.experts.{_FUSED[0]}", f"mlp.experts.{_FUSED[1]}")
    ),
)
