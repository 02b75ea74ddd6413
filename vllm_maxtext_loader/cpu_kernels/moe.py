"""The routed experts in plain JAX: grouped matmul, gather by expert, weighted sum per token."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from vllm_maxtext_loader.cpu_kernels.arguments import cdiv, pad_to, refuse

# Rows of one tile of the grouped matmul. Decoding sends a handful of rows to each expert.
_ROW_BLOCK = 32


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
    refuse("grouped_matmul", rhs_scale=rhs_scale)
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
    tile_ends = jnp.cumsum(cdiv(local_sizes, block))
    padded = pad_to(lhs, (rows + block, lhs.shape[1]))

    def tile_body(tile: jax.Array, out: jax.Array) -> jax.Array:
        group = jnp.searchsorted(tile_ends, tile, side="right")
        end = local_ends[group]
        row = end - local_sizes[group] + block * (tile - tile_ends[group] + cdiv(local_sizes[group], block))
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
