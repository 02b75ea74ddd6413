"""Device mesh, memory statistics and transfers of JAX's CPU backend, in place of a TPU's."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

# For VLLM_CPU_KVCACHE_SPACE, the variable of vLLM's own CPU backend: the KV cache lives in main memory.
DEFAULT_KV_CACHE_GIB = 1
DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"


def requested_devices() -> int:
    """Number of CPU devices jax will make (or has made), read without starting its backend.

    Starting the backend here would fix the number of devices for good, and its threads do not survive the
    fork of vLLM's EngineCore process.
    """
    if jax.config.jax_num_cpu_devices > 0:
        return jax.config.jax_num_cpu_devices
    counts = re.findall(rf"{DEVICE_COUNT_FLAG}=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return int(counts[-1]) if counts else 1


def require_devices(needed: int, available: int) -> None:
    if needed > available:
        raise RuntimeError(
            f"tensor and data parallelism ask for {needed} devices, but JAX has {available} on this CPU. "
            f"Set XLA_FLAGS={DEVICE_COUNT_FLAG}={needed} in the environment before the engine starts."
        )


def require_cpu_devices(devices: Sequence[Any]) -> None:
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
    require_cpu_devices(available)
    count = math.prod(axis_shapes)
    require_devices(count, len(available))
    grid = np.array(available[:count]).reshape(axis_shapes)
    return Mesh(grid, axis_names, axis_types=(AxisType.Auto,) * len(axis_names))


def memory_usage(devices: Sequence[Any]) -> list[tuple[int, int]]:
    """(bytes in use, limit) of each device; together they hold KV caches of VLLM_CPU_KVCACHE_SPACE GiB.

    Contract: tpu-inference 0.32.0 utils.py, `hbm_usage_bytes`. JAX's CPU devices report no memory, and
    share one: what weights take is not counted, because nothing but the size of the KV cache is derived
    from these numbers.
    """
    devices = list(devices)
    require_cpu_devices(devices)
    gib = int(os.environ.get("VLLM_CPU_KVCACHE_SPACE") or 0) or DEFAULT_KV_CACHE_GIB
    return [(0, gib * 2**30 // max(len(devices), 1))] * len(devices)


# ----------------------------------------------------------------------------


def copying(device_array: Callable[..., Any]) -> Callable[..., Any]:
    """tpu-inference's `device_array`, whose arrays share no memory with the NumPy arrays they are made from.

    Contract: tpu-inference 0.32.0 utils.py, `device_array`. Its runner (runner/tpu_runner.py, `_prepare_inputs`)
    fills the same buffers, `positions_cpu` and `device_buffer`, for every step. With async scheduling the step
    before may not have run by then. jax.device_put makes no copy for a CPU device where the buffer is aligned
    to 64 bytes (jaxlib/py_values.cc, kImmutableZeroCopy), and that step would read the next one's positions.
    """

    @functools.wraps(device_array)
    def device_array_of_a_copy(mesh: Mesh, *args: Any, **kwargs: Any) -> Any:
        copies = jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, args)
        return device_array(mesh, *copies, **kwargs)

    return device_array_of_a_copy
