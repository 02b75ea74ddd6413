"""What the hosts of an engine hold of each region of a checkpoint, from the arrays' shardings alone.

`ShardWriter.is_local` asks the same of this process's devices, one by one. Here all devices of all hosts are looked at together, once
per kind of array, since a large slice has hundreds of devices and a checkpoint thousands of regions.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vllm_maxtext_loader.checkpoint.exchange.sharing import Needs
from vllm_maxtext_loader.checkpoint.regions import Region
from vllm_maxtext_loader.checkpoint.tree import Leaf
from vllm_maxtext_loader.conversion.plan import CopyOp, LeafConversion
from vllm_maxtext_loader.tpu.shards import PendingArray


def process_of(device: Any) -> int:
    """The host that a device belongs to."""
    return device.process_index


@dataclasses.dataclass(frozen=True)
class _Kind:
    """Layers of a leaf that are spread over the devices alike.

    Attributes:
        layers: [layers, scan axes]: their indices along the leaf's scan axes.
        hosts: the hosts that hold any of it, ascending.
        starts: [hosts]: where each host's boxes begin.
        boxes: [boxes, axes of a layer, 2]: first index and end of what a device holds, along the axes as stored.
    """

    layers: np.ndarray
    hosts: np.ndarray
    starts: np.ndarray
    boxes: np.ndarray


class Holdings:
    """What hosts need of regions. Calling it is `sharing.NeedsOf`.

    Args:
        entries: leaves that are placed directly, each with its layers' arrays, by key; all others are needed whole, by all hosts.
        process_of: the host of a device.
    """

    def __init__(
        self,
        entries: Mapping[str, tuple[LeafConversion, Sequence[PendingArray]]],
        process_of: Callable[[Any], int] = process_of,
    ) -> None:
        self._entries, self._process_of = entries, process_of
        self._boxes: dict[Any, tuple[np.ndarray, np.ndarray]] = {}
        self._kinds: dict[str, list[_Kind]] = {}

    def hosts(self) -> list[int]:
        """All hosts with a device that holds any of the arrays, ascending."""
        shardings = {array.sharding for _, arrays in self._entries.values() for array in arrays}
        return sorted({self._process_of(device) for own in shardings for device in own.device_set})

    def __call__(self, leaf: Leaf, region: Region) -> Needs | None:
        """What hosts need of a region; None where the leaf is not placed directly."""
        if leaf.key not in self._entries:
            return None
        if leaf.key not in self._kinds:
            self._kinds[leaf.key] = self._kinds_of(leaf.key)
        scan_axes = self._entries[leaf.key][0].scan_axes
        bounds = np.array([(part.start, part.stop) for part in region])
        stacked = bounds[list(scan_axes)]
        rest = bounds[[axis for axis in range(len(region)) if axis not in scan_axes]]
        found = [
            _placed(needs, layers, scan_axes)
            for kind in self._kinds[leaf.key]
            if (layers := _layers(kind.layers, stacked)) is not None
            for needs in [_intersect(kind, rest)]
        ]
        return _union(found, len(region))

    def _kinds_of(self, key: str) -> list[_Kind]:
        entry, arrays = self._entries[key]
        shape = tuple(size for axis, size in enumerate(entry.leaf.shape) if axis not in entry.scan_axes)
        layers: dict[Any, list[tuple[int, ...]]] = collections.defaultdict(list)
        examples: dict[Any, tuple[CopyOp, PendingArray]] = {}
        for copy_op, array in zip(entry.copies, arrays, strict=True):
            leaf = entry.converter.leaf
            ranges = tuple(columns for columns in array.column_ranges if columns.leaf == leaf)
            kept = copy_op.sizes[entry.converter.padded] if entry.converter.padded else None
            kind = (array.sharding, array.shape, array.axis_groups[leaf], ranges, copy_op.pairs, kept)
            layers[kind].append(copy_op.index)
            examples[kind] = copy_op, array
        made = []
        for kind, indices in layers.items():
            copy_op, array = examples[kind]
            if (shape, kind) not in self._boxes:
                self._boxes[shape, kind] = self._boxes_of(entry, copy_op, array, shape)
            hosts, boxes = self._boxes[shape, kind]
            if hosts.size:
                distinct, starts = np.unique(hosts, return_index=True)
                made.append(_Kind(np.array(indices), distinct, starts, boxes))
        return made

    def _boxes_of(
        self, entry: LeafConversion, copy_op: CopyOp, array: PendingArray, shape: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """What devices hold of one layer of a leaf: ([boxes]: the host, in ascending order; [boxes, axes, 2])."""
        leaf = entry.converter.leaf
        indices = array.sharding.devices_indices_map(array.shape)
        shards = np.array(
            [
                [part.indices(size)[:2] for part, size in zip(index, array.shape, strict=True)]
                for index in indices.values()
            ]
        )
        columns = np.array(
            [(own.source, own.start, own.length) for own in array.column_ranges if own.leaf == leaf]
        )
        source, start, length = columns.T
        low = np.maximum(shards[:, -1, :1], start)
        high = np.minimum(shards[:, -1, 1:], start + length)
        device, column = np.nonzero(low < high)
        moved = (source - start)[column]
        held = np.stack([low[device, column] + moved, high[device, column] + moved], axis=-1)
        flat = np.concatenate([shards[device, :-1], held[:, None]], axis=1)
        hosts = np.array([self._process_of(each) for each in indices])[device]
        boxes, is_held = _unflatten(flat, array.axis_groups[leaf], shape)
        if (axis := entry.converter.padded_axis()) is not None:
            boxes[:, axis, 1] = np.minimum(boxes[:, axis, 1], copy_op.sizes[entry.converter.padded or ""])
        if copy_op.pairs:
            # Stored next to each other, wanted half a head apart.
            axis = entry.converter.rearrange.maxtext_axes.index("head_dim")
            boxes[:, axis] = 0, shape[axis]
        is_held &= np.all(boxes[..., 0] < boxes[..., 1], axis=1)
        rows = np.concatenate([hosts[is_held, None], boxes[is_held].reshape(-1, 2 * len(shape))], axis=1)
        rows = np.unique(rows, axis=0)
        return rows[:, 0], rows[:, 1:].reshape(-1, len(shape), 2)


def _unflatten(
    flat: np.ndarray, axis_groups: tuple[tuple[int, ...], ...], shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of an array, along the axes of a layer that make up its axes.

    Args:
        flat: [boxes, axes of the array, 2].
        axis_groups: see `PendingArray`.
        shape: of the layer.

    Returns:
        ([boxes, axes of the layer, 2], [boxes]: whether it holds anything). Where two axes make up one, the box is the
        smallest that covers the range.
    """
    boxes = np.zeros((len(flat), len(shape), 2), np.int64)
    is_held = np.ones(len(flat), bool)
    for own, group in zip(np.moveaxis(flat, 1, 0), axis_groups, strict=True):
        size = int(np.prod([shape[axis] for axis in group]))
        low, high = np.maximum(own[:, 0], 0), np.minimum(own[:, 1], size)
        is_held &= low < high
        match group:
            case ():
                continue
            case (axis,):
                boxes[:, axis, 0], boxes[:, axis, 1] = low, high
            case (outer, inner):
                inside = shape[inner]
                first, last = low // inside, (high - 1) // inside
                is_one = first == last
                boxes[:, outer, 0], boxes[:, outer, 1] = first, last + 1
                boxes[:, inner, 0] = np.where(is_one, low - first * inside, 0)
                boxes[:, inner, 1] = np.where(is_one, high - first * inside, inside)
            case _:
                raise AssertionError(f"{len(group)} axes become one")
    return boxes, is_held


