"""Carries out a plan with few of its tensors in memory at a time, reading few leaves more than once.

A leaf of a scanned model holds one weight of every layer, and so do its stored chunks. Tensors that share leaves are a
group: what one leaf, or two that make one tensor, become. Group after group, each leaf is read once. Only a group that
is larger than the memory takes several passes, and chunks that hold all layers are then read in each of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

from vllm_maxtext_loader.checkpoint.regions import Region
from vllm_maxtext_loader.checkpoint.tree import Leaf
from vllm_maxtext_loader.conversion.plan import LeafConversion, Plan, TensorSpec
from vllm_maxtext_loader.errors import OptionError
from vllm_maxtext_loader.huggingface.directory import natural_order
from vllm_maxtext_loader.options import GIB, available_nbytes


def tensor_groups(plan: Plan) -> dict[str, int]:
    """The number of each tensor's group, by name; numbers follow the order in which leaves are read."""
    joined: dict[str, str] = {}

    def root(key: str) -> str:
        while joined.setdefault(key, key) != key:
            key = joined[key]
        return key

    for target in plan.targets.values():
        for key in target.leaves[1:]:
            joined[root(key)] = root(target.leaves[0])
    numbers: dict[str, int] = {}
    for entry in plan.leaves:
        numbers.setdefault(root(entry.leaf.key), len(numbers))
    return {target.name: numbers[root(target.leaves[0])] for target in plan.targets.values()}


def in_groups(plan: Plan) -> dict[str, TensorSpec]:
    """The plan's tensors, group after group, in a group layer after layer."""
    groups = tensor_groups(plan)
    names = sorted(plan.targets, key=lambda name: (groups[name], natural_order(name)))
    return {name: plan.targets[name] for name in names}


def memory_limit(asked: int | None, nbytes: Mapping[str, int], option: str) -> int:
    """Bytes of tensors that may be in memory at a time.

    Args:
        asked: what the user asked for; None means half of what is free, and the largest tensor at least.
        nbytes: size of each tensor by name.
        option: what the user asked with, for messages.

    Raises:
        OptionError: the user asked for less than the largest tensor.
    """
    largest = max(nbytes, key=lambda name: nbytes[name])
    if asked is None:
        return max(nbytes[largest], available_nbytes() // 2)
    if asked < nbytes[largest]:
        raise OptionError(
            f"{option} is {asked} bytes, but {largest} alone has {nbytes[largest]} "
            f"({nbytes[largest] / GIB:.2f} GiB): give at least that."
        )
    return asked


def split_passes(
    order: Iterable[str], nbytes: Mapping[str, int], groups: Mapping[str, int], limit: int
) -> list[list[str]]:
    """Cuts a sequence of tensors into passes of at most `limit` bytes, between groups where that can be.

    Args:
        order: names of tensors.
        nbytes: size of each by name.
        groups: from `tensor_groups`.
        limit: bytes; at least the largest tensor.
    """
    passes: list[list[str]] = [[]]
    room = limit
    for _, names in itertools.groupby(order, key=lambda name: groups[name]):
        run = list(names)
        total = sum(nbytes[name] for name in run)
        if total > room and passes[-1]:
            passes.append([])
            room = limit
        for name in run:
            if nbytes[name] > room:
                passes.append([])
                room = limit
            passes[-1].append(name)
            room -= nbytes[name]
    return [names for names in passes if names]


def restrict(plan: Plan, names: Iterable[str]) -> Plan:
    """The part of a plan that makes the named tensors."""
    targets = {name: plan.targets[name] for name in names}
    leaves: list[LeafConversion] = []
    for entry in plan.leaves:
        copies = tuple(copy_op for copy_op in entry.copies if copy_op.target in targets)
        if copies:
            leaves.append(dataclasses.replace(entry, copies=copies))
    return dataclasses.replace(plan, targets=targets, leaves=tuple(leaves))


def is_needed(plan: Plan) -> Callable[[Leaf, Region], bool]:
    """Whether a region of a leaf holds a part of any tensor of a (restricted) plan."""
    entries = {entry.leaf.key: entry for entry in plan.leaves}

    def needed(leaf: Leaf, region: Region) -> bool:
        entry = entries[leaf.key]
        spans = [region[axis] for axis in entry.scan_axes]
        return any(
            all(span.start <= at < span.stop for span, at in zip(spans, copy_op.index, strict=True))
            for copy_op in entry.copies
        )

    return needed


def read_nbytes(plan: Plan) -> int:
    """Decoded bytes of the chunks that hold a part of any tensor of a (restricted) plan."""
    return sum(_read_nbytes(entry) for entry in plan.leaves)


def _read_nbytes(entry: LeafConversion) -> int:
    leaf = entry.leaf
    cells = {
        tuple(at // leaf.chunks[axis] for axis, at in zip(entry.scan_axes, copy_op.index, strict=True))
        for copy_op in entry.copies
    }
    layers = sum(math.prod(_extents(entry, cell)) for cell in cells)
    stacked = math.prod(leaf.shape[axis] for axis in entry.scan_axes)
    return leaf.nbytes // stacked * layers


def _extents(entry: LeafConversion, cell: tuple[int, ...]) -> Iterator[int]:
    """Layers in a chunk, along each of the stacked axes."""
    for axis, position in zip(entry.scan_axes, cell, strict=True):
        size, chunk = entry.leaf.shape[axis], entry.leaf.chunks[axis]
        yield min(size, (position + 1) * chunk) - position * chunk
