"""Places decoded chunks straight into the arrays tpu-inference computes with.

The usual way is long: a Hugging Face tensor on the host ([out, in]), vLLM's packed torch parameter, torchax's copy of
it (through float32), a transpose back to [in, out] on the device. MaxText's kernels already are [in, out], and
its experts [expert, in, out], which is what tpu-inference's matmuls want; what is left to do is to pack and pad output
columns (gate beside up; query, key and value side by side, once per shard). So the final array of a layer is made empty,
one shard on each device, and every chunk that arrives is copied into the columns it fills, in place. Each device is
sent what its shard holds and nothing else. The torch parameters are never filled; untouched, they cost no memory.

`columns` knows which column goes where, `shards` holds the arrays, `modules` finds them in vLLM's model; this file leads the chunks there.

Linear layers of the decoder, experts and the embedding go this way: all but a percent of the bytes. The rest (norms,
scalars, router, vision tower) takes the usual way. Both ways end in the same bits; tests say so.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from torch import nn

from vllm_maxtext_loader.checkpoint.reader import Box, Piece
from vllm_maxtext_loader.checkpoint.tree import Leaf
from vllm_maxtext_loader.conversion.convert import ScaleStore, layer_of, transform
from vllm_maxtext_loader.conversion.plan import LeafPlan, Plan, Write
from vllm_maxtext_loader.conversion.rearrange import unscale_embedding
from vllm_maxtext_loader.families.gemma4 import Scope, Value
from vllm_maxtext_loader.tpu.replicated import replicate
from vllm_maxtext_loader.tpu.shards import Shard, Starts, Weight, blocks
from vllm_maxtext_loader.tpu.targets import OUTSIDE, Shapes, find_weights

_WRITERS = min(4, len(os.sched_getaffinity(0)))
"""Threads that copy. New memory is dear where the kernel hands it out page by page: one thread would spend most of its time on that,
with the decoder waiting for it."""


@dataclasses.dataclass(frozen=True)
class _Move:
    """A part of a piece, and where it goes.

    Attributes:
        weight: the array it is a part of.
        device: whose shard.
        write: the layer.
        values: one axis per axis of the array.
        rows: their indices along the leaf's first axis (experts, or input features, or vocabulary).
        starts: where they begin in the device's shard.
    """

    weight: Weight
    device: Any
    write: Write
    values: np.ndarray
    rows: slice
    starts: Starts


def several_processes() -> bool:
    """Whether other processes hold shards of the model, too."""
    return jax.process_count() > 1


class DirectPlacer:
    """Takes the pieces of the leaves it `wants`, and fills the model's modules.

    Attributes:
        placed: names of the parameters that have been filled.
    """

    def __init__(self, model: nn.Module, plan: Plan, dtype: np.dtype, fold_expert_scales: bool) -> None:
        self.plan = plan
        self.fold = fold_expert_scales
        self.scales = ScaleStore()
        self.placed: set[str] = set()
        self._writing: collections.deque[Piece] = collections.deque()
        self._wrote = 0.0
        shapes: Shapes = collections.defaultdict(dict)
        for entry in plan.leaves:
            for write in entry.writes:
                shapes[_layer(entry, write)][entry.rule.leaf] = _layer_shape(entry)
        self._model = model
        self._weights = find_weights(model, shapes, dtype)

    def wants(self, entry: LeafPlan) -> bool:
        """Whether every layer of the leaf is placed directly."""
        keys = [(_layer(entry, write), entry.rule.leaf) for write in entry.writes]
        return bool(keys) and all(key in self._weights for key in keys)

    def needs(self, leaf: Leaf, box: Box, devices: Collection[Any] | None = None) -> bool:
        """Whether a device holds any of a box; leaves that are not placed directly are needed whole.

        Args:
            leaf: the array.
            box: a part of it.
            devices: which devices; None means those of this process.
        """
        entry = self._entries[leaf.key]
        if not self.wants(entry):
            return True
        nothing = np.broadcast_to(np.uint8(0), [part.stop - part.start for part in box])
        moves = self._moves(entry, Piece(leaf, box, nothing, last=False))
        return any(devices is None or move.device in devices for move in moves)

    def targets(self) -> set[str]:
        """Hugging Face names that do not come through `model.load_weights`."""
        return {write.target for entry in self.plan.leaves if self.wants(entry) for write in entry.writes}

    def idle(self, seconds: float) -> float:
        """How many of the last `seconds` nothing was being written."""
        if any(piece.in_use for piece in self._writing):
            return 0.0
        return min(seconds, time.perf_counter() - self._wrote)

    def stream(self, pieces: Iterator[Piece], on_place: Callable[[Piece], None]) -> Iterator[Piece]:
        """Places wanted pieces, passes the others on.

        Args:
            pieces: every piece of the plan that is needed, in its order.
            on_place: told each placed piece.
        """
        unfinished = collections.deque(self.plan.leaves)
        writing = self._writing

        def settle(*, wait: bool) -> None:
            """Takes the pieces that are written off the list, in their order; all of them where it may wait."""
            while writing and (wait or not writing[0].in_use):
                piece = writing.popleft()
                piece.settle()
                on_place(piece)
                if piece.last:
                    self._complete(self._entries[piece.leaf.key])

        with ThreadPoolExecutor(_WRITERS, thread_name_prefix="maxtext-write") as writers:
            for piece in pieces:
                # A leaf of which nothing is needed here has no piece.
                while unfinished[0].leaf.key != piece.leaf.key:
                    self._complete(unfinished.popleft())
                entry = unfinished[0]
                if entry.rule.value is Value.EXPERT_SCALE and self.fold:
                    for write in entry.writes:
                        if (found := layer_of(entry, write, piece)) is not None:
                            transform(entry, write, *found, True, self.scales)
                if self.wants(entry):
                    self._put(entry, piece, writers)
                    writing.append(piece)
                    settle(wait=False)
                else:
                    yield piece
                if piece.last:
                    unfinished.popleft()
            settle(wait=True)
            while unfinished:
                self._complete(unfinished.popleft())

    def replicate(self, names: Iterable[str]) -> None:
        """Puts on every device the weights that took the usual way, when they are loaded; `names`: of parameters and buffers."""
        for mesh in {weight.sharding.mesh for weight in self._weights.values()}:
            replicate(self._model, names, mesh)

    @functools.cached_property
    def _entries(self) -> dict[str, LeafPlan]:
        return {entry.leaf.key: entry for entry in self.plan.leaves}

    def _moves(self, entry: LeafPlan, piece: Piece) -> Iterator[_Move]:
        """What of a piece goes where, layer by layer and device by device."""
        leaf, shape = entry.rule.leaf, _layer_shape(entry)
        for write in entry.writes:
            if (found := layer_of(entry, write, piece)) is None:
                continue
            values, box = found
            if entry.rule.value is Value.UNSCALE_EMBEDDING:
                # Rows past the vocabulary are the writer's padding.
                values = values[: max(0, write.sizes["V"] - box[0].start)]
            weight = self._weights[_layer(entry, write), leaf]
            for block, starts in blocks(values, box, shape, weight.groups[leaf]):
                for device, part, local in weight.targets(leaf, starts, block.shape):
                    rows = slice(starts[0] + part[0].start, starts[0] + part[0].stop)
                    yield _Move(weight, device, write, block[part], rows, local)

    def _put(self, entry: LeafPlan, piece: Piece, writers: Executor) -> None:
        """Has a piece copied into the shards it is a part of; who copies becomes a user of the piece."""
        by_shard: dict[tuple[int, Any], list[_Move]] = collections.defaultdict(list)
        for move in self._moves(entry, piece):
            by_shard[id(move.weight), move.device].append(move)
        for moves in by_shard.values():
            # Here, and not by the writer: two of them may meet at one shard.
            shard = moves[0].weight.shard(moves[0].device)
            piece.users.append(writers.submit(self._write, entry, shard, moves))

    def _write(self, entry: LeafPlan, shard: Shard, moves: list[_Move]) -> None:
        """Copies parts of a piece into the one shard that they belong to."""
        for move in moves:
            scales, convert = None, None
            match entry.rule.value:
                case Value.UNSCALE_EMBEDDING:
                    # Divided on the host: XLA may turn a division by a constant into a multiplication.
                    convert = functools.partial(unscale_embedding, hidden_size=move.write.sizes["H"])
                case Value.EXPERT_OUTPUT if self.fold:
                    scales = self.scales.get(move.write.layer, move.rows)
            shard.write(move.values, move.starts, scales, convert)
        shard.settle()
        self._wrote = time.perf_counter()

    def _complete(self, entry: LeafPlan) -> None:
        """Finishes the modules that have waited for this leaf last."""
        if not self.wants(entry):
            return
        for write in entry.writes:
            weight = self._weights[_layer(entry, write), entry.rule.leaf]
            weight.waiting.discard(entry.rule.leaf)
            if not weight.waiting:
                weight.finish(weight.array())
                self.placed.update(weight.parameters)


def _layer(entry: LeafPlan, write: Write) -> int:
    """Number of the decoder layer, or OUTSIDE."""
    return write.layer if entry.rule.scope is Scope.LAYER else OUTSIDE


def _layer_shape(entry: LeafPlan) -> tuple[int, ...]:
    """Shape of one layer of a leaf."""
    return tuple(size for axis, size in enumerate(entry.leaf.shape) if axis not in entry.stack)
