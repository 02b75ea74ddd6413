"""The CPU reference kernels against tpu-inference's own reference functions, or NumPy where it has none."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")

_SPEC = importlib.util.find_spec("tpu_inference")
if _SPEC is None or not _SPEC.submodule_search_locations:
    pytest.skip("tpu-inference is not installed", allow_module_level=True)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from vllm_maxtext_loader import cpu_kernels  # noqa: E402
from vllm_maxtext_loader.cpu_kernels import attention, devices, install, moe  # noqa: E402

TPU_INFERENCE = Path(_SPEC.submodule_search_locations[0])


@contextmanager
def bare_tpu_inference() -> Iterator[None]:
    """Let tpu_inference's kernels be imported without its __init__, which imports all of vLLM (20 s)."""
    if "tpu_inference" in sys.modules:
        yield
        return
    package, log, utils = (ModuleType(f"tpu_inference{part}") for part in ("", ".logger", ".utils"))
    vars(package).update(__path__=[str(TPU_INFERENCE)])
    vars(log).update(init_logger=logging.getLogger)
    vars(utils).update(align_to=None, get_device_name=None)  # imported by name, not called
    sys.modules.update({module.__name__: module for module in (package, log, utils)})
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "tpu_inference"]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def theirs() -> SimpleNamespace:
    """tpu-inference's kernel modules, whose reference functions are plain JAX."""
    names = {
        "rpa": "ragged_paged_attention.v3.kernel",
        "hd64": "ragged_paged_attention.v3.kernel_hd64",
        "flash": "flash_attention.kernel",
        "dense": "sparse_core.dense_gather_reduce",
        "ragged": "sparse_core.ragged_gather_reduce_v2",
    }
    with bare_tpu_inference():
        return SimpleNamespace(
            **{key: importlib.import_module(f"tpu_inference.kernels.{name}") for key, name in names.items()}
        )


# ----------------------------------------------------------------------------
# Ragged paged attention
# ----------------------------------------------------------------------------

# (new tokens, tokens in all): decoding, a prompt over several pages, a chunk of a prompt.
BATCH = [(1, 38), (45, 45), (7, 50)]


