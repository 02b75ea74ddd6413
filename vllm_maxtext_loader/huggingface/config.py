"""A Hugging Face configuration for a checkpoint that comes with none.

MaxText's checkpoint metadata holds neither model name nor dimensions. Dimensions are read off the shapes;
what shapes cannot tell (sliding window, rope, top-k, soft cap, epsilon, token ids) is taken from the published
Gemma 4 model of those dimensions. A model that is near none of them needs `model_name` or a configuration.

Source of the presets: the published config.json of google/gemma-4-{26B-A4B,31B,E2B,E4B}-it, as recorded in MaxText
0.2.5 checkpoint_conversion/utils/hf_model_configs.py; shapes also in configs/models/gemma4-*.yml there.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from vllm_maxtext_loader.errors import ConfigMismatchError, EngineError, OptionError
from vllm_maxtext_loader.families.gemma4 import Dims, LayerDims

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PUBLISHED_VOCAB = 262_144


@dataclasses.dataclass(frozen=True)
class Preset:
    """One published Gemma 4 model.

    Attributes:
        published: Hugging Face name.
        layers, hidden, heads, head_dim, kv_heads, mlp: dimensions; head_dim and kv_heads of sliding layers.
        global_kv_heads: KV heads of full-attention layers where keys serve as values, else None.
        period: a full-attention layer ends every group of this many layers.
        experts, expert_mlp, top_k: mixture of experts, or None.
        ple: width of the per-layer embeddings, 0 for none.
        kv_shared: trailing layers that reuse earlier keys and values.
        double_wide: those layers have an MLP of twice the width.
        sliding_window, max_positions: in tokens.
        vision_attention: "vision" where image tokens attend in both directions.
    """

    published: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    global_kv_heads: int | None = None
    period: int = 6
    experts: int | None = None
    expert_mlp: int | None = None
    top_k: int | None = None
    ple: int = 0
    kv_shared: int = 0
    double_wide: bool = False
    sliding_window: int = 1024
    max_positions: int = 262_144
    vision_attention: str | None = "vision"
    head_dim: int = 256
    global_head_dim: int = 512

    def dims(self) -> Dims:
        """The text model's dimensions."""
        shared_from = self.layers - self.kv_shared
        layers: list[LayerDims] = []
        for index in range(self.layers):
            sliding = (index + 1) % self.period != 0
            shares = index >= shared_from
            kv_heads = self.kv_heads if sliding else self.global_kv_heads or self.kv_heads
            layers.append(
                LayerDims(
                    sliding=sliding,
                    head_dim=self.head_dim if sliding else self.global_head_dim,
                    kv_heads=None if shares else kv_heads,
                    k_eq_v=self.global_kv_heads is not None and not sliding and not shares,
                    mlp=self.mlp * (2 if shares and self.double_wide else 1),
                )
            )
        return Dims(
            vocab=PUBLISHED_VOCAB,
            hidden=self.hidden,
            heads=self.heads,
            layers=tuple(layers),
            experts=self.experts,
            expert_mlp=self.expert_mlp,
            ple=self.ple or None,
            ple_vocab=PUBLISHED_VOCAB if self.ple else None,
        )


