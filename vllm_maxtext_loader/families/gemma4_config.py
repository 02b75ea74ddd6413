"""Gemma 4: its configuration, both ways, and the published models.

Source of the presets: the published config.json and generation_config.json of google/gemma-4-{26B-A4B,31B,E2B,E4B}-it,
as recorded in MaxText 0.2.5 checkpoint_conversion/utils/hf_model_configs.py; shapes also in configs/models/gemma4-*.yml.
"""

from __future__ import annotations

from typing import Any

from vllm_maxtext_loader.conversion.dims import LayerDims, ModelDims
from vllm_maxtext_loader.conversion.family import Preset

PUBLISHED_VOCAB = 262_144

_STOPS = (1, 106, 50)

_TOKENS: dict[str, Any] = {
    "audio_token_id": 258_881,
    "boa_token_id": 256_000,
    "boi_token_id": 255_999,
    "eoa_token_id": 258_883,
    "eoa_token_index": 258_883,
    "eoi_token_id": 258_882,
    "eos_token_id": [1, 106],
    "image_token_id": 258_880,
    "video_token_id": 258_884,
}


def from_config(config: Any) -> ModelDims:
    """Dimensions a Hugging Face configuration demands.

    Args:
        config: transformers Gemma4Config or Gemma4TextConfig.
    """
    text = config.get_text_config()
    count = text.num_hidden_layers
    shared_from = count - (text.num_kv_shared_layers or 0)
    layers: list[LayerDims] = []
    for index in range(count):
        own = text.per_layer_config[index]
        sliding = text.layer_types[index] == "sliding_attention"
        double = text.use_double_wide_mlp and index >= shared_from > 0
        layers.append(
            _layer(
                sliding=sliding,
                head_dim=own.head_dim,
                kv_heads=None if index >= shared_from else own.num_key_value_heads,
                k_eq_v=bool(text.attention_k_eq_v) and not sliding,
                mlp=text.intermediate_size * (2 if double else 1),
            )
        )
    sizes = {
        "vocab": text.vocab_size,
        "hidden": text.hidden_size,
        "heads": text.num_attention_heads,
    }
    tags: set[str] = set()
    if text.enable_moe_block and text.num_experts:
        tags.add("moe")
        sizes |= {"experts": text.num_experts, "expert_mlp": text.moe_intermediate_size}
    if text.hidden_size_per_layer_input:
        tags.add("ple")
        sizes |= {"ple": text.hidden_size_per_layer_input, "ple_vocab": text.vocab_size_per_layer_input}
    if (vision := getattr(config, "vision_config", None)) is not None:
        tags |= {"vision", "vision_std"} if vision.standardize else {"vision"}
        sizes |= {
            "vision_layers": vision.num_hidden_layers,
            "vision_hidden": vision.hidden_size,
            "vision_heads": vision.num_attention_heads,
            "vision_head_dim": vision.head_dim,
            "vision_mlp": vision.intermediate_size,
            "vision_patch": 3 * vision.patch_size**2,
            "vision_positions": vision.position_embedding_size,
            "vision_coordinates": 2,
        }
    return ModelDims("gemma4", sizes, tuple(layers), frozenset(tags))


def _layer(*, sliding: bool, head_dim: int, kv_heads: int | None, k_eq_v: bool, mlp: int) -> LayerDims:
    sizes = {"head_dim": head_dim, "mlp": mlp} | ({} if kv_heads is None else {"kv_heads": kv_heads})
    present = {
        "sliding": sliding,
        "keys": kv_heads is not None,
        "values": kv_heads is not None and not k_eq_v,
    }
    return LayerDims(sizes, frozenset(tag for tag, is_present in present.items() if is_present))


def _preset(
    name: str,
    published: str,
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    mlp: int,
    global_kv_heads: int | None = None,
    period: int = 6,
    experts: int | None = None,
    expert_mlp: int = 0,
    top_k: int | None = None,
    ple: int = 0,
    kv_shared: int = 0,
    double_wide: bool = False,
    sliding_window: int = 1024,
    max_positions: int = 262_144,
    vision_attention: str | None = "vision",
) -> Preset:
    """A published model.

    Args:
        name: MaxText's name.
        published: Hugging Face name.
        layers, hidden, heads, kv_heads, mlp: dimensions; kv_heads of sliding layers.
        global_kv_heads: KV heads of full-attention layers where keys serve as values, else None.
        period: a full-attention layer ends every group of this many layers.
        experts, expert_mlp, top_k: mixture of experts, or None.
        ple: width of the per-layer embeddings, 0 for none.
        kv_shared: trailing layers that reuse earlier keys and values.
        double_wide: those layers have an MLP of twice the width.
        sliding_window, max_positions: in tokens.
        vision_attention: "vision" where image tokens attend in both directions.
    """
    decoder: list[LayerDims] = []
    for index in range(layers):
        sliding = (index + 1) % period != 0
        shares = index >= layers - kv_shared
        own = kv_heads if sliding else global_kv_heads or kv_heads
        decoder.append(
            _layer(
                sliding=sliding,
                head_dim=256 if sliding else 512,
                kv_heads=None if shares else own,
                k_eq_v=global_kv_heads is not None and not sliding,
                mlp=mlp * (2 if shares and double_wide else 1),
            )
        )
    sizes = {"vocab": PUBLISHED_VOCAB, "hidden": hidden, "heads": heads}
    tags: set[str] = set()
    if experts:
        tags.add("moe")
        sizes |= {"experts": experts, "expert_mlp": expert_mlp}
    if ple:
        tags.add("ple")
        sizes |= {"ple": ple, "ple_vocab": PUBLISHED_VOCAB}
    fields = {
        "max_position_embeddings": max_positions,
        "sliding_window": sliding_window,
        "use_bidirectional_attention": vision_attention,
    }
    dims = ModelDims("gemma4", sizes, tuple(decoder), frozenset(tags))
    return Preset(name, (published,), dims, fields, top_k, _STOPS, (1,))