def make_batch(
    get_cache_shape: Any,
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 128,
    dtype: Any = jnp.float32,
    cache_dtype: Any = None,
    page_size: int = 16,
    sequences: list[tuple[int, int]] = BATCH,
    padding: int = 9,
) -> dict[str, Any]:
    """Arguments of the kernels: random, nan in the cache slots and batch rows that must not be read."""
    rng = np.random.default_rng(0)
    cache_dtype = cache_dtype or dtype
    tokens = sum(new for new, _ in sequences) + padding
    slots = len(sequences) + 2
    per_sequence = max(-(-total // page_size) for _, total in sequences) + 1
    pages = slots * per_sequence + 3

    page_table = rng.permutation(pages)[: slots * per_sequence].reshape(slots, per_sequence)
    shape = get_cache_shape(pages, page_size, heads[1], head_dim, cache_dtype)
    cache = np.full(shape, np.nan, np.float32)
    for pages_of, (new, total) in zip(page_table, sequences, strict=False):
        for position in range(total - new):
            page, offset = pages_of[position // page_size], position % page_size
            cache[page, offset] = rng.normal(size=shape[2:])
    # What the kernels may find beyond the last sequence: old numbers, in no order.
    starts = np.full(slots + 1, 3, np.int32)
    starts[: len(sequences) + 1] = np.cumsum([0] + [new for new, _ in sequences])
    lengths = np.full(slots, 7, np.int32)
    lengths[: len(sequences)] = [total for _, total in sequences]

    def rows(count: int, kind: Any) -> jax.Array:
        values = rng.normal(size=(tokens, count, head_dim))
        values[tokens - padding :] = np.nan
        return jnp.asarray(values, jnp.float32).astype(kind)

    return {
        "queries": rows(heads[0], dtype),
        "keys": rows(heads[1], cache_dtype),
        "values": rows(heads[1], cache_dtype),
        "kv_cache": jnp.asarray(cache).astype(cache_dtype),
        # NumPy: constants when the reference is compiled.
        "kv_lens": lengths,
        "page_indices": page_table.reshape(-1).astype(np.int32),
        "cu_q_lens": starts,
        "distribution": np.asarray([0, 0, len(sequences)], np.int32),
    }


def run(kernel: Any, batch: dict[str, Any], *more: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    out, cache = jax.jit(lambda *arrays: kernel(*arrays, **options))(*batch.values(), *more)
    return np.asarray(out.astype(jnp.float32)), np.asarray(cache.astype(jnp.float32))


def run_theirs(reference: Any, batch: dict[str, Any], *more: Any, **options: Any) -> Any:
    """tpu-inference's reference loops over the sequences in Python: one compilation instead of hundreds."""
    arrays, indices = list(batch.values())[:4], list(batch.values())[4:]
    return jax.jit(lambda *traced: reference(*traced, *indices, *more, **options))(*arrays)


def check_against(reference: Any, batch: dict[str, Any], out: Any, cache: Any, tolerance: float) -> None:
    expected, expected_cache = reference
    used = expected.shape[0]
    np.testing.assert_allclose(out[:used], np.asarray(expected, np.float32), atol=tolerance, rtol=tolerance)
    assert not out[used:].any(), "rows of no sequence must be zero, not nan"
    np.testing.assert_array_equal(cache, np.asarray(expected_cache.astype(jnp.float32)))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        pytest.param({"heads": (8, 1)}, {}, id="plain"),
        pytest.param({"heads": (3, 3), "head_dim": 32}, {"sm_scale": 0.3}, id="no groups, head_dim padded"),
        pytest.param({"head_dim": 256, "page_size": 32}, {"sliding_window": 5, "sm_scale": 0.1}, id="window"),
        pytest.param({"head_dim": 72}, {"sliding_window": 1, "soft_cap": 3.0}, id="window of one, soft cap"),
        pytest.param({}, {"use_causal_mask": False, "sm_scale": 0.1}, id="both ways"),
        pytest.param({"sequences": [(150, 400), (1, 300)], "page_size": 8}, {"sm_scale": 0.1}, id="long"),
        pytest.param({"sequences": [(40, 600)]}, {"sliding_window": 300, "sm_scale": 0.1}, id="long, window"),
        pytest.param({"dtype": jnp.bfloat16, "heads": (6, 3)}, {"sm_scale": 0.1}, id="bfloat16"),
    ],
)
def test_ragged_paged_attention(theirs: Any, shape: dict[str, Any], options: dict[str, Any]) -> None:
    batch = make_batch(theirs.rpa.get_kv_cache_shape, **shape)
    expected = run_theirs(theirs.rpa.ref_ragged_paged_attention, batch, **options)
    out, cache = run(attention.ragged_paged_attention, batch, **options)
    tolerance = 0.03 if batch["queries"].dtype == jnp.bfloat16 else 1e-4
    check_against(expected, batch, out, cache, tolerance)


@pytest.mark.parametrize(
    ("dtype", "options", "sink"),
    [
        (jnp.float32, {"sm_scale": 0.2, "sliding_window": 9, "soft_cap": 2.0}, True),
        (jnp.bfloat16, {"sm_scale": 0.2}, False),
    ],
)
def test_ragged_paged_attention_hd64(theirs: Any, dtype: Any, options: dict[str, Any], sink: bool) -> None:
    batch = make_batch(theirs.hd64.get_kv_cache_shape, head_dim=64, dtype=dtype, heads=(6, 3))
    sinks = [jnp.linspace(-1.0, 2.0, 6)] if sink else []
    expected = run_theirs(theirs.hd64.ref_ragged_paged_attention_hd64, batch, *sinks, **options)
    out, cache = run(attention.ragged_paged_attention_hd64, batch, *sinks, **options)
    check_against(expected, batch, out, cache, 0.03 if dtype == jnp.bfloat16 else 1e-4)


def test_quantized_cache(theirs: Any) -> None:
    batch = make_batch(
        theirs.rpa.get_kv_cache_shape, dtype=jnp.bfloat16, cache_dtype=jnp.float8_e5m2, heads=(4, 1)
    )
    options = {"sm_scale": 0.1, "k_scale": 0.5, "v_scale": 3.0}
    out, cache = run(attention.ragged_paged_attention, batch, **options)
    # The reference multiplies in the cache's 8 bits; wider copies of the same numbers are what is wanted.
    wide = {**batch, **{name: batch[name].astype(jnp.float32) for name in ("queries", "keys", "values")}}
    wide["kv_cache"] = jnp.zeros(
        theirs.rpa.get_kv_cache_shape(batch["kv_cache"].shape[0], 16, 1, 128, jnp.float32)
    )
    wide["kv_cache"] = batch["kv_cache"][:, :, :, :2].reshape(wide["kv_cache"].shape).astype(jnp.float32)
    expected, expected_cache = run_theirs(theirs.rpa.ref_ragged_paged_attention, wide, **options)
    np.testing.assert_allclose(out[: len(expected)], np.asarray(expected), atol=0.03, rtol=0.03)
    np.testing.assert_array_equal(
        cache[:, :, 0, :2].reshape(expected_cache.shape), np.asarray(expected_cache)
    )


@pytest.mark.parametrize("head_dim", [64, 128])
def test_kv_shared_layer_reads_what_another_layer_wrote(theirs: Any, head_dim: int) -> None:
    hd64 = head_dim == 64
    batch = make_batch((theirs.hd64 if hd64 else theirs.rpa).get_kv_cache_shape, head_dim=head_dim)
    kernel = attention.ragged_paged_attention_hd64 if hd64 else attention.ragged_paged_attention
    expected, written = run(kernel, batch)
    shared = {
        **batch,
        "kv_cache": jnp.asarray(written),
        "keys": batch["keys"] * 0,
        "values": batch["values"] * 0,
    }
    if hd64:
        # As the installed sharded_ragged_paged_attention does it: the 64 kernel has no such argument.
        wrapped = install.allow_hd64_sharing(lambda _, *arrays: kernel(*arrays))
        out, cache = run(lambda *arrays: wrapped(None, *arrays, update_kv_cache=False), shared)
    else:
        out, cache = run(kernel, shared, update_kv_cache=False)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(cache, written)


def test_window_without_causal_mask(theirs: Any) -> None:
    """The reference ignores the window here, the kernel bounds it to the left only."""
    batch = make_batch(theirs.rpa.get_kv_cache_shape, sequences=[(20, 20)], heads=(1, 1), padding=0)
    out, _ = run(attention.ragged_paged_attention, batch, sliding_window=4, use_causal_mask=False)
    q, k, v = (np.asarray(batch[name])[:, 0] for name in ("queries", "keys", "values"))
    logits = q @ k.T
    logits[np.arange(20)[:, None] >= np.arange(20) + 4] = -np.inf
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(out[:, 0], weights / weights.sum(axis=1, keepdims=True) @ v, atol=1e-4)


def test_one_batch_without_sequences(theirs: Any) -> None:
    batch = make_batch(theirs.rpa.get_kv_cache_shape)
    batch["distribution"] = np.zeros(3, np.int32)
    out, cache = run(attention.ragged_paged_attention, batch)
    assert not out.any()
    np.testing.assert_array_equal(cache, np.asarray(batch["kv_cache"]))


def test_attention_memory_does_not_grow_with_the_context(theirs: Any) -> None:
    """256 Ki tokens of context in 16 slots of a global layer: 16 GiB if all pages were gathered."""
    slots, page_size = 16, 64
    shapes = {
        "queries": ((64, 16, 512), jnp.bfloat16),
        "keys": ((64, 2, 512), jnp.bfloat16),
        "values": ((64, 2, 512), jnp.bfloat16),
        "kv_cache": (theirs.rpa.get_kv_cache_shape(1000, page_size, 2, 512, jnp.bfloat16), jnp.bfloat16),
        "kv_lens": ((slots,), jnp.int32),
        "page_indices": ((slots * 262144 // page_size,), jnp.int32),
        "cu_q_lens": ((slots + 1,), jnp.int32),
        "distribution": ((3,), jnp.int32),
    }
    step = jax.jit(attention.ragged_paged_attention, donate_argnums=3)
    memory = step.lower(*(jax.ShapeDtypeStruct(*s) for s in shapes.values())).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 32 * 2**20


def test_attention_refuses_what_it_does_not_compute(theirs: Any) -> None:
    batch = make_batch(theirs.rpa.get_kv_cache_shape)
    for option in ({"mask_value": -1.0}, {"q_scale": 2.0}, {"out_dtype": jnp.bfloat16}):
        with pytest.raises(NotImplementedError, match=next(iter(option))):
            attention.ragged_paged_attention(*batch.values(), **option)
    with pytest.raises(TypeError, match="decode_query_size"):
        attention.ragged_paged_attention(*batch.values(), decode_query_size=2)  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match="kv_cache has rows"):
        attention.ragged_paged_attention_hd64(*batch.values())
    with pytest.raises(ValueError, match="kv_cache is float32"):
        attention.ragged_paged_attention(*{**batch, "keys": batch["keys"].astype(jnp.bfloat16)}.values())


# ----------------------------------------------------------------------------
# Mixture of experts
# ----------------------------------------------------------------------------


def grouped_matmul_numpy(
    lhs: Any, rhs: Any, bias: Any, sizes: Any, offset: int, act: str | None
) -> np.ndarray:
    lhs, rhs = (np.asarray(array.astype(jnp.float32)) for array in (lhs, rhs))
    out = np.zeros((lhs.shape[0], rhs.shape[2]), np.float32)
    ends = np.cumsum(sizes)
    for group in range(rhs.shape[0]):
        rows = slice(ends[group + offset] - sizes[group + offset], ends[group + offset])
        out[rows] = lhs[rows] @ rhs[group] + (0 if bias is None else np.asarray(bias)[group])
    if act is None:
        return out
    gate, up = np.split(out, 2, axis=1)
    if act == "silu":
        return gate / (1 + np.exp(-gate)) * up
    return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up


@pytest.mark.parametrize(
    ("dtype", "sizes", "offset", "groups", "act", "bias"),
    [
        (jnp.float32, [5, 0, 70, 1, 0, 14], 0, 6, None, False),
        (jnp.bfloat16, [5, 0, 70, 1, 0, 14], 0, 6, "gelu", True),
        (jnp.bfloat16, [5, 0, 70, 1, 0, 14], 2, 2, "silu", False),
        (jnp.float32, [5, 0, 70, 1, 0, 14], 3, 3, "gelu_tanh", True),
        (jnp.float32, [0, 0, 0, 90], 0, 2, None, True),
        (jnp.float32, [90, 0, 0, 0], 0, 4, "silu", False),
        (jnp.bfloat16, [3, 3, 3, 3], 1, 2, None, True),
    ],
)
def test_grouped_matmul(dtype: Any, sizes: list[int], offset: int, groups: int, act: Any, bias: bool) -> None:
    rng = np.random.default_rng(0)
    lhs = rng.normal(size=(100, 24))
    lhs[sum(sizes) :] = np.nan  # rows past the last group
    lhs = jnp.asarray(lhs).astype(dtype)
    rhs = jnp.asarray(rng.normal(size=(groups, 24, 16)) / 5).astype(dtype)
    rhs_bias = jnp.asarray(rng.normal(size=(groups, 1, 16)), jnp.float32) if bias else None
    out = jax.jit(moe.grouped_matmul, static_argnums=6)(
        lhs, rhs, None, rhs_bias, jnp.asarray(sizes, jnp.int32), jnp.asarray([offset], jnp.int32), act
    )
    assert out.dtype == dtype
    expected = grouped_matmul_numpy(lhs, rhs, rhs_bias, np.asarray(sizes), offset, act)
    ends = np.cumsum(sizes)
    mine = np.zeros(100, bool)
    mine[ends[offset] - sizes[offset] : ends[offset + groups - 1]] = True
    out = np.asarray(out.astype(jnp.float32))
    tolerance = 0.02 if dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(out[mine], expected[mine], atol=tolerance, rtol=tolerance)
    assert not out[~mine].any()


def test_grouped_matmul_result_type() -> None:
    ones = jnp.ones((4, 4), jnp.bfloat16)
    call = (ones, ones[None], None, None, jnp.asarray([4]), jnp.asarray([0]))
    assert moe.grouped_matmul(*call, preferred_element_type=jnp.float32).dtype == jnp.float32


def test_grouped_matmul_memory_is_that_of_one_expert() -> None:
    """Gemma 4 26B: 128 experts of [2816, 1408], 8 for each of 128 tokens: 8 GiB if gathered per row."""
    shapes = [
        ((1024, 2816), jnp.bfloat16),
        ((128, 2816, 1408), jnp.bfloat16),
        ((128,), jnp.int32),
        ((1,), jnp.int32),
    ]
    function = jax.jit(
        lambda x, w, sizes, offset: moe.grouped_matmul(x, w, None, None, sizes, offset, "gelu")
    )
    memory = function.lower(*(jax.ShapeDtypeStruct(*s) for s in shapes)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8 * 2816 * 1408 * 4


def test_grouped_matmul_refuses_what_it_does_not_compute() -> None:
    ones = jnp.ones((4, 4))
    call = {"group_sizes": jnp.asarray([4]), "group_offset": jnp.asarray([0])}
    with pytest.raises(NotImplementedError, match="rhs_scale"):
        moe.grouped_matmul(ones, ones[None], ones, None, **call)
    with pytest.raises(NotImplementedError, match="swigluoai"):
        moe.grouped_matmul(ones, ones[None], None, None, **call, fuse_act="swigluoai")


def test_gather_reduce(theirs: Any) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(24, 16))
    x[20:] = np.nan  # rows of another shard's experts
    x = jnp.asarray(x).astype(jnp.bfloat16)
    indices = jnp.asarray(rng.permutation(24), jnp.int32)
    weights = jnp.asarray(rng.random(24), jnp.float32)
    valid = indices < 20
    expected = theirs.ragged._fallback_implementation(x, indices, weights, valid, 3)
    out = moe.gather_reduce(x, indices, weights, valid, 3)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, expected)

    weights = jnp.where(valid, weights, 0.0).reshape(8, 3)
    expected = theirs.dense._jax_fallback(x, indices, weights, 3, topk_wgt_zero_nan=True)
    np.testing.assert_array_equal(moe.dense_gather_reduce(x, indices, weights, 3, True), expected)
    finite = jnp.nan_to_num(x)
    expected = theirs.dense._jax_fallback(finite, indices, weights, 3)
    np.testing.assert_array_equal(moe.dense_gather_reduce(finite, indices, weights, 3), expected)


def test_gather_rows() -> None:
    x = jnp.arange(12.0).reshape(4, 3)
    out = moe.gather_rows(x, jnp.asarray([2, 0, 2]), jnp.asarray(0), jnp.asarray(3), trim_rows=False)
    np.testing.assert_array_equal(out, np.asarray(x)[[2, 0, 2]])


# ----------------------------------------------------------------------------
# Attention of the vision tower
# ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "causal", "bias", "segments"),
    [(20, False, True, False), (300, False, False, True), (300, True, True, True), (512, True, False, False)],
)
def test_flash_attention(theirs: Any, length: int, causal: bool, bias: bool, segments: bool) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 3, length, 16)), jnp.float32) for _ in range(3))
    ab = jnp.asarray(rng.normal(size=(2, 3, length, length)), jnp.float32) if bias else None
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (2, length))), jnp.int32)
    segment_ids = theirs.flash.SegmentIds(q=ids, kv=ids) if segments else None
    options = {"causal": causal, "sm_scale": 0.4}
    expected = theirs.flash.mha_reference_no_custom_vjp(q, k, v, ab, segment_ids, **options)
    out = jax.jit(lambda *arrays: attention.flash_attention(*arrays, **options))(q, k, v, ab, segment_ids)
    np.testing.assert_allclose(out, expected, atol=1e-5)


