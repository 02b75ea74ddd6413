"""A new step in a running engine: vLLM with tpu-inference on JAX's CPU backend.

The truth is a fresh engine on that step: after a reload every array is what it holds, bit for bit and shard for shard, and
log-probs over the whole vocabulary are equal. Nothing is compiled, nothing of the old weights stays, and whatever goes
wrong changes nothing. One process starts all engines (support/reload_worker.py); the tests read what it wrote down.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import images
from support.checkpoints import cases, read_orbax, write_orbax
from support.damage import biggest, cut, flip
from support.engine import PROMPTS, read_config, run_jobs
from support.steps import FIRST, SECOND, write_run
from vllm_maxtext_loader import open_checkpoint
from vllm_maxtext_loader.checkpoint import checksums

pytestmark = pytest.mark.engine

WORKER = Path(__file__).parent / "support" / "reload_worker.py"

EQUAL: dict[str, tuple[str, str | None, str]] = {
    "dense": ("dense_v2", None, "1"),
    "MoE, another layout": ("moe_v2", "moe_v1", "2"),
    "images": ("moe_mm", None, "1"),
    "images, Gemma 3": ("gemma3_mm", None, "4"),
    "expert parallel, fused gate and up": ("moe_v2", "moe_prefused", "8-ep"),
    "E2B": ("e2b", None, "2"),
    "E4B": ("e4b", None, "4"),
    "Qwen3, unscanned": ("qwen3_scanned", "qwen3_unscanned", "8"),
    "Qwen3, tied": ("qwen3_tied", None, "2"),
    "Qwen3 MoE": ("qwen3moe_scanned", None, "4"),
    "Qwen2.5, with biases": ("qwen2_scanned", None, "4"),
    "Llama": ("llama31_scanned", None, "8"),
    "Mistral": ("mistral_scanned", None, "4"),
    "Mixtral": ("mixtral_scanned", None, "4-ep"),
    "Gemma 3": ("gemma3_scanned", None, "8"),
}
"""The first step's fixture, the second one's where it is another, and the tensor parallel size (-ep: expert parallel)."""

IMAGES = {
    "images": (images.write_gemma4, images.IMAGE),
    "images, Gemma 3": (images.write_gemma3, images.BEGIN),
}
"""What makes a twin take images, and the token that stands for one."""

SPEAKING = ("dense", "MoE, another layout", *IMAGES)
"""Cases that answer prompts, too."""


LONG = [2] + [(13 * i + 5) % 250 for i in range(119)]
"""Longer than a block of the KV cache: only whole blocks are found again."""


def _speaking(directory: Path) -> dict[str, Any]:
    """A text model's prompts."""
    vocab_size = read_config(directory)["vocab_size"]
    return {"prompts": [*PROMPTS, LONG], "vocab_size": vocab_size, "arguments": {"max_logprobs": vocab_size}}


def _equal_job(
    case: str, directory: Path, twin: Callable[[str], Path], pictures: list[Path]
) -> dict[str, Any]:
    name, other, setting = EQUAL[case]
    model = twin(name)
    job: dict[str, Any] = {"name": case, "kind": "equal", "run": str(write_run(directory, name, other))}
    if case in IMAGES:
        write, placeholder = IMAGES[case]
        model = write(model, directory / "twin")
        job["prompts"] = [[2, 17, 99, placeholder, 41, 8]] * len(pictures)
        job["arguments"] = images.engine_arguments(model)
        job |= {"images": [str(path) for path in pictures], "vocab_size": job["arguments"]["max_logprobs"]}
    elif case in SPEAKING:
        job |= _speaking(model)
    size, _, expert = setting.partition("-")
    parallel = {"tensor_parallel_size": int(size), "enable_expert_parallel": bool(expert)}
    return {**job, "model": str(model), "arguments": {**job.get("arguments", {}), **parallel}}


