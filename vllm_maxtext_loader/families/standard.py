"""What MaxText's plain decoders (Qwen, Llama, Mistral, Mixtral) have in common: rows, layer groups, packed layers.

Read it against MaxText 0.2.5 `layers/attentions.py`, `layers/linears.py`, `layers/moe.py`, `layers/nnx_decoders.py` (left),
and transformers 5.19 `models/llama/modeling_llama.py` (right). One layer is scanned at a time, so a block is a layer.
"""

from __future__ import annotations

from typing import Any

from vllm_maxtext_loader.conversion.dims import LayerDims, ModelDims
from vllm_maxtext_loader.conversion.family import (
    LayerGroup,
    PackedModule,
    Scope,
    WeightConverter,
    converter,
    for_scope,
)

AXES = {
    "vocab": "vocab_size",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp": "intermediate_size",
    "experts": "num_experts",
    "expert_mlp": "moe_intermediate_size",
    "gate_up": "2 x moe_intermediate_size (gate, then up)",
}
"""Names of the axes, and the configuration field each is."""

DERIVED: dict[str, tuple[str, int | str]] = {"gate_up": ("expert_mlp", 2)}

PREFIXES = {Scope.ROOT: "", Scope.MODEL: "{text}", Scope.LAYER: "{text}layers.{i}."}

GROUPS: tuple[LayerGroup, ...] = (
    LayerGroup(r"decoder\.layers", stacked=("block",), base="block", position="last", name="scanned"),
    LayerGroup(r"decoder\.layers_(\d{1,4})", name="unscanned"),
)
"""Source: MaxText 0.2.5 layers/nnx_decoders.py; the same since 0.2.2."""

# fmt: off
OUTSIDE: tuple[WeightConverter, ...] = (
    *for_scope(
        Scope.MODEL,
        converter("token_embedder.embedding", "embed_tokens.weight", "vocab hidden -> vocab hidden", padded="vocab"),
        converter("decoder.decoder_norm.scale", "norm.weight", "hidden -> hidden"),
    ),
    *for_scope(
        Scope.ROOT,
        # Where it is absent, the embedding serves as the output head (MaxText: logits_via_embedding).
        converter("decoder.logits_dense.kernel", "lm_head.weight", "hidden vocab -> vocab hidden", padded="vocab", when="untied"),
    ),
)

NORMS: tuple[WeightConverter, ...] = (
    converter("pre_self_attention_layer_norm.scale", "input_layernorm.weight", "hidden -> hidden"),
    converter("post_self_attention_layer_norm.scale", "post_attention_layernorm.weight", "hidden -> hidden"),
)

# MaxText keeps heads as an axis; "kernel" is [in, out], Hugging Face's weight [out, in].
ATTENTION: tuple[WeightConverter, ...] = (
    converter("self_attention.query.kernel", "self_attn.q_proj.weight", "hidden heads head_dim -> (heads head_dim) hidden"),
    converter("self_attention.key.kernel", "self_attn.k_proj.weight", "hidden kv_heads head_dim -> (kv_heads head_dim) hidden"),
    converter("self_attention.value.kernel", "self_attn.v_proj.weight", "hidden kv_heads head_dim -> (kv_heads head_dim) hidden"),
    converter("self_attention.out.kernel", "self_attn.o_proj.weight", "heads head_dim hidden -> hidden (heads head_dim)"),
)

MLP: tuple[WeightConverter, ...] = (
    converter("mlp.wi_0.kernel", "mlp.gate_proj.weight", "hidden mlp -> mlp hidden", when="!moe"),
    converter("mlp.wi_1.kernel", "mlp.up_proj.weight", "hidden mlp -> mlp hidden", when="!moe"),
    converter("mlp.wo.kernel", "mlp.down_proj.weight", "mlp hidden -> hidden mlp", when="!moe"),
)


