"""The arrays that vLLM's models on tpu-inference compute with, and the MaxText leaves each of them is made of.

Written against tpu-inference 0.32.0 layers/vllm/quantization/unquantized.py (what happens to a weight after loading) and
layers/vllm/custom_ops/linear.py (KV heads are repeated where there are fewer of them than shards).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
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
)
from tpu_inference.layers.common.sharding import ShardingAxisName
from tpu_inference.layers.vllm.quantization.unquantized import (
    VllmUnquantizedEmbeddingMethod,
    VllmUnquantizedFusedMoEMethod,
    VllmUnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from vllm_maxtext_loader.conversion.family import Family, PackedModule, WeightConverter
from vllm_maxtext_loader.tpu.columns import (
    ColumnRange,
    LinearColumns,
    expert_column_ranges,
    linear_column_ranges,
)
from vllm_maxtext_loader.tpu.shards import PendingArray


@dataclasses.dataclass(frozen=True)
class LayerLeaf:
    """A leaf as one layer has it.

    Attributes:
        converter: its row of the family's table.
        shape: of one layer of it.
    """

    converter: WeightConverter
    shape: tuple[int, ...]

    def axis_groups(self) -> tuple[tuple[int, ...], ...]:
        """Positions of the leaf's axes that make up each axis of its Hugging Face tensor."""
        axes = self.converter.rearrange.maxtext_axes
        return tuple(
            tuple(axes.index(name) for name in group if name in axes)
            for group in self.converter.rearrange.hf_axes
        )


Leaves = dict[int, dict[str, LayerLeaf]]
"""By decoder layer (NON_LAYER for what is in none) and leaf name."""

NON_LAYER = -1


def find_weights(
    model: nn.Module, family: Family, leaves: Leaves, dtype: np.dtype
) -> dict[tuple[int, str], PendingArray]:
    """By layer and leaf name, the array (of `dtype`) that the leaf is a part of; without those that must take the usual way."""
    return _Finder(model, family, leaves, dtype).weights


