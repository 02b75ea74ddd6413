"""Gemma 3 (4B, 12B, 27B), text and vision.

Read the table against MaxText 0.2.5 `models/gemma3.py` (left) and transformers 5.19 `models/gemma3/modeling_gemma3.py`,
`models/siglip/modeling_siglip.py` (right). Facts that are easy to get wrong:

- a norm is stored as it is applied; Hugging Face stores it minus one;
- the embedding is stored times sqrt(hidden size), the root rounded to bfloat16;
- every sixth layer has full attention, whatever the shapes; the last layer may slide (4B, 27B);
- MaxText stores 262,144 rows of the vocabulary, the published model has 262,208; the rest is zero, as MaxText's own
  converter writes it.
"""

from __future__ import annotations

from typing import Any

from vllm_maxtext_loader.conversion.dims import LayerDims, ModelDims
from vllm_maxtext_loader.conversion.family import (
    Family,
    LayerGroup,
    Preset,
    Scope,
    TagField,
    WeightConverter,
    converter,
    for_scope,
)
from vllm_maxtext_loader.conversion.infer import set_layer_tags
from vllm_maxtext_loader.conversion.layout import Layout
from vllm_maxtext_loader.conversion.values import DivideByRoot, SubtractOne
from vllm_maxtext_loader.dtypes import BFLOAT16
from vllm_maxtext_loader.families import standard

_PERIOD = 6
_STORED_VOCAB, _PUBLISHED_VOCAB = 262_144, 262_208
_HEADS = "(vision_heads vision_head_dim)"
_TOWER = "vision_tower.vision_model."
_ATTENTION = "MultiHeadDotProductAttention_0"

AXES = {
    **standard.AXES,
    "vision_layers": "vision num_hidden_layers",
    "vision_hidden": "vision hidden_size",
    "vision_heads": "vision num_attention_heads",
    "vision_head_dim": "vision hidden_size / num_attention_heads",
    "vision_mlp": "vision intermediate_size",
    "vision_positions": "vision (image_size / patch_size)^2",
    "vision_patch_height": "vision patch_size",
    "vision_patch_width": "vision patch_size",
    "vision_channels": "vision num_channels",
}


def _norm(leaf: str, hf: str, axis: str = "hidden") -> WeightConverter:
    return converter(leaf, hf, f"{axis} -> {axis}", SubtractOne())


# fmt: off
CONVERTERS: tuple[WeightConverter, ...] = (
    *for_scope(
        Scope.MODEL,
        converter("token_embedder.embedding", "embed_tokens.weight", "vocab hidden -> vocab hidden", DivideByRoot("hidden", BFLOAT16), padded="vocab"),
        _norm("decoder.decoder_norm.scale", "norm.weight"),
    ),
    *for_scope(
        Scope.LAYER,
        _norm("pre_self_attention_norm.scale", "input_layernorm.weight"),
        *standard.ATTENTION,
        _norm("self_attention.query_norm.scale", "self_attn.q_norm.weight", "head_dim"),
        _norm("self_attention.key_norm.scale", "self_attn.k_norm.weight", "head_dim"),
        _norm("post_self_attention_norm.scale", "post_attention_layernorm.weight"),
        _norm("pre_ffw_norm.scale", "pre_feedforward_layernorm.weight"),
        *standard.MLP,
        _norm("post_ffw_norm.scale", "post_feedforward_layernorm.weight"),
    ),
    *for_scope(
        Scope.VISION,
        converter("embedding.kernel", f"{_TOWER}embeddings.patch_embedding.weight", "vision_patch_height vision_patch_width vision_channels vision_hidden -> vision_hidden vision_channels vision_patch_height vision_patch_width"),
        converter("embedding.bias", f"{_TOWER}embeddings.patch_embedding.bias", "vision_hidden -> vision_hidden"),
        converter("pos_embedding", f"{_TOWER}embeddings.position_embedding.weight", "1 vision_positions vision_hidden -> vision_positions vision_hidden"),
        converter("Transformer.encoder_norm.scale", f"{_TOWER}post_layernorm.weight", "vision_hidden -> vision_hidden"),
        converter("Transformer.encoder_norm.bias", f"{_TOWER}post_layernorm.bias", "vision_hidden -> vision_hidden"),
        converter("mm_input_projection.w", "multi_modal_projector.mm_input_projection_weight", "vision_hidden hidden -> vision_hidden hidden"),
        _norm("mm_soft_embedding_norm.scale", "multi_modal_projector.mm_soft_emb_norm.weight", "vision_hidden"),
    ),
    *for_scope(
        Scope.VISION_LAYER,
        converter("LayerNorm_0.scale", "layer_norm1.weight", "vision_hidden -> vision_hidden"),
        converter("LayerNorm_0.bias", "layer_norm1.bias", "vision_hidden -> vision_hidden"),
        converter("LayerNorm_1.scale", "layer_norm2.weight", "vision_hidden -> vision_hidden"),
        converter("LayerNorm_1.bias", "layer_norm2.bias", "vision_hidden -> vision_hidden"),
        *(
            row
            for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
            for row in (
                converter(f"{_ATTENTION}.{ours}.kernel", f"self_attn.{theirs}.weight", f"vision_hidden vision_heads vision_head_dim -> {_HEADS} vision_hidden"),
                converter(f"{_ATTENTION}.{ours}.bias", f"self_attn.{theirs}.bias", f"vision_heads vision_head_dim -> {_HEADS}"),
            )
        ),
        converter(f"{_ATTENTION}.out.kernel", "self_attn.out_proj.weight", f"vision_heads vision_head_dim vision_hidden -> vision_hidden {_HEADS}"),
        converter(f"{_ATTENTION}.out.bias", "self_attn.out_proj.bias", "vision_hidden -> vision_hidden"),
        converter("MlpBlockViT_0.Dense_0.kernel", "mlp.fc1.weight", "vision_hidden vision_mlp -> vision_mlp vision_hidden"),
        converter("MlpBlockViT_0.Dense_0.bias", "mlp.fc1.bias", "vision_mlp -> vision_mlp"),
        converter("MlpBlockViT_0.Dense_1.kernel", "mlp.fc2.weight", "vision_mlp vision_hidden -> vision_hidden vision_mlp"),
        converter("MlpBlockViT_0.Dense_1.bias", "mlp.fc2.bias", "vision_hidden -> vision_hidden"),
    ),
)
# fmt: on

