"""The whole list of what will be read and made, before a byte of array data is read.

A plan answers: which Hugging Face tensors come out (all that the model demands, no others), which leaves
each is made of, and in which order the leaves are read. Every refusal happens here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np

from vllm_maxtext_loader.checkpoint.marks import refuse_adapters
from vllm_maxtext_loader.checkpoint.tree import Leaf, Tree
from vllm_maxtext_loader.conversion.config_check import reconcile
from vllm_maxtext_loader.conversion.dims import ModelDims
from vllm_maxtext_loader.conversion.family import Family, Scope, WeightConverter
from vllm_maxtext_loader.conversion.infer import read_dims
from vllm_maxtext_loader.conversion.layout import Layout, MatchedLeaf, describe, read_layouts
from vllm_maxtext_loader.errors import (
    LayoutError,
    MaxTextLoadError,
    MissingLeafError,
    UnknownLeafError,
    WrongShapeError,
)


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One Hugging Face tensor.

    Attributes:
        name: as in the published checkpoints.
        shape: exact shape.
        dtype: stored dtype of the leaves it is made of.
        leaves: keys of those leaves.
        keep_dtype: never cast.
        expert_names: full published names of its parts per expert, with "{e}"; () where it is published whole.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    leaves: tuple[str, ...]
    keep_dtype: bool = False
    expert_names: tuple[str, ...] = ()

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
        sizes: size of every axis name of the converter's pattern.
        pairs: whether rotary pairs are stored next to each other, and are moved apart.
    """

    target: str
    index: tuple[int, ...]
    layer: int
    sizes: Mapping[str, int] = dataclasses.field(repr=False)
    pairs: bool = False


