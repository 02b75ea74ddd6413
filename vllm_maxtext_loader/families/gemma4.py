"""Gemma 4: which MaxText leaf becomes which Hugging Face tensor, and what only this family's shapes tell.

Read the table against MaxText 0.2.5 `models/gemma4.py`, `models/gemma4_small.py` (E2B, E4B) and `layers/moe.py` (left),
and transformers 5.19 `models/gemma4/modeling_gemma4.py` (right). Facts that are easy to get wrong:

- norms are stored as they are applied; there is no "+ 1" as in Gemma 2 and 3;
- the dense MLP of a mixture-of-experts layer is MaxText's `shared_experts`; Hugging Face calls it `mlp`;
- the router's input scale is `pre_forward_scale_2`, its projection is `gate`;
- on the 26B and 31B models a global layer has no `value`: its keys serve as values;
- E2B and E4B layers that share their keys and values with an earlier layer have neither key nor value.
"""

from __future__ import annotations

import dataclasses

from vllm_maxtext_loader.conversion.dims import ModelDims
from vllm_maxtext_loader.conversion.family import (
    Family,
    LayerGroup,
    PackedModule,
    Scope,
    TagField,
    WeightConverter,
    converter,
    for_scope,
)
from vllm_maxtext_loader.conversion.infer import require_size, set_layer_tags
from vllm_maxtext_loader.conversion.layout import Layout
from vllm_maxtext_loader.conversion.values import DivideByRoot
from vllm_maxtext_loader.families import gemma4_config

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
    "ple": "hidden_size_per_layer_input",
    "layers_ple": "num_hidden_layers x hidden_size_per_layer_input",
    "ple_vocab": "vocab_size_per_layer_input",
    "vision_layers": "vision num_hidden_layers",
    "vision_hidden": "vision hidden_size",
    "vision_heads": "vision num_attention_heads",
    "vision_head_dim": "vision head_dim",
    "vision_mlp": "vision intermediate_size",
    "vision_patch": "vision 3 x patch_size^2",
    "vision_positions": "vision position_embedding_size",
    "vision_coordinates": "2 (rows and columns)",
}
"""Names of the axes in the table, and the configuration field each is."""

_MOE = "mlp.moe_block.MoeBlock_0"
_SHARED = "mlp.moe_block.shared_experts"

