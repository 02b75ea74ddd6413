"""Gemma 4: which MaxText leaf becomes which Hugging Face tensor, as a table, and the model's dimensions.

Read the table against MaxText 0.2.5 `models/gemma4.py`, `models/gemma4_small.py` (E2B, E4B) and
`layers/moe.py` (left), and transformers 5.19 `models/gemma4/modeling_gemma4.py` (right). Facts that are
easy to get wrong:

- norms are stored as they are applied; there is no "+ 1" as in Gemma 2 and 3;
- the dense MLP of a mixture-of-experts layer is MaxText's `shared_experts`; Hugging Face calls it `mlp`;
- the router's input scale is `pre_forward_scale_2`, its projection is `gate`;
- on the 26B and 31B models a global layer has no `value`: its keys serve as values;
- E2B and E4B layers that share their keys and values with an earlier layer have neither key nor value.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_maxtext_loader.conversion.rearrange import Rearrange

DIMENSIONS: dict[str, str] = {
    "V": "vocab_size",
    "H": "hidden_size",
    "N": "num_attention_heads",
    "K": "num_key_value_heads",
    "D": "head_dim",
    "M": "intermediate_size",
    "E": "num_experts",
    "F": "moe_intermediate_size",
    "G": "2 x moe_intermediate_size (gate, then up)",
    "P": "hidden_size_per_layer_input",
    "Q": "num_hidden_layers x hidden_size_per_layer_input",
    "W": "vocab_size_per_layer_input",
    "C": "vision hidden_size",
    "A": "vision num_attention_heads",
    "B": "vision head_dim",
    "I": "vision intermediate_size",
    "X": "vision 3 x patch_size^2",
    "T": "vision position_embedding_size",
    "S": "2 (rows and columns)",
}
"""Names of the axes in the table, and the configuration field each is."""


class Value(enum.Enum):
    """What happens to the values of a leaf, beside moving them."""

    COPY = "copied bit by bit"
    UNSCALE_EMBEDDING = "divided by sqrt(hidden size), padded rows dropped"
    EXPERT_OUTPUT = "copied, or multiplied by per_expert_scale where that is folded"
    EXPERT_SCALE = "copied, or replaced by ones where it is folded"


class Scope(enum.Enum):
    """What a rule is repeated over."""

    MODEL = "once"
    LAYER = "decoder layers"
    VISION = "once, vision tower"
    VISION_LAYER = "vision tower layers"


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of the table.

    Attributes:
        scope: what it is repeated over.
        leaf: MaxText path, below the layer for layer scopes.
        hf: Hugging Face name, below the layer (or the text model) likewise.
        move: how the axes are rearranged.
        value: what happens to the values.
    """

    scope: Scope
    leaf: str
    hf: str
    move: Rearrange
    value: Value = Value.COPY


def _rules(scope: Scope, *rows: tuple[str, str, str] | tuple[str, str, str, Value | int]) -> tuple[Rule, ...]:
    rules: list[Rule] = []
    for leaf, hf, pattern, *extra in rows:
        special = extra[0] if extra else Value.COPY
        if isinstance(special, Value):
            rules.append(Rule(scope, leaf, hf, Rearrange(pattern), special))
        else:
            rules.append(Rule(scope, leaf, hf, Rearrange(pattern, part=special)))
    return tuple(rules)


