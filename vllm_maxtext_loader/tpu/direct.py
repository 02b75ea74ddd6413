"""Places decoded chunks straight into the arrays tpu-inference computes with.

The usual way is long: a Hugging Face tensor on the host ([out, in]), vLLM's packed torch parameter, torchax's copy of
it (through float32), a transpose back to [in, out] on the device. MaxText's kernels already are [in, out], and
its experts [expert, in, out], which is what tpu-inference's matmuls want; what is left to do is to pack and pad output
columns (gate beside up; query, key and value side by side, once per shard). So the final array of a layer is made empty,
one shard on each device, and every chunk that arrives is copied into the columns it fills, in place. Each device is
sent what its shard holds and nothing else. The torch parameters are never filled; untouched, they cost no memory.

Which column goes where is not written down here: column numbers are sent through tpu-inference's own functions, once
per kind of layer, and the answer is the map.

Linear layers of the decoder, experts and the embedding go this way: all but a percent of the bytes. The rest (norms,
scalars, router, vision tower) takes the usual way. Both ways end in the same bits; tests say so.

Written against tpu-inference 0.32.0 layers/vllm/quantization/unquantized.py (what happens to a weight after loading),
layers/common/process_weights/{linear,moe}_weights.py (the layouts) and layers/vllm/custom_ops/linear.py (KV heads are
repeated where there are fewer of them than shards).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from torch import nn
from torch.nn import Parameter
from torchax.interop import torch_view
from tpu_inference import envs
from tpu_inference.layers.common.process_weights.linear_weights import LinearWeights, process_linear_weights
from tpu_inference.layers.common.process_weights.moe_weights import (
    FusedMoEWeights,
    _get_moe_weight_shardings,
    process_unquantized_moe_weights,
    shard_moe_weights,
)
from tpu_inference.layers.common.sharding import ShardingAxisName
from tpu_inference.layers.vllm.quantization.unquantized import (
    VllmUnquantizedEmbeddingMethod,
    VllmUnquantizedFusedMoEMethod,
    VllmUnquantizedLinearMethod,
)
from vllm.model_executor.models.gemma4 import Gemma4DecoderLayer, Gemma4ForCausalLM

from vllm_maxtext_loader.checkpoint.reader import Box, Piece
from vllm_maxtext_loader.checkpoint.tree import Leaf
from vllm_maxtext_loader.conversion.convert import ScaleStore, layer_of, transform
from vllm_maxtext_loader.conversion.gemma4 import Scope, Value
from vllm_maxtext_loader.conversion.ops import unscale_embedding
from vllm_maxtext_loader.conversion.plan import LeafPlan, Plan, Write

Starts = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Run:
    """Neighbouring columns of a leaf that are neighbours in the final array, too.

    Attributes:
        leaf: MaxText leaf name ("self_attention.query.kernel").
        source: first column in the leaf, its output axes flattened.
        start: first column in the final array.
        length: number of columns.
    """

    leaf: str
    source: int
    start: int
    length: int


@dataclasses.dataclass
class _Weight:
    """A weight of a module, in its final form, while it is being filled.

    Attributes:
        parameters: full names of the parameters it is.
        shape: global shape; the last axis is the output columns.
        sharding: how it is spread over devices.
        groups: per leaf, which of its axes (layers left out) make up each axis of the final array.
        runs: where the columns go.
        waiting: leaves that are not complete.
        finish: puts the array into the module.
        shards: the part of every device of this process.
        made: done when the shards are there.
    """

    parameters: tuple[str, ...]
    shape: tuple[int, ...]
    sharding: NamedSharding
    groups: dict[str, tuple[tuple[int, ...], ...]]
    runs: list[Run]
    waiting: set[str]
    finish: Callable[[jax.Array], None]
    shards: dict[Any, jax.Array] = dataclasses.field(default_factory=dict)
    made: Future[None] | None = None

    @functools.cached_property
    def bounds(self) -> dict[Any, Box]:
        """By device of this process, what it holds of the array."""
        indices = self.sharding.addressable_devices_indices_map(self.shape)
        return {
            device: tuple(
                slice(*part.indices(size)[:2]) for part, size in zip(index, self.shape, strict=True)
            )
            for device, index in indices.items()
            if index is not None
        }

    def targets(self, leaf: str, starts: Starts, lengths: Sequence[int]) -> Iterator[tuple[Any, Box, Starts]]:
        """Where a block of a leaf goes.

        Args:
            leaf: its name.
            starts: where it begins in the leaf, along the final array's axes.
            lengths: its shape.

        Yields:
            (device, part of the block, where that begins in the device's shard)
        """
        *rows, column = starts
        for (device, shard), run in itertools.product(self.bounds.items(), self.runs):
            if run.leaf != leaf:
                continue
            moved = (*rows, run.start + column - run.source)
            limits = [
                *shard[:-1],
                slice(max(shard[-1].start, run.start), min(shard[-1].stop, run.start + run.length)),
            ]
            low = [max(a, limit.start) for a, limit in zip(moved, limits, strict=True)]
            high = [min(a + n, limit.stop) for a, n, limit in zip(moved, lengths, limits, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                part = tuple(slice(a - m, b - m) for a, b, m in zip(low, high, moved, strict=True))
                yield device, part, tuple(a - s.start for a, s in zip(low, shard, strict=True))

    def make(self, dtype: np.dtype) -> None:
        """Makes the empty shards."""
        for device, shard in self.bounds.items():
            shape = tuple(part.stop - part.start for part in shard)
            self.shards[device] = jnp.zeros(shape, dtype, device=device)

    def wait(self) -> None:
        """Waits until the empty shards are made."""
        if self.made is not None:
            self.made.result()

    def array(self) -> jax.Array:
        """The whole array; its shards are this object's no longer."""
        shards = list(self.shards.values())
        self.shards = {}
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, shards)


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

    weight: _Weight
    device: Any
    write: Write
    values: np.ndarray
    rows: slice
    starts: Starts