# fmt: off
CONVERTERS: tuple[WeightConverter, ...] = (
    *for_scope(
        Scope.MODEL,
        converter("token_embedder.embedding", "embed_tokens.weight", "vocab hidden -> vocab hidden", DivideByRoot("hidden"), padded="vocab"),
        converter("decoder.decoder_norm.scale", "norm.weight", "hidden -> hidden"),
        converter("decoder.per_layer_embedder.embed_tokens_per_layer", "embed_tokens_per_layer.weight", "ple_vocab layers_ple -> ple_vocab layers_ple", when="ple"),
        converter("decoder.per_layer_embedder.per_layer_model_projection.kernel", "per_layer_model_projection.weight", "hidden layers_ple -> layers_ple hidden", when="ple"),
        converter("decoder.per_layer_embedder.per_layer_projection_norm.scale", "per_layer_projection_norm.weight", "ple -> ple", when="ple"),
    ),
    *for_scope(
        Scope.LAYER,
        # Attention. MaxText keeps heads as an axis; "kernel" is [in, out], Hugging Face's weight [out, in].
        converter("pre_self_attention_norm.scale", "input_layernorm.weight", "hidden -> hidden"),
        converter("self_attention.query.kernel", "self_attn.q_proj.weight", "hidden heads head_dim -> (heads head_dim) hidden"),
        converter("self_attention.key.kernel", "self_attn.k_proj.weight", "hidden kv_heads head_dim -> (kv_heads head_dim) hidden", when="keys"),
        converter("self_attention.value.kernel", "self_attn.v_proj.weight", "hidden kv_heads head_dim -> (kv_heads head_dim) hidden", when="values"),
        converter("self_attention.out.kernel", "self_attn.o_proj.weight", "heads head_dim hidden -> hidden (heads head_dim)"),
        converter("self_attention.query_norm.scale", "self_attn.q_norm.weight", "head_dim -> head_dim"),
        converter("self_attention.key_norm.scale", "self_attn.k_norm.weight", "head_dim -> head_dim", when="keys"),
        converter("post_self_attention_norm.scale", "post_attention_layernorm.weight", "hidden -> hidden"),
        # Dense MLP; in a mixture-of-experts layer it is the shared expert.
        converter("pre_ffw_norm.scale", "pre_feedforward_layernorm.weight", "hidden -> hidden"),
        converter("mlp.wi_0.kernel", "mlp.gate_proj.weight", "hidden mlp -> mlp hidden"),
        converter("mlp.wi_1.kernel", "mlp.up_proj.weight", "hidden mlp -> mlp hidden"),
        converter("mlp.wo.kernel", "mlp.down_proj.weight", "mlp hidden -> hidden mlp"),
        converter(f"{_SHARED}.wi_0.kernel", "mlp.gate_proj.weight", "hidden mlp -> mlp hidden"),
        converter(f"{_SHARED}.wi_1.kernel", "mlp.up_proj.weight", "hidden mlp -> mlp hidden"),
        converter(f"{_SHARED}.wo.kernel", "mlp.down_proj.weight", "mlp hidden -> hidden mlp"),
        converter("post_ffw_norm.scale", "post_feedforward_layernorm.weight", "hidden -> hidden"),
        # Mixture of experts. `wi` is gate and up in one leaf (MaxText's prefused experts).
        converter("mlp.pre_forward_scale_2", "router.scale", "hidden -> hidden", when="moe"),
        converter(f"{_MOE}.gate.kernel", "router.proj.weight", "hidden experts -> experts hidden", when="moe"),
        converter(f"{_MOE}.per_expert_scale", "router.per_expert_scale", "experts -> experts", when="moe", fold="scale"),
        converter(f"{_MOE}.wi_0", "experts.gate_up_proj", "experts hidden expert_mlp -> experts (part expert_mlp) hidden", when="moe", part=0),
        converter(f"{_MOE}.wi_1", "experts.gate_up_proj", "experts hidden expert_mlp -> experts (part expert_mlp) hidden", when="moe", part=1),
        converter(f"{_MOE}.wi", "experts.gate_up_proj", "experts hidden gate_up -> experts gate_up hidden", when="moe"),
        converter(f"{_MOE}.wo", "experts.down_proj", "experts expert_mlp hidden -> experts hidden expert_mlp", when="moe", fold="output"),
        converter("mlp.post_feedforward_layernorm_1.scale", "post_feedforward_layernorm_1.weight", "hidden -> hidden", when="moe"),
        converter("mlp.pre_feedforward_layernorm_2.scale", "pre_feedforward_layernorm_2.weight", "hidden -> hidden", when="moe"),
        converter("mlp.post_feedforward_layernorm_2.scale", "post_feedforward_layernorm_2.weight", "hidden -> hidden", when="moe"),
        # Per-layer embeddings (E2B, E4B).
        converter("per_layer_input_gate.kernel", "per_layer_input_gate.weight", "hidden ple -> ple hidden", when="ple"),
        converter("per_layer_projection.kernel", "per_layer_projection.weight", "ple hidden -> hidden ple", when="ple"),
        converter("post_per_layer_input_norm.scale", "post_per_layer_input_norm.weight", "hidden -> hidden", when="ple"),
        converter("layer_scalar", "layer_scalar", "1 -> 1"),
    ),
    *for_scope(
        Scope.VISION,
        converter("vision_entry.input_projection.kernel", "vision_tower.patch_embedder.input_proj.weight", "vision_patch vision_hidden -> vision_hidden vision_patch"),
        converter("vision_entry.pos_emb_param", "vision_tower.patch_embedder.position_embedding_table", "vision_positions vision_coordinates vision_hidden -> vision_coordinates vision_positions vision_hidden"),
        converter("std_bias", "vision_tower.std_bias", "vision_hidden -> vision_hidden", when="vision_std"),
        converter("std_scale", "vision_tower.std_scale", "vision_hidden -> vision_hidden", when="vision_std"),
        converter("projection.kernel", "embed_vision.embedding_projection.weight", "vision_hidden hidden -> hidden vision_hidden"),
    ),
    *for_scope(
        Scope.VISION_LAYER,
        converter("pre_attention_norm.scale", "input_layernorm.weight", "vision_hidden -> vision_hidden"),
        converter("attention.query.kernel", "self_attn.q_proj.linear.weight", "vision_hidden vision_heads vision_head_dim -> (vision_heads vision_head_dim) vision_hidden"),
        converter("attention.key.kernel", "self_attn.k_proj.linear.weight", "vision_hidden vision_heads vision_head_dim -> (vision_heads vision_head_dim) vision_hidden"),
        converter("attention.value.kernel", "self_attn.v_proj.linear.weight", "vision_hidden vision_heads vision_head_dim -> (vision_heads vision_head_dim) vision_hidden"),
        converter("attention.out.kernel", "self_attn.o_proj.linear.weight", "vision_heads vision_head_dim vision_hidden -> vision_hidden (vision_heads vision_head_dim)"),
        converter("attention.query_norm.scale", "self_attn.q_norm.weight", "vision_head_dim -> vision_head_dim"),
        converter("attention.key_norm.scale", "self_attn.k_norm.weight", "vision_head_dim -> vision_head_dim"),
        converter("post_attention_norm.scale", "post_attention_layernorm.weight", "vision_hidden -> vision_hidden"),
        converter("pre_ffw_norm.scale", "pre_feedforward_layernorm.weight", "vision_hidden -> vision_hidden"),
        converter("mlp.wi_0.kernel", "mlp.gate_proj.linear.weight", "vision_hidden vision_mlp -> vision_mlp vision_hidden"),
        converter("mlp.wi_1.kernel", "mlp.up_proj.linear.weight", "vision_hidden vision_mlp -> vision_mlp vision_hidden"),
        converter("mlp.wo.kernel", "mlp.down_proj.linear.weight", "vision_mlp vision_hidden -> vision_hidden vision_mlp"),
        converter("post_ffw_norm.scale", "post_feedforward_layernorm.weight", "vision_hidden -> vision_hidden"),
    ),
)
# fmt: on
"""The table. Two leaves that name the same tensor are alternatives, or parts (gate 0, up 1) of it."""

