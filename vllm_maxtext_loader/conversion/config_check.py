"""A Hugging Face configuration's dimensions against a checkpoint's; numbers only, so that any process may ask."""

from __future__ import annotations

import dataclasses

from vllm_maxtext_loader.conversion.dims import ModelDims
from vllm_maxtext_loader.conversion.family import Family
from vllm_maxtext_loader.errors import ConfigMismatchError

VOCAB = "vocab"


def reconcile(
    family: Family, found: ModelDims, wanted: ModelDims, where: str
) -> tuple[ModelDims, ModelDims, list[str]]:
    """Settles what may differ (vision tower on one side only, padded vocabulary), and refuses the rest.

    Args:
        family: the checkpoint's family.
        found: read from the checkpoint's shapes.
        wanted: demanded by the configuration.
        where: path, for messages.

    Returns:
        found and wanted without a vision tower that the other lacks, and one sentence per difference.

    Raises:
        ConfigMismatchError: the configuration is another model's.
    """
    notes: list[str] = []
    if found.has_vision and not wanted.has_vision:
        notes.append("the checkpoint has a vision tower, the configuration has none: it is not loaded")
        found = found.without_vision()
    if not found.has_vision and wanted.has_vision:
        notes.append("the configuration has a vision tower, the checkpoint has none: text only")
        wanted = wanted.without_vision()
    # Shapes do not show these; the configuration decides.
    found = dataclasses.replace(found, tags=found.tags | (wanted.tags & family.config_tags))
    if found.sizes[VOCAB] > wanted.sizes[VOCAB]:
        notes.append(
            f"{found.sizes[VOCAB] - wanted.sizes[VOCAB]} rows beyond vocab_size {wanted.sizes[VOCAB]} are zero "
            "(padding): dropped"
        )
    if found.sizes[VOCAB] < wanted.sizes[VOCAB] <= found.sizes[VOCAB] + family.added_vocab:
        notes.append(
            f"{wanted.sizes[VOCAB] - found.sizes[VOCAB]} rows of vocab_size {wanted.sizes[VOCAB]} are not stored: zero"
        )
    compare(family, found, wanted, where)
    return found, wanted, notes


def compare(family: Family, found: ModelDims, wanted: ModelDims, where: str) -> None:
    """Refuses a configuration that contradicts the shapes, naming both numbers.

    Raises:
        ConfigMismatchError: with every difference.
    """
    last = len(wanted.layers) - 1
    if len(found.layers) == len(wanted.layers) and not wanted.has("sliding", last):
        refuse_sliding_end(family, found, where)
    if differences := list_differences(family, found, wanted):
        raise ConfigMismatchError(
            f"{where}: the Hugging Face configuration is not this checkpoint's: {'; '.join(differences)}. Use the "
            f"configuration of the model that was trained, or none (it is then read from the checkpoint)."
        )


def list_differences(family: Family, found: ModelDims, wanted: ModelDims) -> list[str]:
    """What differs, by the configuration's field names: one phrase each, with both values."""
    if found.family != wanted.family:
        return [f"model family: configuration {wanted.family}, checkpoint {found.family}"]
    differences: list[str] = []

    def differ(field: str, configured: object, stored: object) -> None:
        if configured != stored:
            differences.append(f"{field}: configuration {configured}, checkpoint {stored}")

    differ("num_hidden_layers", len(wanted.layers), len(found.layers))
    for axis in dict.fromkeys([*wanted.sizes, *found.sizes]):
        configured, stored = wanted.sizes.get(axis), found.sizes.get(axis)
        # A larger table is padded; what lies in its rows is for the reader of values to judge.
        if axis == VOCAB and configured and stored and configured <= stored + family.added_vocab:
            continue
        differ(family.axes.get(axis, axis.replace("_", " ")), configured, stored)
    for tag in sorted(found.tags ^ wanted.tags):
        field = family.tag_fields.get(tag)
        if field is None:
            continue
        differ(
            field.field, *(field.present if tag in dims.tags else field.absent for dims in (wanted, found))
        )
    if len(wanted.layers) == len(found.layers):
        differences += _layer_differences(family, found, wanted)
    return differences


def _layer_differences(family: Family, found: ModelDims, wanted: ModelDims) -> list[str]:
    """The first layer in which a size or a tag differs, for each of them."""
    differences: list[str] = []
    pairs = list(zip(wanted.layers, found.layers, strict=True))
    for tag, field in family.tag_fields.items():
        for layer, (configured, stored) in enumerate(pairs):
            if (tag in configured.tags) != (tag in stored.tags):
                says = [field.present if tag in side.tags else field.absent for side in (configured, stored)]
                differences.append(
                    f"{field.field} of layer {layer}: configuration {says[0]}, checkpoint {says[1]}"
                )
                break
    for axis in sorted(family.per_layer):
        for layer, (configured, stored) in enumerate(pairs):
            a, b = (side.sizes.get(axis, "none") for side in (configured, stored))
            if a != b:
                differences.append(
                    f"{family.axes.get(axis, axis)} of layer {layer}: configuration {a}, checkpoint {b}"
                )
                break
    return differences


def refuse_sliding_end(family: Family, dims: ModelDims, where: str) -> None:
    """Refuses a model that no configuration of its family describes.

    Raises:
        ConfigMismatchError: its last layer has a sliding window, and transformers would make it another.
    """
    if family.ends_in_full_attention and dims.has("sliding", len(dims.layers) - 1):
        raise ConfigMismatchError(
            f"{where}: ends in a sliding-window layer; transformers, and with it vLLM, makes the last layer "
            f"of every {family.title} a full-attention one. Such a checkpoint can be converted, not served."
        )
