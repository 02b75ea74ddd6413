"""Which layer is what: every leaf is placed into a container, and its stacked axes are found.

MaxText scans over blocks of layers (five local, one global) and stores the layers of all blocks in one
leaf, stacked along `param_scan_axis`. That axis is recorded nowhere. It is inferred here: under the right
axis all leaves agree on the number of blocks and on every dimension of the model; under the wrong one
they contradict each other.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

from vllm_maxtext_loader.checkpoint.tree import Leaf
from vllm_maxtext_loader.errors import LayoutError, UnknownLeafError, UnknownModelError
from vllm_maxtext_loader.families.gemma4 import CONTAINERS, RULES, Container, Rule, Scope

SCAN_AXES = (1, 0)
"""Values of `param_scan_axis` that occur, MaxText's default first."""

MOST_LAYERS = 10_000
"""More than any model has; shapes that say otherwise are damaged, and would only cost memory."""

_RULES: Mapping[tuple[Scope, str], Rule] = {(rule.scope, rule.leaf): rule for rule in RULES}
_PER_LAYER_DIMS = frozenset("NDKM")


@dataclasses.dataclass(frozen=True)
class MatchedLeaf:
    """A leaf whose place in the model is known.

    Attributes:
        leaf: the stored array.
        rule: the row of the table it is.
        stack: positions of its stacked axes.
        layers: layer number for every index along the stacked axes; an integer array of their shape.
    """

    leaf: Leaf
    rule: Rule
    stack: tuple[int, ...]
    layers: np.ndarray = dataclasses.field(repr=False)

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Shape of one layer of the leaf."""
        return tuple(size for axis, size in enumerate(self.leaf.shape) if axis not in self.stack)


@dataclasses.dataclass(frozen=True)
class Layout:
    """All placed leaves.

    Attributes:
        title: "scanned v1", "scanned v2" or "unscanned".
        scan_axis: inferred `param_scan_axis`; None where nothing is stacked.
        blocks: number of scanned blocks.
        num_layers: number of decoder layers.
        placed: in the order in which they should be read.
    """

    title: str
    scan_axis: int | None
    blocks: int
    num_layers: int
    placed: tuple[MatchedLeaf, ...]


@dataclasses.dataclass(frozen=True)
class _LeafMatch:
    leaf: Leaf
    rule: Rule
    container: Container | None
    slot: int
    order: tuple[int, int, int]

    @property
    def stack_names(self) -> tuple[str, ...]:
        return self.container.stack if self.container else ()

    @property
    def place(self) -> str:
        """Distinguishes layers that may differ in head dim, KV heads and MLP width."""
        return f"{self.container.pattern if self.container else ''}#{self.slot}"


def read_layouts(leaves: Iterable[Leaf], where: str) -> list[Layout]:
    """Every reading of the leaves that is consistent, best guess first; more than one means ambiguous.

    Where no reading is fully consistent, the one with the fewest contradictions is returned alone: the
    plan then names the leaf that is out of shape.

    Args:
        leaves: the model's leaves.
        where: path, for messages.

    Raises:
        UnknownModelError: the leaves are not Gemma 4's.
        UnknownLeafError: some leaves have no place in the table.
        LayoutError: layers are missing or doubled.
    """
    raws = _match(list(leaves), where)
    if not any(raw.stack_names for raw in raws):
        return [_layout(raws, None, where)]
    scored = sorted(
        ((_contradictions(raws, axis), axis) for axis in SCAN_AXES), key=lambda pair: len(pair[0])
    )
    consistent = [
        axis
        for contradictions, axis in sorted(scored, key=lambda s: SCAN_AXES.index(s[1]))
        if not contradictions
    ]
    if not consistent:
        contradictions, axis = scored[0]
        for message in contradictions:
            if message.startswith("stack"):
                raise LayoutError(f"{where}: {message} (param_scan_axis {axis}).")
        return [_layout(raws, axis, where)]
    return [_layout(raws, axis, where) for axis in consistent]


def describe(layout: Layout) -> str:
    """One phrase for logs and messages."""
    axis = "" if layout.scan_axis is None else f", scan axis {layout.scan_axis}, {layout.blocks} blocks"
    return f"{layout.title}{axis}, {layout.num_layers} layers"


def _match(leaves: list[Leaf], where: str) -> list[_LeafMatch]:
    """Finds container and rule of every leaf."""
    raws: list[_LeafMatch] = []
    unknown: list[Leaf] = []
    rule_order = {id(rule): number for number, rule in enumerate(RULES)}
    for leaf in leaves:
        name = leaf.name
        if rule := _RULES.get((Scope.MODEL, name)):
            raws.append(_LeafMatch(leaf, rule, None, 0, (-1, 0, rule_order[id(rule)])))
            continue
        for number, container in enumerate(CONTAINERS):
            match = re.match(container.pattern + r"\.", name)
            if not match:
                continue
            if rule := _RULES.get((container.scope, name[match.end() :])):
                slot = int(match.group(1)) if match.lastindex else 0
                raws.append(_LeafMatch(leaf, rule, container, slot, (number, slot, rule_order[id(rule)])))
                break
        else:
            unknown.append(leaf)
    if not any(raw.rule.scope is Scope.LAYER for raw in raws):
        raise UnknownModelError(
            f"{where}: is not Gemma 4: none of its {len(leaves)} leaves is a layer MaxText writes for "
            f"decoder_block gemma4 or gemma4_small. First leaves: {', '.join(leaf.name for leaf in leaves[:4])}."
        )
    if not any(raw.rule.leaf == "layer_scalar" for raw in raws):
        raise UnknownModelError(
            f"{where}: is not Gemma 4: no leaf `layer_scalar`, which every Gemma 4 layer has. Gemma 2 and 3 "
            f"checkpoints are not supported."
        )
    if unknown:
        listed = "; ".join(f"{leaf.key} {list(leaf.shape)}" for leaf in unknown[:8])
        more = f"; … ({len(unknown)} in all)" if len(unknown) > 8 else ""
        raise UnknownLeafError(
            f"{where}: has leaves with no place in Gemma 4: {listed}{more}. Nothing is dropped silently: if they are "
            f"weights of a variant (LoRA, quantization, an untied output head), export plain weights from MaxText first."
        )
    return sorted(raws, key=lambda raw: raw.order)


def _stack_positions(raw: _LeafMatch, axis: int) -> tuple[int, ...]:
    return tuple(range(axis, axis + len(raw.stack_names)))


def _dims_of(raw: _LeafMatch, axis: int) -> list[tuple[str, int]] | None:
    """(name, size) of each axis of the leaf under one reading; None where the rank does not fit."""
    names = list(raw.rule.move.maxtext_axes)
    stack = raw.stack_names
    if len(raw.leaf.shape) != len(names) + len(stack):
        return None
    # A leaf of rank r has at most r places to insert at.
    position = min(axis, len(names))
    pattern = raw.container.pattern if raw.container else ""
    labels = {
        # Blocks are counted alike everywhere; local layers of blocks and of the remainder are not.
        "block": "stack block",
        "local": f"stack local {'remainder' if 'remainder' in pattern else 'block'}",
    }
    names[position:position] = [labels[name] for name in stack]
    return [
        (f"{name} {raw.place}" if name in _PER_LAYER_DIMS else name, size)
        for name, size in zip(names, raw.leaf.shape, strict=True)
    ]


def _contradictions(raws: list[_LeafMatch], axis: int) -> list[str]:
    """What speaks against a reading: leaves that disagree with the majority about a dimension."""
    votes: dict[str, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    read = [(raw, _dims_of(raw, axis)) for raw in raws]
    for _, dims in read:
        for name, size in dims or []:
            votes[name][size] += 1
    found: list[str] = []
    for raw, dims in read:
        if dims is None:
            found.append(f"{raw.leaf.key} has rank {len(raw.leaf.shape)}")
            continue
        for name, size in dims:
            expected = 1 if name == "1" else votes[name].most_common(1)[0][0]
            if size != expected:
                found.append(
                    f"{name}: {raw.leaf.key} {list(raw.leaf.shape)} has {size}, other leaves have {expected}"
                )
    return sorted(found, key=lambda message: not message.startswith("stack"))


def _layout(raws: list[_LeafMatch], axis: int | None, where: str) -> Layout:
    """Numbers the layers under one reading."""
    blocks = local = 0
    slots: set[int] = set()
    has_global = False
    for raw in raws:
        if raw.container is None or raw.container.first != "block":
            continue
        positions = _stack_positions(raw, min(axis or 0, len(raw.rule.move.maxtext_axes)))
        shape = raw.leaf.shape
        if len(shape) <= positions[-1]:
            continue
        blocks = max(blocks, shape[positions[0]])
        if "local" in raw.container.stack:
            local = max(local, shape[positions[1]])
        elif raw.container.offset == "slot":
            slots.add(raw.slot)
        else:
            has_global = True
    period = len(slots) or local + has_global
    if slots and slots != set(range(period)):
        raise LayoutError(
            f"{where}: scanned_blocks has slots {sorted(slots)}; expected 0 to {max(slots)} without holes."
        )
    placed = [_place(raw, axis, blocks, period, where) for raw in raws]
    found = {int(layer) for entry in placed if entry.rule.scope is Scope.LAYER for layer in entry.layers.flat}
    count = max(found) + 1
    if count > MOST_LAYERS:
        raise LayoutError(
            f"{where}: the shapes say that there are {count} layers; expected at most {MOST_LAYERS}."
        )
    if missing := sorted(set(range(count)) - found):
        raise LayoutError(
            f"{where}: has leaves for {len(found)} layers up to {count - 1}, but none for layers {missing}."
        )
    titles = [raw.container.title for raw in raws if raw.container and raw.container.title]
    return Layout(
        title=titles[0] if titles else "remainder only",
        scan_axis=axis,
        blocks=blocks,
        num_layers=count,
        placed=tuple(placed),
    )


def _place(raw: _LeafMatch, axis: int | None, blocks: int, period: int, where: str) -> MatchedLeaf:
    container = raw.container
    if container is None or container.scope is Scope.VISION:
        return MatchedLeaf(raw.leaf, raw.rule, (), np.array(0))
    stack = _stack_positions(raw, min(axis or 0, len(raw.rule.move.maxtext_axes)))
    # A leaf of too low a rank is reported by the plan, with the shape it should have.
    sizes = tuple(raw.leaf.shape[position] if position < len(raw.leaf.shape) else 1 for position in stack)
    if math.prod(sizes) > MOST_LAYERS:
        raise LayoutError(
            f"{where}: leaf {raw.leaf.key} has shape {list(raw.leaf.shape)}: {math.prod(sizes)} layers would be stacked "
            f"in it; expected at most {MOST_LAYERS}."
        )
    layers = np.zeros(sizes, np.int64)
    for position, name in enumerate(container.stack):
        index = np.arange(sizes[position]).reshape(
            [-1 if other == position else 1 for other in range(len(sizes))]
        )
        layers = layers + (index * period if name == "block" else index)
    if container.first == "remainder":
        layers = layers + period * blocks
    if container.offset == "slot":
        layers = layers + raw.slot
    elif container.offset == "last":
        layers = layers + period - 1
    return MatchedLeaf(raw.leaf, raw.rule, stack, layers)
