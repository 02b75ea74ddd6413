"""The model's dimensions, read off the shapes of its leaves.

Every dimension is stated by several leaves; the majority counts, so that one leaf that is out of shape is named by the
plan instead of bending the model. What shapes cannot tell (sliding window, rope, top-k) is in a configuration or preset.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping

from vllm_maxtext_loader.conversion.dims import VISION_LAYERS, VISION_TAG, LayerDims, ModelDims
from vllm_maxtext_loader.conversion.family import Family, Scope
from vllm_maxtext_loader.conversion.layout import Layout
from vllm_maxtext_loader.errors import MissingLeafError

_Votes = dict[tuple[str, int | None], collections.Counter[int]]


def read_dims(layout: Layout, where: str) -> ModelDims:
    """Dimensions of the model in `layout`.

    Args:
        layout: matched leaves.
        where: path, for messages.

    Raises:
        MissingLeafError: a dimension that the model needs is stated by no leaf at all.
    """
    family = layout.family
    votes = _count(layout)
    sizes = {name: counter.most_common(1)[0][0] for (name, layer), counter in votes.items() if layer is None}
    layers = [
        LayerDims({name: c.most_common(1)[0][0] for (name, of), c in votes.items() if of == layer})
        for layer in range(layout.num_layers)
    ]
    tags = {entry.converter.when for entry in layout.leaves if not entry.converter.when.startswith("!")} - {
        ""
    }
    tower = [entry for entry in layout.leaves if entry.converter.scope is Scope.VISION_LAYER]
    if any(entry.converter.scope in (Scope.VISION, Scope.VISION_LAYER) for entry in layout.leaves):
        tags.add(VISION_TAG)
        sizes[VISION_LAYERS] = max((int(entry.layers) for entry in tower), default=-1) + 1
    dims = ModelDims(family.name, sizes, tuple(layers), frozenset(tags))
    dims = family.refine(dims, layout, where)
    _check_sizes(dims, family, where)
    return dims


def require_size(sizes: Mapping[str, int], axis: str, layer: int | None, where: str) -> int:
    """A dimension that the model cannot be without.

    Raises:
        MissingLeafError: no leaf states it.
    """
    if axis not in sizes:
        of = "" if layer is None else f" of layer {layer}"
        what = "the checkpoint" if layer is None else "the layer"
        raise MissingLeafError(f"{where}: no leaf{of} tells the dimension {axis}: {what} is incomplete.")
    return sizes[axis]


def set_layer_tags(dims: ModelDims, tags: list[set[str]], per_layer: frozenset[str]) -> ModelDims:
    """`dims` with the tags in `per_layer` told by the layers instead of by the model."""
    layers = tuple(
        dataclasses.replace(layer, tags=frozenset(own)) for layer, own in zip(dims.layers, tags, strict=True)
    )
    return dataclasses.replace(dims, layers=layers, tags=dims.tags - per_layer)


def _check_sizes(dims: ModelDims, family: Family, where: str) -> None:
    for row in family.converters:
        for index in family.repeats(dims, row.scope):
            if not family.demands(dims, row, index):
                continue
            sizes = family.sizes(dims, row.scope, index)
            for axis in row.rearrange.maxtext_axes:
                if axis != "1":
                    require_size(sizes, axis, index if axis in family.per_layer else None, where)


def _count(layout: Layout) -> _Votes:
    """How often each size is stated, by (axis name, layer); layer None for what all layers share."""
    family, votes = layout.family, collections.defaultdict(collections.Counter)
    for entry in layout.leaves:
        axes, shape = entry.converter.rearrange.maxtext_axes, entry.layer_shape
        if len(axes) != len(shape):
            continue
        for stated, stated_size in zip(axes, shape, strict=True):
            if stated == "1":
                continue
            name, factor = family.derived.get(stated, (stated, 1))
            size, rest = divmod(stated_size, layout.num_layers if isinstance(factor, str) else factor)
            if rest or not size:
                continue
            if entry.converter.scope is Scope.LAYER and name in family.per_layer:
                for layer in entry.layers.flat:
                    votes[name, int(layer)][size] += 1
            else:
                votes[name, None][size] += 1
    return votes
