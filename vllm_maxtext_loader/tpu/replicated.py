"""Gives every device its copy of the weights that are not spread over them: norms, scalars, a vision tower.

tpu-inference does so, too, when a load is over (0.32.0 layers/vllm/process_weights/cleanup_sharding.py), by way of the tensors'
bytes, for which XLA compiles three small programs per shape. The tensors' memory can be handed to JAX as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torchax
from jax.sharding import NamedSharding, PartitionSpec
from torch import nn
from torch.nn import Parameter
from torchax.interop import torch_view
from tpu_inference.layers.common.utils import general_device_put

from vllm_maxtext_loader.api import to_numpy
from vllm_maxtext_loader.tpu import dry_load


def replicate(model: nn.Module, names: Iterable[str], mesh: Any) -> None:
    """Puts what is still the host's on all devices of a mesh.

    Args:
        model: all of whose weights have been loaded.
        names: parameters and buffers; the engine still computes with others (an attention's scales) on the host. Layers
            that tpu-inference places in a way of their own (a second embedding) are left to it.
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
        if getattr(module, "quant_method", None) is not None:
            continue
        # It says jax.Array; whatever JAX takes will do.
        values: Any = to_numpy(tensor.detach().contiguous())
        placed = torch_view(place(values, NamedSharding(mesh, PartitionSpec())))
        is_parameter = isinstance(tensor, Parameter)
        setattr(module, last, Parameter(placed, requires_grad=False) if is_parameter else placed)
