"""Puts other arrays in the place of those that a running engine computes with.

tpu-inference gives the model's arrays to every step as an argument, a dictionary; the modules' parameters are the same
arrays (0.32.0 models/common/model_loader.py, models/vllm/vllm_model_wrapper.py). A weight is exchanged in both. An array
of the same shape, dtype and placement goes through the same programs: nothing is compiled.

One array after the other goes to the devices and the old one is released, so that a device holds the model and one
array's shard.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import torch
import torchax
from jax.experimental.layout import Format
from torch import nn
from torch.nn import Parameter
from torchax.interop import jax_view, torch_view

from vllm_maxtext_loader.checkpoint.regions import Region
from vllm_maxtext_loader.errors import EngineError, TornWeightsError
from vllm_maxtext_loader.tpu.shards import PendingArray

logger = logging.getLogger("vllm." + __name__)

PREFIX = "vllm_model."
"""What tpu-inference puts in front of a parameter's name."""

Values = Callable[[Any, Region], np.ndarray]
"""By device and part of an array, the values of its shard, in host memory."""


@dataclasses.dataclass
class StagedArray(PendingArray):
    """An array whose shards stay in host memory until it is exchanged."""

    def complete(self) -> None:
        """Nothing: the module gets the array when it is exchanged."""

    def values(self, device: Any, _: Region) -> np.ndarray:
        """The values of a device's shard; zeros where no leaf has any."""
        return self.shard(device).values

    @property
    def nbytes(self) -> int:
        """Bytes of the shards of this process."""
        return len(self.addressable_indices) * math.prod(self.shard_shape) * self.dtype.itemsize


class Slot:
    """The place of one array: wherever the engine holds it.

    Attributes:
        shape, dtype, sharding: of the array, and of whatever takes its place.
    """

    def __init__(self, array: jax.Array) -> None:
        self.shape = array.shape
        self.dtype = np.dtype(array.dtype)
        self.sharding: Any = array.sharding
        self._layout = _layout(array)
        self._setters: list[Callable[[jax.Array | None], None]] = []

    def add(self, setter: Callable[[jax.Array | None], None]) -> None:
        """Adds a holder of the array; `setter` gives it another, or None so that it releases the old one."""
        self._setters.append(setter)

    def set(self, array: jax.Array | None) -> None:
        """Gives all holders another array."""
        for setter in self._setters:
            setter(array)

    def make(self, values: Values) -> jax.Array:
        """An array of these values, placed as the slot's, when it is on the devices."""
        indices = self.sharding.addressable_devices_indices_map(self.shape)
        shards = []
        for device, index in indices.items():
            region = tuple(
                slice(*part.indices(size)[:2]) for part, size in zip(index, self.shape, strict=True)
            )
            shards.append(jax.device_put(values(device, region), device))
        array = jax.make_array_from_single_device_arrays(self.shape, self.sharding, shards)
        if _layout(array) != self._layout:
            # A kernel asked for another order of axes in memory (tpu-inference's shard_moe_weights).
            array = jax.device_put(array, Format(self._layout, self.sharding))
        return array.block_until_ready()


def _memory(array: jax.Array) -> Any:
    """Where an array lies: a tied weight is one array's memory, and another one for Python."""
    if not array.nbytes:
        return id(array)
    return tuple(shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards)


def _layout(array: Any) -> Any:
    """The order of an array's axes in memory."""
    return array.format.layout


def find_slots(model: nn.Module, state: dict[str, jax.Array]) -> dict[str, Slot]:
    """By name of a parameter or buffer, its slot; names of one array have the same.

    Args:
        model: vLLM's model.
        state: what tpu-inference gives every step.
    """
    by_memory: dict[Any, Slot] = {}
    slots: dict[str, Slot] = {}
    for name, array in state.items():
        slot = by_memory.setdefault(_memory(array), Slot(array))
        slot.add(_setter(state, name, lambda value: value))
        slots[name.removeprefix(PREFIX)] = slot
    for module in model.modules():
        for holder in (vars(module)["_parameters"], vars(module)["_buffers"], vars(module)):
            for name, tensor in holder.items():
                if isinstance(tensor, torchax.tensor.Tensor) or (
                    isinstance(tensor, Parameter) and isinstance(tensor.data, torchax.tensor.Tensor)
                ):
                    array: Any = jax_view(tensor)
                    if (slot := by_memory.get(_memory(array))) is not None:
                        slot.add(_setter(holder, name, _as_tensor(isinstance(tensor, Parameter))))
    return slots


def _setter(
    holder: dict[str, Any], name: str, wrap: Callable[[jax.Array], Any]
) -> Callable[[jax.Array | None], None]:
    def put(array: jax.Array | None) -> None:
        holder[name] = None if array is None else wrap(array)

    return put


def _as_tensor(is_parameter: bool) -> Callable[[jax.Array], torch.Tensor]:
    def wrap(array: jax.Array) -> torch.Tensor:
        tensor = torch_view(array)
        return Parameter(tensor, requires_grad=False) if is_parameter else tensor

    return wrap


def check_fit(
    slots: Mapping[str, Slot], name: str, shape: tuple[int, ...], dtype: np.dtype, where: str
) -> None:
    """Refuses an array that the engine has no place for.

    Raises:
        EngineError: with what is there, and what the checkpoint has.
    """
    slot = slots.get(name)
    if slot is None:
        raise EngineError(
            f"{where}: the engine has no array {name}. It cannot be reloaded; restart it to serve another step."
        )
    if slot.shape != shape or slot.dtype != dtype:
        raise EngineError(
            f"{where}: the engine's array {name} is {slot.dtype} {slot.shape}, this checkpoint's {dtype} {shape}. "
            f"Restart the engine to serve it."
        )


def exchange(slots: Mapping[str, Slot], arrays: Iterable[tuple[str, Values]], where: str) -> None:
    """Exchanges arrays one by one; when no step runs.

    A failure before the first exchange changes nothing. After it, the rest is tried once more, each old array released
    first; what serves is never old and new, unless that fails, too.

    Args:
        slots: from `find_slots`.
        arrays: (name, values of its shards).
        where: the checkpoint, for messages.

    Raises:
        TornWeightsError: some arrays are the new step's, others the old one's, or gone.
    """
    for exchanged, (name, values) in enumerate(arrays):
        slot = slots[name]
        try:
            array = slot.make(values)
        except Exception as error:
            if not exchanged:
                raise
            logger.error(
                "%s: %s could not be placed (%s). Trying again, without the old one.", where, name, error
            )
            slot.set(None)
            try:
                array = slot.make(values)
            except Exception as second:
                raise TornWeightsError(
                    f"{where}: {exchanged} arrays are of this step, and {name} could not be placed ({second}): the engine "
                    f"holds a mixture of two steps, and answers nothing. Reload again, or restart it."
                ) from second
        slot.set(array)
