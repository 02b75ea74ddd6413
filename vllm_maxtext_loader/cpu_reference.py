"""tpu-inference on JAX's CPU backend: plain JAX in place of what only a TPU can run.

`install()` lets vLLM 0.32 with tpu-inference 0.32 generate tokens on a machine without a TPU, so that the
loader can be tested end to end and the weights it placed can be judged by what the model says. Replaced are
the Pallas kernels on the way of a Gemma 4 (ragged paged attention, grouped matmul, the SparseCore gathers,
flash attention), TPU compiler options, the device mesh and the memory statistics. The rest of the engine is
tpu-inference's own code.

The replacements compute in float32 and round once, so they are at least as exact as the kernels; they are
slow. What they do not support they refuse by name. Kernels of other models (MLA, GDN, fused EP MoE, context
parallelism) are not replaced: they fail on the CPU, they do not compute something else.

This module imports jax, so the plugin imports it only when JAX_PLATFORMS=cpu. tpu_inference is imported by
`install()` alone. The kernels are ordinary functions of arrays, usable (and tested) without the engine.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh

from vllm_maxtext_loader.plugin import prepare_cpu_environment

logger = logging.getLogger(__name__)

SUPPORTED_TPU_INFERENCE = "0.32"
# For VLLM_CPU_KVCACHE_SPACE, the variable of vLLM's own CPU backend: the KV cache lives in main memory.
DEFAULT_KV_CACHE_GIB = 1
DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"

# Attention runs in blocks of queries and keys: its memory must not grow with max_model_len.
_QUERY_BLOCK = 32
_KEY_BLOCK = 256
# Rows of one tile of the grouped matmul. Decoding sends a handful of rows to each expert.
_ROW_BLOCK = 32
# Stands for minus infinity where a difference of two of them would be nan.
_LOWEST = -1e30

_installed = False
_replaced = False


# ----------------------------------------------------------------------------
# Devices
# ----------------------------------------------------------------------------


def requested_devices() -> int:
    """Number of CPU devices jax will make (or has made), read without starting its backend.

    Starting the backend here would fix the number of devices for good, and its threads do not survive the
    fork of vLLM's EngineCore process.
    """
    if jax.config.jax_num_cpu_devices > 0:
        return jax.config.jax_num_cpu_devices
    counts = re.findall(rf"{DEVICE_COUNT_FLAG}=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return int(counts[-1]) if counts else 1


def _require_devices(needed: int, available: int) -> None:
    if needed > available:
        raise RuntimeError(
            f"tensor and data parallelism ask for {needed} devices, but JAX has {available} on this CPU. "
            f"Set XLA_FLAGS={DEVICE_COUNT_FLAG}={needed} in the environment before the engine starts."
        )


# ----------------------------------------------------------------------------
# Ragged paged attention
# ----------------------------------------------------------------------------


def ragged_paged_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    kv_cache: jax.Array,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    cu_q_lens: jax.Array,
    distribution: jax.Array,
    *,
    use_causal_mask: bool = True,
    update_kv_cache: bool = True,
    skip_kv_mask: bool = False,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    out_dtype: Any = None,
    mask_value: float | None = None,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    chunk_prefill_size: int | None = None,
    d_block_sizes: tuple[int, int, int, int] | None = None,
    p_block_sizes: tuple[int, int, int, int] | None = None,
    m_block_sizes: tuple[int, int, int, int] | None = None,
    vmem_limit_bytes: int | None = None,
    debug_mode: bool = False,
    disable_bounds_checks: bool = True,
    disable_semaphore_checks: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Attention of several sequences packed into one batch, over keys and values kept in pages.

    Contract: tpu-inference 0.32.0 kernels/ragged_paged_attention/v3/kernel.py, `ragged_paged_attention`. T
    tokens, S sequence slots, N query heads, K key heads, D head_dim, P pages of `page_size` tokens, D' = D
    rounded up to 128.

    Args:
        queries: [T, N, D], the sequences' new tokens one after the other.
        keys: [T, K, D], in the dtype of the cache (quantized by the caller if the cache is).
        values: [T, K, D], as keys.
        kv_cache: [P, page_size, ceil(2K / packing), packing, D']; one token's row holds k0, v0, k1, v1, ...
        kv_lens: i32[S], tokens of each sequence including the new ones.
        page_indices: i32[S * pages_per_sequence], each sequence's pages in order.
        cu_q_lens: i32[S + 1], where each sequence's new tokens start in `queries`.
        distribution: i32[3]; only the last entry, the number of sequences, matters here. The first two tell
            the kernel which of its specialisations may run.
        use_causal_mask: False lets every query see all of its sequence's keys, also the later ones.
        update_kv_cache: False writes nothing and reads every key from the cache: a KV-shared layer of Gemma
            4 E2B, whose keys an earlier layer has written.
        skip_kv_mask: the caller's promise that no key needs masking, for speed. Masking changes nothing then.
        sm_scale: factor of the logits.
        sliding_window: a query at position p sees keys at positions above p - sliding_window.
        soft_cap: logits become soft_cap * tanh(logits / soft_cap).
        out_dtype: the kernel's accumulator dtype. This code accumulates in float32; the output has queries'
            dtype.
        mask_value: not supported, masked keys have weight zero.
        q_scale: not supported; vLLM's attention layers never quantize queries
            (layers/vllm/backends/flash_attn.py).
        k_scale, v_scale: factors of quantized keys and values.
        chunk_prefill_size .. disable_semaphore_checks: tuning of the TPU kernel, no meaning here.

    Returns:
        [T, N, D] in queries' dtype, zero for tokens of no sequence, and the updated cache.
    """
    del skip_kv_mask, chunk_prefill_size, d_block_sizes, p_block_sizes, m_block_sizes
    del vmem_limit_bytes, debug_mode, disable_bounds_checks, disable_semaphore_checks
    _refuse("ragged_paged_attention", mask_value=mask_value, q_scale=q_scale)
    if out_dtype is not None and jnp.dtype(out_dtype) not in (queries.dtype, jnp.dtype(jnp.float32)):
        _refuse("ragged_paged_attention", out_dtype=out_dtype)
    return _paged_attention(
        queries,
        keys,
        values,
        kv_cache,
        kv_lens,
        page_indices,
        cu_q_lens,
        distribution,
        layout=_Interleaved,
        sink=None,
        use_causal_mask=use_causal_mask,
        update_kv_cache=update_kv_cache,
        sm_scale=sm_scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        k_scale=k_scale,
        v_scale=v_scale,
    )