_VISION_ENCODER = r"vision_encoder\.Gemma4VisionEncoderLayer_0"

GROUPS: tuple[LayerGroup, ...] = (
    # MaxText 0.2.4 and later (models/gemma4.py Gemma4ScannableBlock): five local layers scanned inside the block.
    LayerGroup(
        r"decoder\.scanned_blocks\.local_layers",
        stacked=("block", "local"),
        base="block",
        position="local",
        name="scanned v2",
    ),
    LayerGroup(
        r"decoder\.scanned_blocks\.global_layer",
        stacked=("block",),
        base="block",
        position="last",
        name="scanned v2",
    ),
    # MaxText 0.2.2 and 0.2.3: six layers in a block, each stacked over the blocks.
    LayerGroup(
        r"decoder\.scanned_blocks\.layers_(\d{1,4})", stacked=("block",), base="block", name="scanned v1"
    ),
    # Layers that do not fill a block.
    LayerGroup(
        r"decoder\.layers_remainder\.local_layers", stacked=("local",), base="remainder", position="local"
    ),
    LayerGroup(r"decoder\.layers_remainder\.layers_(\d{1,4})", base="remainder"),
    LayerGroup(r"decoder\.(?:layers_remainder\.)?Gemma4DecoderLayerToLinen_(\d{1,4})", base="remainder"),
    # scan_layers=false; E2B and E4B always.
    LayerGroup(r"decoder\.layers_(\d{1,4})", name="unscanned"),
    LayerGroup(_VISION_ENCODER + r"\.layer_(\d{1,4})", Scope.VISION_LAYER),
    LayerGroup(_VISION_ENCODER, Scope.VISION),
    LayerGroup(r"vision_encoder\.Gemma4VisionProjector_0", Scope.VISION),
)
"""Source: MaxText 0.2.3 and 0.2.5 models/gemma4.py, layers/decoders.py, layers/nnx_decoders.py."""

_PERIOD = 6
"""Layers from one full-attention layer to the next in the 26B and 31B models."""