PRESETS: dict[str, Preset] = {
    "gemma4-26b": Preset(
        published="google/gemma-4-26B-A4B-it",
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
    "gemma4-31b": Preset(
        published="google/gemma-4-31B-it",
        layers=60,
        hidden=5376,
        heads=32,
        kv_heads=16,
        global_kv_heads=4,
        mlp=21_504,
    ),
    "gemma4-e2b": Preset(
        published="google/gemma-4-E2B-it",
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
    "gemma4-e4b": Preset(
        published="google/gemma-4-E4B-it",
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
}

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


def match_preset(dims: Dims) -> str | None:
    """Name of the published model of these dimensions; vocabulary padding and the vision tower do not count."""
    for name, preset in PRESETS.items():
        if dataclasses.replace(dims, vocab=PUBLISHED_VOCAB, vision=None) == preset.dims():
            return name
    return None


def config_classes() -> dict[str, type[PretrainedConfig]]:
    """transformers' configuration classes of Gemma 4, by model_type.

    Raises:
        EngineError: the installed transformers does not have them.
    """
    try:
        from transformers import Gemma4Config, Gemma4TextConfig
    except ImportError as error:
        raise EngineError(
            f"the installed transformers does not have Gemma 4 ({error}). Install the version that "
            f"vllm-maxtext-loader requires: pip install --upgrade vllm-maxtext-loader."
        ) from error
    return {"gemma4": Gemma4Config, "gemma4_text": Gemma4TextConfig}


def make_config(dims: Dims, model_name: str | None, where: str) -> PretrainedConfig:
    """Configuration of a model of the given dimensions.

    Args:
        dims: read from the checkpoint's shapes.
        model_name: preset to take the rest from; None means the one of the same dimensions.
        where: path, for messages.

    Returns:
        Gemma4TextConfig (architecture Gemma4ForCausalLM), or Gemma4Config (Gemma4ForConditionalGeneration)
        for a checkpoint with a vision tower.

    Raises:
        OptionError: no preset has that name.
        ConfigMismatchError: no published model has these dimensions, or transformers cannot express them.
        EngineError: the installed transformers does not have Gemma 4.
    """
    preset = PRESETS[choose_preset(dims, model_name, where)]
    text = _text_fields(dims, preset)
    if dims.vision is None:
        model_type, fields = "gemma4_text", {**text, "architectures": ["Gemma4ForCausalLM"]}
    else:
        model_type = "gemma4"
        fields = {
            "text_config": {**text, "model_type": "gemma4_text"},
            "vision_config": _vision_fields(dims),
            "audio_config": None,
            "tie_word_embeddings": True,
            "vision_soft_tokens_per_image": 280,
            "dtype": "bfloat16",
            "initializer_range": 0.02,
            "architectures": ["Gemma4ForConditionalGeneration"],
            **_TOKENS,
        }
    try:
        config: Any = config_classes()[model_type](**fields)
        if dims.vision is None:
            config.eos_token_id = _TOKENS["eos_token_id"]
        expressed = Dims.from_config(config)
    except EngineError:
        raise
    except Exception as error:  # transformers validates with several libraries, each with errors of its own.
        detail = " ".join(str(error).split())[:400]
        raise ConfigMismatchError(
            f"{where}: transformers refuses a configuration of these dimensions ({type(error).__name__}: {detail})."
        ) from error
    if expressed != dims:
        raise ConfigMismatchError(
            f"{where}: transformers cannot express this model. The checkpoint has "
            f"{'; '.join(_differences(dims, expressed, 'transformers'))}. (The Gemma 4 of transformers always ends in "
            f"a full-attention layer.) hf_weights() of the Python interface still converts such a checkpoint."
        )
    return config


def choose_preset(dims: Dims, model_name: str | None, where: str) -> str:
    """Name of the published model to take from what shapes cannot tell. See `make_config` for arguments and errors."""
    if model_name is not None:
        name = model_name.lower().replace("_", "-").removesuffix("-it")
        if name not in PRESETS:
            raise OptionError(f"model_name {model_name!r} is unknown; known: {', '.join(PRESETS)}.")
        preset = PRESETS[name]
        for what, has, should in (
            ("experts", bool(dims.experts), bool(preset.experts)),
            ("per-layer embeddings", bool(dims.ple), bool(preset.ple)),
        ):
            if has != should:
                raise ConfigMismatchError(
                    f"{where}: model_name {name} {'has' if should else 'has no'} {what}, the checkpoint "
                    f"{'has them' if has else 'has none'}."
                )
        if preset.top_k and dims.experts and preset.top_k > dims.experts:
            raise ConfigMismatchError(
                f"{where}: {name} routes each token to {preset.top_k} experts, the checkpoint has {dims.experts}. "
                f"Give a Hugging Face configuration instead of model_name."
            )
        return name
    if (matched := match_preset(dims)) is not None:
        return matched
    nearest = min(PRESETS, key=lambda name: len(_differences(dims, PRESETS[name].dims())))
    raise ConfigMismatchError(
        f"{where}: these dimensions are no published Gemma 4's, so sliding window, rope and top-k are unknown. Nearest: "
        f"{nearest}, which differs in {'; '.join(_differences(dims, PRESETS[nearest].dims()))}. Give the model's own "
        f'configuration (--model HF_DIR --model-loader-extra-config \'{{"checkpoint": "…"}}\'), or a model_name '
        f"({', '.join(PRESETS)}) to take the rest from."
    )


def _differences(found: Dims, published: Dims, source: str = "published") -> list[str]:
    """What differs between two models' dimensions, in words; `source` names the second."""
    pairs: dict[str, tuple[Any, Any]] = {
        "layers": (len(found.layers), len(published.layers)),
        "hidden size": (found.hidden, published.hidden),
        "heads": (found.heads, published.heads),
        "experts": (found.experts, published.experts),
        "expert width": (found.expert_mlp, published.expert_mlp),
        "per-layer embedding width": (found.ple, published.ple),
    }
    for index, (layer, wanted) in enumerate(zip(found.layers, published.layers, strict=False)):
        if layer != wanted:
            pairs[f"layer {index}"] = (_described(layer), _described(wanted))
            break
    return [f"{name}: {a} ({source} {b})" for name, (a, b) in pairs.items() if a != b]


def _described(layer: LayerDims) -> str:
    """A layer in words."""
    heads = "shared keys and values" if layer.kv_heads is None else f"{layer.kv_heads} KV heads"
    return (
        f"{'sliding-window' if layer.sliding else 'full'} attention, {heads} of {layer.head_dim}"
        f"{', keys as values' if layer.k_eq_v else ''}, MLP width {layer.mlp}"
    )


def _text_fields(dims: Dims, preset: Preset) -> dict[str, Any]:
    sliding = next((layer for layer in dims.layers if layer.sliding), dims.layers[0])
    full = next((layer for layer in dims.layers if not layer.sliding), dims.layers[-1])
    shared = sum(layer.kv_heads is None for layer in dims.layers)
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": any(layer.k_eq_v for layer in dims.layers),
        "bos_token_id": 2,
        "dtype": "bfloat16",
        "enable_moe_block": dims.experts is not None,
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "global_head_dim": full.head_dim,
        "head_dim": sliding.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": dims.hidden,
        "hidden_size_per_layer_input": dims.ple or 0,
        "initializer_range": 0.02,
        "intermediate_size": dims.layers[0].mlp,
        "layer_types": ["sliding_attention" if layer.sliding else "full_attention" for layer in dims.layers],
        "max_position_embeddings": preset.max_positions,
        "moe_intermediate_size": dims.expert_mlp,
        "num_attention_heads": dims.heads,
        "num_experts": dims.experts,
        "num_global_key_value_heads": full.kv_heads if full.k_eq_v else None,
        "num_hidden_layers": len(dims.layers),
        "num_key_value_heads": sliding.kv_heads,
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
        "sliding_window": preset.sliding_window,
        "tie_word_embeddings": True,
        "top_k_experts": preset.top_k if dims.experts else None,
        "use_bidirectional_attention": preset.vision_attention,
        "use_cache": True,
        "use_double_wide_mlp": dims.layers[-1].mlp == 2 * dims.layers[0].mlp and shared > 0,
        "vocab_size": dims.vocab,
        "vocab_size_per_layer_input": dims.ple_vocab or dims.vocab,
    }


def _vision_fields(dims: Dims) -> dict[str, Any]:
    vision = dims.vision
    assert vision is not None
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "default_output_length": 280,
        "dtype": "bfloat16",
        "global_head_dim": vision.head_dim,
        "head_dim": vision.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": vision.hidden,
        "intermediate_size": vision.mlp,
        "max_position_embeddings": 131_072,
        "model_type": "gemma4_vision",
        "num_attention_heads": vision.heads,
        "num_hidden_layers": vision.layers,
        "num_key_value_heads": vision.heads,
        "patch_size": round((vision.patch_inputs / 3) ** 0.5),
        "pooling_kernel_size": 3,
        "position_embedding_size": vision.positions,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
        "standardize": vision.standardize,
        # MaxText has no clip bounds, on E2B and E4B either: it computes the unclipped function.
        "use_clipped_linears": False,
    }