_ENCODER = r"vision_encoder\.Gemma3VisionEncoderLayer_0"

GROUPS: tuple[LayerGroup, ...] = (
    # Six layers in a block, five of them local, each stacked over the blocks.
    LayerGroup(r"decoder\.layers\.layers_(\d)", stacked=("block",), base="block", name="scanned"),
    LayerGroup(r"decoder\.layers_remainder\.layers_(\d{1,4})", base="remainder"),
    LayerGroup(r"decoder\.layers_(\d{1,4})", name="unscanned"),
    LayerGroup(_ENCODER + r"\.Transformer\.encoderblock_(\d{1,4})", Scope.VISION_LAYER),
    LayerGroup(_ENCODER, Scope.VISION),
    LayerGroup(r"vision_encoder\.VisionEmbedder_0", Scope.VISION),
)
"""Source: MaxText 0.2.5 models/gemma3.py, layers/nnx_decoders.py; the same since 0.2.2."""


def _refine(dims: ModelDims, layout: Layout, where: str) -> ModelDims:
    """Every sixth layer has full attention; no shape shows it."""
    tags = [{"sliding"} if (layer + 1) % _PERIOD else set[str]() for layer in range(len(dims.layers))]
    return set_layer_tags(dims, tags, frozenset())


def _from_config(config: Any) -> ModelDims:
    """Dimensions of a Gemma3Config or Gemma3TextConfig."""
    text = config.get_text_config()
    layer = {
        "head_dim": text.head_dim,
        "kv_heads": text.num_key_value_heads,
        "mlp": text.intermediate_size,
    }
    layers = tuple(
        LayerDims(layer, frozenset({"sliding"} if kind == "sliding_attention" else ()))
        for kind in text.layer_types
    )
    sizes = {"vocab": text.vocab_size, "hidden": text.hidden_size, "heads": text.num_attention_heads}
    tags: set[str] = set()
    if (vision := getattr(config, "vision_config", None)) is not None:
        tags.add("vision")
        sizes |= {
            "vision_layers": vision.num_hidden_layers,
            "vision_hidden": vision.hidden_size,
            "vision_heads": vision.num_attention_heads,
            "vision_head_dim": vision.hidden_size // vision.num_attention_heads,
            "vision_mlp": vision.intermediate_size,
            "vision_positions": (vision.image_size // vision.patch_size) ** 2,
            "vision_patch_height": vision.patch_size,
            "vision_patch_width": vision.patch_size,
            "vision_channels": vision.num_channels,
        }
    return ModelDims("gemma3", sizes, layers, frozenset(tags))


def _config_fields(dims: ModelDims, preset: Preset) -> dict[str, Any]:
    sizes = dims.sizes
    text = {
        **standard.decoder_fields(dims),
        **preset.fields,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "final_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "initializer_range": 0.02,
        "layer_types": [
            "sliding_attention" if "sliding" in layer.tags else "full_attention" for layer in dims.layers
        ],
        "pad_token_id": 0,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "full_attention": {"factor": 8.0, "rope_theta": 1_000_000.0, "rope_type": "linear"},
            "sliding_attention": {"rope_theta": 10_000.0, "rope_type": "default"},
        },
        "sliding_window": 1024,
        "tie_word_embeddings": True,
        "use_cache": True,
    }
    if not dims.has_vision:
        return {
            **text,
            "architectures": ["Gemma3ForCausalLM"],
            "eos_token_id": [1, 106],
            "model_type": "gemma3_text",
        }
    if sizes["vocab"] == _STORED_VOCAB:
        text["vocab_size"] = _PUBLISHED_VOCAB
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255_999,
        "dtype": "bfloat16",
        "eoi_token_index": 256_000,
        "eos_token_id": [1, 106],
        "image_token_index": sizes["vocab"],
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {**text, "model_type": "gemma3_text"},
        "tie_word_embeddings": True,
        "vision_config": {
            "attention_dropout": 0.0,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": sizes["vision_hidden"],
            "image_size": round(sizes["vision_positions"] ** 0.5) * sizes["vision_patch_height"],
            "intermediate_size": sizes["vision_mlp"],
            "layer_norm_eps": 1e-6,
            "model_type": "siglip_vision_model",
            "num_attention_heads": sizes["vision_heads"],
            "num_channels": sizes["vision_channels"],
            "num_hidden_layers": sizes["vision_layers"],
            "patch_size": sizes["vision_patch_height"],
            "vision_use_head": False,
        },
    }


