"""The arrays that vLLM's Gemma 4 on tpu-inference computes with, and the MaxText leaves each of them is made of.

Written against tpu-inference 0.32.0 layers/vllm/quantization/unquantized.py (what happens to a weight after loading) and
layers/vllm/custom_ops/linear.py (KV heads are repeated where there are fewer of them than shards).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from torch import nn
from torch.nn import Parameter
from torchax.interop import torch_view
from tpu_inference import envs
from tpu_inference.layers.common.process_weights.linear_weights import LinearWeights
from tpu_inference.layers.common.process_weights.moe_weights import (
    FusedMoEWeights,
    _get_moe_weight_shardings,
    shard_moe_weights,
)
from tpu_inference.layers.common.sharding import ShardingAxisName
from tpu_inference.layers.vllm.quantization.unquantized import (
    VllmUnquantizedEmbeddingMethod,
    VllmUnquantizedFusedMoEMethod,
    VllmUnquantizedLinearMethod,
)
from vllm.model_executor.models.gemma4 import Gemma4DecoderLayer, Gemma4ForCausalLM

from vllm_maxtext_loader.tpu.columns import ColumnRange, expert_column_ranges, linear_column_ranges
from vllm_maxtext_loader.tpu.shards import PendingArray

Shapes = dict[int, dict[str, tuple[int, ...]]]
"""By decoder layer (OUTSIDE for what is in none) and leaf name: the shape of one layer of the leaf."""

NON_LAYER = -1


def find_weights(model: nn.Module, shapes: Shapes, dtype: np.dtype) -> dict[tuple[int, str], PendingArray]:
    """By layer and leaf name, the array (of `dtype`) that the leaf is a part of; without those that must take the usual way."""
    return _Finder(model, shapes, dtype).weights


class _Finder:
    """Goes through the model, layer by layer."""

    def __init__(self, model: nn.Module, shapes: Shapes, dtype: np.dtype) -> None:
        self.weights: dict[tuple[int, str], PendingArray] = {}
        self._dtype = dtype
        self._names = {id(module): name for name, module in model.named_modules()}
        for module in model.modules():
            if isinstance(module, Gemma4DecoderLayer):
                self._decoder_layer(module, shapes.get(module.layer_idx, {}))
            elif isinstance(module, Gemma4ForCausalLM):
                self._embedding(module, shapes.get(NON_LAYER, {}))

    def _add(self, layer: int, weight: PendingArray) -> None:
        for leaf in weight.missing_leaves:
            self.weights[layer, leaf] = weight

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
        axis_groups: tuple[tuple[int, ...], ...],
    ) -> None:
        """A linear layer.

        Args:
            layer: decoder layer.
            module: vLLM's linear layer.
            packed: leaf of each of its outputs, in order.
            shapes: shape of every leaf in this layer.
            axis_groups: the leaves' input axes and their output axes.
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
            (leaf, tuple(shapes[leaf][axis] for axis in axis_groups[1]), replicas if position else 1)
            for position, leaf in enumerate(packed)
        )
        column_ranges, columns = linear_column_ranges(outputs, tuple(config.output_sizes), config.n_shards)

        def on_complete(array: jax.Array) -> None:
            _free_parameter(module, "weight")
            method._store_linear_weights(module, LinearWeights(array, None, None, None))
            method.process_weights_after_loading = _noop_process_weights

        self._add(
            layer,
            PendingArray(
                parameters=(f"{self._names[id(module)]}.weight",),
                shape=(math.prod(shapes[packed[0]][axis] for axis in axis_groups[0]), columns),
                sharding=NamedSharding(config.mesh, config.weight_sharding),
                axis_groups=dict.fromkeys(packed, axis_groups),
                column_ranges=column_ranges,
                missing_leaves=set(packed),
                on_complete=on_complete,
                dtype=self._dtype,
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
        found = expert_column_ranges(
            method.mesh, method.moe_backend, module.activation, gates, widths, hidden
        )
        if found is None:
            return
        column_ranges, columns = found
        shardings = _get_moe_weight_shardings(_moe_weights(), method.moe_backend, method.mesh)
        axis_groups = ((0,), (1,), (2,))
        for name, shape, leaves, moves in (
            ("w13_weight", (count, hidden, columns), gates, column_ranges),
            ("w2_weight", (count, inner, hidden), (down,), [ColumnRange(down, 0, 0, hidden)]),
        ):
            self._add(
                layer,
                PendingArray(
                    parameters=(f"{self._names[id(module)]}.{name}",),
                    shape=shape,
                    sharding=getattr(shardings, name),
                    axis_groups=dict.fromkeys(leaves, axis_groups),
                    column_ranges=moves,
                    missing_leaves=set(leaves),
                    on_complete=functools.partial(_finish_experts, module, name),
                    dtype=self._dtype,
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

        def on_complete(array: jax.Array) -> None:
            weight = torch_view(array)
            _free_parameter(embed, "weight")
            delattr(head, "weight")
            for module in (embed, head):
                module.weight = Parameter(weight, requires_grad=False)
                module.quant_method.process_weights_after_loading = _noop_process_weights

        self._add(
            NON_LAYER,
            PendingArray(
                parameters=(f"{self._names[id(embed)]}.weight",),
                # vLLM pads the vocabulary; those rows stay zero.
                shape=(embed.weight.shape[0], hidden),
                sharding=NamedSharding(method.mesh, PartitionSpec(ShardingAxisName.MLP_TENSOR, None)),
                axis_groups={leaf: ((0,), (1,))},
                column_ranges=[ColumnRange(leaf, 0, 0, hidden)],
                missing_leaves={leaf},
                on_complete=on_complete,
                dtype=self._dtype,
            ),
        )


def _noop_process_weights(layer: nn.Module) -> None:
    """Stands for process_weights_after_loading of a layer that is in its final form."""


def _free_parameter(module: Any, name: str) -> None:
    """Frees a torch parameter, as tpu-inference does once it has its own copy."""
    getattr(module, name).untyped_storage().resize_(0)
    delattr(module, name)


def _moe_weights(**weights: Any) -> FusedMoEWeights:
    """tpu-inference's record of an expert layer's arrays, with only those given."""
    names = [field.name for field in dataclasses.fields(FusedMoEWeights)]
    return FusedMoEWeights(**{**dict.fromkeys(names), **weights})


def _finish_experts(module: Any, name: str, array: Any) -> None:
    method: Any = module.quant_method
    _free_parameter(module, name)
    layout = array.format.layout
    if layout is not None and tuple(layout.major_to_minor) != tuple(range(array.ndim)):
        # The array lies where it should; this gives it the memory layout the kernels ask for. Asking for one it has
        # would copy it.
        made = shard_moe_weights(_moe_weights(**{name: array}), method.moe_backend, method.mesh)
        array = getattr(made, name)
    setattr(module, name, Parameter(torch_view(array), requires_grad=False))
    method.process_weights_after_loading = _noop_process_weights
