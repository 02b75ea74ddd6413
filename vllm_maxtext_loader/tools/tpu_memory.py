"""What a model takes of a TPU's memory, by arithmetic: weights as placed, and rotary tables.

Importing vLLM, tpu-inference or transformers takes longer than anybody waits for a table, so their rules are
written down here and in `kv_cache`. Tests compare them with the arrays of an engine and with XLA's own accounting.

Weights are recognized by the names that vLLM packs, which its model classes share: q_proj, k_proj and v_proj
become one array, gate_proj and up_proj another, routed experts two. Whatever has another name is copied to
every device. Written against tpu-inference 0.32.0 layers/vllm.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

from vllm_maxtext_loader.errors import EngineError
from vllm_maxtext_loader.tools.kv_cache import padded_kv_heads
from vllm_maxtext_loader.tools.text_model import LANES, SUBLANES, TextModel, multiple

ITEMSIZE = 2
"""Bytes of a weight: served in bfloat16, whatever is stored."""

_VOCABULARY_MULTIPLE = 64
"""vLLM pads a vocabulary to it."""

_GATES = ("gate_up_proj", "w13")
_COLUMN = ("gate_proj", "up_proj", "per_layer_model_projection")
_ROW = ("o_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class DeviceArray:
    """One array of the model, as one device holds it.

    Attributes:
        name: of the first Hugging Face tensor in it.
        shape: of the device's shard.
        used: values of the shard that are weights; the rest is padding.
        itemsize: bytes of a value.
    """

    name: str
    shape: tuple[int, ...]
    used: float
    itemsize: int = ITEMSIZE

    @property
    def nbytes(self) -> int:
        """Bytes in the device's memory, with tiles. XLA orders the last two axes so that they take fewest."""
        shape = [length for length in self.shape if length > 1]
        if len(shape) < 2:
            return math.prod(shape) * self.itemsize
        *outer, a, b = shape
        tiled = min(multiple(a, SUBLANES) * multiple(b, LANES), multiple(b, SUBLANES) * multiple(a, LANES))
        return math.prod(outer) * tiled * self.itemsize

    @property
    def padding(self) -> int:
        """Bytes of it that are no weights."""
        return self.nbytes - round(self.used * self.itemsize)


