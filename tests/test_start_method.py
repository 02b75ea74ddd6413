"""The engine starts where TensorStore has been loaded before, by a script with or without a guard; or says at once why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.checkpoints import FIXTURES
from support.engine import PROMPTS
from tiny_tokenizer import write_tokenizer

pytestmark = pytest.mark.engine

CHECKPOINT = FIXTURES / "dense_v2" / "checkpoints"

SCRIPT = """
import json, os, sys
from vllm_maxtext_loader import open_checkpoint
ARGUMENTS = dict(model={checkpoint!r}, tokenizer={tokenizer!r}, load_format="maxtext", max_model_len=128, max_num_seqs=4,
                 max_num_batched_tokens=128, model_loader_extra_config={{"model_name": "gemma4-31b"}})

def look():
    assert open_checkpoint({checkpoint!r}, model_name="gemma4-31b").hf_config().vocab_size == 320

def answer():
    from vllm import LLM, SamplingParams
    look()
    llm = LLM(**ARGUMENTS)
    parameters = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([{{"prompt_token_ids": {prompt!r}}}], parameters, use_tqdm=False)
    print("ANSWER", json.dumps(list(output.outputs[0].token_ids)), flush=True)

def configure(*cases):
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
    from vllm.usage.usage_lib import UsageContext
    look()
    made = dict(LLM=(EngineArgs, UsageContext.LLM_CLASS), server=(AsyncEngineArgs, UsageContext.OPENAI_API_SERVER))
    names = ("VLLM_WORKER_MULTIPROC_METHOD", "VLLM_ENABLE_V1_MULTIPROCESSING")
    answers = []
    for kind, environment, more in cases:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(environment)
        args, context = made[kind]
        try:
            args(**ARGUMENTS, **more).create_engine_config(context)
            answers.append([os.environ.get(name) for name in names])
        except Exception as error:
            answers.append(f"{{type(error).__name__}}: {{error}}")
    print("ANSWER", json.dumps(answers), flush=True)

{main}
"""
GUARD = "if __name__ == '__main__':\n    "


def run(directory: Path, main: str) -> tuple[Any, str]:
    """The script's answer, and its log."""
    tokenizer = str(write_tokenizer(directory / "tokenizer", vocab_size=320))
    script = directory / "script.py"
    script.write_text(
        SCRIPT.format(checkpoint=str(CHECKPOINT), tokenizer=tokenizer, prompt=PROMPTS[1], main=main)
    )
    variables = {"JAX_PLATFORMS": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    # Two devices, for data parallelism.
    variables["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("VLLM_WORKER_MULTIPROC_METHOD", "VLLM_ENABLE_V1_MULTIPROCESSING", "MODEL_IMPL_TYPE")
    }
    done = subprocess.run(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**kept, **variables},
        timeout=500,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert len(lines) == 1, done.stdout[-3000:]
    return json.loads(lines[0].removeprefix("ANSWER ")), done.stdout


def test_script_with_a_guard_spawns(tmp_path: Path) -> None:
    tokens, log = run(tmp_path, GUARD + "answer()")
    assert len(tokens) == 3
    assert log.count("vLLM will spawn its processes (VLLM_WORKER_MULTIPROC_METHOD=spawn)") == 1


def test_script_without_a_guard_runs_the_engine_in_its_process(tmp_path: Path) -> None:
    tokens, log = run(tmp_path, "answer()")
    assert len(tokens) == 3
    assert f"{tmp_path}/script.py has no `if __name__" in log
    assert log.count("The engine runs in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0)") == 1


def test_choice_with_a_guard(tmp_path: Path) -> None:
    cases = [
        ("server", {}, {}),
        ("server", {}, {"data_parallel_size": 2}),
        ("LLM", {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}, {}),
    ]
    answers, _ = run(tmp_path, GUARD + f"configure(*{cases!r})")
    assert answers == [["spawn", None]] * 3


def test_choice_without_a_guard(tmp_path: Path) -> None:
    """A server has processes in any case; what the user chose for an LLM stands."""
    cases = [
        ("server", {}, {}),
        ("LLM", {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}, {}),
        ("LLM", {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, {}),
    ]
    (refusal, *kept), _ = run(tmp_path, f"configure(*{cases!r})")
    assert refusal.startswith(f"EngineError: {tmp_path}/script.py: TensorStore is loaded in this process")
    assert 'Start the engine below `if __name__ == "__main__":`' in refusal
    assert kept == [["spawn", None], ["spawn", "0"]]
