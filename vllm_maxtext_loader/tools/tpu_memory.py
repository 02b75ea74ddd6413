"""What a model takes of a TPU's memory, by arithmetic: weights as placed, rotary tables, KV cache.

Importing vLLM and tpu-inference takes longer than anybody waits for a table, so their rules are written down
here. Tests compare them with the arrays of an engine, with XLA's own accounting, and with the KV cache that vLLM
plans.

Weights are recognized by the names that vLLM packs, which its model classes share: q_proj, k_proj and v_proj
become one array, gate_proj and up_proj another, routed experts two. Whatever has another name is copied to
every device. Written against tpu-inference 0.32.0 (layers/vllm, runner/kv_cache.py) and vLLM 0.32.0
(v1/core/kv_cache_planning.py).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_maxtext_loader.errors import EngineError

ITEMSIZE = 2
"""Bytes of a weight: served in bfloat16, whatever is stored."""

LANES, SUBLANES = 128, 8
"""A device's memory holds the last two axes of an array in tiles of this many columns and rows."""

_VOCABULARY_MULTIPLE = 64
"""vLLM pads a vocabulary to it."""

_COLUMN = ("gate_proj", "up_proj", "per_layer_model_projection")
_ROW = ("o_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class DeviceArray:
    """One array of the model, as one device holds it.

    Attributes:
        name: of the first Hugging Face tensor in it.
        shape: of the device's shard.
        used: values of the shard that are weights; the rest is padding.
    """

    name: str
    shape: tuple[int, ...]
    used: float

    @property
    def nbytes(self) -> int:
        """Bytes in the device's memory, with tiles. XLA orders the last two axes so that they take fewest."""
        if len(self.shape) < 2:
            return math.prod(self.shape) * ITEMSIZE
        *outer, a, b = self.shape
        tiled = min(
            _multiple(a, SUBLANES) * _multiple(b, LANES), _multiple(b, SUBLANES) * _multiple(a, LANES)
        )
        return math.prod(outer) * tiled * ITEMSIZE

    @property
    def padding(self) -> int:
        """Bytes of it that are no weights."""
        return self.nbytes - round(self.used * ITEMSIZE)


class _Placement:
    """How tpu-inference spreads the weights of one model over devices.

    Args:
        shapes: of the Hugging Face tensors, by name.
        config: transformers' configuration of the text model.
        devices: tensor parallel size.
        expert_parallel: whether routed experts are spread whole.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], config: Any, devices: int, expert_parallel: bool
    ) -> None:
        self._shapes, self._config = shapes, config
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
            elif last == "q_proj":
                yield self._attention(name)
            elif last in ("k_proj", "v_proj"):
                continue
            elif last in _COLUMN:
                yield self._spread(name, shape, axis=0)
            elif last in _ROW:
                yield self._spread(name, shape, axis=1)
            elif last.startswith("embed_tokens") or last == "lm_head":
                rows = _multiple(shape[0], _VOCABULARY_MULTIPLE)
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
        index = int(re.findall(r"\.layers\.(\d+)\.", name)[0])
        head_dim, heads = _head_dim(self._config, index), _kv_heads(self._config, index)
        width, hidden = self._shapes[name]
        columns = used = self._share(width, name)
        # Where keys serve as values there is one tensor of them, and two places for it.
        if name.replace("q_proj", "k_proj") in self._shapes:
            spread = padded_kv_heads(heads, self._devices)
            columns += 2 * (spread // self._devices) * head_dim
            stored = 2 if name.replace("q_proj", "v_proj") in self._shapes else 1
            used += stored * heads * head_dim / self._devices
        return DeviceArray(name, (hidden, columns), hidden * used)

    def _experts(self, name: str, shape: tuple[int, ...]) -> DeviceArray:
        """Routed experts: gate and up ([experts, 2 x width, hidden]), or down ([experts, hidden, width])."""
        count, devices = shape[0], self._devices
        gates = name.rpartition(".")[2].startswith("gate_up")
        width, hidden = (shape[1] // 2, shape[2]) if gates else (shape[2], shape[1])
        if self._expert_parallel:
            local, part = self._share(count, name), width
        else:
            local, part = count, self._share(width, name)
        used = math.prod(shape) / devices
        if gates:
            return DeviceArray(name, (local, hidden, 2 * _multiple(part, LANES)), used)
        return DeviceArray(name, (local, part, hidden), used)

    def _share(self, length: int, name: str) -> int:
        """What one device holds of an axis.

        Raises:
            EngineError: it cannot be divided.
        """
        if length % self._devices:
            raise EngineError(f"{name}: {length} cannot be spread over {self._devices} devices")
        return length // self._devices


def device_arrays(
    shapes: Mapping[str, tuple[int, ...]], config: Any, devices: int, *, expert_parallel: bool = False
) -> list[DeviceArray]:
    """The weights that each device holds.

    Args:
        shapes: of the Hugging Face tensors, by name.
        config: transformers' configuration.
        devices: tensor parallel size.
        expert_parallel: whether routed experts are spread whole.

    Raises:
        EngineError: tpu-inference could not spread a weight over so many devices.
    """
    return list(_Placement(shapes, config.get_text_config(), devices, expert_parallel).arrays())


def rotary_bytes(config: Any) -> int:
    """Bytes of the rotary embeddings' tables: one for each kind of attention, whole on every device."""
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    tables = set()
    for index in range(text.num_hidden_layers):
        kind = text.layer_types[index] if getattr(text, "layer_types", None) else "full_attention"
        rope = parameters.get(kind, parameters)
        head_dim = _head_dim(text, index)
        proportional = rope.get("rope_type") == "proportional"
        factor = 1.0 if proportional else rope.get("partial_rotary_factor") or 1.0
        tables.add((int(head_dim * factor), rope.get("rope_theta"), rope.get("rope_type")))
    return sum(_multiple(width, LANES) * text.max_position_embeddings * ITEMSIZE for width, *_ in tables)


@dataclasses.dataclass(frozen=True)
class KVCache:
    """The KV cache of a model on so many devices.

    Attributes:
        bytes_per_token: of all devices together.
        max_model_len, max_num_seqs: as the engine is started.
    """

    bytes_per_token: int
    max_model_len: int
    max_num_seqs: int

    @property
    def block_size(self) -> int:
        """Tokens of a block. Source: tpu-inference 0.32.0 layers/vllm/backends/flash_attn.py."""
        length = self.max_model_len
        size = 16 if length > 8192 else min(256, max(16, (1 << (length - 1).bit_length()) // 16))
        # The scalar memory holds 2**19 entries of block tables.
        blocks = max(1, (1 << 19) // self.max_num_seqs // 4)
        fewest = 1 << (-(-length // blocks) - 1).bit_length()
        return max(size, fewest)

    def blocks(self, nbytes: int) -> int:
        """How many blocks so many bytes (of all devices) hold."""
        return max(0, nbytes) // (self.bytes_per_token * self.block_size)

    def tokens(self, nbytes: int) -> int:
        """Tokens that they hold, as vLLM reports them: requests at once times the longest request."""
        per_request = -(-self.max_model_len // self.block_size)
        return int(self.blocks(nbytes) / per_request * self.max_model_len)

    def longest(self, nbytes: int) -> int:
        """The longest request that they hold. vLLM keeps one block back."""
        return max(0, self.blocks(nbytes) - 1) * self.block_size


def kv_cache(
    config: Any, devices: int, *, max_model_len: int, max_num_seqs: int, itemsize: int = ITEMSIZE
) -> KVCache:
    """The KV cache of a model.

    Args:
        config: transformers' configuration.
        devices: tensor parallel size.
        max_model_len, max_num_seqs: as the engine is started.
        itemsize: bytes of a value in the cache.

    Raises:
        EngineError: its heads cannot be spread over so many devices.
    """
    text = config.get_text_config()
    if text.num_attention_heads % devices:
        # vLLM 0.32.0 config/model.py, verify_with_parallel_config.
        raise EngineError(
            f"{text.num_attention_heads} attention heads cannot be spread over {devices} devices"
        )
    packing = 4 // itemsize
    total = 0
    own = text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", 0) or 0)
    if any(_head_dim(text, index) == 64 for index in range(own, text.num_hidden_layers)):
        # tpu-inference 0.32.0 layers/common/attention_interface.py.
        raise EngineError(
            "tpu-inference has no attention kernel for layers that share keys and values with head_dim 64"
        )
    for index in range(own):
        head_dim = _head_dim(text, index)
        heads = padded_kv_heads(_kv_heads(text, index), devices) // devices
        # A head dimension of 64 holds keys and values in one row of 128.
        rows = heads if head_dim == 64 else 2 * heads
        total += _multiple(rows, packing) * _multiple(head_dim, LANES) * itemsize * devices
    return KVCache(total, max_model_len, max_num_seqs)


def padded_kv_heads(heads: int, devices: int) -> int:
    """KV heads after they were repeated for every device to have one.

    Raises:
        EngineError: they cannot be spread evenly.
    """
    if max(heads, devices) % min(heads, devices):
        raise EngineError(f"{heads} KV heads cannot be spread over {devices} devices")
    return max(heads, devices)


def _layer(config: Any, index: int) -> Any:
    """The configuration of one layer; transformers keeps one for each where they differ."""
    return config.per_layer_config[index] if getattr(config, "is_heterogeneous", False) else config


def _head_dim(config: Any, index: int) -> int:
    layer = _layer(config, index)
    return getattr(layer, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _kv_heads(config: Any, index: int) -> int:
    layer = _layer(config, index)
    return getattr(layer, "num_key_value_heads", None) or config.num_attention_heads


def _multiple(value: int, of: int) -> int:
    """`value` rounded up to a multiple."""
    return -(-value // of) * of
