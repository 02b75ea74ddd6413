"""Parameters that took vLLM's `load_weights`, in the form tpu-inference computes with, made on the host.

tpu-inference does so on the device, by programs that are compiled for each shape. A running engine should compile nothing, so
that here NumPy moves the columns. Written against tpu-inference 0.32.0 layers/vllm/quantization/unquantized.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch import nn
from tpu_inference.layers.vllm.quantization.unquantized import (
    VllmUnquantizedEmbeddingMethod,
    VllmUnquantizedLinearMethod,
)
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_maxtext_loader.api import to_numpy
from vllm_maxtext_loader.conversion.convert import assign
from vllm_maxtext_loader.errors import EngineError
from vllm_maxtext_loader.tpu.columns import Packing, linear_orders

_AS_THEY_ARE = (VllmUnquantizedEmbeddingMethod, UnquantizedEmbeddingMethod, UnquantizedLinearMethod)
"""Kinds of layers whose weights tpu-inference only places; the last two are vLLM's own (a router)."""


def learn_orders(model: nn.Module, names: Iterable[str]) -> None:
    """Learns the orders of columns that `final_arrays` needs: one program is compiled for all.

    Args:
        model: shapes are enough.
        names: of the parameters that take `load_weights`.
    """
    linear_orders(
        _packing(module)
        for module, _, _ in _by_module(model, names)
        if type(getattr(module, "quant_method", None)) is VllmUnquantizedLinearMethod
        and module.quant_method.linear_config.fuse_matmuls
    )


def final_arrays(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays that parameters and buffers become.

    Args:
        model: whose parameters and buffers of these names hold values. They are given up one module after the other.
        names: full names.

    Yields:
        (name in tpu-inference's model, array)

    Raises:
        EngineError: a layer whose form only tpu-inference can make.
    """
    for module, prefix, own in _by_module(model, names):
        holders = [vars(module)[kind] for kind in ("_parameters", "_buffers")]
        values = {
            name: to_numpy(holder.pop(name).detach().contiguous())
            for name, holder in itertools.product(own, holders)
            if name in holder
        }
        for name, array in _final(module, prefix, values):
            yield f"{prefix}{name}", array


def _by_module(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[Any, str, list[str]]]:
    """(module, its name and a dot, names of its own parameters)."""
    split = sorted(name.rpartition(".") for name in names)
    for prefix, group in itertools.groupby(split, key=lambda parts: parts[0]):
        yield model.get_submodule(prefix), f"{prefix}." if prefix else "", [last for *_, last in group]


def _final(module: Any, where: str, values: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    method: Any = getattr(module, "quant_method", None)
    if method is None or type(method) in _AS_THEY_ARE:
        yield from values.items()
    elif type(method) is VllmUnquantizedLinearMethod:
        yield from _linear(module, values)
    else:
        raise EngineError(
            f"{where.rstrip('.')} ({type(method).__name__}): the weights of such a layer cannot be exchanged in a running "
            f"engine. Restart it to serve another step."
        )


def _linear(module: Any, values: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """vLLM's [out, in] as [in, out], columns packed per shard; or one matrix per output."""
    config: Any = module.quant_method.linear_config
    starts = list(itertools.accumulate(config.output_sizes, initial=0))
    for name, array in values.items():
        if name == "bias" and module.skip_bias_add:
            yield name, array
        elif config.fuse_matmuls:
            (order,) = linear_orders([_packing(module)])
            yield name, _transposed(array[order] if len(config.output_sizes) > 1 else array)
        else:
            for number, (start, stop) in enumerate(itertools.pairwise(starts)):
                yield f"{name}.{number}", _transposed(array[start:stop])


def _packing(module: Any) -> Packing:
    config: Any = module.quant_method.linear_config
    return Packing(sum(config.output_sizes), tuple(config.output_sizes), config.n_shards)


def _transposed(array: np.ndarray) -> np.ndarray:
    """A copy with the last two axes exchanged; of a vector, a copy."""
    view = np.swapaxes(array, -1, -2) if array.ndim > 1 else array
    made = np.empty(view.shape, view.dtype)
    assign(made, view)
    return made
