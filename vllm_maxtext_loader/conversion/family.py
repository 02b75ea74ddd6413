"""What a model family is: data that the rest of `conversion` works on, and a few small functions.

A family says which MaxText leaf becomes which Hugging Face tensor (`WeightConverter`), where MaxText keeps layers
(`LayerGroup`), how its configuration states the dimensions, and which models of it were published (`Preset`). Nothing
else in the package knows a family: `families/` holds one file each, docs/families.md says how to add one.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vllm_maxtext_loader.conversion.dims import VISION_LAYERS, ModelDims
from vllm_maxtext_loader.conversion.rearrange import Rearrange
from vllm_maxtext_loader.conversion.values import Elementwise, to_float32

if TYPE_CHECKING:
    from vllm_maxtext_loader.conversion.layout import Layout


class Scope(enum.Enum):
    """What a converter is repeated over."""

    ROOT = "once, outside the text model"
    MODEL = "once"
    LAYER = "decoder layers"
    VISION = "once, vision tower"
    VISION_LAYER = "vision tower layers"


@dataclasses.dataclass(frozen=True)
class WeightConverter:
    """One row of a family's table: a MaxText leaf and the Hugging Face tensor it becomes.

    Attributes:
        leaf: MaxText path, below the layer for layer scopes.
        hf: Hugging Face name, below the layer (or the text model) likewise.
        rearrange: how the axes move.
        scope: what it is repeated over.
        values: what happens to every value, in this order.
        when: tag of the models or layers that have the tensor; "!tag" for those without the tag, "" for all.
        padded: axis that the writer may have padded at its end (the vocabulary); the padding is dropped.
        fold: "scale" for a scale per expert that is multiplied into the experts' "output" where the engine does not.
        pairs: tag of the models whose rotary pairs are stored next to each other along `head_dim` (2i, 2i + 1); they
            are moved to (i, i + head_dim / 2).
        expert_names: published names of the tensor's parts per expert, with "{e}"; () where it is published whole.
        keep_dtype: never cast to the engine's dtype.
    """

    leaf: str
    hf: str
    rearrange: Rearrange
    scope: Scope = Scope.LAYER
    values: tuple[Elementwise, ...] = ()
    when: str = ""
    padded: str | None = None
    fold: Literal["scale", "output"] | None = None
    pairs: str | None = None
    expert_names: tuple[str, ...] = ()
    keep_dtype: bool = False

    def to_hf(self, stored: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Hugging Face values of stored ones: float32 and unrounded where anything is computed."""
        for operation in self.values:
            stored = operation.to_hf(stored, sizes)
        return stored

    def to_maxtext(self, values: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Inverse of `to_hf`, float32 and unrounded."""
        values = to_float32(values)
        for operation in reversed(self.values):
            values = operation.to_maxtext(values, sizes)
        return values

    def stored_forms(self, values: np.ndarray, sizes: Mapping[str, int]) -> Iterator[np.ndarray]:
        """What MaxText's converters make of Hugging Face values; `to_maxtext` first."""
        if len(self.values) == 1:
            yield from self.values[0].stored_forms(values, sizes)
        else:
            yield self.to_maxtext(values, sizes)

    def padded_axis(self) -> int | None:
        """Position of the padded axis in the leaf (of one layer)."""
        return None if self.padded is None else self.rearrange.maxtext_axes.index(self.padded)


def converter(
    leaf: str, hf: str, pattern: str, *values: Elementwise, part: int | None = None, **options: Any
) -> WeightConverter:
    """A row as the tables write it; see `WeightConverter` and `Rearrange`."""
    return WeightConverter(leaf, hf, Rearrange(pattern, part), values=values, **options)


def for_scope(scope: Scope, *rows: WeightConverter) -> tuple[WeightConverter, ...]:
    """Rows of one scope."""
    return tuple(dataclasses.replace(row, scope=scope) for row in rows)


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """Where MaxText keeps layers, and how many of them lie stacked in one leaf.

    Attributes:
        pattern: regular expression of the path in front of a layer's own leaf names; group 1 is an index.
        scope: what the leaves below are converted as.
        stacked: names of the stacked (scanned) axes, in order; () where a leaf is one layer.
        base: where its layers begin: "block" (inside a scanned block), "remainder" (after all blocks) or "absolute".
        position: position after that: "index" (from the path), "local" (a stacked axis), "last" of the block.
        name: what a user calls this layout.
    """

    pattern: str
    scope: Scope = Scope.LAYER
    stacked: tuple[str, ...] = ()
    base: Literal["block", "remainder", "absolute"] = "absolute"
    position: Literal["index", "local", "last"] = "index"
    name: str = ""


@dataclasses.dataclass(frozen=True)
class PackedModule:
    """A layer of vLLM's decoder layer that is loaded directly, and what its weight is packed of.

    Attributes:
        module: path below the decoder layer ("self_attn.qkv_proj").
        tensors: Hugging Face names below the layer, in the order of its outputs.
        fallback: tensor that serves where one of them does not exist.
        is_experts: routed experts (gate and up, then down) instead of a linear layer.
    """

    module: str
    tensors: tuple[str, ...]
    fallback: Mapping[str, str] = dataclasses.field(default_factory=dict)
    is_experts: bool = False


@dataclasses.dataclass(frozen=True)
class TagField:
    """How a configuration states a tag of a layer, for messages.

    Attributes:
        field: name in config.json.
        present, absent: what the field says.
        words: how a sentence describes a layer with and without the tag; "" says nothing.
    """

    field: str
    present: str
    absent: str
    words: tuple[str, str] = ("", "")


@dataclasses.dataclass(frozen=True)
class Preset:
    """A published model: what shapes do not tell.

    Attributes:
        name: MaxText's model name.
        published: Hugging Face names of the models with these settings, the one to name first.
        dims: of its text model.
        fields: settings for config.json, by field of the text configuration.
        top_k: experts per token; None for dense models.
        stops: eos_token_id of the published generation_config.json of the instruction-tuned model.
        base_stops: likewise, of the model that is not instruction-tuned.
    """

    name: str
    published: tuple[str, ...]
    dims: ModelDims
    fields: Mapping[str, Any]
    top_k: int | None = None
    stops: tuple[int, ...] = ()
    base_stops: tuple[int, ...] = ()


def _unchanged(dims: ModelDims, layout: Layout, where: str) -> ModelDims:
    return dims


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name, title: "qwen3", and what a message calls it.
        decoder_block: MaxText's names of it, for messages.
        converters: the table.
        groups: tried in order.
        axes: by axis name, the configuration field it is.
        per_layer: axes that may differ between layers.
        derived: by axis name, the axis it is a multiple of, and the factor: a number, or "layers".
        marks: names of layer leaves that every model of the family has.
        absent: names of layer leaves that none has.
        prefixes: by scope, what comes before the Hugging Face names; "{text}" is the text model, "{i}" the layer.
        refine: what only this family knows of shapes (which layers slide, which share keys).
        model_types: transformers' configuration class by model_type; the text model's first.
        architectures: vLLM's class of a text model, by model_type.
        from_config: dimensions a transformers configuration demands.
        config_fields: settings of config.json for dimensions and a preset (a `Preset`).
        presets: published models.
        tag_fields: how config.json states the tags that layers differ in.
        kinds: what a tag that whole models differ in means, in words ("moe": "experts").
        modules: vLLM's layers that chunks are written to directly.
        buffers: endings of buffers that a checkpoint must fill.
        begins_with_bos: trained with <bos> at the beginning.
        ends_in_full_attention: transformers makes the last layer a full-attention one, whatever config.json says.
        config_tags: tags that a configuration decides and shapes do not show.
        refused_names: MaxText's model names that cannot be loaded by name, and why.
        multimodal_text: prefix of the text model in a checkpoint with a vision tower.
        compiled_in: parameters that tpu-inference compiles into its programs as constants, in words.
        both_ways_in_images: trained with tokens of an image that attend to all of it, whatever config.json says.
        added_vocab: rows that a configuration may have beyond the stored table, at most; they are zero.
    """

    name: str
    title: str
    decoder_block: str
    converters: tuple[WeightConverter, ...]
    groups: tuple[LayerGroup, ...]
    axes: Mapping[str, str]
    marks: tuple[str, ...]
    prefixes: Mapping[Scope, str]
    model_types: Mapping[str, str]
    architectures: Mapping[str, str]
    from_config: Callable[[Any], ModelDims]
    config_fields: Callable[[ModelDims, Preset], dict[str, Any]]
    presets: tuple[Preset, ...]
    modules: tuple[PackedModule, ...]
    per_layer: frozenset[str] = frozenset()
    derived: Mapping[str, tuple[str, int | str]] = dataclasses.field(default_factory=dict)
    absent: tuple[str, ...] = ()
    refine: Callable[[ModelDims, Layout, str], ModelDims] = _unchanged
    tag_fields: Mapping[str, TagField] = dataclasses.field(default_factory=dict)
    kinds: Mapping[str, str] = dataclasses.field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    begins_with_bos: bool = False
    ends_in_full_attention: bool = False
    config_tags: frozenset[str] = frozenset()
    refused_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    multimodal_text: str = "model.language_model."
    compiled_in: str = ""
    both_ways_in_images: bool = False
    added_vocab: int = 0

    @functools.cached_property
    def by_leaf(self) -> Mapping[tuple[Scope, str], WeightConverter]:
        """The table by scope and leaf."""
        return {(row.scope, row.leaf): row for row in self.converters}

    def match(self, leaf: str) -> tuple[WeightConverter, LayerGroup | None, int] | None:
        """The row of a leaf, the group it lies in and its index there; None for a leaf without a place."""
        for scope in (Scope.ROOT, Scope.MODEL):
            if (row := self.by_leaf.get((scope, leaf))) is not None:
                return row, None, 0
        for group in self.groups:
            if found := re.match(group.pattern + r"\.", leaf):
                row = self.by_leaf.get((group.scope, leaf[found.end() :]))
                if row is not None:
                    return row, group, int(found[1]) if found.lastindex else 0
        return None

    def objections(self, leaves: Iterable[str]) -> list[str]:
        """What speaks against a tree being this family's; empty where nothing does."""
        names = {name for leaf in leaves if (name := self._layer_leaf(leaf)) is not None}
        if not names:
            return ["no leaf of a layer"]
        found = [f"no leaf {mark}" for mark in self.marks if mark not in names]
        return found + [f"has leaf {name}" for name in self.absent if name in names]

    def _layer_leaf(self, leaf: str) -> str | None:
        for group in self.groups:
            if group.scope is Scope.LAYER and (found := re.match(group.pattern + r"\.", leaf)):
                return leaf[found.end() :]
        return None

    def sizes(self, dims: ModelDims, scope: Scope, index: int = 0) -> Mapping[str, int]:
        """Size of every axis name that occurs in rows of `scope`, for layer `index`."""
        sizes = dict(dims.sizes)
        if scope is Scope.LAYER:
            sizes |= dims.layers[index].sizes
        for name, (axis, factor) in self.derived.items():
            if axis in sizes:
                sizes[name] = sizes[axis] * (len(dims.layers) if isinstance(factor, str) else factor)
        return sizes

    def demands(self, dims: ModelDims, row: WeightConverter, index: int = 0) -> bool:
        """Whether a model of these dimensions has the row's Hugging Face tensor, in layer `index`."""
        if row.scope in (Scope.VISION, Scope.VISION_LAYER) and not dims.has_vision:
            return False
        return dims.has(row.when, index if row.scope is Scope.LAYER else None)

    def repeats(self, dims: ModelDims, scope: Scope) -> range:
        """Indices a row of `scope` is repeated over."""
        if scope is Scope.LAYER:
            return range(len(dims.layers))
        if scope is Scope.VISION_LAYER:
            return range(dims.sizes.get(VISION_LAYERS, 0))
        return range(1)

    def hf_name(self, dims: ModelDims, row: WeightConverter, index: int = 0) -> str:
        """Full Hugging Face name, as in the published checkpoints."""
        text = self.multimodal_text if dims.has_vision else "model."
        return self.prefixes[row.scope].format(text=text, i=index) + row.hf

    def hf_shapes(self, dims: ModelDims) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every Hugging Face tensor the model has, with its exact shape."""
        seen: set[str] = set()
        for row in self.converters:
            for index in self.repeats(dims, row.scope):
                name = self.hf_name(dims, row, index)
                if self.demands(dims, row, index) and name not in seen:
                    seen.add(name)
                    yield name, row.rearrange.hf_shape(self.sizes(dims, row.scope, index))

    def layers_with(self, names: Collection[str], layout: Layout) -> set[int]:
        """Decoder layers that have a leaf of one of these Hugging Face names."""
        return {
            int(layer)
            for entry in layout.leaves
            if entry.converter.scope is Scope.LAYER and entry.converter.hf in names
            for layer in entry.layers.flat
        }
