"""The KV cache of a model on so many TPU devices, by arithmetic.

vLLM plans it in blocks of tokens. Layers that keep everything share one table of blocks. Where a model has
layers that keep a sliding window as well, and all layers store alike, vLLM groups layers by kind: every group has
a table of its own, all draw blocks from one pool, and a window's old blocks are given back. Written against
vLLM 0.32.0 v1/core/kv_cache_planning.py, v1/kv_cache_interface.py, and tpu-inference 0.32.0
runner/kv_cache_manager.py, `get_kv_cache_spec`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

from vllm_maxtext_loader.errors import EngineError
from vllm_maxtext_loader.tools import serve_defaults
from vllm_maxtext_loader.tools.text_model import LANES, TextModel, multiple


@dataclasses.dataclass(frozen=True)
class KVCache:
    """The KV cache of a model.

    Attributes:
        token_bytes: of one token in one block table, on all devices together.
        windows: by block table, the sliding window of its layers; None where they keep every token.
        max_model_len, max_num_seqs, max_num_batched_tokens: as the engine is started.
    """

    token_bytes: int
    windows: tuple[int | None, ...]
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int = serve_defaults.BATCHED_TOKENS

    @property
    def block_size(self) -> int:
        """Tokens of a block. Source: tpu-inference 0.32.0 layers/vllm/backends/flash_attn.py."""
        length = self.max_model_len
        size = 16 if length > 8192 else min(256, max(16, (1 << (length - 1).bit_length()) // 16))
        # The scalar memory holds 2**19 entries of block tables.
        blocks = max(1, (1 << 19) // self.max_num_seqs // 4)
        fewest = 1 << (-(-length // blocks) - 1).bit_length()
        return max(size, fewest)

    @property
    def bytes_per_token(self) -> int:
        """Of all devices together, in a request of the full length."""
        length = -(-self.max_model_len // self.block_size) * self.block_size
        return self.request_bytes(length) // length

    def request_bytes(self, length: int) -> int:
        """What one request of so many tokens takes, of all devices together."""
        return self.request_blocks(length) * self.token_bytes * self.block_size

    def request_blocks(self, length: int) -> int:
        """Blocks that one request of so many tokens takes, at most."""
        return sum(self._blocks_of(window, length) for window in self.windows)

    def _blocks_of(self, window: int | None, length: int) -> int:
        if window is None:
            return -(-length // self.block_size)
        # A window may begin inside a block, and tokens under way are kept.
        kept = window - 1 + serve_defaults.CONCURRENT_BATCHES * self.max_num_batched_tokens
        return -(-min(kept, length) // self.block_size) + 1

    def blocks(self, nbytes: int) -> int:
        """How many blocks so many bytes (of all devices) hold."""
        return max(0, nbytes) // (self.token_bytes * self.block_size)

    def tokens(self, nbytes: int) -> int:
        """Tokens that they hold, as vLLM reports them: requests at once times the longest request."""
        return int(self.blocks(nbytes) / self.request_blocks(self.max_model_len) * self.max_model_len)

    def holds(self, nbytes: int, length: int) -> bool:
        """Whether they hold a request of so many tokens. vLLM keeps one block back."""
        return self.request_blocks(length) < self.blocks(nbytes)


def kv_cache(
    model: TextModel,
    devices: int,
    *,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int = serve_defaults.BATCHED_TOKENS,
    itemsize: int = 2,
) -> KVCache:
    """The KV cache of a model.

    Args:
        model: its layers.
        devices: tensor parallel size.
        max_model_len, max_num_seqs, max_num_batched_tokens: as the engine is started.
        itemsize: bytes of a value in the cache.

    Raises:
        EngineError: its heads cannot be spread over so many devices.
    """
    packing = 4 // itemsize
    sizes: list[int] = []
    for layer in model.own_layers:
        heads = padded_kv_heads(layer.kv_heads, devices) // devices
        # A head dimension of 64 holds keys and values in one row of 128.
        rows = heads if layer.head_dim == 64 else 2 * heads
        sizes.append(multiple(rows, packing) * multiple(layer.head_dim, LANES) * itemsize * devices)
    # tpu-inference keeps every token where head dimensions differ.
    hybrid = len({layer.head_dim for layer in model.own_layers}) == 1
    windows = [layer.window if hybrid else None for layer in model.own_layers]
    # Blocks under way never hold more than all requests together.
    batched = min(max_num_batched_tokens, max_num_seqs * max_model_len)
    if len(set(windows)) == 1:
        return KVCache(sum(sizes), (windows[0],), max_model_len, max_num_seqs, batched)
    counts = Counter(windows)
    group = min(counts.values())
    if max(counts.values()) < 1.5 * group:
        group = max(counts.values())
    tables = {window: -(-count // group) for window, count in counts.items()}
    layers = max(-(-count // tables[window]) for window, count in counts.items())
    return KVCache(
        layers * max(sizes),
        tuple(window for window, count in tables.items() for _ in range(count)),
        max_model_len,
        max_num_seqs,
        batched,
    )


def padded_kv_heads(heads: int, devices: int) -> int:
    """KV heads after they were repeated for every device to have one.

    Raises:
        EngineError: they cannot be spread evenly.
    """
    if max(heads, devices) % min(heads, devices):
        raise EngineError(f"{heads} KV heads cannot be spread over {devices} devices")
    return max(heads, devices)
