"""A model as it was before it was loaded: its modules, and shapes in place of values.

tpu-inference takes a loaded model apart: parameters become arrays of another shape, tied ones lose their identity, weight
loaders go. A reload needs what was there before: to find out which arrays a checkpoint's leaves are a part of
(`targets.find_weights`), and to run the model class's own `load_weights` on the host.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

_LOADERS = ("weight_loader", "_weight_loader")
"""Attributes of a parameter with the function that fills it: a method of its module."""

_Make = Callable[[str, torch.Tensor], torch.Tensor]


class Blueprint:
    """Copies a model's modules without its values.

    Args:
        model: built, and not loaded. Nothing of it is changed or kept but what its modules are configured by.

    Attributes:
        model: the same modules; parameters and buffers are on torch's device "meta".
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = _copy(model, lambda _, tensor: _like(tensor, "meta"))

    def on_host(self, names: Collection[str]) -> nn.Module:
        """Another copy, whose parameters and buffers of these names are zeros in host memory."""
        return _copy(self.model, lambda name, tensor: _like(tensor, "cpu") if name in names else tensor)


def _copy(model: nn.Module, make: _Make) -> nn.Module:
    """The model's modules with other parameters and buffers. What is shared stays shared."""
    modules: dict[int, nn.Module] = {}
    tensors: dict[int, torch.Tensor] = {}

    def copied(name: str, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in tensors:
            tensors[id(tensor)] = make(name, tensor)
        return tensors[id(tensor)]

    def visit(module: nn.Module, prefix: str) -> nn.Module:
        if id(module) in modules:
            return modules[id(module)]
        copy: nn.Module = object.__new__(type(module))
        modules[id(module)] = copy
        own = dict(vars(module))
        for kind in ("_parameters", "_buffers"):
            own[kind] = {name: copied(prefix + name, tensor) for name, tensor in vars(module)[kind].items()}
        vars(copy).update(own)
        vars(copy)["_modules"] = {
            name: None if child is None else visit(child, f"{prefix}{name}.")
            for name, child in vars(module)["_modules"].items()
        }
        return copy

    root = visit(model, "")
    for tensor in tensors.values():
        _bind_loaders(tensor, modules)
    return root


def _like(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """Zeros of a tensor's shape, with its class and attributes."""
    made = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
    if isinstance(tensor, Parameter):
        made = torch.Tensor._make_subclass(type(tensor), made, False)
    vars(made).update(vars(tensor))
    return made


def _bind_loaders(tensor: torch.Tensor, modules: dict[int, nn.Module]) -> None:
    """Makes weight loaders methods of the copied modules; `modules`: the copies, by the originals' ids."""
    for name in _LOADERS:
        loader: Any = vars(tensor).get(name)
        partial = loader if isinstance(loader, functools.partial) else None
        method = partial.func if partial is not None else loader
        if not isinstance(method, types.MethodType) or id(method.__self__) not in modules:
            continue
        bound = types.MethodType(method.__func__, modules[id(method.__self__)])
        vars(tensor)[name] = (
            bound if partial is None else functools.partial(bound, *partial.args, **partial.keywords)
        )