RULES: tuple[Rule, ...] = (
    *_rules(
        Scope.MODEL,
        ("token_embedder.embedding", "embed_tokens.weight", "V H -> V H", Value.UNSCALE_EMBEDDING),
        ("decoder.decoder_norm.scale", "norm.weight", "H -> H"),
        ("decoder.per_layer_embedder.embed_tokens_per_layer", "embed_tokens_per_layer.weight", "W Q -> W Q"),
        ("decoder.per_layer_embedder.per_layer_model_projection.kernel", "per_layer_model_projection.weight", "H Q -> Q H"),
        ("decoder.per_layer_embedder.per_layer_projection_norm.scale", "per_layer_projection_norm.weight", "P -> P"),
    ),
    *_rules(
        Scope.LAYER,
        # Attention. MaxText keeps heads as an axis; "kernel" is [in, out], Hugging Face's weight [out, in].
        ("pre_self_attention_norm.scale", "input_layernorm.weight", "H -> H"),
        ("self_attention.query.kernel", "self_attn.q_proj.weight", "H N D -> (N D) H"),
        ("self_attention.key.kernel", "self_attn.k_proj.weight", "H K D -> (K D) H"),
        ("self_attention.value.kernel", "self_attn.v_proj.weight", "H K D -> (K D) H"),
        ("self_attention.out.kernel", "self_attn.o_proj.weight", "N D H -> H (N D)"),
        ("self_attention.query_norm.scale", "self_attn.q_norm.weight", "D -> D"),
        ("self_attention.key_norm.scale", "self_attn.k_norm.weight", "D -> D"),
        ("post_self_attention_norm.scale", "post_attention_layernorm.weight", "H -> H"),
        # Dense MLP; in a mixture-of-experts layer it is the shared expert.
        ("pre_ffw_norm.scale", "pre_feedforward_layernorm.weight", "H -> H"),
        ("mlp.wi_0.kernel", "mlp.gate_proj.weight", "H M -> M H"),
        ("mlp.wi_1.kernel", "mlp.up_proj.weight", "H M -> M H"),
        ("mlp.wo.kernel", "mlp.down_proj.weight", "M H -> H M"),
        ("mlp.moe_block.shared_experts.wi_0.kernel", "mlp.gate_proj.weight", "H M -> M H"),
        ("mlp.moe_block.shared_experts.wi_1.kernel", "mlp.up_proj.weight", "H M -> M H"),
        ("mlp.moe_block.shared_experts.wo.kernel", "mlp.down_proj.weight", "M H -> H M"),
        ("post_ffw_norm.scale", "post_feedforward_layernorm.weight", "H -> H"),
        # Mixture of experts. `wi` is gate and up in one leaf (MaxText's prefused experts).
        ("mlp.pre_forward_scale_2", "router.scale", "H -> H"),
        ("mlp.moe_block.MoeBlock_0.gate.kernel", "router.proj.weight", "H E -> E H"),
        ("mlp.moe_block.MoeBlock_0.per_expert_scale", "router.per_expert_scale", "E -> E", Value.EXPERT_SCALE),
        ("mlp.moe_block.MoeBlock_0.wi_0", "experts.gate_up_proj", "E H F -> E (part F) H", 0),
        ("mlp.moe_block.MoeBlock_0.wi_1", "experts.gate_up_proj", "E H F -> E (part F) H", 1),
        ("mlp.moe_block.MoeBlock_0.wi", "experts.gate_up_proj", "E H G -> E G H"),
        ("mlp.moe_block.MoeBlock_0.wo", "experts.down_proj", "E F H -> E H F", Value.EXPERT_OUTPUT),
        ("mlp.post_feedforward_layernorm_1.scale", "post_feedforward_layernorm_1.weight", "H -> H"),
        ("mlp.pre_feedforward_layernorm_2.scale", "pre_feedforward_layernorm_2.weight", "H -> H"),
        ("mlp.post_feedforward_layernorm_2.scale", "post_feedforward_layernorm_2.weight", "H -> H"),
        # Per-layer embeddings (E2B, E4B).
        ("per_layer_input_gate.kernel", "per_layer_input_gate.weight", "H P -> P H"),
        ("per_layer_projection.kernel", "per_layer_projection.weight", "P H -> H P"),
        ("post_per_layer_input_norm.scale", "post_per_layer_input_norm.weight", "H -> H"),
        ("layer_scalar", "layer_scalar", "1 -> 1"),
    ),
    *_rules(
        Scope.VISION,
        ("vision_entry.input_projection.kernel", "vision_tower.patch_embedder.input_proj.weight", "X C -> C X"),
        ("vision_entry.pos_emb_param", "vision_tower.patch_embedder.position_embedding_table", "T S C -> S T C"),
        ("std_bias", "vision_tower.std_bias", "C -> C"),
        ("std_scale", "vision_tower.std_scale", "C -> C"),
        ("projection.kernel", "embed_vision.embedding_projection.weight", "C H -> H C"),
    ),
    *_rules(
        Scope.VISION_LAYER,
        ("pre_attention_norm.scale", "input_layernorm.weight", "C -> C"),
        ("attention.query.kernel", "self_attn.q_proj.linear.weight", "C A B -> (A B) C"),
        ("attention.key.kernel", "self_attn.k_proj.linear.weight", "C A B -> (A B) C"),
        ("attention.value.kernel", "self_attn.v_proj.linear.weight", "C A B -> (A B) C"),
        ("attention.out.kernel", "self_attn.o_proj.linear.weight", "A B C -> C (A B)"),
        ("attention.query_norm.scale", "self_attn.q_norm.weight", "B -> B"),
        ("attention.key_norm.scale", "self_attn.k_norm.weight", "B -> B"),
        ("post_attention_norm.scale", "post_attention_layernorm.weight", "C -> C"),
        ("pre_ffw_norm.scale", "pre_feedforward_layernorm.weight", "C -> C"),
        ("mlp.wi_0.kernel", "mlp.gate_proj.linear.weight", "C I -> I C"),
        ("mlp.wi_1.kernel", "mlp.up_proj.linear.weight", "C I -> I C"),
        ("mlp.wo.kernel", "mlp.down_proj.linear.weight", "I C -> C I"),
        ("post_ffw_norm.scale", "post_feedforward_layernorm.weight", "C -> C"),
    ),
)  # fmt: skip
"""The table. Two leaves that name the same tensor are alternatives, or parts (gate 0, up 1) of it."""


