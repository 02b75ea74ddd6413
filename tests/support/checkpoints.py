"""The checkpoints MaxText wrote (tests/fixtures), and trees that Orbax itself reads and writes."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parents[1] / "fixtures"

SERVABLE = (
    "dense_022",
    "dense_024",
    "dense_train",
    "dense_v1",
    "dense_v1_axis0",
    "dense_v1_train",
    "dense_v2",
    "dense_vocabpad",
    "e2b",
    "e4b",
    "moe_022",
    "moe_024",
    "moe_axis0",
    "moe_decode",
    "moe_f32",
    "moe_mm",
    "moe_prefused",
    "moe_train",
    "moe_unscanned",
    "moe_v1",
    "moe_v2",
    "moe_zarr2",
    "rl_nnx",
    "sft_nnx",
)
"""Fixtures that transformers' configuration can describe."""

EXPORT_ONLY = ("dense_v1_nnx_remainder", "dense_v1_remainder", "moe_remainder")
"""Fixtures that end in a sliding-window layer, where transformers always has a full-attention layer."""

FAMILIES: dict[str, tuple[str, ...]] = {
    "gemma4": (*SERVABLE, *EXPORT_ONLY),
    "qwen3": (
        "qwen3_axis0",
        "qwen3_f32",
        "qwen3_rl_nnx",
        "qwen3_scanned",
        "qwen3_sft_nnx",
        "qwen3_tied",
        "qwen3_tied_vocabpad",
        "qwen3_train",
        "qwen3_unscanned",
    ),
    "qwen3_moe": (
        "qwen3moe_axis0",
        "qwen3moe_f32",
        "qwen3moe_prefused",
        "qwen3moe_scanned",
        "qwen3moe_train",
        "qwen3moe_unscanned",
    ),
    "llama": (
        "llama2_script",
        "llama31_scanned",
        "llama31_train",
        "llama31_unscanned",
        "llama3_scanned",
        "llama3_unscanned",
    ),
    "mistral": (
        "mistral_scanned",
        "mistral_script",
    ),
    "qwen2": (
        "qwen2_scanned",
        "qwen2_tied",
        "qwen2_train",
        "qwen2_unscanned",
    ),
    "mixtral": (
        "mixtral_scanned",
        "mixtral_train",
        "mixtral_unscanned",
    ),
    "gemma3": (
        "gemma3_mm",
        "gemma3_scanned",
        "gemma3_train",
        "gemma3_unscanned",
    ),
    "gpt_oss": (
        "gptoss_mixed",
        "gptoss_scanned",
        "gptoss_train",
        "gptoss_unscanned",
    ),
}
"""Fixtures by family."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A checkpoint that MaxText wrote.

    Attributes:
        name: directory under tests/fixtures.
        facts: its case.json.
    """

    name: str
    facts: dict[str, Any]

    @property
    def items(self) -> Path:
        """The item directory."""
        return FIXTURES / self.name / self.facts["items"]

    @property
    def twin_config(self) -> Path:
        """Directory of the twin's config.json."""
        return FIXTURES / "hf" / self.facts["twin"]


def families() -> tuple[str, ...]:
    """The families of models that there are fixtures of."""
    return tuple(FAMILIES)


@functools.cache
def cases(*wanted: str) -> dict[str, Case]:
    """The fixtures of the named families, of all where none is named, by name; a lost one is an error, not a test less."""
    found: dict[str, Case] = {}
    for family in wanted or FAMILIES:
        for name in sorted(FAMILIES[family]):
            found[name] = Case(name, json.loads((FIXTURES / name / "case.json").read_text()))
            assert found[name].facts["family"] == family
    return found


def servable() -> list[str]:
    """Fixtures that a configuration of their family can describe."""
    return [name for name in cases() if name not in EXPORT_ONLY]


Tree = dict[str, Any]


def read_orbax(items: Path) -> Tree:
    """A checkpoint's whole tree, restored by Orbax itself."""
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler()
    metadata = handler.metadata(items)
    import jax
    import numpy as np

    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree)
    return handler.restore(items, args=ocp.args.PyTreeRestore(restore_args=restore_args))


def write_orbax(
    step: Path, tree: Tree, *, item: str = "items", ocdbt: bool = True, zarr3: bool = True
) -> Path:
    """Writes a step the way MaxText does, by Orbax itself; returns the item directory."""
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**{item: handler})) as checkpointer:
        checkpointer.save(step, args=ocp.args.Composite(**{item: ocp.args.PyTreeSave(tree)}))
    return step / item