def _layers(layers: np.ndarray, stacked: np.ndarray) -> np.ndarray | None:
    """Bounds along the scan axes, [axes, 2], of the layers that a region reaches; None where it reaches none."""
    reached = layers[np.all((layers >= stacked[:, 0]) & (layers < stacked[:, 1]), axis=1)]
    return np.stack([reached.min(axis=0), reached.max(axis=0) + 1], axis=-1) if len(reached) else None


def _intersect(kind: _Kind, rest: np.ndarray) -> Needs:
    """What each host needs of a region of one layer, [axes, 2]: the smallest box around what its devices hold of it."""
    low, high = np.maximum(kind.boxes[..., 0], rest[:, 0]), np.minimum(kind.boxes[..., 1], rest[:, 1])
    is_empty = ~np.all(low < high, axis=1)
    low[is_empty], high[is_empty] = np.iinfo(np.int64).max, -1
    first = np.minimum.reduceat(low, kind.starts)
    stop = np.maximum.reduceat(high, kind.starts)
    needing = stop[:, 0] >= 0 if len(rest) else np.ones(len(kind.hosts), bool)
    return Needs(kind.hosts[needing], np.stack([first, stop], axis=-1)[needing])


def _placed(needs: Needs, layers: np.ndarray, scan_axes: tuple[int, ...]) -> Needs:
    """Boxes of one layer, as boxes of the leaf."""
    count, axes = len(needs.hosts), needs.boxes.shape[1] + len(scan_axes)
    boxes = np.empty((count, axes, 2), np.int64)
    boxes[:, list(scan_axes)] = layers
    boxes[:, [axis for axis in range(axes) if axis not in scan_axes]] = needs.boxes
    return Needs(needs.hosts, boxes)


def _union(found: Sequence[Needs], axes: int) -> Needs:
    """What hosts need, where different layers of a leaf are spread differently."""
    if len(found) == 1:
        return found[0]
    hosts = sorted({int(host) for needs in found for host in needs.hosts})
    boxes = np.empty((len(hosts), axes, 2), np.int64)
    for number, host in enumerate(hosts):
        own = np.concatenate([needs.boxes[needs.hosts == host] for needs in found])
        boxes[number] = np.stack([own[..., 0].min(axis=0), own[..., 1].max(axis=0)], axis=-1)
    return Needs(np.array(hosts, np.int64), boxes)