@pytest.fixture(scope="module")
def equal(twin: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every case: a fresh engine on the second step, and one that was reloaded."""
    pictures = images.write_images(tmp_path_factory.mktemp("pictures"))
    jobs = [_equal_job(case, tmp_path_factory.mktemp("case"), twin, pictures) for case in EQUAL]
    return run_jobs(jobs, tmp_path_factory.mktemp("equal"), devices=8, worker=WORKER)


def _answer(answers: dict[str, Any], name: str) -> dict[str, Any]:
    assert "error" not in answers[name], answers[name]["traceback"]
    return answers[name]


@pytest.mark.parametrize("case", EQUAL)
def test_arrays_are_those_of_a_fresh_engine(equal: dict[str, Any], case: str) -> None:
    answer = _answer(equal, case)
    assert answer["changed"] > 20
    assert answer["different"] == []
    assert answer["different after the way back"] == []
    assert answer["served"] == [SECOND, FIRST, FIRST]
    assert answer["versions"] == [f"step-{FIRST}", f"step-{SECOND}", f"step-{FIRST}"]


@pytest.mark.parametrize("case", SPEAKING)
def test_log_probs_are_those_of_a_fresh_engine(equal: dict[str, Any], case: str) -> None:
    answer = _answer(equal, case)
    assert answer["said something else"]
    assert answer["said the same"]
    assert answer["said the same after the way back"]


@pytest.mark.parametrize("case", EQUAL)
def test_nothing_is_compiled_and_nothing_stays(equal: dict[str, Any], case: str) -> None:
    answer = _answer(equal, case)
    assert answer["compiled"] == []
    before, after = answer["programs"]
    assert before == after
    assert all(before) == (case in SPEAKING)
    assert answer["old weights"] == []
    assert answer["leaked"] <= 0


@pytest.mark.parametrize("case", EQUAL)
def test_devices_hold_the_model_and_one_array(equal: dict[str, Any], case: str) -> None:
    over, largest = _answer(equal, case)["over the model"]
    assert over <= largest


def test_log_says_what_was_exchanged_and_how_long_it_took(equal: dict[str, Any]) -> None:
    # vLLM takes the handlers off its loggers when the first engine of a process starts.
    log = _answer(equal, "MoE, another layout")["log"]
    lines = [line for line in log if " now (step " in line]
    assert len(lines) == 4
    assert f"step {SECOND}; before, step {FIRST}" in lines[0]
    for part in ("GiB read", "arrays exchanged", "staging", "pause"):
        assert part in lines[0]


DAMAGED = {
    201: "missing data",
    202: "truncated",
    204: "wrong shape",
    999: "no such step",
}


@pytest.fixture(scope="module")
def disturbed(twin: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What becomes of an engine whose reloads fail, and of one that is asked for several things at once."""
    directory, model = tmp_path_factory.mktemp("faults"), twin("dense_v2")
    run = write_run(directory, "dense_v2")
    for step in (201, 202, 203):
        shutil.copytree(run / str(SECOND), run / str(step))
    biggest(run / "201").unlink()
    cut(biggest(run / "202"), biggest(run / "202").stat().st_size // 2)
    flip(biggest(run / "203"), biggest(run / "203").stat().st_size // 2)
    tree = read_orbax(cases()["dense_v2"].items)
    norm = tree["params"]["params"]["decoder"]["decoder_norm"]
    norm["scale"] = np.concatenate([norm["scale"], norm["scale"]])
    write_orbax(run / "204", tree)
    sums = directory / "sums.json"
    second = open_checkpoint(run, step=SECOND)
    sums.write_text(checksums.dumps(checksums.compute(second), second.plan.where))
    faults = {
        "name": "faults",
        "kind": "faults",
        "model": str(model),
        "run": str(run),
        "bad steps": {name: step for step, name in DAMAGED.items()},
        "another model": str(cases()["qwen3_scanned"].items),
        "checksums": str(sums),
        # Little is in flight when a step is deleted.
        "options": {"concurrent_gib": 0.0002},
        **_speaking(model),
    }
    other = tmp_path_factory.mktemp("protocol")
    protocol = {**faults, "name": "protocol", "kind": "protocol", "run": str(write_run(other, "dense_v2"))}
    return run_jobs([faults, protocol], tmp_path_factory.mktemp("disturbed"), devices=2, worker=WORKER)


ERRORS = {
    "missing data": "ReadError",
    "truncated": "ReadError",
    "wrong shape": "WrongShapeError",
    "no such step": "StepNotFoundError",
    "another model": "ConfigMismatchError",
    "checksums": "ReadError",
    "deleted while it is read": "",
    "first array": "RuntimeError",
    "version after a failure": "",
}


@pytest.mark.parametrize("fault", ERRORS)
def test_fault_changes_nothing(disturbed: dict[str, Any], fault: str) -> None:
    answer = _answer(disturbed, "faults")
    found = answer["faults"][fault]
    assert found["different"] == []
    assert found["version"] == f"step-{FIRST}"
    assert (found["state"]["step"], found["state"]["torn"]) == (FIRST, False)
    if fault == "version after a failure":
        assert found["error"] is None
    else:
        assert found["error"] is not None
        assert found["error"].startswith(ERRORS[fault])


def test_engine_answers_after_faults(disturbed: dict[str, Any]) -> None:
    answer = _answer(disturbed, "faults")
    assert answer["said the same"]
    assert "the last one failed. ReadError" in answer["finish after a failure"]


def test_failure_in_the_middle_rolls_forward(disturbed: dict[str, Any]) -> None:
    assert _answer(disturbed, "faults")["rolled forward"] == [SECOND, []]


def test_mixture_of_steps_answers_nothing_until_it_is_reloaded(disturbed: dict[str, Any]) -> None:
    answer = _answer(disturbed, "faults")
    assert answer["torn"].startswith("TornWeightsError")
    assert answer["torn answer"].startswith("TornWeightsError")
    assert answer["torn state"]["torn"]
    assert answer["torn version"] == f"step-{FIRST}"
    assert answer["healed"] == [SECOND, [], True]
    assert (answer["state"]["step"], answer["state"]["torn"]) == (SECOND, False)


def test_state_names_what_is_served(disturbed: dict[str, Any]) -> None:
    state = _answer(disturbed, "protocol")["state"]
    run = Path(state["path"])
    assert state == {
        "path": str(run),
        "items": str(run / str(FIRST) / "items"),
        "step": FIRST,
        "staged": None,
        "torn": False,
    }


def test_pull_stages_while_the_engine_answers(disturbed: dict[str, Any]) -> None:
    answer = _answer(disturbed, "protocol")
    assert answer["serving"]["state"] == "serving"
    assert (answer["staging"]["state"], answer["staging"]["step"]) == ("staging", SECOND)
    assert answer["said while staging"]
    staged = answer["staged"]
    assert (staged["state"], staged["step"], staged["error"]) == ("staged", SECOND, None)
    assert staged["path"].endswith(f"/{SECOND}/items")
    assert staged["read_bytes"] == staged["total_bytes"] > 0
    assert staged["seconds"] >= 0
    assert answer["staged changes nothing"] == []
    assert answer["staged state"]["step"] == FIRST
    assert answer["staged state"]["staged"] == staged


def test_another_pull_takes_the_place_of_one_that_is_not_served(disturbed: dict[str, Any]) -> None:
    answer = _answer(disturbed, "protocol")
    assert answer["replaced"]["state"] == "staging"
    assert answer["replaced and served"]["state"] == "serving"
    assert answer["dropped"] is None


def test_newer_step_is_for_the_next_pull(disturbed: dict[str, Any]) -> None:
    answer = _answer(disturbed, "protocol")
    assert answer["a newer step meanwhile"]["step"] == SECOND
    assert answer["newest"]["step"] == 250


def test_pull_says_what_is_wrong_with_a_request(disturbed: dict[str, Any]) -> None:
    found = _answer(disturbed, "protocol")["step as a string"]
    assert (found["state"], found["error"]) == (
        "failed",
        "ReloadError: step must be an integer >= 0, found '250'.",
    )


@pytest.mark.parametrize("call", ["start", "update", "reload"])
def test_requests_must_not_run(disturbed: dict[str, Any], call: str) -> None:
    answer = _answer(disturbed, "protocol")
    assert "in progress" in answer[f"{call} while requests run"]
    assert answer["running changes nothing"] == []


def test_engine_must_stand_still(disturbed: dict[str, Any]) -> None:
    answer = _answer(disturbed, "protocol")
    assert "last step is not done" in answer["update before the last step is done"]


def test_frozen_request_is_computed_again(disturbed: dict[str, Any]) -> None:
    spans = _answer(disturbed, "protocol")["spans"]
    assert [version for version, *_ in spans] == [f"step-{FIRST}", f"step-{SECOND}"]


def test_prefix_of_the_old_weights_is_not_used(disturbed: dict[str, Any]) -> None:
    answer = _answer(disturbed, "protocol")
    assert answer["said the same before"]
    assert max(answer["cached tokens"]) > 0
    assert answer["said the same after"]
    assert not answer["said the same with a stale prefix"]


def test_other_payloads_go_where_they_went(disturbed: dict[str, Any]) -> None:
    answer = _answer(disturbed, "protocol")
    assert answer["other payload"] == [None]
    assert answer["other payload changes nothing"] == []


REFUSED = {
    "lora_config": "LoRA",
    "pipeline_parallel_size": "pipeline parallelism",
    "data_parallel_size": "data parallelism",
    "quantization": "quantized weights",
    "kv_transfer_config": "disaggregated serving",
    "speculative_config": "a separate draft model",
    "model_type": "attention sinks, which tpu-inference compiles into its programs",
}


@pytest.mark.parametrize("option", REFUSED)
def test_engine_that_cannot_exchange_weights_says_so(disturbed: dict[str, Any], option: str) -> None:
    answer = _answer(disturbed, "protocol")
    assert answer["not refused"] is None
    reason, pulled, reloaded = answer["refusals"][option]
    assert REFUSED[option] in reason
    assert pulled["state"] == "failed"
    assert pulled["error"] == reloaded == f"EngineError: {reason}"


@pytest.mark.parametrize("case", ["another digest", "another step"])
def test_workers_exchange_only_what_all_have_staged(disturbed: dict[str, Any], case: str) -> None:
    found = _answer(disturbed, "protocol")["workers"][case]
    assert "staged different checkpoints" in found["error"]
    assert "update_weights" not in found["calls"]
    assert "abort_weight_update" in found["calls"]
    # The first worker has found the step for all of them.
    assert found["staged"]["step"] == FIRST
    assert found["staged"]["path"].endswith(f"/{FIRST}/items")
    assert found["different"] == []
    assert found["version"] == f"step-{SECOND}"


def test_reload_weights_of_vllm_gets_all_tensors(disturbed: dict[str, Any]) -> None:
    found = _answer(disturbed, "protocol")["tensors for vllm-cpu"]
    assert found == {str(FIRST): [True, True], str(SECOND): [True, True]}