class DirectPlacer:
    """Takes the pieces of the leaves it `wants`, and fills the model's modules.

    Attributes:
        placed: names of the parameters that have been filled.
    """

    def __init__(self, model: nn.Module, plan: Plan, dtype: np.dtype, fold_expert_scales: bool) -> None:
        self.plan = plan
        self.dtype = dtype
        self.fold = fold_expert_scales
        self.scales = ScaleStore()
        self.placed: set[str] = set()
        self._weights: dict[tuple[int, str], _Weight] = {}
        self._names = {id(module): name for name, module in model.named_modules()}
        shapes: dict[int, dict[str, tuple[int, ...]]] = collections.defaultdict(dict)
        for entry in plan.leaves:
            for write in entry.writes:
                shapes[_layer(entry, write)][entry.rule.leaf] = _layer_shape(entry)
        for module in model.modules():
            if isinstance(module, Gemma4DecoderLayer):
                self._decoder_layer(module, shapes[module.layer_idx])
            elif isinstance(module, Gemma4ForCausalLM):
                self._embedding(module, shapes[-1])

    def wants(self, entry: LeafPlan) -> bool:
        """Whether every layer of the leaf is placed directly."""
        keys = [(_layer(entry, write), entry.rule.leaf) for write in entry.writes]
        return bool(keys) and all(key in self._weights for key in keys)

    @property
    def shared_with_other_processes(self) -> bool:
        """Whether other processes hold shards of the model, too."""
        return jax.process_count() > 1

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

    def stream(self, pieces: Iterator[Piece], on_place: Callable[[Piece], None]) -> Iterator[Piece]:
        """Places wanted pieces, passes the others on.

        Args:
            pieces: every piece of the plan that is needed, in its order.
            on_place: told each placed piece.
        """
        unfinished = collections.deque(self.plan.leaves)
        maker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="maxtext-shards")
        try:
            self._make_all(maker)
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
                    self._put(entry, piece)
                    on_place(piece)
                else:
                    yield piece
                if piece.last:
                    self._complete(unfinished.popleft())
            while unfinished:
                self._complete(unfinished.popleft())
        finally:
            maker.shutdown(cancel_futures=True)

    def _make_all(self, maker: Executor) -> None:
        """Has the empty shards made in the background, in the order in which they will be filled.

        On the CPU that is most of the work of placing: the kernel hands out and clears every page.
        """
        for entry in self.plan.leaves:
            if self.wants(entry):
                for write in entry.writes:
                    weight = self._weights[_layer(entry, write), entry.rule.leaf]
                    if weight.made is None:
                        weight.made = maker.submit(weight.make, self.dtype)

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
            for block, starts in _blocks(values, box, shape, weight.groups[leaf]):
                for device, part, local in weight.targets(leaf, starts, block.shape):
                    rows = slice(starts[0] + part[0].start, starts[0] + part[0].stop)
                    yield _Move(weight, device, write, block[part], rows, local)

    def _put(self, entry: LeafPlan, piece: Piece) -> None:
        """Copies a piece into the shards it is a part of."""
        touched: dict[int, _Weight] = {}
        for move in self._moves(entry, piece):
            values, scales = np.ascontiguousarray(move.values), None
            match entry.rule.value:
                case Value.UNSCALE_EMBEDDING:
                    # Divided on the host: XLA may turn a division by a constant into a multiplication.
                    values = unscale_embedding(values, move.write.sizes["H"])
                case Value.EXPERT_OUTPUT if self.fold:
                    scales = self.scales.get(move.write.layer, move.rows)
            weight = move.weight
            weight.wait()
            block = jax.device_put(values, move.device)
            weight.shards[move.device] = _update(weight.shards[move.device], block, move.starts, scales)
            touched[id(weight)] = weight
        # The piece's memory is used again as soon as this returns, and on the CPU a block is that memory.
        jax.block_until_ready([list(weight.shards.values()) for weight in touched.values()])

    def _complete(self, entry: LeafPlan) -> None:
        """Finishes the modules that have waited for this leaf last."""
        if not self.wants(entry):
            return
        for write in entry.writes:
            weight = self._weights[_layer(entry, write), entry.rule.leaf]
            weight.waiting.discard(entry.rule.leaf)
            if not weight.waiting:
                weight.wait()
                weight.finish(weight.array())
                self.placed.update(weight.parameters)

    def _add(self, layer: int, weight: _Weight) -> None:
        for leaf in weight.waiting:
            self._weights[layer, leaf] = weight

    def _decoder_layer(self, layer: Any, shapes: dict[str, tuple[int, ...]]) -> None:
        """The linear layers and the experts of one decoder layer."""
        index = layer.layer_idx
        mlp = "mlp.moe_block.shared_experts" if layer.enable_moe_block else "mlp"
        attention = layer.self_attn
        query, key, value = (f"self_attention.{name}.kernel" for name in ("query", "key", "value"))
        inputs_first = ((0,), (1, 2))
        if attention.is_kv_shared_layer:
            self._linear(index, attention.q_proj, (query,), shapes, inputs_first)
        else:
            # Where there is no value leaf, keys serve as values.
            packed = (query, key, value if value in shapes else key)
            self._linear(index, attention.qkv_proj, packed, shapes, inputs_first)
        self._linear(index, attention.o_proj, ("self_attention.out.kernel",), shapes, ((0, 1), (2,)))
        self._linear(
            index, layer.mlp.gate_up_proj, (f"{mlp}.wi_0.kernel", f"{mlp}.wi_1.kernel"), shapes, ((0,), (1,))
        )
        self._linear(index, layer.mlp.down_proj, (f"{mlp}.wo.kernel",), shapes, ((0,), (1,)))
        if layer.experts is not None:
            self._experts(index, layer.experts.routed_experts, shapes)

    def _linear(
        self,
        layer: int,
        module: Any,
        packed: tuple[str, ...],
        shapes: dict[str, tuple[int, ...]],
        groups: tuple[tuple[int, ...], ...],
    ) -> None:
        """A linear layer.

        Args:
            layer: decoder layer.
            module: vLLM's linear layer.
            packed: leaf of each of its outputs, in order.
            shapes: shape of every leaf in this layer.
            groups: the leaves' input axes and their output axes.
        """
        method: Any = module.quant_method
        # A subclass may requantize while loading: those layers take the usual way.
        if type(method) is not VllmUnquantizedLinearMethod or getattr(module, "bias", None) is not None:
            return
        config: Any = method.linear_config
        if not config.fuse_matmuls or any(leaf not in shapes for leaf in packed):
            return
        # Only keys and values are repeated: outputs 1 and 2 of a qkv projection.
        replicas = getattr(module, "num_kv_head_replicas", 1)
        outputs = tuple(
            (leaf, tuple(shapes[leaf][axis] for axis in groups[1]), replicas if position else 1)
            for position, leaf in enumerate(packed)
        )
        runs, columns = _linear_runs(outputs, tuple(config.output_sizes), config.n_shards)

        def finish(array: jax.Array) -> None:
            _forget(module, "weight")
            method._store_linear_weights(module, LinearWeights(array, None, None, None))
            method.process_weights_after_loading = _nothing_left

        self._add(
            layer,
            _Weight(
                parameters=(f"{self._names[id(module)]}.weight",),
                shape=(math.prod(shapes[packed[0]][axis] for axis in groups[0]), columns),
                sharding=NamedSharding(config.mesh, config.weight_sharding),
                groups=dict.fromkeys(packed, groups),
                runs=runs,
                waiting=set(packed),
                finish=finish,
            ),
        )

    def _experts(self, layer: int, module: Any, shapes: dict[str, tuple[int, ...]]) -> None:
        """The routed experts of a layer: gate and up (in one leaf, `wi`, or in two), and down."""
        method: Any = module.quant_method
        if type(method) is not VllmUnquantizedFusedMoEMethod or method.moe.has_bias:
            return
        prefix = "mlp.moe_block.MoeBlock_0"
        gates = (f"{prefix}.wi",) if f"{prefix}.wi" in shapes else (f"{prefix}.wi_0", f"{prefix}.wi_1")
        down = f"{prefix}.wo"
        if envs.MOE_REQUANTIZE_WEIGHT_DTYPE or any(leaf not in shapes for leaf in (*gates, down)):
            return
        count, inner, hidden = shapes[down]
        widths = tuple(shapes[leaf][2] for leaf in gates)
        found = _expert_runs(method.mesh, method.moe_backend, module.activation, gates, widths, hidden)
        if found is None:
            return
        runs, columns = found
        shardings = _get_moe_weight_shardings(_moe_weights(), method.moe_backend, method.mesh)
        groups = ((0,), (1,), (2,))
        for name, shape, leaves, moves in (
            ("w13_weight", (count, hidden, columns), gates, runs),
            ("w2_weight", (count, inner, hidden), (down,), [Run(down, 0, 0, hidden)]),
        ):
            self._add(
                layer,
                _Weight(
                    parameters=(f"{self._names[id(module)]}.{name}",),
                    shape=shape,
                    sharding=getattr(shardings, name),
                    groups=dict.fromkeys(leaves, groups),
                    runs=moves,
                    waiting=set(leaves),
                    finish=functools.partial(_finish_experts, module, name),
                ),
            )

    def _embedding(self, model: Any, shapes: dict[str, tuple[int, ...]]) -> None:
        """The embedding; the tied output head shares its array instead of holding a copy."""
        embed, head = model.model.embed_tokens, model.lm_head
        method: Any = embed.quant_method
        leaf = "token_embedder.embedding"
        tied = head.weight is embed.weight and isinstance(head.quant_method, VllmUnquantizedEmbeddingMethod)
        if not tied or type(method) is not VllmUnquantizedEmbeddingMethod or leaf not in shapes:
            return
        hidden = shapes[leaf][1]

        def finish(array: jax.Array) -> None:
            weight = torch_view(array)
            _forget(embed, "weight")
            delattr(head, "weight")
            for module in (embed, head):
                module.weight = Parameter(weight, requires_grad=False)
                module.quant_method.process_weights_after_loading = _nothing_left

        self._add(
            -1,
            _Weight(
                parameters=(f"{self._names[id(embed)]}.weight",),
                # vLLM pads the vocabulary; those rows stay zero.
                shape=(embed.weight.shape[0], hidden),
                sharding=NamedSharding(method.mesh, PartitionSpec(ShardingAxisName.MLP_TENSOR, None)),
                groups={leaf: ((0,), (1,))},
                runs=[Run(leaf, 0, 0, hidden)],
                waiting={leaf},
                finish=finish,
            ),
        )


