"""The `vllm.general_plugins` entry point: what is registered in vLLM, when, and in which process.

vLLM calls `register()` in the front end, in the EngineCore and in every worker, for every model. It must therefore
cost nothing: it imports neither jax nor Orbax, and no part of vLLM that is not there yet. What has to be told to a
module of vLLM or tpu-inference is told when that module is imported (wrapt's post-import hooks):

| module                                  | what happens                                                        |
|-----------------------------------------|---------------------------------------------------------------------|
| vllm.engine.arg_utils                   | EngineArgs learns that `model` may be a MaxText checkpoint (`engine`) |
| vllm.model_executor.model_loader        | the load format `maxtext` is registered (`loader`)                   |
| tpu_inference.models.common.model_loader | for this load format, "auto" means vLLM's own model (`tpu`)           |
| tpu_inference.platforms.tpu_platform    | only with JAX_PLATFORMS=cpu: reference kernels (`cpu_reference`)      |

Nothing changes for other load formats; with JAX_PLATFORMS=cpu the reference kernels serve all of them, since none
would run there without.
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

import wrapt

LOAD_FORMAT = "maxtext"

CPU_ENVIRONMENT: dict[str, str] = {
    # tpu-inference looks for a TPU and asks Google's metadata server about it, unless told (tpu_info.py).
    "TPU_ACCELERATOR_TYPE": "v6e-1",
    "TPU_NAME": "cpu",
    "TPU_WORKER_ID": "0",
    "TPU_SKIP_MDS_QUERY": "1",
    # Compiling every padded batch size ahead takes minutes (runner/compilation_manager.py).
    "SKIP_JAX_PRECOMPILE": "1",
}
"""Defaults that spare tpu-inference 0.32 a search for a TPU on a machine without one."""

_registered = False


def register() -> None:
    """Tells vLLM about the load format; safe to call any number of times."""
    global _registered
    if _registered:
        return
    _registered = True
    wrapt.register_post_import_hook(_on_arg_utils, "vllm.engine.arg_utils")
    wrapt.register_post_import_hook(_on_model_loader, "vllm.model_executor.model_loader")
    wrapt.register_post_import_hook(_on_tpu_model_loader, "tpu_inference.models.common.model_loader")
    if jax_on_cpu():
        prepare_cpu_environment()
        wrapt.register_post_import_hook(_on_tpu_platform, "tpu_inference.platforms.tpu_platform")


def prepare_cpu_environment() -> None:
    """Sets the variables of `CPU_ENVIRONMENT` that the user has not set; child processes inherit them."""
    for name, value in CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def jax_on_cpu() -> bool:
    """Whether tpu-inference is installed and jax was told to use the CPU."""
    platforms = os.environ.get("JAX_PLATFORMS", "").lower().split(",")
    return platforms == ["cpu"] and importlib.util.find_spec("tpu_inference") is not None


def _on_arg_utils(module: ModuleType) -> None:
    from vllm_maxtext_loader.engine import wrap_engine_args

    wrap_engine_args(module.EngineArgs)


def _on_model_loader(module: ModuleType) -> None:
    from vllm_maxtext_loader.loader import MaxTextModelLoader

    module.register_model_loader(LOAD_FORMAT)(MaxTextModelLoader)


def _on_tpu_model_loader(module: ModuleType) -> None:
    from vllm_maxtext_loader.tpu import enforce_vllm_model

    enforce_vllm_model(module)


def _on_tpu_platform(module: ModuleType) -> None:
    del module
    from vllm_maxtext_loader.cpu_reference import install

    install()
