"""From what a user types to the committed item: on a disk and in a bucket, held against Orbax's verdict."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import gcs
from support.checkpoints import FIXTURES
from support.damage import CASE, Place, unprivileged
from vllm_maxtext_loader import errors
from vllm_maxtext_loader.checkpoint.find import (
    COMMIT_FILE,
    STEP_METADATA,
    TMP_MARK,
    TREE_METADATA,
    locate,
)
from vllm_maxtext_loader.checkpoint.storage.path import Location


def set_commit_time(step: Path, value: int | None) -> None:
    path = step / STEP_METADATA
    path.write_text(json.dumps(json.loads(path.read_text()) | {"commit_timestamp_nsecs": value}))


def test_run_step_and_item_mean_the_same(place: Place) -> None:
    place.step("0")
    run, step, items = place.url("run"), place.url("run", "0"), place.url("run", "0", "items")
    for named in (run, step, items, step + "/", items + "//"):
        found = locate(named)
        assert (found.items.url, found.step, found.scan_layers) == (items, 0, True)
    assert locate(run, 0).items.url == locate(step, 0).items.url == locate(items, 0).items.url == items


def test_newest_step_is_a_matter_of_numbers(place: Place) -> None:
    for name in ("9", "10", "007"):
        place.step(name)
    run = place.url("run")
    assert locate(run).step == 10
    assert locate(run, 7).items.url.endswith("/007/items")
    assert locate(run, 9).step == 9


def test_step_that_is_not_there(place: Place) -> None:
    place.step("3")
    place.step("12")
    with pytest.raises(errors.StepNotFoundError, match=r"run: has no step 4\. Steps: 3, 12\."):
        locate(place.url("run"), 4)
    with pytest.raises(
        errors.StepNotFoundError, match=r"step 4 is wanted, but the path names step 12\. Give the run"
    ):
        locate(place.url("run", "12", "items"), 4)
    shutil.copytree(place.root / "run/3/items", place.root / "bare")
    if place.is_remote:
        (place.root / "bare" / COMMIT_FILE).touch()
    assert locate(place.url("bare")).step is None
    with pytest.raises(errors.StepNotFoundError, match=r"step 4 is wanted, but the path names no step"):
        locate(place.url("bare"), 4)


def test_newest_step_without_commit_file_is_skipped_in_a_bucket(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.step("1")
    (place.step("2") / COMMIT_FILE).unlink()
    if not place.is_remote:
        # A disk's commit is a rename; without its own mark the step is as good as the item's says.
        (place.root / "run/2/items" / COMMIT_FILE).unlink()
        assert locate(place.url("run")).step == 2
        return
    with caplog.at_level(logging.WARNING):
        assert locate(place.url("run")).step == 1
    assert "Skipped newer steps" in caplog.text
    assert "run/2: commit_success.txt is missing" in caplog.text
    for named in (place.url("run", "2"), place.url("run", "2", "items")):
        with pytest.raises(errors.UncommittedCheckpointError) as raised:
            locate(named)
        assert_says(
            raised.value, "run/2: commit_success.txt is missing", "wait for it", '{"step": N}', "copied here"
        )
    with pytest.raises(errors.UncommittedCheckpointError, match=r"run/2: commit_success.txt is missing"):
        locate(place.url("run"), 2)


def test_copy_of_an_uncommitted_step_of_a_bucket(place: Place) -> None:
    (place.step("2") / COMMIT_FILE).unlink()
    with pytest.raises(
        errors.UncommittedCheckpointError, match=r"no step is committed: .*run/2: commit_success"
    ):
        locate(place.url("run"))


def test_step_without_commit_time(place: Place) -> None:
    set_commit_time(place.step("2"), None)
    for named, step in (
        (place.url("run", "2"), None),
        (place.url("run", "2", "items"), None),
        (place.url("run"), 2),
    ):
        with pytest.raises(
            errors.UncommittedCheckpointError, match="run/2: _CHECKPOINT_METADATA has no commit time"
        ):
            locate(named, step)
    place.step("1")
    assert locate(place.url("run")).step == 1


def test_temporary_directories(place: Place) -> None:
    tmp = f"7{TMP_MARK}-1234"
    place.step(tmp)
    with pytest.raises(errors.UncommittedCheckpointError, match="holds only temporary directories"):
        locate(place.url("run"))
    for named in (place.url("run", tmp), place.url("run", tmp, "items")):
        with pytest.raises(errors.UncommittedCheckpointError, match=f"{tmp} is a temporary directory"):
            locate(named)
    place.step("6")
    assert locate(place.url("run")).step == 6
    step = place.step("8")
    (step / "items").rename(step / f"items{TMP_MARK}-99")
    if place.is_remote:
        place.prefix = f"{place.prefix}-tmp-item"
    with pytest.raises(errors.UncommittedCheckpointError, match="run/8: holds no finished item"):
        locate(place.url("run"), 8)
    assert locate(place.url("run")).step == 6


def test_step_that_is_being_written_to_a_bucket(place: Place) -> None:
    step = place.step("2")
    shutil.rmtree(step / "items")
    if place.is_remote:
        (step / COMMIT_FILE).unlink()
        with pytest.raises(
            errors.UncommittedCheckpointError, match="run/2: holds no finished item: never committed"
        ):
            locate(place.url("run", "2"))
    else:
        with pytest.raises(
            errors.CorruptMetadataError, match="run/2: Orbax finished it, but no item in it has"
        ):
            locate(place.url("run", "2"))


def test_finished_step_without_tree_is_not_passed_over(place: Place) -> None:
    place.step("1")
    (place.step("2") / "items" / TREE_METADATA).unlink()
    with pytest.raises(
        errors.CorruptMetadataError, match=r"run/2: Orbax finished it, but no item in it has a _METADATA"
    ):
        locate(place.url("run"))


@pytest.mark.parametrize("content", ["", "{", "[]", "nul", '{"a": ' * 100_000, "\xff"])
def test_damaged_step_metadata(place: Place, content: str) -> None:
    (place.step("1") / STEP_METADATA).write_bytes(content.encode("latin-1"))
    with pytest.raises(
        errors.CorruptMetadataError, match=r"run/1/_CHECKPOINT_METADATA: is not (valid JSON|a JSON)"
    ):
        locate(place.url("run"))


def test_what_is_no_checkpoint(place: Place) -> None:
    (place.root / "model").mkdir()
    (place.root / "model/config.json").write_text("{}")
    with pytest.raises(errors.NotACheckpointError, match=r"is no Orbax checkpoint: .* Found: config.json"):
        locate(place.url("model"))
    with pytest.raises(errors.NotACheckpointError, match=r"config.json: is a file; expected a directory"):
        locate(place.url("model", "config.json"))
    with pytest.raises(
        errors.CheckpointNotFoundError, match=r"mode: no such checkpoint directory\. .* holds: .*model"
    ):
        locate(place.url("mode"))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(errors.NotACheckpointError, match="the directory is empty"):
        locate(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(
        errors.CheckpointNotFoundError, match=r"link: is a symbolic link to .*gone, which does not exist"
    ):
        locate(tmp_path / "link")
    proxy = gcs.shared()[1]
    with gcs.environment(proxy.url):
        with pytest.raises(
            errors.CheckpointNotFoundError, match=r"there is no bucket no-such-bucket.*Check the bucket"
        ):
            locate("gs://no-such-bucket/run")
        with pytest.raises(
            errors.CheckpointNotFoundError,
            match=r"gs://-x/run: is not a valid bucket name\. Bucket names must",
        ):
            locate("gs://-x/run")


def test_run_directory_finds_its_checkpoints(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    place.step("3", parent="experiment/checkpoints")
    place.step("12", parent="experiment/checkpoints")
    (place.root / "experiment/tensorboard").mkdir()
    (place.root / "experiment/tensorboard/events").write_text("x")
    experiment, checkpoints = place.url("experiment"), place.url("experiment", "checkpoints")
    with caplog.at_level(logging.INFO):
        assert locate(experiment).items.url == f"{checkpoints}/12/items"
    said = [record.getMessage() for record in caplog.records if "run's directory" in record.getMessage()]
    assert said == [f"{experiment} is a run's directory: using its checkpoints in {checkpoints}."]
    assert locate(experiment, 3).items.url == f"{checkpoints}/3/items"
    with pytest.raises(
        errors.StepNotFoundError, match=r"experiment/checkpoints: has no step 4\. Steps: 3, 12"
    ):
        locate(experiment, 4)
    # Steps that lie here come first, and only one level is looked into.
    place.step("5", parent="experiment")
    assert locate(place.url("experiment")).items.url == f"{experiment}/5/items"
    place.step("1", parent="deep/checkpoints/checkpoints")
    with pytest.raises(errors.NotACheckpointError, match=r"deep/checkpoints: is no Orbax checkpoint"):
        locate(place.url("deep"))


def test_listed_names_cannot_forge_lines_or_steer_a_terminal(place: Place) -> None:
    names = (
        ("\x1b[2J_30", "a\u202eb") if place.is_remote else ("\x1b[2J_30", "a\u202eb", "x\nWARNING: forged")
    )
    for name in names:
        (place.root / "run" / name).mkdir(parents=True)
        (place.root / "run" / name / "f").write_text("x")
    for named in ((), ("x",)):
        with pytest.raises(errors.MaxTextLoadError) as raised:
            locate(place.url("run", *named))
        message = str(raised.value)
        assert message.isprintable()
        assert r"\x1b[2J_30" in message
    place.step("7")
    assert locate(place.url("run")).step == 7


def test_link_to_a_name_with_escapes(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("\x1b[2J")
    with pytest.raises(errors.CheckpointNotFoundError, match=r"link to \\x1b\[2J, which does not exist"):
        locate(tmp_path / "link")


def test_forms_of_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(FIXTURES / CASE, tmp_path / CASE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    items = str(tmp_path / CASE / "checkpoints/0/items")
    (tmp_path / "latest").symlink_to(tmp_path / CASE / "checkpoints")
    for path in (f"{CASE}/checkpoints", f"~/{CASE}/checkpoints/", f"file://{tmp_path}/{CASE}/checkpoints"):
        assert locate(path).items.url == items
    assert locate("latest").items.url == str(tmp_path / "latest/0/items")
    assert Location.parse("gcs://bucket//a/").url == "gs://bucket/a"


@pytest.mark.parametrize(
    "closed", ["", "checkpoints/0", "checkpoints/0/_CHECKPOINT_METADATA", "checkpoints/0/items"]
)
def test_permission_denied(closed: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(shutil.copytree(FIXTURES / CASE, Path(directory) / "case"))
        os.chmod(directory, 0o755)
        os.chmod(root / closed, 0)
        try:
            with unprivileged(), pytest.raises(errors.StorageError) as raised:
                locate(root / "checkpoints")
        finally:
            os.chmod(root / closed, 0o755)
        assert_says(raised.value, str(root), "Permission denied", "readable for the user this runs as")


@pytest.fixture(scope="module")
def orbax_tree() -> Iterator[Path]:
    """What Orbax itself writes: by its checkpoint manager, its new interface, and as a single tree."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import numpy as np
    import orbax.checkpoint as ocp
    import orbax.checkpoint.experimental.v1 as ocp1

    tree = {"params": {"params": {"token_embedder": {"embedding": np.ones((4, 4), np.float32)}}}}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
        with ocp.CheckpointManager(root / "manager", item_names=("items",), options=options) as manager:
            manager.save(7, args=ocp.args.Composite(items=ocp.args.PyTreeSave(tree)))
        ocp1.save_checkpointables(root / "new/7", {"items": tree})
        ocp.PyTreeCheckpointer().save(root / "single/7/items", tree)
        yield root