@dataclasses.dataclass(frozen=True)
class LeafConversion:
    """All that is made of one leaf.

    Attributes:
        leaf: the stored array.
        converter: the row of the table it is.
        scan_axes: positions of its stacked axes.
        copies: one per layer in it.
    """

    leaf: Leaf
    converter: WeightConverter
    scan_axes: tuple[int, ...]
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
    dims: ModelDims
    targets: Mapping[str, TensorSpec]
    leaves: tuple[LeafConversion, ...]
    unused: tuple[tuple[Leaf, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def family(self) -> Family:
        """The model's family."""
        return self.layout.family

    @property
    def nbytes(self) -> int:
        """Decoded bytes that will be read."""
        return sum(entry.leaf.nbytes for entry in self.leaves)


def make_plan(tree: Tree, family: Family, wanted: ModelDims | None = None) -> Plan:
    """Plans the conversion of a tree.

    Args:
        tree: the checkpoint's leaves.
        family: the family they are of.
        wanted: dimensions that a given Hugging Face configuration demands; None takes the checkpoint's.

    Raises:
        UnknownLeafError, LayoutError, MissingLeafError, WrongShapeError, ConfigMismatchError:
            see each; all from metadata.
    """
    where = str(tree.location.items)
    refuse_adapters(tree.leaves.values(), where)
    layouts = read_layouts(tree.leaves.values(), family, where)
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
        f"(param_scan_axis {plan.layout.scan_axis}) {describe(plan.layout)}, hidden size {plan.dims.sizes['hidden']}"
        for plan in plans
    )
    raise LayoutError(
        f"{where}: the shapes fit two readings: {readings}. MaxText does not record param_scan_axis. Give a Hugging "
        f"Face configuration (--model HF_DIR, checkpoint in --model-loader-extra-config) that tells them apart."
    )


def _plan(layout: Layout, wanted: ModelDims | None, where: str) -> Plan:
    family = layout.family
    found = read_dims(layout, where)
    notes: list[str] = []
    unused: list[tuple[Leaf, str]] = []
    matched: list[MatchedLeaf] = list(layout.leaves)
    if wanted is None:
        dims = found
    else:
        found, wanted, notes = reconcile(family, found, wanted, where)
        if not found.has_vision:
            vision = [
                entry for entry in matched if entry.converter.scope in (Scope.VISION, Scope.VISION_LAYER)
            ]
            matched = [entry for entry in matched if entry not in vision]
            unused += [(entry.leaf, "vision tower; the configuration is text-only") for entry in vision]
        dims = wanted
    dtypes: dict[str, np.dtype] = {}
    parts: dict[str, set[int | None]] = {}
    sources: dict[str, list[str]] = {}
    leaves: list[LeafConversion] = []
    surplus: list[str] = []
    kept: set[str] = set()
    per_expert: dict[str, tuple[str, ...]] = {}
    for entry in matched:
        copies: list[CopyOp] = []
        pairs = entry.converter.pairs is not None and dims.has(entry.converter.pairs)
        _check_shape(entry, family, dims, where)
        for index in np.ndindex(entry.layers.shape):
            layer = int(entry.layers[index])
            if not family.demands(dims, entry.converter, layer):
                surplus.append(f"{entry.leaf.key} (layer {layer})")
                continue
            name = family.hf_name(dims, entry.converter, layer)
            part = entry.converter.rearrange.part
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
            sizes = family.sizes(dims, entry.converter.scope, layer)
            copies.append(CopyOp(name, index, layer, sizes, pairs))
            if entry.converter.keep_dtype:
                kept.add(name)
            if names := entry.converter.expert_names:
                prefix = name.removesuffix(entry.converter.hf)
                per_expert[name] = tuple(prefix + published for published in names)
        leaves.append(LeafConversion(entry.leaf, entry.converter, entry.scan_axes, tuple(copies)))
    if surplus:
        raise UnknownLeafError(
            f"{where}: has leaves that the model has no place for: {_some(surplus)}. The configuration says that these "
            f"layers share keys and values, use keys as values, or have no experts."
        )
    shapes = dict(family.hf_shapes(dims))
    _check_complete(shapes, parts, family, dims, where)
    return Plan(
        where=where,
        layout=layout,
        dims=dims,
        targets={
            name: TensorSpec(
                name, shape, dtypes[name], tuple(sources[name]), name in kept, per_expert.get(name, ())
            )
            for name, shape in shapes.items()
        },
        leaves=tuple(leaves),
        unused=tuple(unused),
        notes=tuple(notes),
    )


def _check_shape(entry: MatchedLeaf, family: Family, dims: ModelDims, where: str) -> None:
    """Refuses a leaf whose shape is not the one the dimensions demand.

    Raises:
        WrongShapeError: with the leaf, the shape expected and the shape found.
    """
    leaf, converter = entry.leaf, entry.converter
    rearrange, padded = converter.rearrange, converter.padded_axis()
    # All layers of one leaf have one shape; two kinds of layer in it would show in a later one.
    seen: list[Mapping[str, int]] = []
    for index in np.ndindex(entry.layers.shape):
        sizes = family.sizes(dims, converter.scope, int(entry.layers[index]))
        if sizes in seen:
            continue
        seen.append(sizes)
        if any(name not in sizes for name in rearrange.maxtext_axes if name != "1"):
            return  # A leaf of a kind the model has none of: the plan says so.
        expected = list(rearrange.maxtext_shape(sizes))
        actual = list(entry.layer_shape)
        # MaxText pads the vocabulary at the end; a family may have rows that it does not store.
        short = family.added_vocab
        if padded is not None and len(actual) == len(expected) and actual[padded] + short >= expected[padded]:
            actual[padded] = expected[padded]
        stacked = len(leaf.shape) == len(expected) + len(entry.scan_axes)
        if not stacked or actual != expected:
            full = list(expected)
            for position, size in zip(entry.scan_axes, entry.layers.shape, strict=True):
                full.insert(position, size)
            axes = ", ".join(
                f"{name} = {family.axes[name]}" for name in rearrange.maxtext_axes if name in family.axes
            )
            raise WrongShapeError(
                f"{where}: leaf {leaf.key} has shape {list(leaf.shape)}, expected {full} "
                f"({' '.join(rearrange.maxtext_axes)}{' stacked' if entry.scan_axes else ''}; {axes})."
            )


def _check_complete(
    shapes: Mapping[str, tuple[int, ...]],
    parts: Mapping[str, set[int | None]],
    family: Family,
    dims: ModelDims,
    where: str,
) -> None:
    """Refuses a checkpoint that lacks a tensor, or a part of one.

    Raises:
        MissingLeafError: with the Hugging Face names and the MaxText leaves they come from.
    """
    wanted_parts: dict[str, dict[int | None, list[str]]] = {}
    for row in family.converters:
        for index in family.repeats(dims, row.scope):
            if family.demands(dims, row, index):
                name = family.hf_name(dims, row, index)
                wanted_parts.setdefault(name, {}).setdefault(row.rearrange.part, []).append(row.leaf)
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
            f"incomplete (name another step), or was written by a MaxText version whose names this package does not know "
            f"(`vllm-maxtext inspect` lists the leaves it has)."
        )


def _some(items: Iterable[str], most: int = 6) -> str:
    listed = list(items)
    return "; ".join(listed[:most]) + (f"; … ({len(listed)} in all)" if len(listed) > most else "")