def _layer(entry: LeafPlan, write: Write) -> int:
    """Number of the decoder layer, -1 outside of layers."""
    return write.layer if entry.rule.scope is Scope.LAYER else -1


def _layer_shape(entry: LeafPlan) -> tuple[int, ...]:
    """Shape of one layer of a leaf."""
    return tuple(size for axis, size in enumerate(entry.leaf.shape) if axis not in entry.stack)


def _nothing_left(layer: nn.Module) -> None:
    """Stands for process_weights_after_loading of a layer that is in its final form."""


def _forget(module: Any, name: str) -> None:
    """Frees a torch parameter, as tpu-inference does once it has its own copy."""
    getattr(module, name).untyped_storage().resize_(0)
    delattr(module, name)


def _moe_weights(**weights: Any) -> FusedMoEWeights:
    """tpu-inference's record of an expert layer's arrays, with only those given."""
    names = [field.name for field in dataclasses.fields(FusedMoEWeights)]
    return FusedMoEWeights(**{**dict.fromkeys(names), **weights})


def _finish_experts(module: Any, name: str, array: Any) -> None:
    method: Any = module.quant_method
    _forget(module, name)
    layout = array.format.layout
    if layout is not None and tuple(layout.major_to_minor) != tuple(range(array.ndim)):
        # The array lies where it should; this gives it the memory layout the kernels ask for. Asking for one it has
        # would copy it.
        made = shard_moe_weights(_moe_weights(**{name: array}), method.moe_backend, method.mesh)
        array = getattr(made, name)
    setattr(module, name, Parameter(torch_view(array), requires_grad=False))
    method.process_weights_after_loading = _nothing_left


