"""A checkpoint that several processes wrote together is read as one that a single process wrote."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import gcs
from support.checkpoints import cases
from support.damage import regions
from vllm_maxtext_loader import open_checkpoint
from vllm_maxtext_loader.conversion.layout import describe
from vllm_maxtext_loader.errors import CorruptMetadataError

WRITER = Path(__file__).parent / "support" / "multiprocess_writer.py"
PROCESSES = 2
DEVICES = 2
"""Per process."""

CASE = "moe_v2"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the processes wrote."""
    run = tmp_path_factory.mktemp("multiprocess") / "run"
    run.mkdir()
    address = f"127.0.0.1:{gcs.free_port()}"
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
        "PYTHONPATH": os.pathsep.join([str(WRITER.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                str(WRITER),
                address,
                str(PROCESSES),
                str(number),
                str(cases()[CASE].items),
                str(run / "0"),
            ],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(PROCESSES)
    ]
    for process in processes:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said[-3000:]
    return run


def test_every_process_has_a_directory_of_its_own(written: Path) -> None:
    found = sorted(path.name for path in (written / "0/items").glob("ocdbt.process_*"))
    assert found == [f"ocdbt.process_{number}" for number in range(PROCESSES)]


def test_arrays_are_those_of_one_writer(written: Path) -> None:
    one, several = open_checkpoint(cases()[CASE].items), open_checkpoint(written)
    assert describe(several.plan.layout) == describe(one.plan.layout)
    leaf = "decoder.scanned_blocks.local_layers.mlp.moe_block.MoeBlock_0.wo"
    assert several.tree.leaves[leaf].chunks[0] * PROCESSES * DEVICES == several.tree.leaves[leaf].shape[0]
    first = dict(one.hf_weights())
    second = dict(several.hf_weights())
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
    assert len(regions(several)) >= len(several.tree.leaves)


def test_databases_that_were_never_merged(written: Path, tmp_path: Path) -> None:
    """Each process' database names every array and holds a part of it."""
    import orbax.checkpoint as ocp
    from etils import epath

    run = Path(shutil.copytree(written, tmp_path / "run"))
    items = run / "0/items"
    (items / "manifest.ocdbt").unlink()
    shutil.rmtree(items / "d")
    says = "next to ocdbt.process_0 to ocdbt.process_1 .2 in all., and none of them holds every chunk"
    with pytest.raises(CorruptMetadataError, match=says):
        open_checkpoint(run)
    alone = Path(shutil.copytree(run, tmp_path / "alone"))
    shutil.rmtree(alone / "0/items/ocdbt.process_1")
    with pytest.raises(
        CorruptMetadataError, match=r"next to ocdbt.process_0, and it does not hold every chunk"
    ):
        open_checkpoint(alone)
    # Without chunks of zeros, only Orbax's record tells that there was a second process.
    metadata = alone / "0/items/_METADATA"
    without = json.loads(metadata.read_text()) | {"store_array_data_equal_to_fill_value": False}
    metadata.write_text(json.dumps(without))
    with pytest.raises(CorruptMetadataError, match="it does not hold every chunk"):
        open_checkpoint(alone)
    # The advice helps.
    ocp.PyTreeCheckpointHandler(use_zarr3=True).finalize(epath.Path(items))
    first, second = dict(open_checkpoint(written).hf_weights()), dict(open_checkpoint(run).hf_weights())
    assert all(second[name].equal(tensor) for name, tensor in first.items())
