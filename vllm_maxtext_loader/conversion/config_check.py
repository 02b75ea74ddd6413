"""A Hugging Face configuration's dimensions against a checkpoint's; numbers only, so that any process may ask."""

from __future__ import annotations

import dataclasses

from vllm_maxtext_loader.errors import ConfigMismatchError
from vllm_maxtext_loader.families.gemma4 import Dims


def reconcile(found: Dims, wanted: Dims, where: str) -> tuple[Dims, Dims, list[str]]:
    """Settles what may differ (vision tower on one side only, padded vocabulary), and refuses the rest.

    Args:
        found: read from the checkpoint's shapes.
        wanted: demanded by the configuration.
        where: path, for messages.

    Returns:
        found and wanted without a vision tower that the other lacks, and one sentence per difference.

    Raises:
        ConfigMismatchError: the configuration is another model's.
    """
    notes: list[str] = []
    if found.vision is not None and wanted.vision is None:
        notes.append("the checkpoint has a vision tower, the configuration has none: it is not loaded")
        found = dataclasses.replace(found, vision=None)
    if found.vision is None and wanted.vision is not None:
        notes.append("the configuration has a vision tower, the checkpoint has none: text only")
        wanted = dataclasses.replace(wanted, vision=None)
    if found.vocab > wanted.vocab:
        notes.append(
            f"{found.vocab - wanted.vocab} rows beyond vocab_size {wanted.vocab} are padding: dropped"
        )
    compare(found, wanted, where)
    return found, wanted, notes


def compare(found: Dims, wanted: Dims, where: str) -> None:
    """Refuses a configuration that contradicts the shapes, naming both numbers.

    Raises:
        ConfigMismatchError: with every difference.
    """
    differences: list[str] = []

    def differ(name: str, config: object, checkpoint: object) -> None:
        if config != checkpoint:
            differences.append(f"{name}: configuration {config}, checkpoint {checkpoint}")

    differ("num_hidden_layers", len(wanted.layers), len(found.layers))
    differ("hidden_size", wanted.hidden, found.hidden)
    differ("num_attention_heads", wanted.heads, found.heads)
    differ("num_experts", wanted.experts, found.experts)
    differ("moe_intermediate_size", wanted.expert_mlp, found.expert_mlp)
    differ("hidden_size_per_layer_input", wanted.ple, found.ple)
    differ("vocab_size_per_layer_input", wanted.ple_vocab, found.ple_vocab)
    if wanted.vocab > found.vocab:
        differ("vocab_size", wanted.vocab, found.vocab)
    if len(wanted.layers) == len(found.layers):
        if not wanted.layers[-1].sliding:
            refuse_sliding_end(found, where)
        for name, field in (
            ("layer_types", "sliding"),
            ("head_dim", "head_dim"),
            ("num_key_value_heads", "kv_heads"),
            ("attention_k_eq_v", "k_eq_v"),
            ("intermediate_size", "mlp"),
        ):
            for layer, (config, checkpoint) in enumerate(zip(wanted.layers, found.layers, strict=True)):
                if getattr(config, field) != getattr(checkpoint, field):
                    differ(f"{name} of layer {layer}", _say(config, field), _say(checkpoint, field))
                    break
    if wanted.vision is not None and found.vision is not None:
        for field in dataclasses.fields(wanted.vision):
            differ(
                f"vision {field.name}", getattr(wanted.vision, field.name), getattr(found.vision, field.name)
            )
    if differences:
        raise ConfigMismatchError(
            f"{where}: the Hugging Face configuration is not this checkpoint's: {'; '.join(differences)}. Use the "
            f"configuration of the model that was trained, or none (it is then read from the checkpoint)."
        )


def refuse_sliding_end(dims: Dims, where: str) -> None:
    """Refuses a model that no configuration describes.

    Raises:
        ConfigMismatchError: its last layer has a sliding window.
    """
    if dims.layers[-1].sliding:
        raise ConfigMismatchError(
            f"{where}: ends in a sliding-window layer; transformers, and with it vLLM, makes the last layer "
            f"of every Gemma 4 a full-attention one. Such a checkpoint can be converted, not served."
        )


def _say(layer: object, field: str) -> object:
    value = getattr(layer, field)
    if field == "sliding":
        return "sliding_attention" if value else "full_attention"
    return "none (shared with an earlier layer)" if value is None else value
