"""The whole list of what will be read and made, before a byte of array data is read.

A plan answers: which Hugging Face tensors come out (all that the model demands, no others), which leaves
each is made of, and in which order the leaves are read. Every refusal happens here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np

from vllm_maxtext_loader.checkpoint.tree import Leaf, Tree
from vllm_maxtext_loader.conversion.config_check import reconcile
from vllm_maxtext_loader.conversion.infer import read_dims
from vllm_maxtext_loader.conversion.layout import Layout, MatchedLeaf, describe, read_layouts
from vllm_maxtext_loader.errors import (
    LayoutError,
    MaxTextLoadError,
    MissingLeafError,
    UnknownLeafError,
    WrongShapeError,
)
from vllm_maxtext_loader.families.gemma4 import DIMENSIONS, RULES, Dims, Rule, Scope, Value


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One Hugging Face tensor.

    Attributes:
        name: as in the published checkpoints.
        shape: exact shape.
        dtype: stored dtype of the leaves it is made of.
        leaves: keys of those leaves.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    leaves: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes at the stored dtype."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class CopyOp:
    """One layer of a leaf, and the tensor it (or a part of it) becomes.

    Attributes:
        target: Hugging Face name.
        index: position along the leaf's stacked axes; () where nothing is stacked.
        layer: number of the layer, 0 outside of layers.
        sizes: size of every axis name of the rule's pattern.
    """

    target: str
    index: tuple[int, ...]
    layer: int
    sizes: Mapping[str, int] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class LeafConversion:
    """All that is made of one leaf.

    Attributes:
        leaf: the stored array.
        rule: the row of the table it is.
        stack: positions of its stacked axes.
        writes: one per layer in it.
    """

    leaf: Leaf
    rule: Rule
    stack: tuple[int, ...]
    copies: tuple[CopyOp, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a load will do.

    Attributes:
        where: path of the checkpoint, for messages.
        layout: where the layers lie.
        dims: the model's dimensions.
        targets: every tensor that will be made, by Hugging Face name.
        leaves: what is read, in order; leaves of one tensor are neighbours.
        unused: leaves that are not read because the model as configured has no use for them, with the reason.
        notes: what was assumed, one sentence each.
    """

    where: str
    layout: Layout
    dims: Dims
    targets: Mapping[str, TensorSpec]
    leaves: tuple[LeafConversion, ...]
    unused: tuple[tuple[Leaf, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Decoded bytes that will be read."""
        return sum(entry.leaf.nbytes for entry in self.leaves)


def make_plan(tree: Tree, wanted: Dims | None = None) -> Plan:
    """Plans the conversion of a tree.

    Args:
        tree: the checkpoint's leaves.
        wanted: dimensions that a given Hugging Face configuration demands; None takes the checkpoint's.

    Raises:
        UnknownModelError, UnknownLeafError, LayoutError, MissingLeafError, WrongShapeError, ConfigMismatchError:
            see each; all from metadata.
    """
    where = str(tree.location.items)
    layouts = read_layouts(tree.leaves.values(), where)
    if len(layouts) == 1:
        return _plan(layouts[0], wanted, where)
    plans: list[Plan] = []
    failures: list[MaxTextLoadError] = []
    for layout in layouts:
        try:
            plans.append(_plan(layout, wanted, where))
        except MaxTextLoadError as error:
            failures.append(error)
    if len(plans) == 1:
        return plans[0]
    if not plans:
        raise failures[0]
    readings = "; ".join(
        f"(param_scan_axis {plan.layout.scan_axis}) {describe(plan.layout)}, hidden size {plan.dims.hidden}"
        for plan in plans
    )
    raise LayoutError(
        f"{where}: the shapes fit two readings: {readings}. MaxText does not record param_scan_axis. Give a Hugging "
        f"Face configuration (--model HF_DIR, checkpoint in --model-loader-extra-config) that tells them apart."
    )


def _plan(layout: Layout, wanted: Dims | None, where: str) -> Plan:
    found = read_dims(layout, where)
    notes: list[str] = []
    unused: list[tuple[Leaf, str]] = []
    placed: list[MatchedLeaf] = list(layout.placed)
    if wanted is None:
        dims = found
    else:
        found, wanted, notes = reconcile(found, wanted, where)
        if found.vision is None:
            vision = [entry for entry in placed if entry.rule.scope in (Scope.VISION, Scope.VISION_LAYER)]
            placed = [entry for entry in placed if entry not in vision]
            unused += [(entry.leaf, "vision tower; the configuration is text-only") for entry in vision]
        dims = wanted
    dtypes: dict[str, np.dtype] = {}
    parts: dict[str, set[int | None]] = {}
    sources: dict[str, list[str]] = {}
    leaves: list[LeafConversion] = []
    surplus: list[str] = []
    for entry in placed:
        copies: list[CopyOp] = []
        _check_shape(entry, dims, where)
        for index in np.ndindex(entry.layers.shape):
            layer = int(entry.layers[index])
            if not dims.demands(entry.rule, layer):
                surplus.append(f"{entry.leaf.key} (layer {layer})")
                continue
            name = dims.hf_name(entry.rule, layer)
            part = entry.rule.move.part
            have = parts.setdefault(name, set())
            if part in have or None in have or (part is None and have):
                raise UnknownLeafError(
                    f"{where}: {name} is stored twice: in {', '.join(sources[name])} and in {entry.leaf.key}."
                )
            have.add(part)
            sources.setdefault(name, []).append(entry.leaf.key)
            # bfloat16 and float16 have no common type but float32.
            same = dtypes.get(name, entry.leaf.dtype) == entry.leaf.dtype
            dtypes[name] = entry.leaf.dtype if same else np.dtype(np.float32)
            copies.append(CopyOp(name, index, layer, dims.sizes(entry.rule.scope, layer)))
        leaves.append(LeafConversion(entry.leaf, entry.rule, entry.stack, tuple(copies)))
    if surplus:
        raise UnknownLeafError(
            f"{where}: has leaves that the model has no place for: {_some(surplus)}. The configuration says that these "
            f"layers share keys and values, use keys as values, or have no experts."
        )
    shapes = dict(dims.hf_shapes())
    _check_complete(shapes, parts, dims, where)
    return Plan(
        where=where,
        layout=layout,
        dims=dims,
        targets={
            name: TensorSpec(name, shape, dtypes[name], tuple(sources[name]))
            for name, shape in shapes.items()
        },
        leaves=tuple(leaves),
        unused=tuple(unused),
        notes=tuple(notes),
    )


def _check_shape(entry: MatchedLeaf, dims: Dims, where: str) -> None:
    """Refuses a leaf whose shape is not the one the dimensions demand.

    Raises:
        WrongShapeError: with the leaf, the shape expected and the shape found.
    """
    leaf, move = entry.leaf, entry.rule.move
    for index in np.ndindex(entry.layers.shape):
        sizes = dims.sizes(entry.rule.scope, int(entry.layers[index]))
        if any(name not in sizes for name in move.maxtext_axes if name != "1"):
            return  # A leaf of a kind the model has none of: the plan says so.
        expected = move.maxtext_shape(sizes)
        actual = entry.layer_shape
        if entry.rule.value is Value.UNSCALE_EMBEDDING and len(actual) == 2 and actual[0] >= expected[0]:
            actual = (expected[0], actual[1])  # MaxText pads the vocabulary at the end.
        stacked = len(leaf.shape) == len(expected) + len(entry.stack)
        if not stacked or actual != expected:
            full = list(expected)
            for position, size in zip(entry.stack, entry.layers.shape, strict=True):
                full.insert(position, size)
            axes = ", ".join(
                f"{name} = {DIMENSIONS[name]}" for name in move.maxtext_axes if name in DIMENSIONS
            )
            raise WrongShapeError(
                f"{where}: leaf {leaf.key} has shape {list(leaf.shape)}, expected {full} "
                f"({' '.join(move.maxtext_axes)}{' stacked' if entry.stack else ''}; {axes})."
            )
        # All layers of one leaf have one shape; two kinds of layer in it would show in the second.
        if (
            len(
                {dims.layers[int(layer)] for layer in entry.layers.flat}
                if entry.rule.scope is Scope.LAYER
                else ()
            )
            <= 1
        ):
            return


def _check_complete(
    shapes: Mapping[str, tuple[int, ...]], parts: Mapping[str, set[int | None]], dims: Dims, where: str
) -> None:
    """Refuses a checkpoint that lacks a tensor, or a part of one.

    Raises:
        MissingLeafError: with the Hugging Face names and the MaxText leaves they come from.
    """
    wanted_parts: dict[str, dict[int | None, list[str]]] = {}
    for rule in RULES:
        for index in dims.repeats(rule.scope):
            if dims.demands(rule, index):
                name = dims.hf_name(rule, index)
                wanted_parts.setdefault(name, {}).setdefault(rule.move.part, []).append(rule.leaf)
    missing: list[str] = []
    for name in shapes:
        have = parts.get(name, set())
        wanted = {part for part in wanted_parts[name] if part is not None}
        if None in have or (wanted and have >= wanted):
            continue
        lacking = [leaf for part, leaves in wanted_parts[name].items() if part not in have for leaf in leaves]
        missing.append(f"{name} (MaxText: {' or '.join(lacking)})")
    if missing:
        raise MissingLeafError(
            f"{where}: {len(missing)} of {len(shapes)} tensors are in no leaf: {_some(missing)}. The checkpoint is "
            f"incomplete, or was written by a MaxText version whose names this package does not know."
        )


def _some(items: Iterable[str], most: int = 6) -> str:
    listed = list(items)
    return "; ".join(listed[:most]) + (f"; … ({len(listed)} in all)" if len(listed) > most else "")
