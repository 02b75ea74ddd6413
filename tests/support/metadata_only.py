"""Checkpoints of any size that take no space: MaxText's metadata, and no chunk of array data."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.checkpoints import cases
from vllm_maxtext_loader.families.gemma4 import RULES, Dims, Scope

PERIOD = 6
"""Layers of a scanned block: five with a sliding window, then one with full attention."""


def published(name: str, *, layers: int | None = None, vision: bool = False, **changes: Any) -> Dims:
    """Dimensions of a published model.

    Args:
        name: MaxText's name of it.
        layers: its first layers only; None means all.
        vision: with its vision tower.
        changes: fields that differ.
    """
    from transformers import Gemma4Config

    from support.checkpoints import FIXTURES

    record = json.loads((FIXTURES / "published.json").read_text())[name]
    dims = Dims.from_config(Gemma4Config(**record))
    kept = dims.layers if layers is None else dims.layers[:layers]
    return dataclasses.replace(dims, layers=kept, vision=dims.vision if vision else None, **changes)


def leaves(dims: Dims) -> dict[str, tuple[int, ...]]:
    """MaxText leaves (below `params`) and their shapes; scanned (v2) where layers come in blocks."""
    found: dict[str, tuple[int, ...]] = {}
    parts: dict[str, set[int | None]] = collections.defaultdict(set)
    blocks = len(dims.layers) // PERIOD
    scanned = dims.ple is None and dims.layers == dims.layers[:PERIOD] * blocks
    for rule in RULES:
        for index in dims.repeats(rule.scope):
            name = dims.hf_name(rule, index)
            decoder = rule.scope is Scope.LAYER
            dense = decoder and rule.leaf.startswith(("mlp.wi_", "mlp.wo")) and dims.experts is not None
            shared = "shared_experts" in rule.leaf and dims.experts is None
            # Prefused experts are another way of storing the same tensor.
            if not dims.demands(rule, index) or dense or shared or rule.leaf.endswith("MoeBlock_0.wi"):
                continue
            parts[name].add(rule.move.part)
            shape = rule.move.maxtext_shape(dims.sizes(rule.scope, index))
            match rule.scope:
                case Scope.MODEL:
                    found[rule.leaf] = shape
                case Scope.LAYER if not scanned:
                    found[f"decoder.layers_{index}.{rule.leaf}"] = shape
                case Scope.LAYER if index == 0:
                    stack = (blocks, PERIOD - 1)
                    found[f"decoder.scanned_blocks.local_layers.{rule.leaf}"] = (shape[0], *stack, *shape[1:])
                case Scope.LAYER if index == PERIOD - 1:
                    found[f"decoder.scanned_blocks.global_layer.{rule.leaf}"] = (
                        shape[0],
                        blocks,
                        *shape[1:],
                    )
                case Scope.VISION:
                    found[f"{_vision_prefix(rule.leaf)}.{rule.leaf}"] = shape
                case Scope.VISION_LAYER:
                    found[f"vision_encoder.Gemma4VisionEncoderLayer_0.layer_{index}.{rule.leaf}"] = shape
    return found


def _vision_prefix(leaf: str) -> str:
    return "vision_encoder." + (
        "Gemma4VisionProjector_0" if leaf == "projection.kernel" else "Gemma4VisionEncoderLayer_0"
    )


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