class _Placement:
    """How tpu-inference spreads the weights of one model over devices.

    Args:
        model: the text model.
        devices: tensor parallel size.
        expert_parallel: whether routed experts are spread whole.
    """

    def __init__(self, model: TextModel, devices: int, expert_parallel: bool) -> None:
        self._model, self._shapes = model, model.shapes
        self._devices, self._expert_parallel = devices, expert_parallel

    def arrays(self) -> Iterator[DeviceArray]:
        """Every array that a device holds."""
        for name, shape in self._shapes.items():
            last = name.removesuffix(".weight").rpartition(".")[2]
            # Towers of other modalities are copied to every device.
            tower = "vision" in name or "audio" in name
            if tower or len(shape) < 2:
                yield DeviceArray(name, shape, math.prod(shape))
            elif len(shape) == 3 and ".experts" in name:
                yield self._experts(name, shape)
            elif last.endswith("_bias"):
                yield self._expert_biases(name, shape)
            elif last == "q_proj":
                yield self._attention(name)
            elif last in ("k_proj", "v_proj"):
                continue
            elif last in _COLUMN:
                yield self._spread(name, shape, axis=0)
            elif last in _ROW:
                yield self._spread(name, shape, axis=1)
            elif last.startswith("embed_tokens") or last == "lm_head":
                rows = multiple(shape[0], _VOCABULARY_MULTIPLE)
                array = self._spread(name, (rows, shape[1]), axis=0)
                yield dataclasses.replace(array, used=math.prod(shape) / self._devices)
            else:
                yield DeviceArray(name, shape, math.prod(shape))

    def _spread(self, name: str, shape: tuple[int, ...], axis: int) -> DeviceArray:
        """A matrix ([out, in]) of which each device holds a part."""
        part = list(shape)
        part[axis] = self._share(shape[axis], name)
        return DeviceArray(name, tuple(part), math.prod(part))

    def _attention(self, name: str) -> DeviceArray:
        """Queries, keys and values in one array; KV heads are repeated where there are fewer than devices."""
        layer = self._model.layers[int(re.findall(r"\.layers\.(\d+)\.", name)[0])]
        width, hidden = self._shapes[name]
        columns = used = self._share(width, name)
        # Where keys serve as values there is one tensor of them, and two places for it.
        if name.replace("q_proj", "k_proj") in self._shapes:
            spread = padded_kv_heads(layer.kv_heads, self._devices)
            columns += 2 * (spread // self._devices) * layer.head_dim
            stored = 2 if name.replace("q_proj", "v_proj") in self._shapes else 1
            used += stored * layer.kv_heads * layer.head_dim / self._devices
        return DeviceArray(name, (hidden, columns), hidden * used)

    def _experts(self, name: str, shape: tuple[int, ...]) -> DeviceArray:
        """Routed experts: gate and up of all ([experts, hidden, 2 x width] or transposed), or down."""
        count, hidden = shape[0], self._model.hidden
        gates = name.rpartition(".")[2] in _GATES
        width = math.prod(shape) // count // hidden // (2 if gates else 1)
        local, part = self._expert_shares(name, count, width)
        used = math.prod(shape) / self._devices
        if gates:
            return DeviceArray(name, (local, hidden, 2 * multiple(part, LANES)), used)
        return DeviceArray(name, (local, part, hidden), used)

    def _expert_biases(self, name: str, shape: tuple[int, ...]) -> DeviceArray:
        """Their biases, in float32: of gate and up ([experts, 2 x width]), spread as these are; of down, whole."""
        count, length = shape
        if name.rpartition(".")[2].removesuffix("_bias") in _GATES:
            local, part = self._expert_shares(name, count, length // 2)
            length, used = 2 * multiple(part, LANES), math.prod(shape) / self._devices
        else:
            local = self._share(count, name) if self._expert_parallel else count
            used = local * length
        return DeviceArray(name, (local, 1, length), used, itemsize=4)

    def _expert_shares(self, name: str, count: int, width: int) -> tuple[int, int]:
        """Experts, and columns of each, that a device holds."""
        if self._expert_parallel:
            return self._share(count, name), width
        return count, self._share(width, name)

    def _share(self, length: int, name: str) -> int:
        """What one device holds of an axis.

        Raises:
            EngineError: it cannot be divided.
        """
        if length % self._devices:
            raise EngineError(f"{name}: {length} cannot be spread over {self._devices} devices")
        return length // self._devices


def device_arrays(model: TextModel, devices: int, *, expert_parallel: bool = False) -> list[DeviceArray]:
    """The weights that each device holds.

    Args:
        model: the text model.
        devices: tensor parallel size.
        expert_parallel: whether routed experts are spread whole.

    Raises:
        EngineError: tpu-inference could not spread a weight over so many devices.
    """
    return list(_Placement(model, devices, expert_parallel).arrays())


def rotary_bytes(model: TextModel) -> int:
    """Bytes of the rotary embeddings' tables: one for each kind of attention, whole on every device."""
    tables = set()
    for layer in model.layers:
        rope = layer.rope
        kind = rope["rope_type"]
        factor = 1.0 if kind == "proportional" else rope.get("partial_rotary_factor") or 1.0
        rows = model.max_position_embeddings
        # Source: vLLM 0.32.0 layers/rotary_embedding/{linear,yarn}_scaling_rope.py.
        if kind == "linear":
            rows = int(rows * rope["factor"])
        elif kind == "yarn":
            rows = int(rope["original_max_position_embeddings"] * rope["factor"])
        tables.add((rows, int(layer.head_dim * factor), rope["rope_theta"], kind))
    itemsize = model.rotary_itemsize
    return sum(DeviceArray("", (rows, width), 0, itemsize).nbytes for rows, width, *_ in tables)