def _refine(dims: ModelDims, layout: Layout, where: str) -> ModelDims:
    """Which layers slide, share keys and values, or use keys as values."""
    count = len(dims.layers)
    own_keys = FAMILY.layers_with({"self_attn.k_proj.weight", "self_attn.k_norm.weight"}, layout)
    own_values = FAMILY.layers_with({"self_attn.v_proj.weight"}, layout)
    shared_from = count
    # Only trailing layers share keys and values, and only models with per-layer embeddings do (E2B, E4B).
    if "ple" in dims.tags:
        while shared_from > 0 and shared_from - 1 not in own_keys:
            shared_from -= 1
    sliding = _sliding(dims, layout, own_values, shared_from, where)
    # One full-attention layer without a value leaf, and none with, make "keys serve as values" true of all.
    k_eq_v = not any(layer in own_values for layer in range(shared_from) if not sliding[layer])
    tags: list[set[str]] = []
    for layer in range(count):
        has_values = layer < shared_from and not (k_eq_v and not sliding[layer])
        present = {"sliding": sliding[layer], "keys": layer < shared_from, "values": has_values}
        tags.append({tag for tag, is_present in present.items() if is_present})
    layers = tuple(
        dataclasses.replace(layer, sizes={k: v for k, v in layer.sizes.items() if k != "kv_heads"})
        if index >= shared_from
        else layer
        for index, layer in enumerate(dims.layers)
    )
    return set_layer_tags(dataclasses.replace(dims, layers=layers), tags, frozenset({"keys", "values"}))


def _sliding(
    dims: ModelDims, layout: Layout, own_values: set[int], shared_from: int, where: str
) -> list[bool]:
    """Which layers attend to a sliding window: told by the layer group, the head dim, or a missing `value`."""
    count = len(dims.layers)
    head_dims = [
        require_size(layer.sizes, "head_dim", index, where) for index, layer in enumerate(dims.layers)
    ]
    full: set[int] = set()
    for entry in layout.leaves:
        if ".global_layer." in entry.leaf.name:
            full |= {int(layer) for layer in entry.layers.flat}
    if not full and len(set(head_dims)) == 2:
        # Full-attention layers are the wider ones in every published Gemma 4 (512 against 256).
        full = {layer for layer in range(count) if head_dims[layer] == max(head_dims)}
    if not full:
        valued = {layer for layer in range(shared_from) if layer in own_values}
        if valued and len(valued) < shared_from:
            full = set(range(shared_from)) - valued
    if not full:
        full = {layer for layer in range(count) if layer % _PERIOD == _PERIOD - 1}
    return [layer not in full for layer in range(count)]


FAMILY = Family(
    name="gemma4",
    title="Gemma 4",
    decoder_block="gemma4 or gemma4_small",
    converters=CONVERTERS,
    groups=GROUPS,
    axes=AXES,
    per_layer=frozenset({"head_dim", "kv_heads", "mlp"}),
    derived={"gate_up": ("expert_mlp", 2), "layers_ple": ("ple", "layers")},
    marks=("layer_scalar",),
    prefixes={
        Scope.MODEL: "{text}",
        Scope.LAYER: "{text}layers.{i}.",
        Scope.VISION: "model.",
        Scope.VISION_LAYER: "model.vision_tower.encoder.layers.{i}.",
    },
    refine=_refine,
    model_types={"gemma4_text": "Gemma4TextConfig", "gemma4": "Gemma4Config"},
    architectures={"gemma4_text": "Gemma4ForCausalLM", "gemma4": "Gemma4ForConditionalGeneration"},
    from_config=gemma4_config.from_config,
    config_fields=gemma4_config.config_fields,
    presets=gemma4_config.PRESETS,
    tag_fields={
        "sliding": TagField(
            "layer_types",
            "sliding_attention",
            "full_attention",
            ("sliding-window attention", "full attention"),
        ),
        "keys": TagField(
            "num_key_value_heads",
            "own",
            "none (shared with an earlier layer)",
            ("", "shared keys and values"),
        ),
        "values": TagField("attention_k_eq_v", "False", "True", ("", "keys as values")),
        "vision_std": TagField("vision standardize", "True", "False"),
    },
    kinds={"moe": "experts", "ple": "per-layer embeddings"},
    modules=(
        PackedModule(
            "self_attn.qkv_proj",
            ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
            # Where a layer has no values, its keys serve as values.
            fallback={"self_attn.v_proj.weight": "self_attn.k_proj.weight"},
        ),
        # Layers that share keys and values with an earlier one.
        PackedModule("self_attn.q_proj", ("self_attn.q_proj.weight",)),
        PackedModule("self_attn.o_proj", ("self_attn.o_proj.weight",)),
        PackedModule("mlp.gate_up_proj", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
        PackedModule("mlp.down_proj", ("mlp.down_proj.weight",)),
        PackedModule(
            "experts.routed_experts", ("experts.gate_up_proj", "experts.down_proj"), is_experts=True
        ),
    ),
    buffers=("layer_scalar",),
    begins_with_bos=True,
    ends_in_full_attention=True,
)
