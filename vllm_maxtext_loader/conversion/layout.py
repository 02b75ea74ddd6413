"""Which layer is what: every leaf is matched with a row of the table, and its scan axes are found.

MaxText scans over blocks of layers and stores the layers of all blocks in one leaf, stacked along `param_scan_axis`.
That axis is recorded nowhere. It is inferred here: under the right axis all leaves agree on the number of blocks and on
every dimension of the model; under the wrong one they contradict each other.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from vllm_maxtext_loader.checkpoint.tree import Leaf
from vllm_maxtext_loader.conversion.family import Family, LayerGroup, Scope, WeightConverter
from vllm_maxtext_loader.errors import LayoutError, UnknownLeafError

SCAN_AXES = (1, 0)
"""Values of `param_scan_axis` that occur, MaxText's default first."""

MOST_LAYERS = 10_000
"""More than any model has; shapes that say otherwise are damaged, and would only cost memory."""


@dataclasses.dataclass(frozen=True)
class MatchedLeaf:
    """A leaf whose place in the model is known.

    Attributes:
        leaf: the stored array.
        converter: the row of the table it is.
        scan_axes: positions of its stacked axes.
        layers: layer number for every index along the stacked axes; an integer array of their shape.
    """

    leaf: Leaf
    converter: WeightConverter
    scan_axes: tuple[int, ...]
    layers: np.ndarray = dataclasses.field(repr=False)

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Shape of one layer of the leaf."""
        return tuple(size for axis, size in enumerate(self.leaf.shape) if axis not in self.scan_axes)


@dataclasses.dataclass(frozen=True)
class Layout:
    """All matched leaves.

    Attributes:
        family: the model's family.
        title: "scanned v1", "scanned v2", "scanned" or "unscanned".
        scan_axis: inferred `param_scan_axis`; None where nothing is stacked.
        blocks: number of scanned blocks.
        num_layers: number of decoder layers.
        leaves: in the order in which they should be read.
    """

    family: Family
    title: str
    scan_axis: int | None
    blocks: int
    num_layers: int
    leaves: tuple[MatchedLeaf, ...]


@dataclasses.dataclass(frozen=True)
class _LeafMatch:
    leaf: Leaf
    converter: WeightConverter
    group: LayerGroup | None
    index: int
    order: tuple[int, int, int]

    @property
    def stacked(self) -> tuple[str, ...]:
        return self.group.stacked if self.group else ()

    @property
    def layer_kind(self) -> str:
        """Distinguishes layers that may differ in head dim, KV heads and MLP width."""
        return f"{self.group.pattern if self.group else ''}#{self.index}"


def read_layouts(leaves: Iterable[Leaf], family: Family, where: str) -> list[Layout]:
    """Every reading of the leaves that is consistent, best guess first; more than one means ambiguous.

    Where no reading is fully consistent, the one with the fewest contradictions is returned alone: the
    plan then names the leaf that is out of shape.

    Args:
        leaves: the model's leaves.
        family: the model's family.
        where: path, for messages.

    Raises:
        UnknownLeafError: some leaves have no place in the table.
        LayoutError: layers are missing or doubled.
    """
    matches = _match(list(leaves), family, where)
    if not any(match.stacked for match in matches):
        return [_layout(matches, family, None, where)]
    scored = sorted(
        ((_contradictions(matches, family, axis), axis) for axis in SCAN_AXES), key=lambda pair: len(pair[0])
    )
    consistent = [
        axis
        for contradictions, axis in sorted(scored, key=lambda pair: SCAN_AXES.index(pair[1]))
        if not contradictions
    ]
    if not consistent:
        contradictions, axis = scored[0]
        for message in contradictions:
            if message.startswith("stack"):
                raise LayoutError(f"{where}: {message} (param_scan_axis {axis}).")
        return [_layout(matches, family, axis, where)]
    return [_layout(matches, family, axis, where) for axis in consistent]


def describe(layout: Layout) -> str:
    """One phrase for logs and messages."""
    axis = "" if layout.scan_axis is None else f", scan axis {layout.scan_axis}, {layout.blocks} blocks"
    return f"{layout.title}{axis}, {layout.num_layers} layers"


def _match(leaves: list[Leaf], family: Family, where: str) -> list[_LeafMatch]:
    """Finds the row and the layer group of every leaf."""
    matches: list[_LeafMatch] = []
    unknown: list[Leaf] = []
    row_order = {id(row): number for number, row in enumerate(family.converters)}
    group_order = {id(group): number for number, group in enumerate(family.groups)}
    for leaf in leaves:
        if (found := family.match(leaf.name)) is None:
            unknown.append(leaf)
            continue
        row, group, index = found
        order = (-1 if group is None else group_order[id(group)], index, row_order[id(row)])
        matches.append(_LeafMatch(leaf, row, group, index, order))
    if unknown:
        listed = "; ".join(f"{leaf.key} {list(leaf.shape)}" for leaf in unknown[:8])
        more = f"; … ({len(unknown)} in all)" if len(unknown) > 8 else ""
        raise UnknownLeafError(
            f"{where}: has leaves with no place in {family.title}: {listed}{more}. Nothing is dropped silently: if they "
            f"are weights of a variant (LoRA, quantization, an untied output head), export plain weights from MaxText "
            f"first."
        )
    return sorted(matches, key=lambda match: match.order)


def _scan_axes(match: _LeafMatch, axis: int) -> tuple[int, ...]:
    return tuple(range(axis, axis + len(match.stacked)))


def _axes_of(match: _LeafMatch, family: Family, axis: int) -> list[tuple[str, int]] | None:
    """(name, size) of each axis of the leaf under one reading; None where the rank does not fit."""
    names = list(match.converter.rearrange.maxtext_axes)
    if len(match.leaf.shape) != len(names) + len(match.stacked):
        return None
    # A leaf of rank r has at most r places to insert at.
    position = min(axis, len(names))
    pattern = match.group.pattern if match.group else ""
    labels = {
        # Blocks are counted alike everywhere; local layers of blocks and of the remainder are not.
        "block": "stack block",
        "local": f"stack local {'remainder' if 'remainder' in pattern else 'block'}",
    }
    names[position:position] = [labels[name] for name in match.stacked]
    return [
        (f"{name} {match.layer_kind}" if name in family.per_layer else name, size)
        for name, size in zip(names, match.leaf.shape, strict=True)
    ]


def _contradictions(matches: list[_LeafMatch], family: Family, axis: int) -> list[str]:
    """What speaks against a reading: leaves that disagree with the majority about a dimension."""
    votes: dict[str, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    read = [(match, _axes_of(match, family, axis)) for match in matches]
    for _, axes in read:
        for name, size in axes or []:
            votes[name][size] += 1
    found: list[str] = []
    for match, axes in read:
        if axes is None:
            found.append(f"{match.leaf.key} has rank {len(match.leaf.shape)}")
            continue
        for name, size in axes:
            expected = 1 if name == "1" else votes[name].most_common(1)[0][0]
            if size != expected:
                found.append(
                    f"{name}: {match.leaf.key} {list(match.leaf.shape)} has {size}, other leaves have {expected}"
                )
    return sorted(found, key=lambda message: not message.startswith("stack"))


def _layout(matches: list[_LeafMatch], family: Family, axis: int | None, where: str) -> Layout:
    """Numbers the layers under one reading."""
    blocks, period = _block_structure(matches, axis, where)
    leaves = [_place(match, axis, blocks, period, where) for match in matches]
    found = {
        int(layer) for entry in leaves if entry.converter.scope is Scope.LAYER for layer in entry.layers.flat
    }
    count = max(found) + 1
    if count > MOST_LAYERS:
        raise LayoutError(
            f"{where}: the shapes say that there are {count} layers; expected at most {MOST_LAYERS}."
        )
    if missing := sorted(set(range(count)) - found):
        raise LayoutError(
            f"{where}: has leaves for {len(found)} layers up to {count - 1}, but none for layers {missing}."
        )
    titles = [match.group.name for match in matches if match.group and match.group.name]
    return Layout(
        family=family,
        title=titles[0] if titles else "remainder only",
        scan_axis=axis,
        blocks=blocks,
        num_layers=count,
        leaves=tuple(leaves),
    )


def _block_structure(matches: list[_LeafMatch], axis: int | None, where: str) -> tuple[int, int]:
    """(number of scanned blocks, layers in a block)."""
    blocks = local = 0
    indices: set[int] = set()
    has_last = False
    for match in matches:
        if match.group is None or match.group.base != "block":
            continue
        positions = _scan_axes(match, min(axis or 0, len(match.converter.rearrange.maxtext_axes)))
        shape = match.leaf.shape
        if len(shape) <= positions[-1]:
            continue
        blocks = max(blocks, shape[positions[0]])
        if "local" in match.stacked:
            local = max(local, shape[positions[1]])
        elif match.group.position == "index":
            indices.add(match.index)
        else:
            has_last = True
    if indices and indices != set(range(len(indices))):
        raise LayoutError(
            f"{where}: the scanned block has layers {sorted(indices)}; expected 0 to {max(indices)} without holes."
        )
    return blocks, len(indices) or local + has_last


def _place(match: _LeafMatch, axis: int | None, blocks: int, period: int, where: str) -> MatchedLeaf:
    group = match.group
    if group is None or group.scope is Scope.VISION:
        return MatchedLeaf(match.leaf, match.converter, (), np.array(0))
    scan_axes = _scan_axes(match, min(axis or 0, len(match.converter.rearrange.maxtext_axes)))
    # A leaf of too low a rank is reported by the plan, with the shape it should have.
    sizes = tuple(
        match.leaf.shape[position] if position < len(match.leaf.shape) else 1 for position in scan_axes
    )
    if math.prod(sizes) > MOST_LAYERS:
        raise LayoutError(
            f"{where}: leaf {match.leaf.key} has shape {list(match.leaf.shape)}: {math.prod(sizes)} layers would be "
            f"stacked in it; expected at most {MOST_LAYERS}."
        )
    layers = np.zeros(sizes, np.int64)
    for position, name in enumerate(group.stacked):
        index = np.arange(sizes[position]).reshape(
            [-1 if other == position else 1 for other in range(len(sizes))]
        )
        layers = layers + (index * period if name == "block" else index)
    if group.base == "remainder":
        layers = layers + period * blocks
    if group.position == "index":
        layers = layers + match.index
    elif group.position == "last":
        layers = layers + period - 1
    return MatchedLeaf(match.leaf, match.converter, scan_axes, layers)
