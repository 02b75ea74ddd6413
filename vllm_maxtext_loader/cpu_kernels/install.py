"""Puts the kernels of this package in place of tpu-inference's. Written against tpu-inference 0.32.0.

Replaced are the Pallas kernels on the way of a plain decoder (ragged paged attention, grouped matmul, the
SparseCore gathers, flash attention), TPU compiler options, the device mesh, the memory statistics, and the
transfer of a step's inputs. Kernels of other models (MLA, context parallelism) are not replaced: they fail
on the CPU, they do not compute something else.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any

logger = logging.getLogger("vllm." + __name__)

_KERNELS = "tpu_inference.kernels"
_LAYERS = "tpu_inference.layers.common"
_OURS = "vllm_maxtext_loader.cpu_kernels"

REPLACEMENTS: tuple[tuple[str, str, str, str], ...] = (
    ("tpu_inference.utils", "make_optimized_mesh", f"{_OURS}.devices", "make_mesh"),
    ("tpu_inference.utils", "hbm_usage_bytes", f"{_OURS}.devices", "memory_usage"),
    # Empty: the CPU's compiler knows none of the xla_tpu_* options.
    ("tpu_inference.models.common.compiler_options", "get_step_fn_compiler_options", "builtins", "dict"),
    ("tpu_inference.models.common.compiler_options", "get_sampling_compiler_options", "builtins", "dict"),
    (
        f"{_KERNELS}.ragged_paged_attention.v3.kernel",
        "ragged_paged_attention",
        f"{_OURS}.attention",
        "ragged_paged_attention",
    ),
    (
        f"{_KERNELS}.ragged_paged_attention.v3.kernel_hd64",
        "ragged_paged_attention_hd64",
        f"{_OURS}.attention",
        "ragged_paged_attention_hd64",
    ),
    (f"{_KERNELS}.flash_attention.kernel", "flash_attention", f"{_OURS}.attention", "flash_attention"),
    (f"{_LAYERS}.fused_moe_gmm", "gmm_wrapper", f"{_OURS}.moe", "grouped_matmul"),
    (f"{_KERNELS}.sparse_core.ragged_gather_v2", "ragged_gather_v2", f"{_OURS}.moe", "gather_rows"),
    (
        f"{_KERNELS}.sparse_core.ragged_gather_reduce_v2",
        "ragged_gather_reduce",
        f"{_OURS}.moe",
        "gather_reduce",
    ),
    (
        f"{_KERNELS}.sparse_core.dense_gather_reduce",
        "dense_gather_reduce",
        f"{_OURS}.moe",
        "dense_gather_reduce",
    ),
)
"""tpu-inference's module and function, and the module and function of what takes its place."""

UNAVAILABLE: tuple[tuple[str, str, str], ...] = (
    (f"{_LAYERS}.attention_interface", "mla_ragged_paged_attention", "MLA attention"),
    (f"{_LAYERS}.attention_interface", "encoder_only_flash_attention", "encoder-only attention"),
    (f"{_LAYERS}.attention_interface", "dcp_forward", "decode context parallelism"),
    (f"{_LAYERS}.attention_interface", "pcp_forward", "prefill context parallelism"),
)
"""tpu-inference's module and function without a reference kernel, and what it is for."""

_replaced = False
_undo: list[tuple[Any, str, Any]] = []
"""What was put in place, the name it was put under, and what it took the place of."""


def install(module: ModuleType) -> None:
    """Arranges that vLLM's workers in this process run on the CPU with this package's kernels.

    It imports no kernel and starts no JAX backend; `replace_kernels` does its work when a worker starts.

    Args:
        module: tpu_inference.platforms.tpu_platform.

    Raises:
        RuntimeError: JAX was configured for another backend than the CPU.
        AttributeError: the platform lacks a method that is extended; nothing has been changed then.
    """
    require_cpu()
    platform = module.TpuPlatform
    extended = {
        "check_and_update_config": _extended(platform, "check_and_update_config", check_device_count),
        # vLLM's hook for platforms that bring fallbacks for kernels: called in the worker's process, just before
        # the worker's class is imported (v1/worker/worker_base.py, init_worker).
        "register_triton_kernel_overrides": _extended(
            platform, "register_triton_kernel_overrides", replace_kernels
        ),
    }
    for name, method in extended.items():
        setattr(platform, name, method)


def replace_kernels() -> None:
    """Replaces tpu-inference's functions in this process, and says so in one WARNING.

    `install` arranges for it. Only code that uses tpu-inference without a vLLM worker has to call it. What this
    tpu-inference does not have is named in one error, and the rest is replaced: it may not be needed.
    """
    global _replaced
    if _replaced:
        return
    require_cpu()
    from vllm_maxtext_loader.cpu_kernels.devices import copying

    missing: list[str] = []
    for module, name, source, function in REPLACEMENTS:
        _try_replace(
            module, name, lambda _, s=source, f=function: getattr(importlib.import_module(s), f), missing
        )
    for module, name, what in UNAVAILABLE:
        _try_replace(module, name, lambda _, w=what: _unavailable(w), missing)
    interface = f"{_LAYERS}.attention_interface"
    _try_replace(interface, "sharded_ragged_paged_attention", allow_hd64_sharing, missing)
    _try_replace("tpu_inference.utils", "device_array", copying, missing)
    _try_replace("tpu_inference.layers.jax.sample.sampling", "sample", _recompiled_sample, missing)
    _try_replace("tpu_inference.spec_decode.jax.eagle3", "Eagle3Proposer", _recompiled_proposer, missing)
    _replaced = True
    if missing:
        logger.error(
            "JAX runs on the CPU, and tpu-inference lacks %s: these have no CPU kernel.", ", ".join(missing)
        )
    logger.warning(
        "JAX runs on the CPU: TPU kernels are replaced by plain JAX reference code; right, but slow. "
        "For tests, not for serving."
    )


