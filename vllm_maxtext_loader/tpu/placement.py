"""Places decoded chunks straight into the arrays tpu-inference computes with.

The usual way is long: a Hugging Face tensor on the host ([out, in]), vLLM's packed torch parameter, torchax's copy of
it (through float32), a transpose back to [in, out] on the device. MaxText's kernels already are [in, out], and
its experts [expert, in, out], which is what tpu-inference's matmuls want. What is left is to pack and pad output columns
(gate next to up; query, key and value side by side, once per shard). So the final array of a layer is made empty,
one shard on each device, and every chunk that arrives is copied into the columns it fills, in place. Each device is
sent what its shard holds and nothing else. The torch parameters are never filled; untouched, they cost no memory.

`columns` knows which column goes where, `targets` finds the arrays in vLLM's model, `shards` and `device_shards`
hold them; this module copies the chunks there.

Linear layers of the decoder, experts and the embedding go this way: all but a percent of the bytes. The rest (norms,
scalars, router, vision tower) takes the usual way. Both ways end in the same bits; tests say so.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from torch import nn

from vllm_maxtext_loader.api import Checkpoint
from vllm_maxtext_loader.checkpoint.reader import DecodedRegion
from vllm_maxtext_loader.checkpoint.regions import Region
from vllm_maxtext_loader.checkpoint.tree import Leaf
from vllm_maxtext_loader.conversion.convert import ScaleStore, cast, keep_scales, layer_of, locate
from vllm_maxtext_loader.conversion.family import Scope
from vllm_maxtext_loader.conversion.plan import CopyOp, LeafConversion, Plan
from vllm_maxtext_loader.tpu import dry_load
from vllm_maxtext_loader.tpu.device_shards import MOST_STAGED, Staging, fill_on_devices, staged_nbytes
from vllm_maxtext_loader.tpu.holdings import Holdings, process_of
from vllm_maxtext_loader.tpu.replicated import replicate, rotary_tables
from vllm_maxtext_loader.tpu.shards import (
    Block,
    Convert,
    Offsets,
    PendingArray,
    flattened_blocks,
    memory_is_host,
)
from vllm_maxtext_loader.tpu.targets import NON_LAYER, LayerLeaf, Leaves, find_weights

_WRITERS = min(16, len(os.sched_getaffinity(0)))
"""Threads that copy and compute. First-touch page faults are expensive: the decoder would wait for a single thread."""


@dataclasses.dataclass(frozen=True)
class _ShardCopy:
    """A part of a region, and where it goes.

    Attributes:
        weight: the array it is a part of.
        device: whose shard.
        copy_op: the layer.
        values: one axis per axis of the array.
        rows: their indices along the leaf's first axis (experts, or input features, or vocabulary).
        offsets: where they begin in the device's shard.
    """

    weight: PendingArray
    device: Any
    copy_op: CopyOp
    values: np.ndarray
    rows: slice
    offsets: Offsets


@dataclasses.dataclass(frozen=True)
class _Writing:
    """A region that is being written. (It may have other readers: what sends it to other hosts.)"""

    decoded: DecodedRegion
    writes: list[Future[None]]

    @property
    def busy(self) -> bool:
        """Whether a write is not done."""
        return any(not write.done() for write in self.writes)


Weights = dict[tuple[int, str], PendingArray]
"""By layer (NON_LAYER for what is in none) and leaf name, the array that the leaf is a part of."""


def plan_weights(model: nn.Module, plan: Plan, dtype: np.dtype) -> Weights:
    """The arrays (of `dtype`) of a model that a plan's leaves go to directly."""
    leaves: Leaves = collections.defaultdict(dict)
    for entry in plan.leaves:
        for copy_op in entry.copies:
            leaf = LayerLeaf(entry.converter, _layer_shape(entry))
            leaves[_layer(entry, copy_op)][entry.converter.leaf] = leaf
    return find_weights(model, plan.family, leaves, dtype)


def staged_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the read budget that tiles on their way to this process's devices may take; 0 where there are none."""
    if all(map(memory_is_host, jax.local_devices())):
        return 0
    return staged_nbytes(checkpoint.plan.nbytes, checkpoint.concurrent_bytes)


def several_processes() -> bool:
    """Whether other processes hold shards of the model, too."""
    return jax.process_count() > 1


