"""Places decoded chunks straight into the arrays tpu-inference computes with.

The usual way is long: a Hugging Face tensor on the host ([out, in]), vLLM's packed torch parameter, torchax's copy of
it (through float32), a transpose back to [in, out] on the device. MaxText's kernels already are [in, out], and
its experts [expert, in, out], which is what tpu-inference's matmuls want. So the pieces of a layer go to the device
as they are stored, and one compiled function per kind of layer joins, packs and pads them there, with
tpu-inference's own functions for the final layout. The torch parameters are never filled; untouched, they cost no
memory.

Linear layers of the decoder, experts and the embedding go this way: all but a percent of the bytes. The rest (norms,
scalars, router, vision tower) takes the usual way. Both ways end in the same bits; tests say so.

Written against tpu-inference 0.32.0 layers/vllm/quantization/unquantized.py (what happens to a weight after loading),
layers/common/process_weights/{linear,moe}_weights.py (the layouts) and layers/vllm/custom_ops/linear.py (KV heads are
repeated where there are fewer of them than shards).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torch import nn
from torch.nn import Parameter
from torchax.interop import torch_view
from tpu_inference.layers.common.process_weights.linear_weights import LinearWeights, process_linear_weights
from tpu_inference.layers.common.process_weights.moe_weights import (
    FusedMoEWeights,
    process_unquantized_moe_weights,
    shard_moe_weights,
)
from tpu_inference.layers.common.sharding import ShardingAxisName
from tpu_inference.layers.common.utils import general_device_put
from tpu_inference.layers.vllm.quantization.unquantized import (
    VllmUnquantizedEmbeddingMethod,
    VllmUnquantizedFusedMoEMethod,
    VllmUnquantizedLinearMethod,
)
from vllm.model_executor.models.gemma4 import Gemma4DecoderLayer, Gemma4ForCausalLM

from vllm_maxtext_loader.checkpoint.reader import Box, Piece
from vllm_maxtext_loader.conversion.convert import ScaleStore, cast, layer_of, transform
from vllm_maxtext_loader.conversion.gemma4 import Scope, Value
from vllm_maxtext_loader.conversion.plan import LeafPlan, Plan, Write

Grid = Any
"""Pieces of one array, as nested lists along its axes; a pytree, so that it can be an argument of a jitted function."""


@dataclasses.dataclass
class _Slot:
    """One leaf's share of a layer's weight: pieces on the device, until all are there."""

    pieces: list[tuple[Box, jax.Array]] = dataclasses.field(default_factory=list)
    complete: bool = False


@dataclasses.dataclass
class _Job:
    """A module's weight that is being collected.

    Attributes:
        parameters: full names of the parameters it fills.
        slots: by MaxText leaf name ("self_attention.query.kernel").
        finish: makes the final arrays and puts them into the module.
        mesh: the devices they are spread over.
    """

    parameters: tuple[str, ...]
    slots: dict[str, _Slot]
    finish: Callable[[dict[str, Grid]], None]
    mesh: Mesh


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
        self._jobs: dict[tuple[int, str], _Job] = {}
        names = {id(module): name for name, module in model.named_modules()}
        present: dict[int, set[str]] = {}
        for entry in plan.leaves:
            if entry.rule.scope is Scope.LAYER:
                for write in entry.writes:
                    present.setdefault(write.layer, set()).add(entry.rule.leaf)
        for module in model.modules():
            if isinstance(module, Gemma4DecoderLayer):
                self._decoder_layer(module, present.get(module.layer_idx, set()), names)
            elif isinstance(module, Gemma4ForCausalLM):
                self._embedding(module, names)

    def wants(self, entry: LeafPlan) -> bool:
        """Whether every layer of the leaf is placed directly."""
        return bool(entry.writes) and all(self._key(entry, write) in self._jobs for write in entry.writes)

    def put(self, entry: LeafPlan, piece: Piece) -> None:
        """Sends a piece of a wanted leaf to the device, and finishes the modules it completes."""
        for write in entry.writes:
            job = self._jobs[self._key(entry, write)]
            slot = job.slots[entry.rule.leaf]
            if (found := layer_of(entry, write, piece)) is None:
                continue
            values, box = found
            if entry.rule.value is Value.UNSCALE_EMBEDDING:
                # Divided on the host: XLA may turn a division by a constant into a multiplication.
                values, box = transform(entry, write, values, box, self.fold, self.scales)
            if values.size:
                # What is still to be computed with is rounded once, afterwards.
                folds = self.fold and entry.rule.value is Value.EXPERT_OUTPUT
                values = np.ascontiguousarray(values if folds else cast(values, self.dtype))
                sharding = _spread(values.shape, job.mesh)
                slot.pieces.append((box, general_device_put(values, sharding)))  # pyright: ignore[reportArgumentType]
        if not piece.last:
            return
        for write in entry.writes:
            job = self._jobs[self._key(entry, write)]
            job.slots[entry.rule.leaf].complete = True
            if all(slot.complete for slot in job.slots.values()):
                grids = {leaf: _grid(slot.pieces) for leaf, slot in job.slots.items()}
                job.slots.clear()
                job.finish(grids)
                self.placed.update(job.parameters)

    def stream(self, pieces: Iterator[Piece], on_place: Callable[[Piece], None]) -> Iterator[Piece]:
        """Places wanted pieces, passes the others on.

        Args:
            pieces: every piece of the plan, in its order.
            on_place: told each placed piece.
        """
        by_key = {entry.leaf.key: entry for entry in self.plan.leaves}
        wanted = {key for key, entry in by_key.items() if self.wants(entry)}
        for piece in pieces:
            entry = by_key[piece.leaf.key]
            if entry.rule.value is Value.EXPERT_SCALE and self.fold:
                for write in entry.writes:
                    if (found := layer_of(entry, write, piece)) is not None:
                        transform(entry, write, *found, True, self.scales)
            if piece.leaf.key in wanted:
                self.put(entry, piece)
                on_place(piece)
            else:
                yield piece

    def targets(self) -> set[str]:
        """Hugging Face names that do not come through `model.load_weights`."""
        return {write.target for entry in self.plan.leaves if self.wants(entry) for write in entry.writes}

    def _key(self, entry: LeafPlan, write: Write) -> tuple[int, str]:
        return (write.layer if entry.rule.scope is Scope.LAYER else -1, entry.rule.leaf)

    def _add(self, layer: int, leaves: tuple[str, ...], job: _Job) -> None:
        for leaf in leaves:
            self._jobs[layer, leaf] = job

    def _decoder_layer(self, layer: Any, present: set[str], names: dict[int, str]) -> None:
        """Jobs for the linear layers and the experts of one decoder layer."""
        index = layer.layer_idx
        mlp = "mlp.moe_block.shared_experts" if layer.enable_moe_block else "mlp"
        attention = layer.self_attn
        query, key, value = (f"self_attention.{name}.kernel" for name in ("query", "key", "value"))
        if attention.is_kv_shared_layer:
            self._linear(index, attention.q_proj, (query,), (query,), names)
        else:
            # Where there is no value leaf, keys serve as values.
            leaves = (query, key, value) if value in present else (query, key)
            self._linear(index, attention.qkv_proj, leaves, (query, key, leaves[-1]), names)
        out = ("self_attention.out.kernel",)
        self._linear(index, attention.o_proj, out, out, names)
        gate_up = (f"{mlp}.wi_0.kernel", f"{mlp}.wi_1.kernel")
        self._linear(index, layer.mlp.gate_up_proj, gate_up, gate_up, names)
        down = (f"{mlp}.wo.kernel",)
        self._linear(index, layer.mlp.down_proj, down, down, names)
        if layer.experts is not None:
            self._experts(index, layer.experts.routed_experts, present, names)

    def _linear(
        self,
        layer: int,
        module: Any,
        leaves: tuple[str, ...],
        order: tuple[str, ...],
        names: dict[int, str],
    ) -> None:
        """Job for a linear layer.

        Args:
            layer: decoder layer.
            module: vLLM's linear layer.
            leaves: leaves it is made of.
            order: leaf of each of its packed outputs, in order.
            names: module names by identity.
        """
        method: Any = module.quant_method
        # A subclass may requantize while loading: those layers take the usual way.
        if type(method) is not VllmUnquantizedLinearMethod or getattr(module, "bias", None) is not None:
            return
        config: Any = method.linear_config
        replicas = getattr(module, "num_kv_head_replicas", 1)
        build = _linear_function(
            config.mesh,
            config.weight_sharding,
            tuple(config.output_sizes),
            config.n_shards,
            config.fuse_matmuls,
            # Only keys and values are repeated: outputs 1 and 2 of a qkv projection.
            tuple(replicas if position else 1 for position in range(len(order))),
        )
        input_axes = 2 if order[0] == "self_attention.out.kernel" else 1

        def finish(grids: dict[str, Grid]) -> None:
            weight = _done(build([grids[leaf] for leaf in order], input_axes))
            _forget(module, "weight")
            method._store_linear_weights(module, LinearWeights(weight, None, None, None))
            method.process_weights_after_loading = _nothing_left

        job = _Job((f"{names[id(module)]}.weight",), {leaf: _Slot() for leaf in leaves}, finish, config.mesh)
        self._add(layer, leaves, job)

    def _experts(self, layer: int, module: Any, present: set[str], names: dict[int, str]) -> None:
        """Jobs for the routed experts of a layer: gate and up (in one leaf, `wi`, or in two), and down.

        They are finished one after the other, so that the pieces of one are gone before those of the other come.
        """
        method: Any = module.quant_method
        if type(method) is not VllmUnquantizedFusedMoEMethod or method.moe.has_bias:
            return
        prefix = "mlp.moe_block.MoeBlock_0"
        gates = (f"{prefix}.wi",) if f"{prefix}.wi" in present else (f"{prefix}.wi_0", f"{prefix}.wi_1")
        down = (f"{prefix}.wo",)
        name = names[id(module)]
        for leaves, weight in ((gates, "w13_weight"), (down, "w2_weight")):
            finish = functools.partial(self._finish_experts, layer, module, leaves, weight)
            job = _Job((f"{name}.{weight}",), {leaf: _Slot() for leaf in leaves}, finish, method.mesh)
            self._add(layer, leaves, job)

    def _finish_experts(
        self, layer: int, module: Any, leaves: tuple[str, ...], weight: str, grids: dict[str, Grid]
    ) -> None:
        method: Any = module.quant_method
        is_down = weight == "w2_weight"
        scales = self.scales.get(layer, slice(None)) if self.fold and is_down else None
        _forget(module, weight)
        build = _experts_function(method.mesh, method.moe_backend, module.activation, self.dtype, weight)
        made = FusedMoEWeights(None, None, None, None, None, None)  # type: ignore[arg-type]
        setattr(made, weight, _done(build([grids[leaf] for leaf in leaves], scales)))
        made = torch_view(shard_moe_weights(made, method.moe_backend, method.mesh))
        setattr(module, weight, Parameter(getattr(made, weight), requires_grad=False))
        method.process_weights_after_loading = _nothing_left

    def _embedding(self, model: Any, names: dict[int, str]) -> None:
        """Job for the embedding; the tied output head shares its array instead of holding a copy."""
        embed, head = model.model.embed_tokens, model.lm_head
        method: Any = embed.quant_method
        tied = head.weight is embed.weight and isinstance(head.quant_method, VllmUnquantizedEmbeddingMethod)
        if not tied or type(method) is not VllmUnquantizedEmbeddingMethod:
            return
        leaf = "token_embedder.embedding"
        sharding = NamedSharding(method.mesh, PartitionSpec(ShardingAxisName.MLP_TENSOR, None))
        rows = embed.weight.shape[0]

        def finish(grids: dict[str, Grid]) -> None:
            weight = torch_view(_done(_embedding_function(sharding, rows)(grids[leaf])))
            _forget(embed, "weight")
            delattr(head, "weight")
            for module in (embed, head):
                module.weight = Parameter(weight, requires_grad=False)
                module.quant_method.process_weights_after_loading = _nothing_left

        job = _Job((f"{names[id(embed)]}.weight",), {leaf: _Slot()}, finish, method.mesh)
        self._add(-1, (leaf,), job)


def _done(made: Any) -> Any:
    """Waits: otherwise the pieces of many layers would be held by computations that are merely queued."""
    return jax.block_until_ready(made)


def _nothing_left(layer: nn.Module) -> None:
    """Stands for process_weights_after_loading of a layer that is in its final form."""


def _forget(module: Any, name: str) -> None:
    """Frees a torch parameter, as tpu-inference does once it has its own copy."""
    getattr(module, name).untyped_storage().resize_(0)
    delattr(module, name)


def _spread(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Spreads a piece over all devices, along its last axis that divides evenly; copies it where none does.

    The last axes are the output features, along which most final weights are sharded.
    """
    for axis in reversed(range(len(shape))):
        if shape[axis] % mesh.size == 0:
            return NamedSharding(mesh, PartitionSpec(*[None] * axis, tuple(mesh.axis_names)))
    return NamedSharding(mesh, PartitionSpec())