@functools.partial(jax.jit, donate_argnums=0)
def _update(shard: jax.Array, block: jax.Array, starts: Starts, scales: Any) -> jax.Array:
    """`shard` with `block` at `starts`, in the same memory; [experts] scales are multiplied in, rounding once."""
    if scales is not None:
        block = block.astype(jnp.float32) * scales[:, None, None]
    return jax.lax.dynamic_update_slice(shard, block.astype(shard.dtype), starts)


def _blocks(
    values: np.ndarray, box: Box, shape: tuple[int, ...], groups: tuple[tuple[int, ...], ...]
) -> Iterator[tuple[np.ndarray, Starts]]:
    """A box with its axes flattened into groups: one block, or several where a group is not one run.

    Args:
        values: [box lengths].
        box: where they lie in an array of `shape`.
        shape: of the whole.
        groups: axes that become one; at most two in a group.

    Yields:
        (values with one axis per group, where they begin)
    """
    for outer, *inner in groups:
        if inner and values.shape[outer] > 1 and values.shape[inner[0]] < shape[inner[0]]:
            for position in range(values.shape[outer]):
                start = box[outer].start + position
                one = (*box[:outer], slice(start, start + 1), *box[outer + 1 :])
                yield from _blocks(values.take([position], axis=outer), one, shape, groups)
            return
    starts = tuple(
        int(np.ravel_multi_index([box[axis].start for axis in group], [shape[axis] for axis in group]))
        for group in groups
    )
    if values.size:
        yield values.reshape([math.prod(values.shape[axis] for axis in group) for group in groups]), starts


