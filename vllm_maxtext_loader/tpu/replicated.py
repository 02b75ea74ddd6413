"""Gives every device its copy of what is not spread over them: norms, scalars, a vision tower, rotary tables.

tpu-inference does the same when a load is over (0.32.0 layers/vllm/process_weights/cleanup_sharding.py), from the
tensors' bytes, for which XLA compiles three small programs per shape. JAX can take the tensors' memory as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import NoneType
from typing import Any

import torch
import torchax
from jax.sharding import NamedSharding, PartitionSpec
from torch import nn
from torch.nn import Parameter
from torchax.interop import torch_view
from tpu_inference.layers.common.utils import general_device_put
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from vllm_maxtext_loader.api import to_numpy
from vllm_maxtext_loader.tpu import dry_load


def replicate(model: nn.Module, names: Iterable[str], mesh: Any) -> None:
    """Puts what is still the host's on all devices of a mesh.

    Args:
        model: all of whose weights have been loaded.
        names: parameters and buffers. Those of layers that tpu-inference places itself (a second embedding) are
            left to it.
        mesh: the devices.
    """
    # A dry load copies nothing.
    place = general_device_put if dry_load.current() is None else dry_load.place_untouched
    # Sorted: where there are several processes, JAX compares what they give, and they must give it in the same order.
    for name in sorted(names):
        prefix, _, last = name.rpartition(".")
        module = model.get_submodule(prefix)
        # tpu-inference may have made something else of it by now, which then is on the devices.
        tensor = getattr(module, last, None)
        if not isinstance(tensor, torch.Tensor) or isinstance(tensor, torchax.tensor.Tensor):
            continue
        # A router has vLLM's own method, which leaves its weight as it is.
        if type(getattr(module, "quant_method", None)) not in (NoneType, UnquantizedLinearMethod):
            continue
        # It says jax.Array; whatever JAX takes will do.
        values: Any = to_numpy(tensor.detach().contiguous())
        placed = torch_view(place(values, NamedSharding(mesh, PartitionSpec())))
        is_parameter = isinstance(tensor, Parameter)
        setattr(module, last, Parameter(placed, requires_grad=False) if is_parameter else placed)


def rotary_tables(model: nn.Module) -> Iterator[str]:
    """Names of the tables that vLLM has computed for rotary embeddings."""
    for name, module in model.named_modules():
        if isinstance(module, RotaryEmbeddingBase):
            yield from (f"{name}.{buffer}" for buffer, _ in module.named_buffers(recurse=False))