def _grid(pieces: list[tuple[Box, jax.Array]], axis: int = 0) -> Grid:
    """Arranges pieces as nested lists, one level per axis, by where they start; a lone piece as it is."""
    if (axis == 0 and len(pieces) == 1) or axis == len(pieces[0][0]):
        return pieces[0][1]
    rows: dict[int, list[tuple[Box, jax.Array]]] = {}
    for box, array in pieces:
        rows.setdefault(box[axis].start, []).append((box, array))
    return [_grid(rows[start], axis + 1) for start in sorted(rows)]


def _join(grid: Grid, axis: int = 0) -> jax.Array:
    """The array whose pieces are `grid`."""
    if not isinstance(grid, list):
        return grid
    return jnp.concatenate([_join(part, axis + 1) for part in grid], axis=axis)


@functools.cache
def _linear_function(
    mesh: Mesh,
    spec: PartitionSpec,
    output_sizes: tuple[int, ...],
    n_shards: int,
    fused: bool,
    repeats: tuple[int, ...],
) -> Callable[[list[Grid], int], Any]:
    """Compiled once per kind of linear layer: leaves in, final weight ([in, out], or a list of them) out."""

    def build(grids: list[Grid], input_axes: int) -> Any:
        outputs = []
        for grid, repeat in zip(grids, repeats, strict=True):
            kernel = _join(grid)
            if repeat > 1:
                kernel = jnp.repeat(kernel, repeat, axis=1)
            outputs.append(kernel.reshape(math.prod(kernel.shape[:input_axes]), -1))
        weight = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=-1)
        return process_linear_weights(
            LinearWeights(weight, None, None, None),
            fused=fused,
            output_sizes=list(output_sizes),
            reorder_size=n_shards,
        ).weight

    return jax.jit(build, static_argnums=1, out_shardings=NamedSharding(mesh, spec))


