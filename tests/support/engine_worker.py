"""Runs real engines (vLLM, tpu-inference, JAX on the CPU) in one process and writes down what they hold and say.

Starting Python, vLLM and JAX costs more than loading a tiny model, and the number of JAX devices is fixed per process; so
one process starts many engines, one after the other. The tests run this file and read its answer.

    python engine_worker.py JOBS.json ANSWERS.json

A job: {"name", "model", "arguments": {…}, "environment": {…}, "prompts": [[token ids]], "images": [path], "vocab_size": n, "keep_state": bool,
"compare": name, "folded": bool, "computed": bool, "forget": name, "max_tokens": n, "lora": path, "late": bool}. `compare` is an earlier job whose state was
kept, until a job says `forget`. Where there are images, every prompt has one. With an adapter the prompts are answered without it, too ("tokens without").
With `late` they are answered once more, within `late_steps`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import logging
import os
import pickle
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ml_dtypes
import numpy as np
from PIL import Image

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
COMMON = {"skip_tokenizer_init": True, "max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 128}


class Records(logging.Handler):
    """Keeps the messages of this package's loggers."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


def state_of(llm: Any) -> dict[str, np.ndarray]:
    """Every parameter and buffer of the engine's model, whole (not by shard)."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    return {name: np.asarray(array) for name, array in runner.state.items()}


def placement_of(llm: Any) -> dict[str, str]:
    """Shape, dtype and sharding of every parameter and buffer."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    return {name: f"{array.shape} {array.dtype} {array.sharding}" for name, array in runner.state.items()}


