"""Mixtral 8x7B and 8x22B.

Read the table against MaxText 0.2.5 `models/mixtral.py` (left) and transformers 5.19 `models/mixtral/modeling_mixtral.py`
(right). As Llama, with a scaled query and rotary halves. The published files name an expert's gate w1, up w3 and down w2.
"""

from __future__ import annotations

from typing import Any

from vllm_maxtext_loader.conversion.dims import ModelDims
from vllm_maxtext_loader.conversion.family import Family, Preset, TagField
from vllm_maxtext_loader.families import standard
from vllm_maxtext_loader.families.llama import attention

_FUSED = ("w13", "w2")
_BLOCK = "block_sparse_moe"


def _from_config(config: Any) -> ModelDims:
    """Dimensions of a MixtralConfig."""
    return standard.decoder_dims(
        "mixtral", config, experts=config.num_local_experts, expert_mlp=config.intermediate_size
    )


def _config_fields(dims: ModelDims, preset: Preset) -> dict[str, Any]:
    return {
        **standard.decoder_fields(dims),
        **preset.fields,
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "intermediate_size": dims.sizes["expert_mlp"],
        "model_type": "mixtral",
        "num_experts_per_tok": preset.top_k,
        "num_local_experts": dims.sizes["experts"],
        "output_router_logits": False,
        "rms_norm_eps": 1e-5,
        "router_aux_loss_coef": 0.02,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
        "use_cache": True,
    }


def _preset(name: str, published: str, positions: int, **dims: Any) -> Preset:
    fields = {
        "max_position_embeddings": positions,
        "rope_parameters": {"rope_theta": 1_000_000.0, "rope_type": "default"},
    }
    sizes = standard.preset_dims("mixtral", head_dim=128, kv_heads=8, experts=8, **dims)
    return Preset(name, (f"mistralai/{published}",), sizes, fields, top_k=2, stops=(2,), base_stops=(2,))


# fmt: off
PRESETS: tuple[Preset, ...] = (
    _preset("mixtral-8x7b", "Mixtral-8x7B-Instruct-v0.1", 32_768, vocab=32_000, layers=32, hidden=4096, heads=32, expert_mlp=14_336),
    _preset("mixtral-8x22b", "Mixtral-8x22B-Instruct-v0.1", 65_536, vocab=32_768, layers=56, hidden=6144, heads=48, expert_mlp=16_384),
)
# fmt: on
"""Source: MaxText 0.2.5 configs/models/mixtral-*.yml."""

FAMILY = Family(
    name="mixtral",
    title="Mixtral",
    decoder_block="mixtral",
    converters=(
        *standard.OUTSIDE,
        *standard.NORMS,
        *attention(None),
        *standard.moe_rows("MoeBlock_0", _BLOCK, "w1", "w3", "w2", _FUSED),
    ),
    groups=standard.GROUPS,
    axes={**standard.AXES, "experts": "num_local_experts", "expert_mlp": "intermediate_size"},
    per_layer=frozenset({"head_dim", "kv_heads"}),
    derived=standard.DERIVED,
    marks=("pre_self_attention_layer_norm.scale", "MoeBlock_0.gate.kernel"),
    prefixes=standard.PREFIXES,
    model_types={"mixtral": "MixtralConfig"},
    architectures={"mixtral": "MixtralForCausalLM"},
    from_config=_from_config,
    config_fields=_config_fields,
    presets=PRESETS,
    tag_fields={"untied": TagField("tie_word_embeddings", "False", "True")},
    kinds={"moe": "experts", "untied": "an output head of its own"},
    modules=standard.modules(
        f"{_BLOCK}.experts.routed_experts",
        (f"{_BLOCK}.experts.{_FUSED[0]}", f"{_BLOCK}.experts.{_FUSED[1]}"),
    ),
    begins_with_bos=True,
)
