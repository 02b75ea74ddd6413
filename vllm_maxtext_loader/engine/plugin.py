"""The `vllm.general_plugins` entry point: what is patched in vLLM and tpu-inference, and when.

vLLM calls `register()` in the front end, in the EngineCore and in every worker, for every model. It imports nothing
but wrapt and the standard library. Each patch is applied when its module is imported:

| module                                   | what changes                                                           |
|------------------------------------------|------------------------------------------------------------------------|
| vllm.engine.arg_utils                    | for `maxtext`, `model` may be a MaxText checkpoint (`args`)            |
| vllm.config.model                        | a worker on another node writes the made configuration (`config_dir`)  |
| vllm.envs                                | variables of ours that are set are known                               |
| vllm.model_executor.model_loader         | the load format `maxtext` exists (`loader`)                            |
| tpu_inference.models.common.model_loader | for `maxtext`, MODEL_IMPL_TYPE=auto means vLLM's own model (`tpu`)     |
| tpu_inference.worker.tpu_worker          | for `maxtext`, another step can be loaded (`worker`)                   |
| vllm.v1.engine.core                      | for `maxtext`, no cache outlives its weights (`core`)                  |
| tpu_inference.executors.ray_…            | for `maxtext`, nodes say first what they lack (`nodes`)                |
| tpu_inference.platforms.tpu_platform     | with JAX_PLATFORMS=cpu only: reference kernels (`cpu_kernels`)         |

A patch that fails is logged as one error and leaves its module as it was; `maxtext` then refuses to load.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

from vllm_maxtext_loader import cpu_kernels, versions
from vllm_maxtext_loader.errors import EngineError
from vllm_maxtext_loader.options import LOAD_FORMAT, TRAVELLING, VARIABLES

logger = logging.getLogger("vllm." + __name__)

_registered = False
_failures: list[str] = []
"""Sentences about patches that could not be applied in this process."""


def register() -> None:
    """Registers the load format; safe to call any number of times.

    With a vLLM or tpu-inference that this package does not know, only a stub is registered, which refuses `maxtext`
    with a sentence. Nothing else is patched then.
    """
    global _registered
    if _registered:
        return
    _registered = True
    if (reason := versions.unsupported()) is not None:
        _failures.append(reason)
    _on_import("vllm.engine.arg_utils", _patch_engine_args)
    _on_import("vllm.model_executor.model_loader", _register_load_format)
    if reason is not None:
        return
    _on_import("vllm.envs", _make_variables_known)
    _on_import("vllm.config.model", _patch_model_config)
    _on_import("tpu_inference.models.common.model_loader", _patch_model_choice)
    _on_import("tpu_inference.worker.tpu_worker", _patch_worker)
    _on_import("vllm.v1.engine.core", _patch_engine_core)
    for executor in ("ray_distributed_executor", "ray_distributed_executor_v2"):
        _on_import(f"tpu_inference.executors.{executor}", _patch_ray_executor)
    if cpu_kernels.are_wanted():
        cpu_kernels.prepare_environment()
        _on_import("tpu_inference.platforms.tpu_platform", _install_cpu_kernels)


def is_maxtext(engine_args: Any) -> bool:
    """Whether an EngineArgs asks for this load format."""
    return str(engine_args.load_format).lower() == LOAD_FORMAT


def check_patches() -> None:
    """Refuses to serve with a vLLM that could not be patched.

    Raises:
        EngineError: an unknown version, or a patch that failed.
    """
    if _failures:
        raise EngineError(" ".join(_failures))


def _on_import(name: str, patch: Callable[[ModuleType], None]) -> None:
    """Applies a patch when a module is imported, or at once where it has been."""

    def guarded(module: ModuleType) -> None:
        # An exception here would break the import of vLLM's or tpu-inference's module, for every load format.
        try:
            patch(module)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            _failures.append(
                f"vllm-maxtext-loader could not extend {name} ({reason}). Install vllm-tpu=={versions.SUPPORTED}.0."
            )
            logger.error(
                "vllm-maxtext-loader could not extend %s: --load-format maxtext will not work, other load formats "
                "are not affected (%s).",
                name,
                reason,
            )

    wrapt.register_post_import_hook(guarded, name)


def _patch_engine_args(module: ModuleType) -> None:
    """Lets EngineArgs prepare a checkpoint for `maxtext`; any other load format goes to vLLM's own methods, untouched."""
    engine_args = module.EngineArgs
    create_engine_config = engine_args.create_engine_config
    create_model_config = engine_args.create_model_config
    get_model_path = module.get_model_path

    @functools.wraps(create_engine_config)
    def engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_maxtext(self):
            return create_engine_config(self, *args, **kwargs)
        check_patches()
        from vllm_maxtext_loader.engine import args as engine_arguments
        from vllm_maxtext_loader.engine.start_method import avoid_fork

        # vLLM does it first of all; what is said while preparing would be lost.
        module.configure_logging_if_needed(self.create_logging_config())
        with engine_arguments.prepared(self):
            avoid_fork(self, kwargs.get("usage_context", args[0] if args else None))
            return create_engine_config(self, *args, **kwargs)

    @functools.wraps(create_model_config)
    def model_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_maxtext(self):
            return create_model_config(self, *args, **kwargs)
        check_patches()
        from vllm_maxtext_loader.engine import args as engine_arguments

        return engine_arguments.make_model_config(
            self, functools.partial(create_model_config, self, *args, **kwargs)
        )

    @functools.wraps(get_model_path)
    def model_path(model: Any, revision: str | None = None) -> Any:
        # With HF_HUB_OFFLINE, EngineArgs.__post_init__ looks up `model` and `tokenizer` among downloaded repositories. It
        # also loads this plugin, so for the first EngineArgs only what it calls can still be replaced.
        try:
            return get_model_path(model, revision)
        except Exception:
            caller = sys._getframe(1).f_locals.get("self")
            if isinstance(caller, engine_args) and is_maxtext(caller):
                return model  # A checkpoint that does not exist, "~" or file://: `prepared` decides.
            raise

    engine_args.create_engine_config = engine_config
    engine_args.create_model_config = model_config
    vars(module)["get_model_path"] = model_path