class _Finder:
    """Goes through the model, layer by layer."""

    def __init__(self, model: nn.Module, family: Family, leaves: Leaves, dtype: np.dtype) -> None:
        self.weights: dict[tuple[int, str], PendingArray] = {}
        self._dtype = dtype
        # Linear layers, by what decides where their columns go, and what makes their arrays once that is known.
        self._linears: list[tuple[LinearColumns, Callable[[list[ColumnRange], int], None]]] = []
        self._names = {id(module): name for name, module in model.named_modules()}
        decoder: Any = next(module for module in model.modules() if _embedding_of(module) is not None)
        for index, layer in enumerate(decoder.layers):
            own = leaves.get(index, {})
            for packed in family.modules:
                module = _submodule(layer, packed.module)
                if module is None:
                    continue
                if packed.is_experts:
                    self._experts(index, module, packed, own)
                else:
                    self._linear(index, module, packed, own)
        kinds = list(dict.fromkeys(kind for kind, _ in self._linears))
        found = dict(zip(kinds, linear_column_ranges(kinds), strict=True))
        for kind, add in self._linears:
            add(*found[kind])
        outside = leaves.get(NON_LAYER, {})
        head = next((module for module in model.modules() if isinstance(module, ParallelLMHead)), None)
        self._embedding(decoder, head, outside)

    def _add(self, layer: int, weight: PendingArray) -> None:
        for leaf in weight.missing_leaves:
            self.weights[layer, leaf] = weight

    def _linear(self, layer: int, module: Any, packed: PackedModule, own: dict[str, LayerLeaf]) -> None:
        """A linear layer.

        Args:
            layer: decoder layer.
            module: vLLM's linear layer.
            packed: what its outputs are, in order.
            own: leaves of this layer.
        """
        method: Any = module.quant_method
        # A subclass may requantize while loading: those layers take the usual way.
        if type(method) is not VllmUnquantizedLinearMethod:
            return
        config: Any = method.linear_config
        by_tensor = {leaf.converter.hf: name for name, leaf in own.items()}
        names = [
            by_tensor.get(name) or by_tensor.get(packed.fallback.get(name, "")) for name in packed.tensors
        ]
        has_bias = getattr(module, "bias", None) is not None
        biases = [by_tensor.get(_bias_of(name)) for name in packed.tensors] if has_bias else []
        if not config.fuse_matmuls or None in names or None in biases or (has_bias and module.skip_bias_add):
            return
        outputs: list[tuple[str, tuple[int, ...], int]] = []
        groups: dict[str, tuple[tuple[int, ...], ...]] = {}
        # Only keys and values are repeated: outputs 1 and 2 of a qkv projection.
        replicas = getattr(module, "num_kv_head_replicas", 1)
        for position, name in enumerate(names):
            assert name is not None
            # Hugging Face's matrix is [out, in], tpu-inference's [in, out].
            out_axes, in_axes = own[name].axis_groups()
            groups[name] = (in_axes, out_axes)
            sizes = tuple(own[name].shape[axis] for axis in out_axes)
            outputs.append((name, sizes, replicas if position else 1))

        complete: dict[str, jax.Array] = {}

        def on_complete(parameter: str, array: jax.Array) -> None:
            _free_parameter(module, parameter)
            complete[parameter] = array
            if len(complete) == 1 + has_bias:
                weights = LinearWeights(complete["weight"], None, None, complete.get("bias"))
                method._store_linear_weights(module, weights)
                complete.clear()
            method.process_weights_after_loading = _noop_process_weights

        def add(column_ranges: list[ColumnRange], columns: int) -> None:
            first = outputs[0][0]
            array = PendingArray(
                parameters=(f"{self._names[id(module)]}.weight",),
                shape=(math.prod(own[first].shape[axis] for axis in groups[first][0]), columns),
                sharding=NamedSharding(config.mesh, config.weight_sharding),
                axis_groups=groups,
                column_ranges=column_ranges,
                missing_leaves=set(groups),
                on_complete=functools.partial(on_complete, "weight"),
                dtype=self._dtype,
            )
            self._add(layer, array)
            if has_bias:
                of_weight = {
                    weight: bias for weight, bias in zip(names, biases, strict=True) if weight and bias
                }
                bias = PendingArray(
                    parameters=(f"{self._names[id(module)]}.bias",),
                    shape=(columns,),
                    sharding=NamedSharding(config.mesh, config.bias_sharding),
                    axis_groups={bias: own[bias].axis_groups() for bias in of_weight.values()},
                    column_ranges=_renamed(column_ranges, of_weight),
                    missing_leaves=set(of_weight.values()),
                    on_complete=functools.partial(on_complete, "bias"),
                    dtype=self._dtype,
                )
                self._add(layer, bias)

        kind = LinearColumns(tuple(outputs), tuple(config.output_sizes), config.n_shards)
        self._linears.append((kind, add))

    def _experts(self, layer: int, module: Any, packed: PackedModule, own: dict[str, LayerLeaf]) -> None:
        """The routed experts of a layer: gate and up (in one leaf or in two), and down."""
        method: Any = module.quant_method
        if type(method) is not VllmUnquantizedFusedMoEMethod:
            return
        if envs.MOE_REQUANTIZE_WEIGHT_DTYPE:
            return
        gates, downs = (_parts(own, tensor) for tensor in packed.tensors)
        gate_biases, down_biases = (_parts(own, _bias_of(tensor)) for tensor in packed.tensors)
        parts = {own[name].converter.rearrange.part for name in gates}
        if len(downs) != 1 or parts not in ({None}, {0, 1}):
            return
        if method.moe.has_bias and (len(gate_biases), len(down_biases)) != (len(gates), 1):
            return
        count, inner, hidden = own[downs[0]].shape
        widths = tuple(own[leaf].shape[2] for leaf in gates)
        found = expert_column_ranges(
            method.mesh,
            method.moe_backend,
            module.activation,
            gates,
            widths,
            hidden,
            interleaved=own[gates[0]].converter.rearrange.interleaved,
            has_bias=method.moe.has_bias,
        )
        if found is None:
            return
        column_ranges, columns = found
        down_ranges = [ColumnRange(downs[0], 0, 0, hidden)]
        arrays = [
            ("w13_weight", (count, hidden, columns), column_ranges),
            ("w2_weight", (count, inner, hidden), down_ranges),
        ]
        if method.moe.has_bias:
            of_weight = dict(zip((*gates, *downs), (*gate_biases, *down_biases), strict=True))
            arrays += [
                ("w13_bias", (count, 1, columns), _renamed(column_ranges, of_weight)),
                ("w2_bias", (count, 1, hidden), _renamed(down_ranges, of_weight)),
            ]
        shardings = _get_moe_weight_shardings(_moe_weights(), method.moe_backend, method.mesh)
        for name, shape, ranges in arrays:
            leaves = {column_range.leaf for column_range in ranges}
            is_bias = name.endswith("_bias")
            self._add(
                layer,
                PendingArray(
                    parameters=(f"{self._names[id(module)]}.{name}",),
                    shape=shape,
                    sharding=getattr(shardings, name),
                    axis_groups=dict.fromkeys(leaves, ((0,), (), (1,)) if is_bias else ((0,), (1,), (2,))),
                    column_ranges=ranges,
                    missing_leaves=leaves,
                    on_complete=functools.partial(_finish_experts, module, name),
                    # tpu-inference adds biases in float32, which it makes from the engine's dtype.
                    dtype=np.dtype(np.float32) if is_bias else self._dtype,
                    rounded_to=self._dtype if is_bias else None,
                    # As tpu-inference's shard_moe_weights asks for; its kernels rely on it.
                    row_major=True,
                ),
            )

    def _embedding(self, decoder: Any, head: Any, outside: dict[str, LayerLeaf]) -> None:
        """The embeddings and the output head; a tied head shares the embedding's array instead of holding a copy."""
        embed = _embedding_of(decoder)
        by_tensor = {leaf.converter.hf: name for name, leaf in outside.items()}
        tied = head is not None and getattr(head, "weight", None) is getattr(embed, "weight", None)
        self._table([embed, head] if tied else [embed], by_tensor.get("embed_tokens.weight"), outside)
        if head is not None and not tied:
            self._table([head], by_tensor.get("lm_head.weight"), outside)
        if (per_layer := getattr(decoder, "embed_tokens_per_layer", None)) is not None:
            self._table([per_layer], by_tensor.get("embed_tokens_per_layer.weight"), outside)

    def _table(self, modules: list[Any], name: str | None, outside: dict[str, LayerLeaf]) -> None:
        """A matrix with a row per token, that of the first module; the others share it."""
        first = modules[0]
        methods: list[Any] = [getattr(module, "quant_method", None) for module in modules]
        if name is None or any(type(method) is not VllmUnquantizedEmbeddingMethod for method in methods):
            return
        if any(getattr(module, "bias", None) is not None for module in modules):
            return
        leaf = outside[name]
        groups = leaf.axis_groups()
        hidden = leaf.shape[groups[1][0]]

        def on_complete(array: jax.Array) -> None:
            weight = torch_view(array)
            _free_parameter(first, "weight")
            for module in modules[1:]:
                delattr(module, "weight")
            for module in modules:
                module.weight = Parameter(weight, requires_grad=False)
                module.quant_method.process_weights_after_loading = _noop_process_weights

        self._add(
            NON_LAYER,
            PendingArray(
                parameters=(f"{self._names[id(first)]}.weight",),
                # vLLM pads the vocabulary; those rows stay zero.
                shape=(first.weight.shape[0], hidden),
                sharding=NamedSharding(methods[0].mesh, PartitionSpec(ShardingAxisName.MLP_TENSOR, None)),
                axis_groups={name: groups},
                column_ranges=[ColumnRange(name, 0, 0, hidden)],
                missing_leaves={name},
                on_complete=on_complete,
                dtype=self._dtype,
            ),
        )