def moe_rows(block: str, hf: str, gate: str, up: str, down: str, fused: tuple[str, str]) -> tuple[WeightConverter, ...]:
    """Rows of a mixture of experts.

    Args:
        block: MaxText's module below the layer ("moe_block").
        hf: Hugging Face's ("mlp").
        gate, up, down: published names of an expert's matrices.
        fused: names of gate and up, and of down, under which vLLM takes all experts of a layer.
    """
    def names(*matrices: str) -> tuple[str, ...]:
        return tuple(f"{hf}.experts.{{e}}.{matrix}.weight" for matrix in matrices)

    gate_up, out = (f"{hf}.experts.{name}" for name in fused)
    return (
        converter(f"{block}.gate.kernel", f"{hf}.gate.weight", "hidden experts -> experts hidden", when="moe"),
        converter(f"{block}.wi_0", gate_up, "experts hidden expert_mlp -> experts (part expert_mlp) hidden", part=0, when="moe", expert_names=names(gate, up)),
        converter(f"{block}.wi_1", gate_up, "experts hidden expert_mlp -> experts (part expert_mlp) hidden", part=1, when="moe", expert_names=names(gate, up)),
        # Gate and up in one leaf: MaxText's prefused experts.
        converter(f"{block}.wi", gate_up, "experts hidden gate_up -> experts gate_up hidden", when="moe", expert_names=names(gate, up)),
        converter(f"{block}.wo", out, "experts expert_mlp hidden -> experts hidden expert_mlp", when="moe", expert_names=names(down)),
    )
# fmt: on


def modules(experts: str | None = None, fused: tuple[str, str] = ("", "")) -> tuple[PackedModule, ...]:
    """vLLM's layers that chunks are written to directly.

    Args:
        experts: path of the routed experts below the decoder layer; None for a family without.
        fused: names of gate and up, and of down, of all experts of a layer.
    """
    dense = (
        PackedModule(
            "self_attn.qkv_proj",
            ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        ),
        PackedModule("self_attn.o_proj", ("self_attn.o_proj.weight",)),
        PackedModule("mlp.gate_up_proj", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
        PackedModule("mlp.down_proj", ("mlp.down_proj.weight",)),
    )
    return dense if experts is None else (*dense, PackedModule(experts, fused, is_experts=True))


def decoder_dims(family: str, config: Any, *, experts: int | None, expert_mlp: int | None) -> ModelDims:
    """Dimensions of a decoder whose layers are all alike.

    Args:
        family: its name.
        config: a transformers configuration.
        experts, expert_mlp: number and width of the experts; None for a dense model.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layer = {"head_dim": head_dim, "kv_heads": config.num_key_value_heads}
    sizes = {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
    }
    tags: set[str] = set()
    if experts and expert_mlp:
        tags.add("moe")
        sizes |= {"experts": experts, "expert_mlp": expert_mlp}
    else:
        layer["mlp"] = config.intermediate_size
    if not config.tie_word_embeddings:
        tags.add("untied")
    return ModelDims(family, sizes, (LayerDims(layer),) * config.num_hidden_layers, frozenset(tags))


def decoder_fields(dims: ModelDims) -> dict[str, Any]:
    """The configuration fields that state the dimensions of such a decoder."""
    sizes, layer = dims.sizes, dims.layers[0].sizes
    return {
        "dtype": "bfloat16",
        "head_dim": layer["head_dim"],
        "hidden_size": sizes["hidden"],
        "num_attention_heads": sizes["heads"],
        "num_hidden_layers": len(dims.layers),
        "num_key_value_heads": layer["kv_heads"],
        "tie_word_embeddings": "untied" not in dims.tags,
        "vocab_size": sizes["vocab"],
        **({"intermediate_size": layer["mlp"]} if "mlp" in layer else {}),
    }


def preset_dims(
    family: str,
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocab: int,
    mlp: int | None = None,
    experts: int | None = None,
    expert_mlp: int | None = None,
    tied: bool = False,
    tags: frozenset[str] = frozenset(),
) -> ModelDims:
    """Dimensions of a published model."""
    layer = {"head_dim": head_dim, "kv_heads": kv_heads}
    sizes = {"vocab": vocab, "hidden": hidden, "heads": heads}
    own = set(tags) if tied else {*tags, "untied"}
    if experts and expert_mlp:
        own.add("moe")
        sizes |= {"experts": experts, "expert_mlp": expert_mlp}
    elif mlp:
        layer["mlp"] = mlp
    return ModelDims(family, sizes, (LayerDims(layer),) * layers, frozenset(own))