# ----------------------------------------------------------------------------
# Several devices
# ----------------------------------------------------------------------------


def sharded() -> None:
    """What `test_under_shard_map` runs in a process of its own, where JAX has four devices."""
    spec = jax.sharding.PartitionSpec
    assert devices.requested_devices() == 4 == len(jax.devices())
    mesh = devices.make_mesh((1, 4), ("data", "model"))
    with pytest.raises(RuntimeError, match="--xla_force_host_platform_device_count=8"):
        devices.make_mesh((2, 4), ("data", "model"))
    rng = np.random.default_rng(0)

    # Two of the experts on each device.
    x = jnp.asarray(rng.normal(size=(50, 8)), jnp.float32)
    experts = jnp.asarray(rng.normal(size=(8, 8, 6)), jnp.float32)
    sizes = jnp.asarray([9, 0, 20, 1, 0, 0, 10, 10], jnp.int32)

    def local_experts(x: jax.Array, experts: jax.Array, offset: jax.Array) -> jax.Array:
        out = moe.grouped_matmul(x, experts, None, None, sizes, offset)
        return jax.lax.psum(out, "model")

    specs = (spec(), spec("model"), spec("model"))
    split = jax.shard_map(local_experts, mesh=mesh, in_specs=specs, out_specs=spec(), check_vma=False)
    expected = grouped_matmul_numpy(x, experts, None, np.asarray(sizes), 0, None)
    np.testing.assert_allclose(jax.jit(split)(x, experts, jnp.arange(0, 8, 2)), expected, atol=1e-5)

    # Two of the heads on each device.
    q, k, v = (jnp.asarray(rng.normal(size=(12, 8, 128)), jnp.float32) for _ in range(3))
    pages = [jnp.asarray(a, jnp.int32) for a in ([12], [3, 1], [0, 12], [0, 0, 1])]
    arguments = (q, k, v, jnp.zeros((5, 8, 16, 1, 128)), *pages)
    specs = (spec(None, "model"),) * 3 + (spec(None, None, "model"),) + (spec(),) * 4
    kernel = attention.ragged_paged_attention
    split = jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=specs[2:4], check_vma=False)
    for ours, whole in zip(jax.jit(split)(*arguments), jax.jit(kernel)(*arguments), strict=True):
        np.testing.assert_allclose(ours, whole, atol=1e-5)