class ShardWriter:
    """Writes the regions of the leaves it `handles` into the model's arrays.

    Args:
        model: whose arrays.
        plan: what is read.
        dtype: of the arrays.
        fold_expert_scales: whether scales per expert are multiplied in.
        weights: the arrays; None means those of `plan_weights`.
        threads: that copy.
        staged: see `staged_bytes`.

    Attributes:
        filled: names of the parameters that have been filled.
        arrays: of the model, that are being filled.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        dtype: np.dtype,
        fold_expert_scales: bool,
        *,
        weights: Weights | None = None,
        threads: int = _WRITERS,
        staged: int = MOST_STAGED,
    ) -> None:
        self.plan = plan
        self._threads = threads
        self.fold = fold_expert_scales
        self.scales = ScaleStore()
        self.filled: set[str] = set()
        self._writing: collections.deque[_Writing] = collections.deque()
        self._wrote = 0.0
        self._model = model
        self._weights = plan_weights(model, plan, dtype) if weights is None else weights
        self.arrays = list({id(weight): weight for weight in self._weights.values()}.values())
        on_host = all(memory_is_host(device) for array in self.arrays for device in array.addressable_indices)
        self._stagings: list[Staging] = []
        # A dry load writes nothing, and host memory that is never touched costs nothing. Given arrays are filled as they are.
        if weights is None and not on_host and dry_load.current() is None:
            self._stagings = fill_on_devices(self.arrays, staged)
            for staging in self._stagings:
                staging.allocate()

    def handles(self, entry: LeafConversion) -> bool:
        """Whether every layer of the leaf is placed directly."""
        keys = [(_layer(entry, copy_op), entry.converter.leaf) for copy_op in entry.copies]
        return bool(keys) and all(key in self._weights for key in keys)

    def is_local(self, leaf: Leaf, region: Region, devices: Collection[Any] | None = None) -> bool:
        """Whether a device holds any of a region; leaves that are not placed directly are needed whole.

        Args:
            leaf: the array.
            region: a part of it.
            devices: which devices; None means those of this process.
        """
        entry = self._entries[leaf.key]
        if not self.handles(entry):
            return True
        moves = self._shard_copies(entry, _without_values(leaf, region))
        return any(devices is None or move.device in devices for move in moves)

    def holdings(self, process_of: Callable[[Any], int] = process_of) -> Holdings:
        """What each host needs of any region.

        Args:
            process_of: the host of a device.
        """
        return Holdings(
            {
                entry.leaf.key: (
                    entry,
                    [self._weights[_layer(entry, copy_op), entry.converter.leaf] for copy_op in entry.copies],
                )
                for entry in self.plan.leaves
                # Every host folds in the scales of all experts.
                if self.handles(entry) and entry.converter.fold != "scale"
            },
            process_of,
        )

    def prepare(self, regions: Iterable[tuple[Leaf, Region]]) -> None:
        """Begins to compile the programs that fill arrays on devices; others are compiled when they are needed.

        Args:
            regions: such as will be written. The first of a kind of arrays decides the program.
        """
        for leaf, region in regions:
            entry = self._entries[leaf.key]
            if not self.handles(entry):
                continue
            arrays = [self._weights[_layer(entry, copy_op), entry.converter.leaf] for copy_op in entry.copies]
            if all(array.on_devices is None or array.on_devices.is_prepared for array in arrays):
                continue
            for moves in self._copies_by_array(entry, _without_values(leaf, region)):
                if (shards := moves[0].weight.on_devices) is not None:
                    shards.prepare([Block(move.device, move.values, move.offsets) for move in moves])

    def targets(self) -> set[str]:
        """Hugging Face names that do not come through `model.load_weights`."""
        return {
            copy_op.target for entry in self.plan.leaves if self.handles(entry) for copy_op in entry.copies
        }

    def idle(self, seconds: float) -> float:
        """How many of the last `seconds` nothing was being written."""
        if any(region.busy for region in self._writing):
            return 0.0
        return min(seconds, time.perf_counter() - self._wrote)

    def stream(
        self, regions: Iterator[DecodedRegion], on_written: Callable[[DecodedRegion], None]
    ) -> Iterator[DecodedRegion]:
        """Writes the regions it handles, passes the others on.

        Args:
            regions: every region of the plan that is needed; of scales that are folded into experts, before those of the experts.
            on_written: called with each region that has been written.
        """
        unfinished = dict(self._entries)
        writing = self._writing

        def collect(*, block: bool) -> None:
            """Takes the written regions off the list, in order; with `block`, waits for all of them."""
            while writing and (block or not writing[0].busy):
                region = writing.popleft()
                for write in region.writes:
                    write.result()
                decoded = region.decoded
                on_written(decoded)
                if decoded.last:
                    self._complete(self._entries[decoded.leaf.key])

        with contextlib.ExitStack() as ending:
            for staging in self._stagings:
                ending.callback(staging.close)
            writers = ending.enter_context(
                ThreadPoolExecutor(self._threads, thread_name_prefix="maxtext-write")
            )
            for decoded in regions:
                entry = unfinished[decoded.leaf.key]
                if self.fold:
                    keep_scales(entry, decoded, self.scales)
                if self.handles(entry):
                    writes = [writers.submit(self._run, task) for task in self.tasks(entry, decoded)]
                    decoded.readers.extend(writes)
                    writing.append(_Writing(decoded, writes))
                    collect(block=False)
                else:
                    yield decoded
                if decoded.last:
                    del unfinished[decoded.leaf.key]
            collect(block=True)
            # A leaf of which nothing is needed here has no region.
            for entry in unfinished.values():
                self._complete(entry)

    def replicate(self, names: Iterable[str]) -> None:
        """Puts the weights that were loaded the usual way, and rotary tables, on every device.

        Args:
            names: of parameters and buffers.
        """
        for mesh in {weight.sharding.mesh for weight in self._weights.values()}:
            replicate(self._model, {*names, *rotary_tables(self._model)}, mesh)

    @functools.cached_property
    def _entries(self) -> dict[str, LeafConversion]:
        return {entry.leaf.key: entry for entry in self.plan.leaves}

    def _shard_copies(self, entry: LeafConversion, decoded: DecodedRegion) -> Iterator[_ShardCopy]:
        """What of a region goes where, layer by layer and device by device."""
        leaf, shape = entry.converter.leaf, _layer_shape(entry)
        for copy_op in entry.copies:
            if (found := layer_of(entry, copy_op, decoded)) is None:
                continue
            weight = self._weights[_layer(entry, copy_op), leaf]
            for values, region in locate(entry, copy_op, *found):
                for block, offsets in flattened_blocks(values, region, shape, weight.axis_groups[leaf]):
                    for device, part, local in weight.targets(leaf, offsets, block.shape):
                        rows = slice(offsets[0] + part[0].start, offsets[0] + part[0].stop)
                        yield _ShardCopy(weight, device, copy_op, block[part], rows, local)

    def tasks(self, entry: LeafConversion, decoded: DecodedRegion) -> Iterator[Callable[[], None]]:
        """What to run, in any order and by any thread, to write a region into the arrays it is a part of."""
        for moves in self._copies_by_array(entry, decoded):
            yield from moves[0].weight.tasks([self._block(entry, move) for move in moves])

    def _copies_by_array(self, entry: LeafConversion, decoded: DecodedRegion) -> Iterable[list[_ShardCopy]]:
        by_array: dict[int, list[_ShardCopy]] = collections.defaultdict(list)
        for move in self._shard_copies(entry, decoded):
            by_array[id(move.weight)].append(move)
        return by_array.values()

    def _block(self, entry: LeafConversion, move: _ShardCopy) -> Block:
        scales, convert = None, None
        if entry.converter.values:
            # Computed on the host: XLA may turn a division by a constant into a multiplication.
            convert = functools.partial(entry.converter.to_hf, sizes=move.copy_op.sizes)
        elif entry.converter.fold == "output" and self.fold:
            scales = self.scales.get(move.copy_op.layer, move.rows)
        if (rounded := move.weight.rounded_to) is not None:
            convert = _rounding(convert, rounded)
        return Block(move.device, move.values, move.offsets, scales, convert)

    def _run(self, task: Callable[[], None]) -> None:
        task()
        self._wrote = time.perf_counter()

    def _complete(self, entry: LeafConversion) -> None:
        """Finishes the modules that have waited for this leaf last."""
        if not self.handles(entry):
            return
        for copy_op in entry.copies:
            weight = self._weights[_layer(entry, copy_op), entry.converter.leaf]
            weight.missing_leaves.discard(entry.converter.leaf)
            if not weight.missing_leaves:
                weight.complete()
                self.filled.update(weight.parameters)


def _without_values(leaf: Leaf, region: Region) -> DecodedRegion:
    """A region whose place counts, and not its values."""
    nothing = np.broadcast_to(np.uint8(0), [part.stop - part.start for part in region])
    return DecodedRegion(leaf, region, nothing, last=False)


def _rounding(convert: Convert | None, dtype: np.dtype) -> Convert:
    """`convert`, with its result rounded to a dtype."""
    return lambda values: cast(values if convert is None else convert(values), dtype)


def _layer(entry: LeafConversion, copy_op: CopyOp) -> int:
    """Number of the decoder layer, or OUTSIDE."""
    return copy_op.layer if entry.converter.scope is Scope.LAYER else NON_LAYER


def _layer_shape(entry: LeafConversion) -> tuple[int, ...]:
    """Shape of one layer of a leaf."""
    return tuple(size for axis, size in enumerate(entry.leaf.shape) if axis not in entry.scan_axes)
