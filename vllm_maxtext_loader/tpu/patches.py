"""What is changed in tpu-inference, and when its layers go to the device. Only the package `tpu` imports tpu_inference (and `cpu_kernels`, which replaces parts of it).

Written against tpu-inference 0.32.0: models/common/model_loader.py (which model class is built) and
models/vllm/vllm_model_loader.py (a layer's host memory is released as soon as the layer is complete). `direct` places
weights without a torch tensor in between.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vllm_maxtext_loader.errors import EngineError
from vllm_maxtext_loader.options import LOAD_FORMAT

if TYPE_CHECKING:
    from torch import nn
    from vllm.config import VllmConfig


def enforce_vllm_model(module: ModuleType) -> None:
    """Makes MODEL_IMPL_TYPE=auto mean "vllm" for this load format; other formats keep tpu-inference's choice.

    Args:
        module: tpu_inference.models.common.model_loader.
    """
    original = module.resolve_model_impl_type

    @functools.wraps(original)
    def resolve_model_impl_type(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> str:
        if vllm_config.load_config.load_format != LOAD_FORMAT:
            return original(vllm_config, *args, **kwargs)
        # tpu-inference refuses a draft of another kind than its target (spec_decode/jax/eagle3.py).
        is_draft_model = kwargs.get("is_draft_model", bool(args and args[0]))
        variable = "DRAFT_MODEL_IMPL_TYPE" if is_draft_model else "MODEL_IMPL_TYPE"
        asked = getattr(module.envs, variable)
        if asked not in ("auto", "vllm"):
            raise EngineError(
                f"{variable}={asked}: --load-format maxtext loads into vLLM's own model class. Unset {variable}."
            )
        return "vllm"

    vars(module)["resolve_model_impl_type"] = resolve_model_impl_type


def release_finished_layers(model: nn.Module) -> None:
    """Lets every linear and expert layer go to the device, and its host memory go, as soon as it is complete.

    tpu-inference processes such a layer when its last weight arrives, and once more at the end, where it recognises
    a processed layer by its device. That fails where the device is the CPU, so each layer is processed once here.
    """
    from tpu_inference.layers.vllm.quantization.base import VllmQuantizationMethod
    from tpu_inference.models.vllm.vllm_model_loader import attach_incremental_weight_loader

    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if isinstance(method, VllmQuantizationMethod):
            vars(method)["process_weights_after_loading"] = _once(method.process_weights_after_loading)
    attach_incremental_weight_loader(model)


def lower_layer_norms() -> None:
    """Lets torchax run vLLM's LayerNorm, which Gemma 3's vision encoder is made of.

    vLLM 0.32.0 model_executor/layers/layernorm.py asks `torch.promote_types` for the dtype to compute in, which torchax has no
    lowering for: the first image would end the engine. Floating-point types are promoted here in the same way.
    """
    from vllm.model_executor.layers.layernorm import LayerNorm

    def compute_dtype(self: Any, x: Any) -> Any:
        if self.weight is None or self.weight.dtype == x.dtype:
            return x.dtype
        import torch

        return torch.float32

    LayerNorm._compute_dtype = compute_dtype


def _once(process: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    done: set[int] = set()

    @functools.wraps(process)
    def wrapper(layer: nn.Module) -> None:
        if id(layer) not in done:
            done.add(id(layer))
            process(layer)

    return wrapper
