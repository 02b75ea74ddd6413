"""Attention in plain JAX: over a paged KV cache (decoder) and without a cache (vision tower)."""

from __future__ import annotations

import math
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from vllm_maxtext_loader.cpu_kernels.arguments import cdiv, pad_to, refuse, round_up

# Attention runs in blocks of queries and keys: its memory must not grow with max_model_len.
_QUERY_BLOCK = 32
_KEY_BLOCK = 256
# Stands for minus infinity where a difference of two of them would be nan.
_LOWEST = -1e30


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
    refuse("ragged_paged_attention", mask_value=mask_value, q_scale=q_scale)
    if out_dtype is not None and jnp.dtype(out_dtype) not in (queries.dtype, jnp.dtype(jnp.float32)):
        refuse("ragged_paged_attention", out_dtype=out_dtype)
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


# Options of the layer being traced that tpu-inference has no way to pass on, see install.allow_hd64_sharing.
hd64_options: ContextVar[dict[str, bool] | None] = ContextVar("hd64_options", default=None)


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
    refuse("ragged_paged_attention_hd64", mask_value=mask_value, q_scale=q_scale)
    options = {"use_causal_mask": True, "update_kv_cache": True, **(hd64_options.get() or {})}
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
        return math.ceil(2 * heads / packing), packing, round_up(head_dim, 128)

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
        rows = pad_to(layout.pack(keys, values), (tokens, math.prod(kv_cache.shape[2:4]), kv_cache.shape[4]))
        page, offset = _token_slots(tokens, page_table, page_size, kv_lens, cu_q_lens, sequences, pages)
        # Tokens of no sequence have the page index `pages`, one past the end: their write is dropped.
        kv_cache = kv_cache.at[page, offset].set(rows.reshape(tokens, *kv_cache.shape[2:]), mode="drop")

    block_q = min(tokens, _QUERY_BLOCK)
    block_pages = min(page_table.shape[1], math.ceil(_KEY_BLOCK / page_size))
    block_k = block_pages * page_size
    logit_scale = sm_scale * (1.0 if k_scale is None else k_scale)
    # Blocks of rows start at any token; padding keeps JAX from moving the last one to the left.
    grouped = pad_to(queries, (tokens + block_q, query_heads, head_dim))
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
        _, weight, acc = lax.fori_loop(first, cdiv(last, block_k), key_block, (highest, weight, acc))
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

        return lax.fori_loop(0, cdiv(q_len, block_q), query_block, out)

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