def _embedding_of(module: Any) -> Any:
    """The token embedding of a decoder, None of any other module; vLLM's GPT-OSS has its own name for it."""
    if not hasattr(module, "layers"):
        return None
    return getattr(module, "embed_tokens", None) or getattr(module, "embedding", None)


def _bias_of(tensor: str) -> str:
    """Hugging Face name of a weight's bias; that of a tensor of all experts has no ".weight" at the end."""
    return f"{tensor.removesuffix('weight')}bias" if tensor.endswith(".weight") else f"{tensor}_bias"


def _parts(own: dict[str, LayerLeaf], tensor: str) -> tuple[str, ...]:
    """Leaves that a Hugging Face tensor is made of, in the order of its parts."""
    names = [name for name, leaf in own.items() if leaf.converter.hf == tensor]
    return tuple(sorted(names, key=lambda name: own[name].converter.rearrange.part or 0))


def _renamed(ranges: list[ColumnRange], names: Mapping[str, str]) -> list[ColumnRange]:
    """The ranges of other leaves that are packed in the same way."""
    return [dataclasses.replace(column_range, leaf=names[column_range.leaf]) for column_range in ranges]


def _submodule(layer: nn.Module, path: str) -> Any:
    """The module at a dotted path; None where the layer has none there."""
    module: Any = layer
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return None
    return module


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
    setattr(module, name, Parameter(torch_view(array), requires_grad=False))
    method.process_weights_after_loading = _noop_process_weights
