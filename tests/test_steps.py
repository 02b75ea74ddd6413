"""Which directories of a run are its steps, and which of these are finished."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support import gcs
from support.damage import Place
from vllm_maxtext_loader import errors
from vllm_maxtext_loader.checkpoint.find import COMMIT_FILE, STEP_METADATA, TREE_METADATA, locate
from vllm_maxtext_loader.checkpoint.names import naming_schemes


def hugging_face(place: Place, name: str) -> None:
    """A directory that a tokenizer or an export left next to the steps."""
    (place.root / "run" / name).mkdir(parents=True)
    (place.root / "run" / name / "config.json").write_text("{}")
    (place.root / "run" / name / "model.safetensors.index.json").write_text("{}")


def messages(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


@pytest.mark.parametrize("backup", ["before_crash_900", "checkpoint_900", "200_old_900", "export_0000900"])
def test_backup_next_to_numbers_is_not_a_step(
    place: Place, backup: str, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("100", "200", backup):
        place.step(name)
    hugging_face(place, "hf_20250101")
    run = place.url("run")
    with caplog.at_level(logging.INFO):
        assert locate(run).items.url == f"{run}/200/items"
    assert not messages(caplog, logging.WARNING)
    said = messages(caplog, logging.INFO)
    assert len(said) == 1
    assert_says(said[0], f"{run}: passed over", backup, "hf_20250101", "give its path")
    with pytest.raises(errors.StepNotFoundError) as raised:
        locate(run, 900)
    assert_says(str(raised.value), "has no step 900. Steps: 100, 200.", backup, "give its path")
    assert locate(f"{run}/{backup}").step == 900
    assert locate(run, 100).items.url == f"{run}/100/items"


def test_orbax_has_the_same_newest_step(tmp_path: Path) -> None:
    from orbax.checkpoint.path import step as orbax_step

    place = Place(tmp_path, None)
    for name in ("100", "200", "before_crash_900"):
        place.step(name)
        place.step(f"checkpoint_{name}", parent="prefix")
    shutil.rmtree(tmp_path / "prefix/checkpoint_before_crash_900")
    for run, prefix in (("run", None), ("prefix", "checkpoint")):
        newest = orbax_step.latest_step_metadata(
            tmp_path / run, orbax_step.standard_name_format(step_prefix=prefix)
        )
        assert newest is not None
        assert locate(tmp_path / run).items.url == str(newest.path / "items")


def test_one_prefix(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("checkpoint_5", "checkpoint_20"):
        place.step(name)
    hugging_face(place, "hf_20250101")
    hugging_face(place, "tokenizer")
    run = place.url("run")
    with caplog.at_level(logging.INFO):
        assert locate(run).items.url == f"{run}/checkpoint_20/items"
    assert not messages(caplog, logging.WARNING)
    assert_says(messages(caplog, logging.INFO)[0], "passed over hf_20250101:")
    assert locate(run, 5).items.url == f"{run}/checkpoint_5/items"
    assert locate(f"{run}/checkpoint_5").step == 5
    with pytest.raises(
        errors.StepNotFoundError, match=r"has no step 7\. Steps: checkpoint_5, checkpoint_20\."
    ):
        locate(run, 7)


@pytest.mark.parametrize("step", [None, 100, 200, 7])
def test_two_prefixes_are_a_question(place: Place, step: int | None) -> None:
    for name in ("checkpoint_50", "checkpoint_100", "params_200"):
        place.step(name)
    run = place.url("run")
    with pytest.raises(errors.StepNotFoundError) as raised:
        locate(run, step)
    assert_says(
        str(raised.value), "checkpoint_100, params_200", f"Give the path of a step's directory, e.g. {run}/"
    )
    assert locate(f"{run}/checkpoint_100").step == 100


def test_numbers_without_a_checkpoint_are_no_steps(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    place.step("checkpoint_100")
    for name in ("20250101", "20250102"):
        hugging_face(place, name)
    run = place.url("run")
    with caplog.at_level(logging.INFO):
        assert locate(run).items.url == f"{run}/checkpoint_100/items"
    assert not messages(caplog, logging.WARNING)
    assert locate(run, 100).step == 100
    place.step("200")
    run = place.url("run")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert locate(run).items.url == f"{run}/200/items"
    assert not messages(caplog, logging.WARNING)
    assert_says(messages(caplog, logging.INFO)[0], "20250101", "20250102", "checkpoint_100")


def test_two_directories_of_one_number(place: Place) -> None:
    for name in ("100", "000100", "200"):
        place.step(name)
    run = place.url("run")
    assert locate(run).step == 200
    with pytest.raises(errors.StepNotFoundError, match=r"000100 and 100 are both step 100\. Give the path"):
        locate(run, 100)
    assert locate(f"{run}/000100").step == 100
    hugging_face(place, "0300")
    place.step("300")
    run = place.url("run")
    assert locate(run).items.url == f"{run}/300/items"


def test_items_next_to_numbers_are_an_export(place: Place) -> None:
    step = place.step("100")
    shutil.copytree(step / "items", place.root / "run/params")
    run = place.url("run")
    assert locate(run).items.url == f"{run}/100/items"


def test_run_directory_with_a_dated_export(place: Place) -> None:
    place.step("100", parent="run/checkpoints")
    place.step("backup_900")
    hugging_face(place, "hf_20250101")
    hugging_face(place, "20250101")
    run = place.url("run")
    assert locate(run).items.url == f"{run}/checkpoints/100/items"
    assert locate(run, 100).step == 100


def test_names_of_steps() -> None:
    names = [
        "0",
        "007",
        "a_b_3",
        "step_7",
        "_5",
        "x",
        "ocdbt.process_0",
        "7.orbax-checkpoint-tmp-1",
        "\x1b_3",
    ]
    assert naming_schemes(names) == {
        "": {0: ["0"], 7: ["007"]},
        "a_b": {3: ["a_b_3"]},
        "step": {7: ["step_7"]},
    }


def test_name_of_an_item_is_not_a_step(place: Place) -> None:
    step = place.step("100")
    (step / "items").rename(step / "params_2")
    run = place.url("run")
    for named in (run, f"{run}/100", f"{run}/100/params_2"):
        found = locate(named)
        assert (found.items.url, found.step) == (f"{run}/100/params_2", 100)


def unfinished(place: Place, name: str, state: str) -> Path:
    """A step as a writer leaves it that commits by a file, or as a copy of a live run has it."""
    step = place.step(name)
    (step / COMMIT_FILE).unlink()
    (step / "items" / COMMIT_FILE).unlink()
    metadata = step / STEP_METADATA
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"commit_timestamp_nsecs": None}))
    (step / "items" / TREE_METADATA).unlink()
    match state:
        case "arrays of a process":
            (step / "items/manifest.ocdbt").unlink()
            shutil.rmtree(step / "items/d")
        case "no item":
            shutil.rmtree(step / "items")
        case "no metadata at all":
            metadata.unlink()
        case "metadata that is being written":
            metadata.write_bytes(b"")
    return step


STATES = ["arrays", "arrays of a process", "no item", "no metadata at all", "metadata that is being written"]


@pytest.mark.parametrize("state", STATES)
def test_unfinished_step_is_skipped(place: Place, state: str, caplog: pytest.LogCaptureFixture) -> None:
    place.step("100")
    unfinished(place, "200", state)
    run = place.url("run")
    with caplog.at_level(logging.INFO):
        assert locate(run).items.url == f"{run}/100/items"
    (said,) = messages(caplog, logging.WARNING)
    assert_says(said, f"Skipped newer steps of {run}: {run}/200: holds no finished item: never committed")
    missing = {
        "no item": COMMIT_FILE if place.is_remote else f"{STEP_METADATA} has no commit time",
        "no metadata at all": f"200/items has arrays but no {TREE_METADATA}",
    }.get(state, COMMIT_FILE if place.is_remote else f"200/items has arrays but no {TREE_METADATA}")
    named = [(run, 200), (f"{run}/200", None)]
    if state != "no item":
        named.append((f"{run}/200/items", None))
    for path, step in named:
        with pytest.raises(errors.UncommittedCheckpointError) as raised:
            locate(path, step)
        assert_says(str(raised.value), "never committed", missing, "wait for it")
        assert "Copy the checkpoint again" not in str(raised.value)


def test_only_unfinished_steps(place: Place) -> None:
    unfinished(place, "200", "arrays")
    with pytest.raises(
        errors.UncommittedCheckpointError, match=r"run: no step is committed: .*run/200: holds no"
    ):
        locate(place.url("run"))


@pytest.mark.parametrize("mark", [COMMIT_FILE, "commit time"])
def test_committed_step_without_tree_is_damaged(place: Place, mark: str) -> None:
    place.step("100")
    step = place.step("200")
    (step / "items" / TREE_METADATA).unlink()
    if mark == COMMIT_FILE:
        (step / STEP_METADATA).unlink()
    elif place.is_remote:
        return
    else:
        (step / COMMIT_FILE).unlink()
    run = place.url("run")
    for path in (run, f"{run}/200"):
        with pytest.raises(
            errors.CorruptMetadataError, match=r"200: Orbax finished it, but no item in it has a"
        ):
            locate(path)
    with pytest.raises(
        errors.CorruptMetadataError, match=r"200: Orbax finished it, but items has no _METADATA"
    ):
        locate(f"{run}/200/items")


def test_unfinished_step_of_another_item(place: Place) -> None:
    """The item that holds the model is not there yet, the others are."""
    place.step("100")
    step = place.step("200")
    for item in ("adam", "state"):
        shutil.copytree(step / "items", step / item)
        tree = {"key_metadata": [{"key": "count"}], "value_metadata": {"value_type": "scalar"}}
        (step / item / TREE_METADATA).write_text(json.dumps({"tree_metadata": {"x": tree}}))
    shutil.rmtree(step / "items")
    (step / COMMIT_FILE).unlink()
    run = place.url("run")
    assert locate(run).step == 100
    with pytest.raises(errors.UncommittedCheckpointError, match=rf"200: {COMMIT_FILE} is missing"):
        locate(run, 200)


NAMES = ["1", "2", "0002", "3", "a_3", "a_4", "b_c_5", "b_c_0005", "z"]


def expected(states: dict[str, str]) -> str | type[Exception]:
    """The directory that is loaded, or the error, by the rules of docs/gcs.md."""
    holding = {name for name, state in states.items() if state != "other" and name != "z"}
    schemes = {name.rpartition("_")[0] for name in holding}
    if not holding:
        return errors.NotACheckpointError
    if "" in schemes:
        holding = {name for name in holding if "_" not in name}
    elif len(schemes) > 1:
        return errors.StepNotFoundError
    numbers = {name: int(name.rpartition("_")[2]) for name in holding}
    for number in sorted(set(numbers.values()), reverse=True):
        named = [name for name in holding if numbers[name] == number]
        if len(named) > 1:
            return errors.StepNotFoundError
        if states[named[0]] == "committed":
            return named[0]
    return errors.UncommittedCheckpointError


def test_newest_step_follows_the_rules(tmp_path: Path) -> None:
    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.dictionaries(
            st.sampled_from(NAMES), st.sampled_from(["committed", "unfinished", "other"]), min_size=1
        )
    )
    def run(states: dict[str, str]) -> None:
        for name, state in states.items():
            directory = tmp_path / "run" / name
            (directory / "items").mkdir(parents=True)
            (directory / "items" / ("config.json" if state == "other" else TREE_METADATA)).touch()
            if state != "other":
                time = None if state == "unfinished" else 1
                (directory / STEP_METADATA).write_text(json.dumps({"commit_timestamp_nsecs": time}))
        want = expected(states)
        try:
            if isinstance(want, str):
                assert locate(tmp_path / "run").items.url == str(tmp_path / "run" / want / "items")
            else:
                with pytest.raises(want):
                    locate(tmp_path / "run")
        finally:
            shutil.rmtree(tmp_path / "run")

    run()


def test_requests_of_runs_with_other_directories(tmp_path: Path) -> None:
    proxy = gcs.shared()[1]
    with gcs.environment(proxy.url):
        place = Place(tmp_path, tmp_path.name)
        for name in ("1", "before_crash_900"):
            place.step(name)
        hugging_face(place, "hf_20250101")
        place.step("checkpoint_1", parent="prefix")
        shutil.copytree(place.root / "run/hf_20250101", place.root / "prefix/hf_20250101")
        step = place.step("1", parent="items")
        shutil.copytree(step / "items", step / "iter")
        for run, kinds in (
            ("run", {"list": 2, "stat": 1, "read": 1}),
            ("prefix", {"list": 3, "stat": 1, "read": 1}),
            ("items", {"list": 2, "read": 2}),
        ):
            url = place.url(run)
            proxy.clear()
            locate(url)
            assert proxy.counts() == kinds, run


def assert_says(message: str, *parts: str) -> None:
    for part in parts:
        assert part in message, f"{part!r} is not in {message}"