SAVED = {"manager": "7", "new": "7", "single": "7/items"}
"""The directory that Orbax was told to save to, and that it marks."""


@pytest.mark.parametrize("spoil", ["nothing", "commit file", "name"])
@pytest.mark.parametrize("writer", list(SAVED))
def test_orbax_agrees(place: Place, orbax_tree: Path, writer: str, spoil: str) -> None:
    import fsspec
    from orbax.checkpoint.path import step as orbax_step

    shutil.copytree(orbax_tree / writer, place.root / writer)
    saved, items = SAVED[writer], "7/items"
    if spoil == "commit file":
        (place.root / writer / saved / COMMIT_FILE).unlink()
        if not place.is_remote:
            (place.root / writer / items / COMMIT_FILE).unlink(missing_ok=True)
    if spoil == "name":
        head, _, tail = saved.partition("/")
        renamed = f"{head}/{tail}{TMP_MARK}-1" if tail else f"{head}{TMP_MARK}-1"
        (place.root / writer / saved).rename(place.root / writer / renamed)
        saved, items = renamed, renamed if tail else f"{renamed}/items"
    before = fsspec.config.conf.get("gcs")
    fsspec.config.conf["gcs"] = {"token": "anon", "use_listings_cache": False}
    try:
        finished = orbax_step.is_path_finalized(place.url(writer, saved))
    finally:
        fsspec.config.conf["gcs"] = before or {}
    # Orbax looks at a bucket's commit file only; a temporary name is refused here in a bucket as well.
    assert finished == (spoil == "nothing" or (spoil == "commit file") != place.is_remote)
    for named in {place.url(writer, saved), place.url(writer, items)}:
        if finished and spoil != "name":
            assert locate(named).items.url == place.url(writer, items)
            assert locate(place.url(writer)).step == 7
        else:
            with pytest.raises(errors.UncommittedCheckpointError):
                locate(named)