def test_under_shard_map() -> None:
    flags = "--xla_force_host_platform_device_count=4"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, __file__]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr


def test_other_devices_are_refused() -> None:
    with pytest.raises(RuntimeError, match="runs on tpu"):
        devices.make_mesh((1,), ("model",), devices=[SimpleNamespace(platform="tpu")])
    with pytest.raises(RuntimeError, match="runs on tpu"):
        devices.memory_usage([SimpleNamespace(platform="cpu"), SimpleNamespace(platform="tpu")])


def test_requested_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.jax, "config", SimpleNamespace(jax_num_cpu_devices=-1))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert devices.requested_devices() == 1
    flag = "--xla_force_host_platform_device_count"
    monkeypatch.setenv("XLA_FLAGS", f"--xla_cpu_max_isa=AVX2 {flag}=2 {flag}=8")
    assert devices.requested_devices() == 8
    monkeypatch.setattr(devices.jax, "config", SimpleNamespace(jax_num_cpu_devices=3))
    assert devices.requested_devices() == 3


@pytest.mark.parametrize(("setting", "gib"), [(None, devices.DEFAULT_KV_CACHE_GIB), ("4", 4)])
def test_memory_is_shared_by_the_devices(
    monkeypatch: pytest.MonkeyPatch, setting: str | None, gib: int
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    if setting:
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", setting)
    usage = devices.memory_usage([SimpleNamespace(platform="cpu")] * 2)
    assert usage == [(0, gib * 2**29)] * 2
    assert devices.memory_usage([]) == []


def test_arrays_on_the_device_share_no_memory_with_the_host() -> None:
    def device_array(mesh: Any, *args: Any, sharding: Any = None) -> Any:
        return jax.device_put(*args, sharding)

    mesh = devices.make_mesh((1,), ("model",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    memory = np.zeros(4096, np.uint8)
    aligned = memory[-memory.ctypes.data % 64 :][:1024].view(np.int32)
    for put, seen in ((device_array, 7), (devices.copying(device_array), 0)):
        aligned[:] = 0
        one, (two, nothing) = (put(mesh, tree, sharding=sharding) for tree in (aligned, (aligned, None)))
        aligned[:] = 7
        assert nothing is None
        for array in (one, two):
            assert array.sharding == sharding
            np.testing.assert_array_equal(array, np.full(256, seen))


# ----------------------------------------------------------------------------
# Installation
# ----------------------------------------------------------------------------


def test_environment_keeps_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cpu_kernels.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SKIP_JAX_PRECOMPILE", "0")
    cpu_kernels.prepare_environment()
    assert os.environ["SKIP_JAX_PRECOMPILE"] == "0"
    assert os.environ["TPU_SKIP_MDS_QUERY"] == "1"


@pytest.mark.parametrize("platforms", [None, "", "tpu", "tpu,cpu", "proxy,cpu"])
def test_install_refuses_another_backend(monkeypatch: pytest.MonkeyPatch, platforms: str | None) -> None:
    monkeypatch.setattr(jax, "config", SimpleNamespace(jax_platforms=platforms))
    with pytest.raises(RuntimeError, match="JAX_PLATFORMS=cpu"):
        install.install(ModuleType("tpu_inference.platforms.tpu_platform"))


@pytest.mark.parametrize(
    ("platforms", "switch", "wanted"),
    [
        ("cpu", None, True),
        ("CPU", "1", True),
        ("cpu", "0", False),
        ("cpu", "false", False),
        (None, None, False),
        ("tpu,cpu", None, False),
    ],
)
def test_kernels_can_be_turned_off(
    monkeypatch: pytest.MonkeyPatch, platforms: str | None, switch: str | None, wanted: bool
) -> None:
    for name, value in (("JAX_PLATFORMS", platforms), (cpu_kernels.SWITCH_VARIABLE, switch)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert cpu_kernels.are_wanted() == wanted


def test_everything_to_replace_exists() -> None:
    """Read from the sources: importing these modules takes half a minute."""
    pairs = [entry[:2] for entry in (*install.REPLACEMENTS, *install.UNAVAILABLE)]
    wanted = {(module, name) for module, name in pairs} | {
        ("tpu_inference.layers.common.attention_interface", "sharded_ragged_paged_attention"),
        ("tpu_inference.utils", "device_array"),
        ("tpu_inference.layers.jax.sample.sampling", "sample"),
        ("tpu_inference.spec_decode.jax.eagle3", "Eagle3Proposer"),
        ("tpu_inference.spec_decode.jax.eagle3", "_propose"),
        ("tpu_inference.platforms.tpu_platform", "TpuPlatform"),
    }
    for module, name in wanted:
        source = TPU_INFERENCE.joinpath(*module.split(".")[1:]).with_suffix(".py").read_text()
        names = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.ImportFrom):
                names |= {alias.asname or alias.name for alias in node.names}
        assert name in names, f"{module} has no {name}"


def test_replace_reaches_earlier_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    def old() -> None: ...

    origin, copy, stranger = (
        SimpleNamespace(__name__=name, f=old)
        for name in ("tpu_inference.origin", "tpu_inference.copy", "other")
    )
    for module in (origin, copy, stranger):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    copy.alias = old
    install.replace("tpu_inference.origin", "f", "new")
    assert (origin.f, copy.f, copy.alias, stranger.f) == ("new", "new", "new", old)


def test_install_extends_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a platform of our own: the real one takes all of vLLM with it."""
    calls = []

    class Platform:
        @classmethod
        def check_and_update_config(cls, vllm_config: Any) -> None:
            calls.append(vllm_config)

        @classmethod
        def register_triton_kernel_overrides(cls) -> str:
            return "theirs"

    module = SimpleNamespace(TpuPlatform=Platform)
    monkeypatch.setattr(devices, "requested_devices", lambda: 2)
    monkeypatch.setattr(install, "replace_kernels", lambda: calls.append("ours"))
    install.install(module)  # type: ignore[arg-type]

    config = SimpleNamespace(sharding_config=SimpleNamespace(total_devices=2))
    Platform.check_and_update_config(config)
    assert calls == [config]
    config.sharding_config.total_devices = 4
    with pytest.raises(RuntimeError, match="--xla_force_host_platform_device_count=4"):
        Platform().check_and_update_config(vllm_config=config)

    calls.clear()
    assert Platform().register_triton_kernel_overrides() == "theirs"
    assert calls == ["ours"]


def test_platform_that_lacks_a_method_stays_as_it_was() -> None:
    class Platform:
        @classmethod
        def check_and_update_config(cls, vllm_config: Any) -> None: ...

    before = dict(vars(Platform))
    with pytest.raises(AttributeError, match="register_triton_kernel_overrides"):
        install.install(SimpleNamespace(TpuPlatform=Platform))  # type: ignore[arg-type]
    assert dict(vars(Platform)) == before


if __name__ == "__main__":
    sharded()
