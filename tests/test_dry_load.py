"""A dry load makes the arrays of a load, refuses what a load refuses, and reads no array data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support import metadata_only, tpu_compile
from support.checkpoints import cases

pytestmark = pytest.mark.engine

LENGTHS = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 128}

SETTINGS: dict[str, dict[str, Any]] = {
    "moe_v2": {"tensor_parallel_size": 2},
    "moe_axis0": {"tensor_parallel_size": 4, "enable_expert_parallel": True},
    "e2b": {"tensor_parallel_size": 1},
}
NAMES = {"moe_v2": "gemma4-26b", "moe_axis0": "gemma4-26b", "e2b": "gemma4-e2b"}


@pytest.mark.parametrize("name", SETTINGS)
def test_arrays_are_those_of_a_load(name: str, tmp_path: Path) -> None:
    arguments = {
        **LENGTHS,
        **SETTINGS[name],
        "model_loader_extra_config": {"model_name": NAMES[name]},
    }
    items = cases()[name].items
    loaded = tpu_compile.run(items, tmp_path / "loaded", arguments=arguments, load=True)
    dry = tpu_compile.run(items, tmp_path / "dry", arguments=arguments)
    assert len(loaded["state"]) > 50
    assert dry["state"] == loaded["state"]


def test_what_a_load_refuses_is_refused(tmp_path: Path) -> None:
    leaves = metadata_only.leaves(metadata_only.published("gemma4-26b", layers=6))
    del leaves["decoder.scanned_blocks.global_layer.self_attention.key.kernel"]
    run = metadata_only.write(tmp_path / "run", leaves)
    answer = tpu_compile.run(run, tmp_path / "dry", arguments=LENGTHS)
    assert answer["error"].startswith("MissingLeafError: ")