# Options of the layer being traced that tpu-inference has no way to pass on, see _allow_hd64_sharing.
_hd64_options: ContextVar[dict[str, bool] | None] = ContextVar("_hd64_options", default=None)


def ragged_paged_attention_hd64(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    kv_cache: jax.Array,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    cu_q_lens: jax.Array,
    distribution: jax.Array,
    attention_sink: jax.Array | None = None,
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = None,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    chunk_prefill_size: int | None = None,
    num_kv_pages_per_block: int | None = None,
    num_queries_per_block: int | None = None,
    vmem_limit_bytes: int | None = None,
    debug_mode: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`ragged_paged_attention` for head_dim 64, where key and value of a head share one row of 128.

    Contract: tpu-inference 0.32.0 kernels/ragged_paged_attention/v3/kernel_hd64.py,
    `ragged_paged_attention_hd64`. The cache is [P, page_size, ceil(K / packing), packing, 128] with key and
    value side by side.

    Args:
        attention_sink: f32[N], a logit per query head that takes weight in the softmax and gives no value.
    """
    del chunk_prefill_size, num_kv_pages_per_block, num_queries_per_block, vmem_limit_bytes, debug_mode
    _refuse("ragged_paged_attention_hd64", mask_value=mask_value, q_scale=q_scale)
    options = {"use_causal_mask": True, "update_kv_cache": True, **(_hd64_options.get() or {})}
    return _paged_attention(
        queries,
        keys,
        values,
        kv_cache,
        kv_lens,
        page_indices,
        cu_q_lens,
        distribution,
        layout=_SideBySide,
        sink=attention_sink,
        sm_scale=sm_scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        k_scale=k_scale,
        v_scale=v_scale,
        **options,
    )


class _Interleaved:
    """Cache layout of kernel.py (`merge_kv`, `get_kv_cache_shape`): rows k0, v0, k1, v1, ..., 128 wide."""

    @staticmethod
    def token_shape(heads: int, head_dim: int, packing: int) -> tuple[int, int, int]:
        return math.ceil(2 * heads / packing), packing, _round_up(head_dim, 128)

    @staticmethod
    def pack(k: jax.Array, v: jax.Array) -> jax.Array:
        """[T, K, D] twice -> [T, 2K, D]"""
        tokens, heads, head_dim = k.shape
        return jnp.stack([k, v], axis=2).reshape(tokens, 2 * heads, head_dim)

    @staticmethod
    def unpack(rows: jax.Array, heads: int, head_dim: int) -> tuple[jax.Array, jax.Array]:
        """[B, rows, D'] -> [B, K, D] twice"""
        rows = rows[:, : 2 * heads, :head_dim]
        return rows[:, 0::2], rows[:, 1::2]


class _SideBySide:
    """Cache layout of kernel_hd64.py: one row of 128 per head, the key in its first half."""

    @staticmethod
    def token_shape(heads: int, head_dim: int, packing: int) -> tuple[int, int, int]:
        return math.ceil(heads / packing), packing, 2 * head_dim

    @staticmethod
    def pack(k: jax.Array, v: jax.Array) -> jax.Array:
        """[T, K, 64] twice -> [T, K, 128]"""
        return jnp.concatenate([k, v], axis=-1)

    @staticmethod
    def unpack(rows: jax.Array, heads: int, head_dim: int) -> tuple[jax.Array, jax.Array]:
        """[B, rows, 128] -> [B, K, 64] twice"""
        rows = rows[:, :heads]
        return rows[..., :head_dim], rows[..., head_dim:]


def _paged_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    kv_cache: jax.Array,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    cu_q_lens: jax.Array,
    distribution: jax.Array,
    *,
    layout: type[_Interleaved | _SideBySide],
    sink: jax.Array | None,
    use_causal_mask: bool,
    update_kv_cache: bool,
    sm_scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    k_scale: float | None,
    v_scale: float | None,
) -> tuple[jax.Array, jax.Array]:
    """Both kernels; see `ragged_paged_attention` for the arguments.

    Three nested loops (sequences, query blocks, key blocks) with an online softmax. Their trip counts
    follow the batch, not the padding: an engine started with a max_model_len of 131072 pays for the tokens
    it has seen.
    """
    tokens, query_heads, head_dim = queries.shape
    key_heads = keys.shape[1]
    pages, page_size = kv_cache.shape[:2]
    slots = kv_lens.shape[0]
    group = query_heads // key_heads
    packing = 4 // kv_cache.dtype.itemsize
    _check_paged_inputs(queries, keys, values, kv_cache, layout.token_shape(key_heads, head_dim, packing))

    page_table = page_indices.reshape(slots, -1)
    sequences = distribution[2]
    if update_kv_cache:
        rows = _pad_to(layout.pack(keys, values), (tokens, math.prod(kv_cache.shape[2:4]), kv_cache.shape[4]))
        page, offset = _token_slots(tokens, page_table, page_size, kv_lens, cu_q_lens, sequences, pages)
        # Tokens of no sequence have the page index `pages`, one past the end: their write is dropped.
        kv_cache = kv_cache.at[page, offset].set(rows.reshape(tokens, *kv_cache.shape[2:]), mode="drop")

    block_q = min(tokens, _QUERY_BLOCK)
    block_pages = min(page_table.shape[1], math.ceil(_KEY_BLOCK / page_size))
    block_k = block_pages * page_size
    logit_scale = sm_scale * (1.0 if k_scale is None else k_scale)
    # Blocks of rows start at any token; padding keeps JAX from moving the last one to the left.
    grouped = _pad_to(queries, (tokens + block_q, query_heads, head_dim))
    grouped = grouped.reshape(-1, key_heads, group, head_dim)
    head_sink = jnp.full((key_heads, group), _LOWEST) if sink is None else sink.reshape(key_heads, group)

    def load_keys(sequence: jax.Array, block: jax.Array) -> tuple[jax.Array, jax.Array]:
        slot = jnp.minimum(block * block_pages + jnp.arange(block_pages), page_table.shape[1] - 1)
        stored = kv_cache[page_table[sequence, slot]].reshape(block_k, -1, kv_cache.shape[4])
        k, v = layout.unpack(stored, key_heads, head_dim)
        return k.astype(jnp.float32), v.astype(jnp.float32)

    def attend(sequence: jax.Array, first_row: jax.Array, first_position: jax.Array) -> jax.Array:
        """Output [K, group, block_q, D] of the query rows from `first_row`, in float32."""
        q = lax.dynamic_slice_in_dim(grouped, first_row, block_q).astype(jnp.float32)
        kv_len = kv_lens[sequence]
        q_position = first_position + jnp.arange(block_q)

        def key_block(block: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            highest, weight, acc = state
            k, v = load_keys(sequence, block)
            k_position = block * block_k + jnp.arange(block_k)
            visible = jnp.broadcast_to(k_position < kv_len, (block_q, block_k))
            if use_causal_mask:
                visible &= k_position <= q_position[:, None]
            if sliding_window is not None:
                visible &= q_position[:, None] < k_position + sliding_window
            logits = jnp.einsum("qhgd,khd->hgqk", q, k) * logit_scale
            if soft_cap is not None:
                logits = soft_cap * jnp.tanh(logits / soft_cap)
            logits = jnp.where(visible, logits, _LOWEST)
            new_highest = jnp.maximum(highest, logits.max(axis=-1))
            p = jnp.where(visible, jnp.exp(logits - new_highest[..., None]), 0.0)
            # The rest of a page may hold anything, also nan, and 0 * nan is nan.
            v = jnp.where((k_position < kv_len)[:, None, None], v, 0.0)
            fade = jnp.exp(highest - new_highest)
            acc = acc * fade[..., None] + jnp.einsum("hgqk,khd->hgqd", p, v)
            return new_highest, weight * fade + p.sum(axis=-1), acc

        last = jnp.minimum(kv_len, first_position + block_q) if use_causal_mask else kv_len
        first = (
            0 if sliding_window is None else jnp.maximum(first_position - sliding_window + 1, 0) // block_k
        )
        highest = jnp.broadcast_to(head_sink[..., None], (key_heads, group, block_q)).astype(jnp.float32)
        weight = jnp.full_like(highest, 0.0 if sink is None else 1.0)
        acc = jnp.zeros((key_heads, group, block_q, head_dim), jnp.float32)
        _, weight, acc = lax.fori_loop(first, _cdiv(last, block_k), key_block, (highest, weight, acc))
        return acc / jnp.where(weight > 0, weight, 1.0)[..., None]

    def sequence_body(sequence: jax.Array, out: jax.Array) -> jax.Array:
        q_start = cu_q_lens[sequence]
        q_len = cu_q_lens[sequence + 1] - q_start

        def query_block(block: jax.Array, out: jax.Array) -> jax.Array:
            row = q_start + block * block_q
            new = attend(sequence, row, kv_lens[sequence] - q_len + block * block_q)
            new = (new * (1.0 if v_scale is None else v_scale)).transpose(2, 0, 1, 3).astype(out.dtype)
            # The last block of a sequence reaches into the next one, whose rows are not ours to write.
            mine = jnp.arange(block_q) < q_len - block * block_q
            old = lax.dynamic_slice_in_dim(out, row, block_q)
            return lax.dynamic_update_slice_in_dim(
                out, jnp.where(mine[:, None, None, None], new, old), row, axis=0
            )

        return lax.fori_loop(0, _cdiv(q_len, block_q), query_block, out)

    out = lax.fori_loop(0, sequences, sequence_body, jnp.zeros(grouped.shape, queries.dtype))
    return out[:tokens].reshape(tokens, query_heads, head_dim), kv_cache


def _check_paged_inputs(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    kv_cache: jax.Array,
    token_shape: tuple[int, int, int],
) -> None:
    """What the kernels' static_validate_inputs checks, as far as this code would go wrong without."""
    if (
        keys.shape != values.shape
        or keys.shape[::2] != queries.shape[::2]
        or queries.shape[1] % keys.shape[1]
    ):
        raise ValueError(
            f"queries {queries.shape}, keys {keys.shape} and values {values.shape} do not fit together"
        )
    if not kv_cache.dtype == keys.dtype == values.dtype:
        raise ValueError(f"kv_cache is {kv_cache.dtype}, but keys are {keys.dtype} and values {values.dtype}")
    if kv_cache.shape[2:] != token_shape:
        raise ValueError(f"kv_cache has rows of {kv_cache.shape[2:]} per token, {token_shape} expected")


def _token_slots(
    tokens: int,
    page_table: jax.Array,
    page_size: int,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    sequences: jax.Array,
    nowhere: int,
) -> tuple[jax.Array, jax.Array]:
    """Where each of the batch's tokens is stored: (page, offset in it), both i32[tokens].

    Tokens past the last sequence get the page `nowhere`.
    """
    slots = kv_lens.shape[0]
    # Entries past the last sequence are not defined, and searchsorted needs them in order.
    ends = jnp.where(jnp.arange(slots) < sequences, cu_q_lens[1:], tokens)
    token = jnp.arange(tokens)
    sequence = jnp.minimum(jnp.searchsorted(ends, token, side="right"), slots - 1)
    position = kv_lens[sequence] - cu_q_lens[sequence + 1] + token
    page = page_table[sequence, jnp.clip(position // page_size, 0, page_table.shape[1] - 1)]
    return jnp.where(token < cu_q_lens[sequences], page, nowhere), position % page_size


# ----------------------------------------------------------------------------
# Mixture of experts
# ----------------------------------------------------------------------------

# jax.nn.gelu approximates with tanh unless told otherwise, and so does the kernel's "gelu".
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def grouped_matmul(
    lhs: jax.Array,
    rhs: jax.Array,
    rhs_scale: jax.Array | None,
    rhs_bias: jax.Array | None,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    fuse_act: str | None = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """Multiply each group of rows with its expert's matrix.

    Contract: tpu-inference 0.32.0 layers/common/fused_moe_gmm.py, `gmm_wrapper`, over tokamax's `gmm_v2`.

    Args:
        lhs: [M, K]; the rows are sorted by group and the groups follow each other from row 0.
        rhs: [G, K, N], the matrices of the groups group_offset .. group_offset + G, this shard's experts.
        rhs_scale: not supported (quantized weights).
        rhs_bias: [G, 1, N] or None.
        group_sizes: i32[all groups], rows of each group, also of those that other shards hold.
        group_offset: i32[1].
        fuse_act: "silu", "gelu" or "gelu_tanh"; rhs is [gate | up] on its last axis, and the result is
            act(gate) * up.
        preferred_element_type: dtype of the result, lhs's by default.

    Returns:
        [M, N], or [M, N / 2] with fuse_act; zero in the rows of other shards' groups and past the last
        group, which the kernel leaves undefined.
    """
    _refuse("grouped_matmul", rhs_scale=rhs_scale)
    if fuse_act is not None and fuse_act not in _ACTIVATIONS:
        raise NotImplementedError(f"grouped_matmul: fuse_act={fuse_act!r} has no CPU reference")
    rows, groups = lhs.shape[0], rhs.shape[0]
    if lhs.shape[1] != rhs.shape[1]:
        raise ValueError(f"grouped_matmul: lhs {lhs.shape} and rhs {rhs.shape} do not fit together")
    width = rhs.shape[2] if fuse_act is None else rhs.shape[2] // 2
    block = min(rows, _ROW_BLOCK)

    # Tiles of `block` rows, none across two groups. Looping over these costs one expert's weights of memory
    # and reads only the experts that have rows; gathering weights per row would cost [M, K, N].
    ends = jnp.cumsum(group_sizes)
    local_sizes = lax.dynamic_slice_in_dim(group_sizes, group_offset[0], groups)
    local_ends = lax.dynamic_slice_in_dim(ends, group_offset[0], groups)
    tile_ends = jnp.cumsum(_cdiv(local_sizes, block))
    padded = _pad_to(lhs, (rows + block, lhs.shape[1]))

    def tile_body(tile: jax.Array, out: jax.Array) -> jax.Array:
        group = jnp.searchsorted(tile_ends, tile, side="right")
        end = local_ends[group]
        row = end - local_sizes[group] + block * (tile - tile_ends[group] + _cdiv(local_sizes[group], block))
        x = lax.dynamic_slice_in_dim(padded, row, block)
        y = jnp.matmul(x, rhs[group], preferred_element_type=jnp.float32)
        if rhs_bias is not None:
            y += rhs_bias[group].astype(jnp.float32)
        if fuse_act is not None:
            y = _ACTIVATIONS[fuse_act](y[:, :width]) * y[:, width:]
        mine = (row + jnp.arange(block) < end)[:, None]
        old = lax.dynamic_slice_in_dim(out, row, block)
        return lax.dynamic_update_slice_in_dim(out, jnp.where(mine, y.astype(out.dtype), old), row, axis=0)

    out = jnp.zeros((rows + block, width), preferred_element_type or lhs.dtype)
    return lax.fori_loop(0, tile_ends[-1], tile_body, out)[:rows]


def gather_rows(
    x: jax.Array,
    indices: jax.Array,
    start: jax.Array,
    end: jax.Array,
    *,
    max_row_subchunks: int = 4,
    trim_rows: bool = True,
) -> jax.Array:
    """x[indices]: [rows, H], i32[M] -> [M, H].

    Contract: tpu-inference 0.32.0 kernels/sparse_core/ragged_gather_v2.py, `ragged_gather_v2`, which fills
    only the rows [start, end) of this shard's experts, leaves the others undefined, and may pad unless
    `trim_rows`.
    """
    del start, end, max_row_subchunks, trim_rows
    return x[indices]


def gather_reduce(
    x: jax.Array,
    indices: jax.Array,
    topk_weights: jax.Array,
    valid_rows_mask: jax.Array,
    reduce_group_size: int,
    tunable_params: Any = None,
) -> jax.Array:
    """Bring the experts' outputs back to their tokens: each token's weighted sum of `reduce_group_size` rows.

    Contract: tpu-inference 0.32.0 kernels/sparse_core/ragged_gather_reduce_v2.py, `ragged_gather_reduce`.

    Args:
        x: [rows, H], outputs sorted by expert.
        indices: i32[M], for each (token, choice) its row in x.
        topk_weights: [M].
        valid_rows_mask: bool[M]; rows of other shards' experts are left out, whatever they hold.
        reduce_group_size: choices per token.
        tunable_params: tuning of the TPU kernel, no meaning here.

    Returns:
        [M / reduce_group_size, H] in x's dtype, summed in float32.
    """
    del tunable_params
    weighted = x[indices].astype(jnp.float32) * topk_weights.astype(jnp.float32)[:, None]
    weighted = jnp.where(valid_rows_mask[:, None], weighted, 0.0)
    return weighted.reshape(-1, reduce_group_size, x.shape[1]).sum(axis=1).astype(x.dtype)


def dense_gather_reduce(
    x: jax.Array,
    indices: jax.Array,
    topk_weights: jax.Array,
    reduce_group_size: int,
    topk_wgt_zero_nan: bool = False,
) -> jax.Array:
    """`gather_reduce` of a shard that holds all experts.

    Contract: tpu-inference 0.32.0 kernels/sparse_core/dense_gather_reduce.py, `dense_gather_reduce`.

    Args:
        topk_weights: [tokens, reduce_group_size].
        topk_wgt_zero_nan: leave out rows with weight zero, which may hold nan.
    """
    weights = topk_weights.reshape(-1)
    valid = weights != 0.0 if topk_wgt_zero_nan else jnp.ones(weights.shape, bool)
    return gather_reduce(x, indices, weights, valid, reduce_group_size)


# ----------------------------------------------------------------------------
# Attention of the vision tower
# ----------------------------------------------------------------------------


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ab: jax.Array | None = None,
    segment_ids: Any = None,
    *,
    causal: bool = False,
    sm_scale: float = 1.0,
    block_sizes: Any = None,
    vmem_limit_bytes: int | None = None,
    debug: bool = False,
) -> jax.Array:
    """Attention without a cache.

    Contract: tpu-inference 0.32.0 kernels/flash_attention/kernel.py, `flash_attention`.

    Args:
        q: [B, N, Tq, D].
        k: [B, N, Tk, D].
        v: [B, N, Tk, D].
        ab: [B, N, Tq, Tk], added to the logits before they are scaled, as the kernel does.
        segment_ids: None or (q: i32[B, Tq], kv: i32[B, Tk]); only equal ids see each other.
        causal: query i sees keys 0 .. i.
        sm_scale: factor of the logits.
        block_sizes, vmem_limit_bytes, debug: tuning of the TPU kernel, no meaning here.

    Returns:
        [B, N, Tq, D] in q's dtype.
    """
    del block_sizes, vmem_limit_bytes, debug
    queries, keys = q.shape[2], k.shape[2]
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    block = min(queries, _KEY_BLOCK)
    blocks = math.ceil(queries / block)

    def rows(array: jax.Array, axis: int, start: jax.Array) -> jax.Array:
        # The last block is moved to the left instead of padded; it computes some rows twice.
        return lax.dynamic_slice_in_dim(array, start, block, axis)

    def attend(start: jax.Array) -> jax.Array:
        logits = jnp.einsum("bhqd,bhkd->bhqk", rows(q, 2, start).astype(jnp.float32), k)
        if ab is not None:
            logits += rows(ab, 2, start).astype(jnp.float32)
        logits *= sm_scale
        visible = jnp.ones((1, 1, 1, keys), bool)
        if segment_ids is not None:
            visible = (rows(segment_ids.q, 1, start)[:, :, None] == segment_ids.kv[:, None, :])[:, None]
        if causal:
            visible &= jnp.arange(keys) <= start + jnp.arange(block)[:, None]
        # Added, as in the kernel: a padding row that sees nothing gets a mean of all values, not nan.
        weights = jax.nn.softmax(logits + jnp.where(visible, 0.0, _LOWEST), axis=-1)
        return jnp.einsum("bhqk,bhkd->bhqd", weights, v).astype(q.dtype)

    starts = jnp.minimum(jnp.arange(blocks) * block, queries - block)
    return lax.fori_loop(
        0,
        blocks,
        lambda i, out: lax.dynamic_update_slice_in_dim(out, attend(starts[i]), starts[i], axis=2),
        jnp.zeros(q.shape, q.dtype),
    )


# ----------------------------------------------------------------------------
# Devices
# ----------------------------------------------------------------------------


def _require_cpu_devices(devices: Sequence[Any]) -> None:
    """Every worker passes here with its devices before anything is computed on them."""
    others = {device.platform for device in devices} - {"cpu"}
    if others:
        raise RuntimeError(
            f"the CPU reference kernels are installed, but JAX runs on {', '.join(sorted(others))}, where "
            "they must not run: start a new process without JAX_PLATFORMS=cpu."
        )


def make_mesh(
    axis_shapes: Sequence[int], axis_names: Sequence[str], *, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over the first CPU devices.

    Contract: tpu-inference 0.32.0 utils.py, `make_optimized_mesh`, which orders devices by their place in
    the TPU's torus.
    """
    available = list(jax.devices() if devices is None else devices)
    _require_cpu_devices(available)
    count = math.prod(axis_shapes)
    _require_devices(count, len(available))
    grid = np.array(available[:count]).reshape(axis_shapes)
    return Mesh(grid, axis_names, axis_types=(AxisType.Auto,) * len(axis_names))


def memory_usage(devices: Sequence[Any]) -> list[tuple[int, int]]:
    """(bytes in use, limit) of each device; together they hold KV caches of VLLM_CPU_KVCACHE_SPACE GiB.

    Contract: tpu-inference 0.32.0 utils.py, `hbm_usage_bytes`. JAX's CPU devices report no memory, and
    share one: what weights take is not counted, because nothing but the size of the KV cache is derived
    from these numbers.
    """
    devices = list(devices)
    _require_cpu_devices(devices)
    gib = int(os.environ.get("VLLM_CPU_KVCACHE_SPACE") or 0) or DEFAULT_KV_CACHE_GIB
    return [(0, gib * 2**30 // max(len(devices), 1))] * len(devices)


# ----------------------------------------------------------------------------
# Installation
# ----------------------------------------------------------------------------


def _unavailable(what: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{what} needs a TPU: tpu-inference's kernel has no CPU reference")

    return refuse


_KERNELS = "tpu_inference.kernels"
_LAYERS = "tpu_inference.layers.common"

# What `replace_kernels` replaces by its name: (module, function, what takes its place). The compiler options
# are empty because the CPU's compiler knows none of the xla_tpu_* ones; the jax.jit calls on the way of a
# plain model take theirs from these two functions.
REPLACEMENTS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("tpu_inference.utils", "make_optimized_mesh", make_mesh),
    ("tpu_inference.utils", "hbm_usage_bytes", memory_usage),
    ("tpu_inference.models.common.compiler_options", "get_step_fn_compiler_options", dict),
    ("tpu_inference.models.common.compiler_options", "get_sampling_compiler_options", dict),
    (f"{_KERNELS}.ragged_paged_attention.v3.kernel", "ragged_paged_attention", ragged_paged_attention),
    (
        f"{_KERNELS}.ragged_paged_attention.v3.kernel_hd64",
        "ragged_paged_attention_hd64",
        ragged_paged_attention_hd64,
    ),
    (f"{_KERNELS}.flash_attention.kernel", "flash_attention", flash_attention),
    (f"{_LAYERS}.attention_interface", "mla_ragged_paged_attention", _unavailable("MLA attention")),
    (
        f"{_LAYERS}.attention_interface",
        "encoder_only_flash_attention",
        _unavailable("encoder-only attention"),
    ),
    (f"{_LAYERS}.attention_interface", "dcp_forward", _unavailable("decode context parallelism")),
    (f"{_LAYERS}.attention_interface", "pcp_forward", _unavailable("prefill context parallelism")),
    (f"{_LAYERS}.fused_moe_gmm", "gmm_wrapper", grouped_matmul),
    (f"{_KERNELS}.sparse_core.ragged_gather_v2", "ragged_gather_v2", gather_rows),
    (f"{_KERNELS}.sparse_core.ragged_gather_reduce_v2", "ragged_gather_reduce", gather_reduce),
    (f"{_KERNELS}.sparse_core.dense_gather_reduce", "dense_gather_reduce", dense_gather_reduce),
)


def install() -> None:
    """Have vLLM's workers in this process run on the CPU with this module's functions.

    Meant for the plugin's `register()`, which vLLM calls in the user's process and in each process it starts.
    It imports no kernel and starts no JAX backend; `replace_kernels` does its work when a worker starts. A
    second call does nothing.

    Raises:
        RuntimeError: JAX is not told to run on the CPU, or tpu-inference is missing or of another version.
    """
    global _installed
    if _installed:
        return
    _require_cpu()
    _require_tpu_inference()
    prepare_cpu_environment()
    platform = importlib.import_module("tpu_inference.platforms.tpu_platform").TpuPlatform
    _extend(platform, "check_and_update_config", _check_device_count)
    # vLLM's hook for platforms that bring fallbacks for kernels: called in the worker's process, just before
    # the worker's class is imported (v1/worker/worker_base.py, init_worker).
    _extend(platform, "register_triton_kernel_overrides", replace_kernels)
    _installed = True


def replace_kernels() -> None:
    """Replace tpu-inference's functions in this process, and say so in one WARNING.

    `install` arranges for it. Only code that uses tpu-inference without a vLLM worker has to call it.
    """
    global _replaced
    if _replaced:
        return
    _require_cpu()
    for module, name, new in REPLACEMENTS:
        _replace(module, name, new)
    interface = importlib.import_module("tpu_inference.layers.common.attention_interface")
    sharded = _allow_hd64_sharing(interface.sharded_ragged_paged_attention)
    _replace(interface.__name__, "sharded_ragged_paged_attention", sharded)
    # Compiled with its compiler options when its module is imported, and that may have happened.
    sampling = importlib.import_module("tpu_inference.layers.jax.sample.sampling")
    sample = jax.jit(sampling.sample.__wrapped__, static_argnames=("mesh", "allow_distributed_sampling"))
    _replace(sampling.__name__, "sample", sample)
    _replaced = True
    logger.warning(
        "JAX runs on the CPU: TPU kernels are replaced by plain JAX reference code; right, but slow. "
        "For tests, not for serving."
    )


def _require_cpu() -> None:
    """Refuse any backend but the CPU without starting it; `_require_cpu_devices` sees what it became."""
    platforms = jax.config.jax_platforms or ""
    if platforms.split(",")[0] != "cpu":
        raise RuntimeError(
            f"the CPU reference kernels need JAX_PLATFORMS=cpu in the environment before jax is imported; "
            f"jax_platforms is {platforms!r}"
        )


def _require_tpu_inference() -> None:
    try:
        version = importlib.metadata.version("tpu-inference")
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError(
            "JAX_PLATFORMS=cpu needs tpu-inference; install the package's extra 'tpu' (vllm-tpu==0.32.0)"
        ) from None
    if version.split(".")[:2] != SUPPORTED_TPU_INFERENCE.split("."):
        raise RuntimeError(
            f"the CPU reference kernels replace functions of tpu-inference {SUPPORTED_TPU_INFERENCE}.x, but "
            f"{version} is installed. Install vllm-tpu==0.32.0, or run on a TPU."
        )


def _replace(module: str, name: str, new: Any) -> None:
    """Set module.name, and every copy that a `from module import name` made before."""
    old = getattr(importlib.import_module(module), name)
    for other in list(sys.modules.values()):
        if getattr(other, "__name__", "").partition(".")[0] == "tpu_inference":
            for attribute, value in list(vars(other).items()):
                if value is old:
                    setattr(other, attribute, new)


def _extend(owner: type, name: str, after: Callable[..., None]) -> None:
    """Make owner's class method also call `after` with its arguments."""
    original = getattr(owner, name).__func__

    @functools.wraps(original)
    def extended(cls: type, *args: Any, **kwargs: Any) -> Any:
        result = original(cls, *args, **kwargs)
        after(*args, **kwargs)
        return result

    setattr(owner, name, classmethod(extended))


def _check_device_count(vllm_config: Any) -> None:
    """Refuse in the user's process and at once, not a minute later in the log of the EngineCore."""
    if jax.distributed.is_initialized():
        # How many devices all processes have together is known when their backends have started.
        return
    _require_devices(vllm_config.sharding_config.total_devices, requested_devices())


def _allow_hd64_sharing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let layers with head_dim 64 share KV caches and see both ways, which the TPU's kernel for 64 cannot.

    Gemma 4 has head_dims of 256 and 512; small models made for tests have 64. Layout and sharding stay
    tpu-inference's: the wrapped function, which would refuse, is not told of the two options; the kernel it
    calls learns them from `_hd64_options`.
    """

    @functools.wraps(original)
    def sharded_ragged_paged_attention(
        mesh: Mesh,
        q: jax.Array,
        *args: Any,
        update_kv_cache: bool = True,
        use_causal_mask: bool = True,
        **kwargs: Any,
    ) -> Any:
        options = {"update_kv_cache": update_kv_cache, "use_causal_mask": use_causal_mask}
        if q.shape[-1] != 64:
            return original(mesh, q, *args, **options, **kwargs)
        with _setting(_hd64_options, options):
            return original(mesh, q, *args, **kwargs)

    return sharded_ragged_paged_attention


@contextlib.contextmanager
def _setting(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


# ----------------------------------------------------------------------------
# Small helpers
# ----------------------------------------------------------------------------


def _refuse(function: str, **arguments: Any) -> None:
    """Raise for arguments that would be ignored."""
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{function}: {name}={value!r} has no CPU reference")


def _cdiv(a: Any, b: int) -> Any:
    """a / b rounded up, for ints and for traced integers."""
    return -(-a // b)


def _round_up(value: int, multiple: int) -> int:
    return _cdiv(value, multiple) * multiple


def _pad_to(array: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Zeros after the end of each axis."""
    return jnp.pad(array, [(0, new - old) for new, old in zip(shape, array.shape, strict=True)])