def _patch_model_config(module: ModuleType) -> None:
    """Lets a worker on another node write the directory of configuration that the first node made for a checkpoint.

    A worker calls this method before it reads anything of the model (tpu-inference 0.32.0 worker/tpu_worker.py).
    """
    model_config = module.ModelConfig
    pull = model_config.maybe_pull_model_tokenizer_for_runai

    @functools.wraps(pull)
    def write_or_pull(self: Any, model: str, tokenizer: str) -> None:
        if TRAVELLING in vars(self):
            from vllm_maxtext_loader.engine.config_dir import restore

            restore(self)
            model, tokenizer = self.model, self.tokenizer
        pull(self, model, tokenizer)

    model_config.maybe_pull_model_tokenizer_for_runai = write_or_pull


def _make_variables_known(module: ModuleType) -> None:
    """Spares the user vLLM's warning of unknown variables, for those of ours that are set.

    Only those: vLLM makes all that it knows a part of its compile cache's key.
    """
    for name in VARIABLES:
        if name in os.environ:
            module.environment_variables.setdefault(name, functools.partial(os.environ.get, name))


def _register_load_format(module: ModuleType) -> None:
    """Registers a loader class that imports the real one when it is asked for."""

    class MaxTextLoadFormat(module.BaseModelLoader):
        def __new__(cls, load_config: Any) -> Any:
            check_patches()
            try:
                from vllm_maxtext_loader.engine.loader import MaxTextModelLoader
            except ImportError as error:
                raise EngineError(
                    f"--load-format maxtext: the installed vLLM lacks what this version of vllm-maxtext-loader uses "
                    f"({error}). Install vllm-tpu=={versions.SUPPORTED}.0."
                ) from error
            return MaxTextModelLoader(load_config)

    module.register_model_loader(LOAD_FORMAT)(MaxTextLoadFormat)


def _patch_model_choice(module: ModuleType) -> None:
    from vllm_maxtext_loader.tpu.patches import enforce_vllm_model

    enforce_vllm_model(module)


def _patch_worker(module: ModuleType) -> None:
    from vllm_maxtext_loader.engine.worker import extend_worker

    extend_worker(module)


def _patch_engine_core(module: ModuleType) -> None:
    from vllm_maxtext_loader.engine.core import extend_engine_core

    extend_engine_core(module)


def _patch_ray_executor(module: ModuleType) -> None:
    from vllm_maxtext_loader.engine.nodes import extend_executor

    extend_executor(module)


def _install_cpu_kernels(module: ModuleType) -> None:
    from vllm_maxtext_loader.cpu_kernels.install import install

    install(module)