@dataclasses.dataclass(frozen=True)
class Container:
    """Where MaxText keeps layers, and how many of them lie stacked in one leaf.

    Attributes:
        pattern: regular expression of the path in front of a layer's own leaf names; group 1 is the slot.
        scope: what the leaves below are rules of.
        stack: names of the stacked axes, in order; () where a leaf is one layer.
        first: "block" (layers of a scanned block), "remainder" (after all blocks) or "absolute".
        offset: position inside: "slot" (from the path), "local" (stacked axis), "last" of the block.
        title: what a user calls this layout.
    """

    pattern: str
    scope: Scope
    stack: tuple[str, ...] = ()
    first: str = "absolute"
    offset: str = "slot"
    title: str = ""


_VISION_ENCODER = r"vision_encoder\.Gemma4VisionEncoderLayer_0"

CONTAINERS: tuple[Container, ...] = (
    # MaxText 0.2.4 and later (models/gemma4.py Gemma4ScannableBlock): five local layers scanned inside the block.
    Container(
        r"decoder\.scanned_blocks\.local_layers",
        Scope.LAYER,
        ("block", "local"),
        "block",
        "local",
        "scanned v2",
    ),
    Container(
        r"decoder\.scanned_blocks\.global_layer", Scope.LAYER, ("block",), "block", "last", "scanned v2"
    ),
    # MaxText 0.2.2 and 0.2.3: six slots, each stacked over the blocks.
    Container(
        r"decoder\.scanned_blocks\.layers_(\d{1,4})", Scope.LAYER, ("block",), "block", "slot", "scanned v1"
    ),
    # Layers that do not fill a block.
    Container(r"decoder\.layers_remainder\.local_layers", Scope.LAYER, ("local",), "remainder", "local"),
    Container(r"decoder\.layers_remainder\.layers_(\d{1,4})", Scope.LAYER, (), "remainder", "slot"),
    Container(
        r"decoder\.(?:layers_remainder\.)?Gemma4DecoderLayerToLinen_(\d{1,4})",
        Scope.LAYER,
        (),
        "remainder",
        "slot",
    ),
    # scan_layers=false; E2B and E4B always.
    Container(r"decoder\.layers_(\d{1,4})", Scope.LAYER, title="unscanned"),
    Container(_VISION_ENCODER + r"\.layer_(\d{1,4})", Scope.VISION_LAYER),
    Container(_VISION_ENCODER, Scope.VISION),
    Container(r"vision_encoder\.Gemma4VisionProjector_0", Scope.VISION),
)
"""Tried in order. Source: MaxText 0.2.3 and 0.2.5 models/gemma4.py, layers/decoders.py, layers/nnx_decoders.py."""


@dataclasses.dataclass(frozen=True)
class LayerDims:
    """One decoder layer.

    Attributes:
        sliding: sliding-window attention (else full).
        head_dim: D.
        kv_heads: K; None where the layer shares keys and values with an earlier one.
        k_eq_v: keys serve as values.
        mlp: M, width of the dense MLP.
    """

    sliding: bool
    head_dim: int
    kv_heads: int | None
    k_eq_v: bool
    mlp: int


@dataclasses.dataclass(frozen=True)
class VisionDims:
    """The vision tower: layers, C, A, B, I, X, T, and whether it has std_bias and std_scale."""

    layers: int
    hidden: int
    heads: int
    head_dim: int
    mlp: int
    patch_inputs: int
    positions: int
    standardize: bool