def bits(array: np.ndarray) -> np.ndarray:
    """The array as integers, so that equality means equality of bits."""
    return np.ascontiguousarray(array).view(
        {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[array.itemsize]
    )


def differences(state: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, float]:
    """Names whose bits differ, with the share of elements that do; 1.0 for a missing name or another shape."""
    found: dict[str, float] = {}
    for name in sorted(set(state) | set(other)):
        a, b = state.get(name), other.get(name)
        if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
            found[name] = 1.0
        elif not np.array_equal(bits(a), bits(b)):
            found[name] = float(np.mean(bits(a) != bits(b)))
    return found


def explained(state: dict[str, np.ndarray], other: dict[str, np.ndarray], hidden_size: int) -> list[str]:
    """Names whose difference is exactly what folding and the embedding's rounding do, checked by value.

    Args:
        state: after loading MaxText's checkpoint with folded expert scales.
        other: after loading the Hugging Face twin.
        hidden_size: of the model.
    """
    good: list[str] = []
    root = np.float32(hidden_size**0.5)
    for name, ours in state.items():
        theirs = other[name]
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            stored = (theirs.astype(np.float32) * root).astype(BFLOAT16)
            again = (ours.astype(np.float32) * root).astype(BFLOAT16)
            if np.mean(stored == again) >= 0.99:
                good.append(name)
        elif name.endswith("router.per_expert_scale"):
            if np.all(ours.astype(np.float32) == 1):
                good.append(name)
        elif name.endswith("w2_weight"):
            layer = name.partition(".experts.")[0]
            scale = other[f"{layer}.router.per_expert_scale"].astype(np.float32)
            folded = (theirs.astype(np.float32) * scale[:, None, None]).astype(BFLOAT16)
            if np.array_equal(bits(folded), bits(ours)):
                good.append(name)
    return good


def within_a_rounding(state: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> list[str]:
    """Names of matrices whose bfloat16 values are nowhere more than one unit in the last place apart."""
    good: list[str] = []
    for name, ours in state.items():
        if name.endswith(("qkv_proj.weight", "embed_tokens.weight", "lm_head.weight")):
            near = np.abs(bits(ours).astype(np.int32) - bits(other[name]).astype(np.int32)) <= 1
            if near.all():
                good.append(name)
    return good


def _add_parameter() -> Callable[[], None]:
    """Makes vLLM's model have a parameter that no checkpoint knows, as another vLLM's might."""
    import torch
    from vllm.model_executor.models.gemma4 import Gemma4ForCausalLM

    init = Gemma4ForCausalLM.__init__

    # Keeps the signature: vLLM looks at it.
    @functools.wraps(init)
    def with_parameter(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.register_parameter("renamed_weight", torch.nn.Parameter(torch.zeros(1), requires_grad=False))

    vars_set(Gemma4ForCausalLM, "__init__", with_parameter)
    return lambda: vars_set(Gemma4ForCausalLM, "__init__", init)


def _take_less() -> Callable[[], None]:
    """Makes vLLM's model stop before the last tensor, and say that it has them all."""
    from vllm.model_executor.models.gemma4 import Gemma4ForCausalLM

    load_weights = Gemma4ForCausalLM.load_weights

    def take_less(self: Any, weights: Any) -> set[str]:
        tensors = iter(weights)
        load_weights(self, (next(tensors) for _ in range(3)))
        return {name for name, _ in (*self.named_parameters(), *self.named_buffers())}

    vars_set(Gemma4ForCausalLM, "load_weights", take_less)
    return lambda: vars_set(Gemma4ForCausalLM, "load_weights", load_weights)


def vars_set(owner: type, name: str, value: Any) -> None:
    """Replaces a method of a class."""
    setattr(owner, name, value)


def _another_node() -> Callable[[], None]:
    """Gives the worker what a worker on another node gets: a pickled configuration, and none of the first node's files."""
    from tpu_inference.worker.tpu_worker import TPUWorker

    init = TPUWorker.__init__

    @functools.wraps(init)
    def on_another_node(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        shutil.rmtree(vllm_config.model_config.model)
        init(self, pickle.loads(pickle.dumps(vllm_config)), *args, **kwargs)

    vars_set(TPUWorker, "__init__", on_another_node)
    return lambda: vars_set(TPUWorker, "__init__", init)


def _small_parts() -> Callable[[], None]:
    """Cuts chunks from a bucket into parts of half a kilobyte, as those of large checkpoints are cut into megabytes."""
    from vllm_maxtext_loader.checkpoint import parts, remote

    least, in_turn = parts._LEAST_BYTES, remote.in_turn
    cut = 0
    parts._LEAST_BYTES = 512

    def counted(*args: Any) -> Any:
        nonlocal cut
        ordered = in_turn(*args)
        cut += sum(read.whole is not None for read in ordered)
        return ordered

    remote.in_turn = counted

    def back() -> None:
        parts._LEAST_BYTES, remote.in_turn = least, in_turn
        assert cut > 100

    return back


CHANGES: dict[str, Callable[[], Callable[[], None]]] = {
    "parameter": _add_parameter,
    "less": _take_less,
    "another node": _another_node,
    "small parts": _small_parts,
}
"""What a job can have changed around vLLM's model, each with the way back."""


@contextlib.contextmanager
def late_steps(llm: Any) -> Iterator[None]:
    """Every step waits for a long computation, so that the next one is prepared before it runs.

    The buffers in which tpu-inference prepares all steps are aligned to 64 bytes: jax.device_put does not copy
    such memory to a CPU device. numpy aligns to 16 bytes only, so an engine meets this by chance.
    """
    import jax
    import jax.numpy as jnp

    def aligned(array: np.ndarray) -> np.ndarray:
        memory = np.zeros(array.nbytes + 64, np.uint8)
        return memory[-memory.ctypes.data % 64 :][: array.nbytes].view(array.dtype)

    @jax.jit
    def late(token_ids: jax.Array) -> jax.Array:
        product = jax.lax.fori_loop(0, 1000, lambda _, x: jnp.tanh(x @ x), jnp.ones((128, 128)))
        # No tanh is above one, which the compiler does not know.
        return token_ids + (product[0, 0] > 1).astype(token_ids.dtype)

    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    prepare = runner._prepare_inputs

    def prepare_late(scheduled: Any) -> Any:
        token_ids, *others = prepare(scheduled)
        return late(token_ids), *others

    runner.positions_cpu = aligned(runner.positions_cpu)
    runner.device_buffer.buffer = aligned(runner.device_buffer.buffer)
    runner._prepare_inputs = prepare_late
    yield
    runner._prepare_inputs = prepare


def log_probs(outputs: list[Any]) -> list[dict[str, float]]:
    """Per prompt, the log-probs of the first token, where they were asked for."""
    return [
        {str(token): entry.logprob for token, entry in output.outputs[0].logprobs[0].items()}
        for output in outputs
        if output.outputs[0].logprobs
    ]


def run(job: dict[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
    """Starts an engine, writes down what was asked for, and shuts it down."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    records = Records()
    logger = logging.getLogger("vllm.vllm_maxtext_loader")
    logger.addHandler(records)
    # Only the job's own variables are taken back: the plugin's defaults for the CPU must stay.
    before = {name: os.environ.get(name) for name in job.get("environment", {})}
    os.environ.update(job.get("environment", {}))
    llm = None
    answer: dict[str, Any] = {}
    change_back = CHANGES[job["change"]]() if "change" in job else None
    try:
        llm = LLM(model=job["model"], **{**COMMON, **job.get("arguments", {})})
        state, placement = state_of(llm), placement_of(llm)
        answer["parameters"] = len(state)
        if job.get("keep_state"):
            kept[job["name"]] = (state, placement)
        if "compare" in job:
            other, other_placement = kept[job["compare"]]
            found = differences(state, other)
            good = explained(state, other, job["hidden_size"]) if job.get("folded") else []
            good += within_a_rounding(state, other) if job.get("computed") else []
            answer["differences"] = {name: share for name, share in found.items() if name not in good}
            answer["explained"] = sorted(set(found) & set(good))
            answer["placed_elsewhere"] = sorted(
                k for k in placement if placement[k] != other_placement.get(k)
            )
        if "prompts" in job:
            parameters = SamplingParams(
                max_tokens=job.get("max_tokens", 1),
                ignore_eos=True,
                temperature=0,
                logprobs=job.get("vocab_size"),
                detokenize=False,
            )
            prompts: list[Any] = [{"prompt_token_ids": tokens} for tokens in job["prompts"]]
            for prompt, image in zip(prompts, job.get("images", ()), strict=False):
                prompt["multi_modal_data"] = {"image": Image.open(image)}
            adapter = None
            if "lora" in job:
                outputs = llm.generate(prompts, parameters, use_tqdm=False)
                answer["tokens without"] = [list(output.outputs[0].token_ids) for output in outputs]
                adapter = LoRARequest("adapter", 1, job["lora"])
            outputs = llm.generate(prompts, parameters, use_tqdm=False, lora_request=adapter)
            answer["prompt_lengths"] = [len(output.prompt_token_ids) for output in outputs]
            answer["tokens"] = [list(output.outputs[0].token_ids) for output in outputs]
            answer["logprobs"] = log_probs(outputs)
            if job.get("late"):
                # Prompts are computed from their beginnings, and a second token makes a step follow at once.
                llm.reset_prefix_cache()
                parameters.max_tokens = 2
                with late_steps(llm):
                    answer["logprobs late"] = log_probs(llm.generate(prompts, parameters, use_tqdm=False))
    except Exception as error:
        answer["error"] = f"{type(error).__name__}: {error}"
        answer["traceback"] = traceback.format_exc()
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        if change_back is not None:
            change_back()
        logger.removeHandler(records)
        answer["log"] = records.lines
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        # What is left is no garbage. vLLM collects seven times per engine; without this, half of a job is spent on it.
        gc.freeze()
    return answer


def main() -> None:
    """Runs all jobs."""
    jobs, answers = json.loads(Path(sys.argv[1]).read_text()), {}
    kept: dict[str, Any] = {}
    for job in jobs:
        answers[job["name"]] = run(job, kept)
        kept.pop(job.get("forget"), None)
        Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
