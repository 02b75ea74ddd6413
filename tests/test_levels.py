"""A path above, inside or of another age than a checkpoint: the error names what was meant."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from support import gcs
from support.checkpoints import FIXTURES
from support.damage import Place, without_database
from vllm_maxtext_loader import errors
from vllm_maxtext_loader.checkpoint.find import COMMIT_FILE, STEP_METADATA, TREE_METADATA, locate


def refused(path: str, step: int | None = None, kind: type[Exception] = errors.NotACheckpointError) -> str:
    with pytest.raises(kind) as raised:
        locate(path, step)
    return str(raised.value)


def test_base_directory_of_several_runs(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    place.step("100", parent="base/exp_1/checkpoints")
    place.step("200", parent="base/exp_1/checkpoints")
    place.step("7", parent="base/other")
    (place.root / "base/logs").mkdir()
    (place.root / "base/logs/events").write_text("x")
    (place.root / "base/notes.txt").write_text("x")
    base = place.url("base")
    with caplog.at_level(logging.INFO):
        message = refused(base)
    assert "is no Orbax checkpoint" in message
    assert "Below it would load: exp_1 (step 200), other (step 7)." in message
    assert f"Give the path, e.g. {base}/exp_1." in message
    assert not caplog.records
    assert locate(f"{base}/exp_1").step == 200


def test_actor_and_critic(place: Place) -> None:
    for name in ("actor", "critic"):
        place.step("30", parent=f"rl/{name}")
    assert "Below it would load: actor (step 30), critic (step 30)." in refused(place.url("rl"))


def test_two_levels_up(place: Place) -> None:
    place.step("100", parent="bucket/me/exp/checkpoints")
    assert "Below it would load: me/exp (step 100)." in refused(place.url("bucket"))
    (place.root / "nothing/a/b/c").mkdir(parents=True)
    (place.root / "nothing/a/b/c/x").write_text("x")
    assert "would load" not in refused(place.url("nothing"))


def test_top_of_a_bucket() -> None:
    server, proxy = gcs.shared()
    with gcs.environment(proxy.url):
        server.make_bucket("top-of-a-bucket")
        server.upload(FIXTURES / "moe_v2/checkpoints", "top-of-a-bucket", "exp/checkpoints/")
        assert "Below it would load: exp (step 0). Give the path, e.g. gs://top-of-a-bucket/exp." in refused(
            "gs://top-of-a-bucket"
        )


def test_requests_of_a_directory_with_many_others(tmp_path: Path) -> None:
    proxy = gcs.shared()[1]
    with gcs.environment(proxy.url):
        place = Place(tmp_path, tmp_path.name)
        for number in range(200):
            (tmp_path / f"base/user{number}/data").mkdir(parents=True)
            (tmp_path / f"base/user{number}/data/x").write_text("x")
        url = place.url("base")
        proxy.clear()
        refused(url)
        assert sum(proxy.counts().values()) < 150


def test_part_of_a_checkpoint(place: Place) -> None:
    place.step("100")
    items = place.url("run", "100", "items")
    for part in ("d", "ocdbt.process_0", "ocdbt.process_0/d", "array_metadatas"):
        assert f"is a part of a checkpoint. Give the path of all of it: {items}" in refused(f"{items}/{part}")
    assert "is a file" in refused(f"{items}/{TREE_METADATA}")


OLD = ["arrays by leaf name", "msgpack file and arrays", "msgpack file and database", "msgpack file"]


def old(place: Place, layout: str, *, step: str = "100", item: str = "default") -> Path:
    """A step as an Orbax of 2023 wrote it: no metadata of the tree and of the step."""
    target = place.root / "run" / step / item
    if layout == "msgpack file and database":
        shutil.copytree(FIXTURES / "moe_zarr2/checkpoints/0/items", target)
    elif layout == "msgpack file":
        target.mkdir(parents=True)
    else:
        files = without_database(FIXTURES / "moe_zarr2/checkpoints", place.root / f"files {step}")
        shutil.copytree(files / "0/items", target)
    for name in (TREE_METADATA, "_sharding", COMMIT_FILE):
        (target / name).unlink(missing_ok=True)
    shutil.rmtree(target / "array_metadatas", ignore_errors=True)
    if layout != "arrays by leaf name":
        (target / "checkpoint").write_bytes(b"\x81")
    if place.is_remote:
        (target.parent / COMMIT_FILE).touch()
    return target


@pytest.mark.parametrize("layout", OLD)
def test_layout_without_tree_metadata(place: Place, layout: str) -> None:
    old(place, layout)
    run = place.url("run")
    for path in (run, f"{run}/100", f"{run}/100/default"):
        message = refused(path, kind=errors.OldLayoutError)
        assert f"{run}/100/default: has " in message
        assert "written by an Orbax of 2023 or before" in message
        assert "save it with a current Orbax" in message
        assert "opy the checkpoint again" not in message
    assert "Orbax of 2023" in refused(run, 100, errors.OldLayoutError)


def test_old_step_is_not_passed_over(place: Place) -> None:
    place.step("50")
    old(place, "msgpack file and arrays")
    assert "100/default" in refused(place.url("run"), kind=errors.OldLayoutError)
    assert locate(place.url("run"), 50).step == 50


def test_files_of_others_are_no_old_checkpoint(place: Place) -> None:
    for name, files in {
        "tensorflow": ("checkpoint", "model.ckpt-1.index", "model.ckpt-1.data-00000-of-00001"),
        "torch": ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"),
    }.items():
        (place.root / name).mkdir()
        for file in files:
            (place.root / name / file).write_text("x")
        assert "is no Orbax checkpoint" in refused(place.url(name))


def test_unfinished_arrays_by_name_are_not_old(place: Place) -> None:
    files = without_database(FIXTURES / "moe_zarr2/checkpoints", place.root / "run") / "0"
    (files / "items" / TREE_METADATA).unlink()
    (files / COMMIT_FILE).unlink(missing_ok=True)
    (files / STEP_METADATA).write_text('{"commit_timestamp_nsecs": null}')
    assert "never committed" in refused(place.url("run"), kind=errors.UncommittedCheckpointError)
