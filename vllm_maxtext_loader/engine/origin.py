"""What a loaded model remembers of its checkpoint, so that another step can take its place."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from vllm_maxtext_loader.api import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vllm_maxtext_loader.checkpoint.find import ItemLocation
    from vllm_maxtext_loader.options import Options
    from vllm_maxtext_loader.tpu.blueprint import Blueprint

_ATTRIBUTE = "_maxtext_origin"


@dataclasses.dataclass(frozen=True)
class Origin:
    """How a model was loaded.

    Attributes:
        path: the checkpoint, as the user gave it.
        location: where it was found.
        options: the loader's.
        hf_config: the model's configuration.
        dtype: of its weights.
        fold_expert_scales: whether scales per expert were multiplied in.
        blueprint: the model before it was loaded.
    """

    path: str
    location: ItemLocation
    options: Options
    hf_config: Any
    dtype: torch.dtype
    fold_expert_scales: bool
    blueprint: Blueprint

    def attach(self, model: nn.Module) -> None:
        """Lets the model remember."""
        vars(model)[_ATTRIBUTE] = self

    @staticmethod
    def of(model: nn.Module) -> Origin | None:
        """What a model remembers; None of one that `--load-format maxtext` did not load."""
        return vars(model).get(_ATTRIBUTE)

    def open(self, path: str, step: int | None) -> Checkpoint:
        """Opens another checkpoint for the same model.

        Raises:
            MaxTextLoadError: there is none, or it is of another model.
        """
        checkpoint = open_checkpoint(
            path, step=step, model_name=self.options.model_name, concurrent_gib=self.options.concurrent_gib
        )
        return checkpoint.with_config(self.hf_config)


def run_of(location: ItemLocation) -> str:
    """The run that a checkpoint is a step of; its own path where it is none."""
    directory = location.step_directory
    parent = None if directory is None else directory.parent
    return location.requested.url if parent is None else parent.url