@functools.cache
def _experts_function(
    mesh: Mesh, backend: Any, activation: Any, dtype: np.dtype, weight: str
) -> Callable[[list[Grid], Any], jax.Array]:
    """Compiled once per model and weight: leaves (and scales to be folded) in, packed and padded experts out."""

    def build(grids: list[Grid], scales: jax.Array | None) -> jax.Array:
        # [expert, in, out]; gate and up side by side.
        experts = jnp.concatenate([_join(grid) for grid in grids], axis=2)
        if scales is not None:
            experts = experts.astype(jnp.float32) * scales[:, None, None]
        # tpu-inference's function takes vLLM's [expert, out, in] of both weights and transposes: the two transposes
        # cancel in XLA, and nothing is computed of the weight that is not asked for.
        given = jnp.swapaxes(experts.astype(dtype), 1, 2)
        count, out, inner = given.shape
        other = (count, inner, out // 2) if weight == "w13_weight" else (count, 2 * inner, out)
        both = {
            weight: given,
            "w2_weight" if weight == "w13_weight" else "w13_weight": jnp.zeros(other, dtype),
        }
        made = process_unquantized_moe_weights(
            mesh=mesh, moe_backend=backend, activation=activation, w13_bias=None, w2_bias=None, **both
        )
        return getattr(made, weight)

    return jax.jit(build)


@functools.cache
def _embedding_function(sharding: NamedSharding, rows: int) -> Callable[[Grid], jax.Array]:
    """Compiled once per model: vocabulary rows in, padded and sharded table out."""

    def build(grid: Grid) -> jax.Array:
        table = _join(grid)
        return jnp.pad(table, ((0, rows - table.shape[0]), (0, 0)))

    return jax.jit(build, out_shardings=sharding)