@dataclasses.dataclass(frozen=True)
class Dims:
    """Everything that determines the shapes of a Gemma 4 model's weights.

    Attributes:
        vocab, hidden, heads: V, H, N.
        layers: one entry per decoder layer.
        experts, expert_mlp: E, F; None for dense models.
        ple, ple_vocab: P, W; None for models without per-layer embeddings.
        vision: None for text-only models.
    """

    vocab: int
    hidden: int
    heads: int
    layers: tuple[LayerDims, ...]
    experts: int | None = None
    expert_mlp: int | None = None
    ple: int | None = None
    ple_vocab: int | None = None
    vision: VisionDims | None = None

    def sizes(self, scope: Scope, index: int = 0) -> Mapping[str, int]:
        """Size of every axis name that occurs in rules of `scope`, for layer `index`."""
        sizes = {"V": self.vocab, "H": self.hidden, "N": self.heads, "S": 2}
        if self.experts and self.expert_mlp:
            sizes |= {"E": self.experts, "F": self.expert_mlp, "G": 2 * self.expert_mlp}
        if self.ple and self.ple_vocab:
            sizes |= {"P": self.ple, "Q": self.ple * len(self.layers), "W": self.ple_vocab}
        if scope is Scope.LAYER:
            layer = self.layers[index]
            sizes |= {"D": layer.head_dim, "K": layer.kv_heads or 0, "M": layer.mlp}
        if self.vision is not None and scope in (Scope.VISION, Scope.VISION_LAYER):
            vision = self.vision
            sizes |= {"C": vision.hidden, "A": vision.heads, "B": vision.head_dim, "I": vision.mlp}
            sizes |= {"X": vision.patch_inputs, "T": vision.positions}
        return sizes

    def demands(self, rule: Rule, index: int = 0) -> bool:
        """Whether a model of these dimensions has the rule's Hugging Face tensor in layer `index`."""
        name = rule.hf
        if rule.scope is Scope.MODEL:
            return self.ple is not None or "per_layer" not in name
        if rule.scope in (Scope.VISION, Scope.VISION_LAYER):
            return self.vision is not None and (self.vision.standardize or ".std_" not in name)
        layer = self.layers[index]
        if name in ("self_attn.k_proj.weight", "self_attn.k_norm.weight"):
            return layer.kv_heads is not None
        if name == "self_attn.v_proj.weight":
            return layer.kv_heads is not None and not layer.k_eq_v
        if name.startswith(("router.", "experts.")) or name.endswith(
            ("layernorm_1.weight", "layernorm_2.weight")
        ):
            return self.experts is not None
        return self.ple is not None or "per_layer" not in name

    def repeats(self, scope: Scope) -> range:
        """Indices a rule of `scope` is repeated over."""
        if scope is Scope.LAYER:
            return range(len(self.layers))
        if scope is Scope.VISION_LAYER:
            return range(self.vision.layers if self.vision else 0)
        return range(1)

    def hf_name(self, rule: Rule, index: int = 0) -> str:
        """Full Hugging Face name, as in the published checkpoints."""
        text = "model.language_model." if self.vision is not None else "model."
        match rule.scope:
            case Scope.MODEL:
                return text + rule.hf
            case Scope.LAYER:
                return f"{text}layers.{index}.{rule.hf}"
            case Scope.VISION:
                return f"model.{rule.hf}"
            case Scope.VISION_LAYER:
                return f"model.vision_tower.encoder.layers.{index}.{rule.hf}"

    def hf_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every Hugging Face tensor the model has, with its exact shape."""
        seen: set[str] = set()
        for rule in RULES:
            for index in self.repeats(rule.scope):
                name = self.hf_name(rule, index)
                if self.demands(rule, index) and name not in seen:
                    seen.add(name)
                    yield name, rule.move.hf_shape(self.sizes(rule.scope, index))

    @classmethod
    def from_config(cls, config: Any) -> Dims:
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
            shares = index >= shared_from
            layers.append(
                LayerDims(
                    sliding=sliding,
                    head_dim=own.head_dim,
                    kv_heads=None if shares else own.num_key_value_heads,
                    k_eq_v=bool(text.attention_k_eq_v) and not sliding and not shares,
                    mlp=text.intermediate_size
                    * (2 if text.use_double_wide_mlp and index >= shared_from > 0 else 1),
                )
            )
        experts = text.num_experts if text.enable_moe_block else None
        ple = text.hidden_size_per_layer_input or None
        vision = getattr(config, "vision_config", None)
        return cls(
            vocab=text.vocab_size,
            hidden=text.hidden_size,
            heads=text.num_attention_heads,
            layers=tuple(layers),
            experts=experts,
            expert_mlp=text.moe_intermediate_size if experts else None,
            ple=ple,
            ple_vocab=text.vocab_size_per_layer_input if ple else None,
            vision=None
            if vision is None
            else VisionDims(
                layers=vision.num_hidden_layers,
                hidden=vision.hidden_size,
                heads=vision.num_attention_heads,
                head_dim=vision.head_dim,
                mlp=vision.intermediate_size,
                patch_inputs=3 * vision.patch_size**2,
                positions=vision.position_embedding_size,
                standardize=bool(vision.standardize),
            ),
        )