def require_cpu() -> None:
    """Refuses any backend but the CPU without starting it; `devices.require_cpu_devices` sees what it became."""
    import jax

    platforms = jax.config.jax_platforms or ""
    if platforms.split(",")[0] != "cpu":
        raise RuntimeError(
            f"the CPU reference kernels need JAX_PLATFORMS=cpu in the environment before jax is imported; "
            f"jax_platforms is {platforms!r}"
        )


def check_device_count(vllm_config: Any) -> None:
    """Refuses in the user's process and at once, not a minute later in the log of the EngineCore."""
    import jax

    from vllm_maxtext_loader.cpu_kernels.devices import requested_devices, require_devices

    if jax.distributed.is_initialized() or os.environ.get("TPU_MULTIHOST_BACKEND"):
        # How many devices all processes have together is known when their backends have started.
        return
    require_devices(vllm_config.sharding_config.total_devices, requested_devices())


def replace(module: str, name: str, new: Any) -> None:
    """Sets module.name, and every copy that a `from module import name` made before."""
    old = getattr(importlib.import_module(module), name)
    _undo.append((new, name, old))
    _exchange(lambda _, value: new if value is old else value)


def _exchange(choose: Callable[[str, Any], Any]) -> None:
    """Sets every global of tpu-inference's modules to what `choose` says of its name and value."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").partition(".")[0] == "tpu_inference":
            for name, value in list(vars(module).items()):
                if (chosen := choose(name, value)) is not value:
                    setattr(module, name, chosen)


@contextlib.contextmanager
def tpu_kernels() -> Iterator[None]:
    """Takes the reference kernels back for a while: what is traced inside is what a TPU would run."""

    def original(name: str, value: Any) -> Any:
        # One replacement may stand for two functions (no compiler options): the name tells which.
        found = {known: old for new, known, old in _undo if new is value}
        return found.get(name, next(iter(found.values()), value)) if found else value

    def replacement(name: str, value: Any) -> Any:
        return next((new for new, _, old in _undo if old is value), value)

    _exchange(original)
    try:
        yield
    finally:
        _exchange(replacement)


def allow_hd64_sharing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Lets layers with head_dim 64 share KV caches and see both ways, which the TPU's kernel for 64 cannot.

    Gemma 4 has head_dims of 256 and 512; small models made for tests have 64. Layout and sharding stay
    tpu-inference's: the wrapped function, which would refuse, is not given the two options; the kernel it
    calls reads them from `hd64_options`.
    """
    from vllm_maxtext_loader.cpu_kernels.attention import hd64_options

    @functools.wraps(original)
    def sharded_ragged_paged_attention(
        mesh: Any,
        q: Any,
        *args: Any,
        update_kv_cache: bool = True,
        use_causal_mask: bool = True,
        **kwargs: Any,
    ) -> Any:
        options = {"update_kv_cache": update_kv_cache, "use_causal_mask": use_causal_mask}
        if q.shape[-1] != 64:
            return original(mesh, q, *args, **options, **kwargs)
        with _setting(hd64_options, options):
            return original(mesh, q, *args, **kwargs)

    return sharded_ragged_paged_attention


def _try_replace(module: str, name: str, make: Callable[[Any], Any], missing: list[str]) -> None:
    """Replaces module.name by what `make` makes of it; notes it as missing where it does not exist."""
    try:
        old = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        missing.append(f"{module}.{name}")
        return
    replace(module, name, make(old))


def _recompiled_sample(sample: Any) -> Any:
    """tpu-inference's sampler without the compiler options it was compiled with when its module was imported."""
    import jax

    return jax.jit(sample.__wrapped__, static_argnames=("mesh", "allow_distributed_sampling"))


def _recompiled_proposer(proposer: Any) -> Any:
    """tpu-inference's EAGLE-3 proposer, likewise; the class itself, with another method."""
    import jax

    proposer._propose = jax.jit(
        proposer._propose.__wrapped__,
        donate_argnames=("kv_caches",),
        static_argnames=("self", "num_speculative_tokens", "layer_name_to_kvcache_index"),
    )
    return proposer


def _extended(owner: type, name: str, after: Callable[..., None]) -> Any:
    """A class method of owner that also calls `after` with its arguments."""
    original = getattr(owner, name).__func__

    @functools.wraps(original)
    def extended(cls: type, *args: Any, **kwargs: Any) -> Any:
        result = original(cls, *args, **kwargs)
        after(*args, **kwargs)
        return result

    return classmethod(extended)


def _unavailable(what: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{what} needs a TPU: tpu-inference's kernel has no CPU reference")

    return refuse


@contextlib.contextmanager
def _setting(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
