"""Checkpoints of any size that take no space: MaxText's metadata, and no chunk of array data."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from support.checkpoints import FIXTURES, cases
from vllm_maxtext_loader.conversion.dims import ModelDims
from vllm_maxtext_loader.conversion.family import Scope, WeightConverter
from vllm_maxtext_loader.families import by_name, find_preset

PERIOD = 6
"""Layers of a scanned block of Gemma 4: five with a sliding window, then one with full attention."""

GEMMA3_TOWER = {
    "hidden_size": 1152,
    "image_size": 896,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}
"""Vision tower of all published Gemma 3. Source: config.json of google/gemma-3-4b-it."""

_TOWERS = {
    "gemma3": "vision_encoder.Gemma3VisionEncoderLayer_0.",
    "gemma4": "vision_encoder.Gemma4VisionEncoderLayer_0.",
}
_TOWER_LAYERS = {"gemma3": "Transformer.encoderblock_{}.", "gemma4": "layer_{}."}
_PROJECTORS = {
    "mm_input_projection.w": "vision_encoder.VisionEmbedder_0.",
    "mm_soft_embedding_norm.scale": "vision_encoder.VisionEmbedder_0.",
    "projection.kernel": "vision_encoder.Gemma4VisionProjector_0.",
}


def published(name: str, *, layers: int | None = None, vision: bool = False, **changes: int) -> ModelDims:
    """Dimensions of a published model.

    Args:
        name: MaxText's name of it.
        layers: its first layers only; None means all.
        vision: with its vision tower (Gemma 4 and 3).
        changes: sizes that differ.
    """
    from transformers import Gemma3Config, Gemma4Config

    family, preset = find_preset(name)
    dims = preset.dims
    if vision and dims.family == "gemma4":
        record = json.loads((FIXTURES / "published.json").read_text())[name]
        dims = family.from_config(Gemma4Config(**record))
    elif vision:
        tower = family.from_config(Gemma3Config(vision_config=GEMMA3_TOWER))
        dims = dataclasses.replace(dims, sizes={**tower.sizes, **dims.sizes}, tags=dims.tags | tower.tags)
    kept = dims.layers if layers is None else dims.layers[:layers]
    return dataclasses.replace(dims, layers=kept).with_sizes(**changes)


def leaves(dims: ModelDims) -> dict[str, tuple[int, ...]]:
    """MaxText leaves (below `params`) and their shapes; scanned where layers come in blocks."""
    family = by_name(dims.family)
    found: dict[str, tuple[int, ...]] = {}
    moe = "moe" in dims.tags
    for row in family.converters:
        # Prefused experts are another way of storing the same tensor; so are the MLP and the shared expert.
        shared = "shared_experts" in row.leaf
        decoder = dims.family == "gemma4" and row.scope is Scope.LAYER
        dense = decoder and row.leaf.startswith(("mlp.wi_", "mlp.wo"))
        if "gate_up" in row.rearrange.maxtext_axes or (shared and not moe) or (dense and moe):
            continue
        for index in family.repeats(dims, row.scope):
            if family.demands(dims, row, index):
                shape = row.rearrange.maxtext_shape(family.sizes(dims, row.scope, index))
                found |= _placed(dims, row, index, shape)
    return found


def _placed(
    dims: ModelDims, row: WeightConverter, index: int, shape: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    """The leaf of a row that layer `index` is stored in, with its shape; nothing where another layer gives it."""
    match row.scope:
        case Scope.VISION:
            return {f"{_PROJECTORS.get(row.leaf, _TOWERS[dims.family])}{row.leaf}": shape}
        case Scope.VISION_LAYER:
            layer = _TOWER_LAYERS[dims.family].format(index)
            return {f"{_TOWERS[dims.family]}{layer}{row.leaf}": shape}
        case Scope.LAYER:
            pass
        case _:
            return {row.leaf: shape}
    groups = [group.pattern for group in by_name(dims.family).groups]
    if groups[0] == r"decoder\.layers":
        return {f"decoder.layers.{row.leaf}": (shape[0], len(dims.layers), *shape[1:])}
    blocks = len(dims.layers) // PERIOD
    if dims.family != "gemma4" or "ple" in dims.tags or dims.layers != dims.layers[:PERIOD] * blocks:
        return {f"decoder.layers_{index}.{row.leaf}": shape}
    if index == 0:
        stacked = (shape[0], blocks, PERIOD - 1, *shape[1:])
        return {f"decoder.scanned_blocks.local_layers.{row.leaf}": stacked}
    if index == PERIOD - 1:
        return {f"decoder.scanned_blocks.global_layer.{row.leaf}": (shape[0], blocks, *shape[1:])}
    return {}


def write(run: Path, shapes: Mapping[str, tuple[int, ...]], *, dtype: str = "bfloat16") -> Path:
    """Writes step 0 of a run, as Orbax lays it out (zarr v2, without OCDBT); returns the run's directory."""
    template = cases()["moe_zarr2"].items
    items = run / "0" / "items"
    items.mkdir(parents=True)
    metadata = json.loads((template / "_METADATA").read_text())
    metadata["tree_metadata"] = {}
    for name, shape in shapes.items():
        keys = ("params", "params", *name.split("."))
        metadata["tree_metadata"][str(keys)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        array = items / ".".join(keys)
        array.mkdir()
        chunk = [max(1, shape[0] // 16), *shape[1:]] if math.prod(shape) > 1 << 24 else list(shape)
        (array / ".zarray").write_text(
            json.dumps(
                {
                    "zarr_format": 2,
                    "shape": list(shape),
                    "chunks": chunk,
                    "dtype": dtype,
                    "compressor": None,
                    "fill_value": None,
                    "filters": None,
                    "order": "C",
                    "dimension_separator": ".",
                }
            )
        )
    (items / "_METADATA").write_text(json.dumps(metadata))
    shutil.copy(template.parent / "_CHECKPOINT_METADATA", items.parent)
    for directory in (items, items.parent):
        (directory / "commit_success.txt").write_text("")
    return run