def test_requests(tmp_path: Path) -> None:
    proxy = gcs.shared()[1]
    with gcs.environment(proxy.url):
        place = Place(tmp_path, tmp_path.name)
        place.step("1")
        (place.step("2") / COMMIT_FILE).unlink()
        place.step("1", parent="experiment/checkpoints")
        run, step, items = place.url("run"), place.url("run", "1"), place.url("run", "1", "items")
        for named, wanted, kinds in (
            (step, None, {"list": 1, "stat": 1, "read": 1}),
            (items, None, {"list": 1, "stat": 1, "read": 1}),
            (run, 1, {"list": 2, "stat": 1, "read": 1}),
            (run, None, {"list": 3, "stat": 2, "read": 2}),
            (place.url("experiment"), None, {"list": 3, "stat": 1, "read": 1}),
        ):
            proxy.clear()
            locate(named, wanted)
            assert proxy.counts() == kinds, named


def test_step_deleted_while_steps_are_looked_at(tmp_path: Path) -> None:
    server, proxy = gcs.shared()
    place = Place(tmp_path, tmp_path.name)
    place.step("1")
    place.step("2")
    with gcs.environment(proxy.url):
        run = place.url("run")

        def delete() -> None:
            server.delete(gcs.BUCKET, f"{place.prefix}/run/2/")

        proxy.clear()
        proxy.faults = [gcs.Fault(f"list .*{place.prefix}/run/2/", before=delete, times=1)]
        assert locate(run).step == 1
        with pytest.raises(errors.StepNotFoundError):
            locate(run, 2)


def assert_says(error: Exception, *parts: str) -> None:
    for part in parts:
        assert part in str(error), f"{part!r} is not in {error}"
