"""The `vllm.general_plugins` entry point: what is patched in vLLM and tpu-inference, and when.

vLLM calls `register()` in the front end, in the EngineCore and in every worker, for every model. It imports nothing
but wrapt and the standard library. Each patch is applied when its module is imported:

| module                                   | what changes                                                           |
|------------------------------------------|------------------------------------------------------------------------|
| vllm.engine.arg_utils                    | for `maxtext`, `model` may be a MaxText checkpoint (`engine`)          |
| vllm.model_executor.model_loader         | the load format `maxtext` exists (`loader`)                            |
| tpu_inference.models.common.model_loader | for `maxtext`, MODEL_IMPL_TYPE=auto means vLLM's own model (`tpu`)     |
| tpu_inference.platforms.tpu_platform     | with JAX_PLATFORMS=cpu only: reference kernels (`cpu_kernels`)         |

A patch that fails is logged as one error and leaves its module as it was; `maxtext` then refuses to load.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

from vllm_maxtext_loader import cpu_kernels, versions
from vllm_maxtext_loader.errors import EngineError
from vllm_maxtext_loader.options import LOAD_FORMAT

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
    _on_import("tpu_inference.models.common.model_loader", _patch_model_choice)
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

    @functools.wraps(create_engine_config)
    def engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_maxtext(self):
            check_patches()
            from vllm_maxtext_loader.engine import args as engine_arguments

            engine_arguments.prepare(self)
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

    engine_args.create_engine_config = engine_config
    engine_args.create_model_config = model_config


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


def _install_cpu_kernels(module: ModuleType) -> None:
    from vllm_maxtext_loader.cpu_kernels.install import install

    install(module)