def _preset(name: str, published: str, scalar: int, **dims: int) -> Preset:
    """A published model; `scalar` is what queries are divided by the root of."""
    layer = {key: dims.pop(key) for key in ("head_dim", "kv_heads", "mlp")}
    count = dims.pop("layers")
    layers = tuple(
        LayerDims(layer, frozenset({"sliding"} if (index + 1) % _PERIOD else ())) for index in range(count)
    )
    fields = {"max_position_embeddings": 131_072, "query_pre_attn_scalar": scalar}
    sizes = ModelDims("gemma3", {"vocab": _STORED_VOCAB, **dims}, layers)
    return Preset(name, (f"google/{published}",), sizes, fields, stops=(1, 106), base_stops=(1,))


# fmt: off
PRESETS: tuple[Preset, ...] = (
    _preset("gemma3-4b", "gemma-3-4b-it", 256, layers=34, hidden=2560, heads=8, kv_heads=4, head_dim=256, mlp=10_240),
    _preset("gemma3-12b", "gemma-3-12b-it", 256, layers=48, hidden=3840, heads=16, kv_heads=8, head_dim=256, mlp=15_360),
    _preset("gemma3-27b", "gemma-3-27b-it", 168, layers=62, hidden=5376, heads=32, kv_heads=16, head_dim=128, mlp=21_504),
)
# fmt: on
"""Source: MaxText 0.2.5 configs/models/gemma3-*.yml, models/gemma3.py; rotary embedding: transformers 5.19
configuration_gemma3.py (MaxText's hf_model_configs.py has other values, which the models do not use)."""

FAMILY = Family(
    name="gemma3",
    title="Gemma 3",
    decoder_block="gemma3",
    converters=CONVERTERS,
    groups=GROUPS,
    axes=AXES,
    per_layer=frozenset({"head_dim", "kv_heads", "mlp"}),
    marks=("pre_ffw_norm.scale", "self_attention.query_norm.scale", "pre_self_attention_norm.scale"),
    absent=("layer_scalar",),
    prefixes={
        Scope.MODEL: "{text}",
        Scope.LAYER: "{text}layers.{i}.",
        Scope.VISION: "",
        Scope.VISION_LAYER: f"{_TOWER}encoder.layers.{{i}}.",
    },
    refine=_refine,
    model_types={"gemma3_text": "Gemma3TextConfig", "gemma3": "Gemma3Config"},
    architectures={"gemma3_text": "Gemma3ForCausalLM", "gemma3": "Gemma3ForConditionalGeneration"},
    from_config=_from_config,
    config_fields=_config_fields,
    presets=PRESETS,
    tag_fields={
        "sliding": TagField(
            "layer_types",
            "sliding_attention",
            "full_attention",
            ("sliding-window attention", "full attention"),
        )
    },
    modules=standard.modules(),
    begins_with_bos=True,
    both_ways_in_images=True,
    multimodal_text="language_model.model.",
    added_vocab=_PUBLISHED_VOCAB - _STORED_VOCAB,
)