def _runs(columns: np.ndarray, names: Sequence[str], numbers: dict[str, np.ndarray]) -> list[Run]:
    """Runs of a final array's columns.

    Args:
        columns: number of the column that each of them was; 0 for padding.
        names: leaves.
        numbers: the numbers that a leaf's columns were given.
    """
    runs = []
    for leaf in names:
        first, last = int(numbers[leaf].min()), int(numbers[leaf].max())
        (positions,) = np.nonzero((columns >= first) & (columns <= last))
        breaks = np.nonzero((np.diff(positions) != 1) | (np.diff(columns[positions]) != 1))[0] + 1
        for run in np.split(positions, breaks):
            runs.append(Run(leaf, int(columns[run[0]]) - first, int(run[0]), len(run)))
    return runs


def _numbered(widths: dict[str, int]) -> dict[str, np.ndarray]:
    """A number for every column of every leaf, from 1."""
    numbers, first = {}, 1
    for leaf, width in widths.items():
        numbers[leaf] = np.arange(first, first + width, dtype=np.int32)
        first += width
    return numbers


@functools.cache
def _linear_runs(
    outputs: tuple[tuple[str, tuple[int, ...], int], ...], output_sizes: tuple[int, ...], n_shards: int
) -> tuple[list[Run], int]:
    """Where the columns of a linear layer's leaves go, and how many columns it has.

    Args:
        outputs: per output the leaf, its output axes ([features], or [heads, head_dim]) and how often each head comes.
        output_sizes: tpu-inference's.
        n_shards: shards its outputs are packed for.
    """
    numbers = _numbered({leaf: math.prod(axes) for leaf, axes, _ in outputs})
    packed = np.concatenate(
        [np.repeat(numbers[leaf].reshape(axes), repeats, axis=0).ravel() for leaf, axes, repeats in outputs]
    )

    @jax.jit
    def process(weight: jax.Array) -> Any:
        return process_linear_weights(
            LinearWeights(weight, None, None, None),
            fused=True,
            output_sizes=list(output_sizes),
            reorder_size=n_shards,
        ).weight

    columns = np.asarray(process(packed[None, :]))[0]
    return _runs(columns, list(numbers), numbers), len(columns)


@functools.cache
def _expert_runs(
    mesh: Any, backend: Any, activation: Any, leaves: tuple[str, ...], widths: tuple[int, ...], hidden: int
) -> tuple[list[Run], int] | None:
    """Where the columns of gate and up go, and how many columns the packed array has.

    None where tpu-inference's layout does more than to move columns of gate and up.
    """
    numbers = _numbered(dict(zip(leaves, widths, strict=True)))
    packed = np.concatenate(list(numbers.values()))
    inner = len(packed) // 2
    down = jnp.arange(hidden * inner, dtype=jnp.int32).reshape(1, hidden, inner)
    made = process_unquantized_moe_weights(
        mesh=mesh,
        moe_backend=backend,
        activation=activation,
        w13_weight=jnp.asarray(packed)[None, :, None],
        w13_bias=None,
        w2_weight=down,
        w2_bias=None,
    )
    w13, w2 = np.asarray(made.w13_weight), np.asarray(made.w2_weight)
    if (
        w13.ndim != 3
        or w13.shape[:2] != (1, 1)
        or not np.array_equal(w2, np.swapaxes(np.asarray(down), 1, 2))
    ):
        return None
    return _runs(w13[0, 0], leaves, numbers), w13.shape[2]
