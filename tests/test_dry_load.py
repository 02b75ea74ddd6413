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
    # Biases: most of it takes the usual way.
    "gptoss_scanned": {"tensor_parallel_size": 2},
}
NAMES = {
    "moe_v2": "gemma4-26b",
    "moe_axis0": "gemma4-26b",
    "e2b": "gemma4-e2b",
    "gptoss_scanned": "gpt-oss-20b",
}


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
    assert len(loaded["state"]) > 40
    assert dry["state"] == loaded["state"]


@pytest.mark.parametrize(("devices", "expert_parallel"), [(8, False), (8, True), (1, False)])
def test_loading_the_published_26b_compiles_few_programs(
    devices: int, expert_parallel: bool, tmp_path: Path
) -> None:
    """At all its layers: programs, what is sent, and the memory that it takes on the host and on a device."""
    run = metadata_only.write(tmp_path / "run", metadata_only.leaves(metadata_only.published("gemma4-26b")))
    arguments = {
        **LENGTHS,
        "tensor_parallel_size": devices,
        "enable_expert_parallel": expert_parallel,
        "model_loader_extra_config": {"model_name": "gemma4-26b"},
    }
    # More memory than any chip has: what is loaded onto one device here is served by several.
    answer = tpu_compile.run(run, tmp_path / "dry", arguments=arguments, hbm_bytes=100 << 30)
    steps = answer["filling"]
    assert steps["programs"] + steps["compiled_besides"] <= 16
    assert steps["programs"] == steps["kinds"] + 1
    assert steps["valid_bytes"] > 45 << 30
    # Tiles are sent whole: what does not count in them is little, and few of them are small.
    assert steps["sent_bytes"] < 1.02 * steps["valid_bytes"]
    assert steps["tiles"] < 1.5 * steps["valid_bytes"] / steps["tile_bytes"]
    # A chunk of experts is one device's where experts are parallel; otherwise all devices have a part of it.
    if devices == 8 and not expert_parallel:
        assert steps["launches"] < 0.2 * steps["tiles"]
    # On the host a quarter of the read budget at most.
    assert steps["staged_bytes"] * devices <= steps["budget"] // 4
    assert steps["staged_bytes"] + steps["tile_bytes"] < steps["device_bytes"] / 50


def test_what_a_load_refuses_is_refused(tmp_path: Path) -> None:
    leaves = metadata_only.leaves(metadata_only.published("gemma4-26b", layers=6))
    del leaves["decoder.scanned_blocks.global_layer.self_attention.key.kernel"]
    run = metadata_only.write(tmp_path / "run", leaves)
    answer = tpu_compile.run(run, tmp_path / "dry", arguments=LENGTHS)
    assert answer["error"].startswith("MissingLeafError: ")
