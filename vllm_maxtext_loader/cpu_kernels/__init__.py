"""tpu-inference on JAX's CPU backend: plain JAX in place of what only a TPU can run. For tests, not for serving.

With JAX_PLATFORMS=cpu nothing would run without these kernels, so they serve every load format. They compute in
float32 and round once: at least as exact as the TPU's kernels, and slow. What they do not support they refuse by
name. VLLM_MAXTEXT_CPU_KERNELS=0 turns them off. `install` puts them in place; this module imports neither jax nor
a kernel.
"""

from __future__ import annotations

import os
import sys

from vllm_maxtext_loader import versions
from vllm_maxtext_loader.options import is_off

SWITCH_VARIABLE = "VLLM_MAXTEXT_CPU_KERNELS"
"""Environment variable; 0 leaves tpu-inference as it is, also with JAX_PLATFORMS=cpu."""

ENVIRONMENT: dict[str, str] = {
    # tpu-inference looks for a TPU and asks Google's metadata server about it, unless these are set (tpu_info.py).
    "TPU_ACCELERATOR_TYPE": "v6e-1",
    "TPU_NAME": "cpu",
    "TPU_WORKER_ID": "0",
    "TPU_SKIP_MDS_QUERY": "1",
    # Compiling every padded batch size ahead takes minutes (runner/compilation_manager.py).
    "SKIP_JAX_PRECOMPILE": "1",
}
"""Defaults that spare tpu-inference 0.32 a search for a TPU on a machine without one."""


def are_wanted() -> bool:
    """Whether JAX is set to use the CPU, tpu-inference is installed, and the user has not turned the kernels off."""
    if is_off(SWITCH_VARIABLE):
        return False
    platforms = os.environ.get("JAX_PLATFORMS", "").lower().split(",")
    return platforms == ["cpu"] and versions.installed("tpu-inference") is not None


def prepare_environment() -> None:
    """Sets the variables of `ENVIRONMENT` that the user has not set; child processes inherit them."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Ray imports JAX in a worker's process before it copies the engine's environment there; JAX has looked by then.
    jax = sys.modules.get("jax")
    if jax is not None and not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")