PRESETS: tuple[Preset, ...] = (
    _preset(
        "gemma4-26b",
        "google/gemma-4-26B-A4B-it",
        layers=30,
        hidden=2816,
        heads=16,
        kv_heads=8,
        global_kv_heads=2,
        mlp=2112,
        experts=128,
        expert_mlp=704,
        top_k=8,
    ),
    _preset(
        "gemma4-31b",
        "google/gemma-4-31B-it",
        layers=60,
        hidden=5376,
        heads=32,
        kv_heads=16,
        global_kv_heads=4,
        mlp=21_504,
    ),
    _preset(
        "gemma4-e2b",
        "google/gemma-4-E2B-it",
        layers=35,
        hidden=1536,
        heads=8,
        kv_heads=1,
        mlp=6144,
        period=5,
        ple=256,
        kv_shared=20,
        double_wide=True,
        sliding_window=512,
        max_positions=131_072,
        vision_attention=None,
    ),
    _preset(
        "gemma4-e4b",
        "google/gemma-4-E4B-it",
        layers=42,
        hidden=2560,
        heads=8,
        kv_heads=2,
        mlp=10_240,
        ple=256,
        kv_shared=18,
        sliding_window=512,
        max_positions=131_072,
        vision_attention=None,
    ),
)


def config_fields(dims: ModelDims, preset: Preset) -> dict[str, Any]:
    """Fields of config.json for a model of these dimensions; `model_type` says of which class."""
    text = _text_fields(dims, preset)
    if not dims.has_vision:
        return {
            **text,
            "model_type": "gemma4_text",
            "architectures": ["Gemma4ForCausalLM"],
            "eos_token_id": _TOKENS["eos_token_id"],
        }
    return {
        "text_config": {**text, "model_type": "gemma4_text"},
        "vision_config": _vision_fields(dims),
        "audio_config": None,
        "tie_word_embeddings": True,
        "vision_soft_tokens_per_image": 280,
        "dtype": "bfloat16",
        "initializer_range": 0.02,
        "model_type": "gemma4",
        "architectures": ["Gemma4ForConditionalGeneration"],
        **_TOKENS,
    }


def _text_fields(dims: ModelDims, preset: Preset) -> dict[str, Any]:
    sizes, layers = dims.sizes, dims.layers
    sliding = next((layer for layer in layers if "sliding" in layer.tags), layers[0])
    full = next((layer for layer in layers if "sliding" not in layer.tags), layers[-1])
    k_eq_v = {index for index, layer in enumerate(layers) if {"keys", "values"} & layer.tags == {"keys"}}
    shared = sum("keys" not in layer.tags for layer in layers)
    moe = "moe" in dims.tags
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": bool(k_eq_v),
        "bos_token_id": 2,
        "dtype": "bfloat16",
        "enable_moe_block": moe,
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "global_head_dim": full.sizes["head_dim"],
        "head_dim": sliding.sizes["head_dim"],
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": sizes["hidden"],
        "hidden_size_per_layer_input": sizes.get("ple", 0),
        "initializer_range": 0.02,
        "intermediate_size": layers[0].sizes["mlp"],
        "layer_types": [
            "sliding_attention" if "sliding" in layer.tags else "full_attention" for layer in layers
        ],
        "max_position_embeddings": preset.fields["max_position_embeddings"],
        "moe_intermediate_size": sizes.get("expert_mlp"),
        "num_attention_heads": sizes["heads"],
        "num_experts": sizes.get("experts"),
        "num_global_key_value_heads": full.sizes.get("kv_heads") if layers.index(full) in k_eq_v else None,
        "num_hidden_layers": len(layers),
        "num_key_value_heads": sliding.sizes.get("kv_heads"),
        "num_kv_shared_layers": shared,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "full_attention": {
                "partial_rotary_factor": 0.25,
                "rope_theta": 1_000_000.0,
                "rope_type": "proportional",
            },
            "sliding_attention": {"rope_theta": 10_000.0, "rope_type": "default"},
        },
        "sliding_window": preset.fields["sliding_window"],
        "tie_word_embeddings": True,
        "top_k_experts": preset.top_k if moe else None,
        "use_bidirectional_attention": preset.fields["use_bidirectional_attention"],
        "use_cache": True,
        "use_double_wide_mlp": layers[-1].sizes["mlp"] == 2 * layers[0].sizes["mlp"] and shared > 0,
        "vocab_size": sizes["vocab"],
        "vocab_size_per_layer_input": sizes.get("ple_vocab", sizes["vocab"]),
    }


def _vision_fields(dims: ModelDims) -> dict[str, Any]:
    sizes = dims.sizes
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "default_output_length": 280,
        "dtype": "bfloat16",
        "global_head_dim": sizes["vision_head_dim"],
        "head_dim": sizes["vision_head_dim"],
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": sizes["vision_hidden"],
        "intermediate_size": sizes["vision_mlp"],
        "max_position_embeddings": 131_072,
        "model_type": "gemma4_vision",
        "num_attention_heads": sizes["vision_heads"],
        "num_hidden_layers": sizes["vision_layers"],
        "num_key_value_heads": sizes["vision_heads"],
        "patch_size": round((sizes["vision_patch"] / 3) ** 0.5),
        "pooling_kernel_size": 3,
        "position_embedding_size": sizes["vision_positions"],
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
        "standardize": "vision_std" in dims.tags,
        # MaxText has no clip bounds, on E2B and E4B either: it computes the unclipped function.
        "use_clipped_linears": False,
    }
