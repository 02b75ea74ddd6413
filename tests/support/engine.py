"""Runs the real engine in processes of its own, and says how far its log-probs may be from a reference."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

WORKER = Path(__file__).with_name("engine_worker.py")
LLAMA = {
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 64,
}
"""Dimensions of a model that is not ours."""

PROMPTS = [
    [2, 7, 11, 13],
    # Longer than the sliding window of 16 tokens, and than two of them.
    [2] + [(7 * i + 3) % 250 for i in range(23)],
    [2] + [(11 * i + 5) % 250 for i in range(59)],
]


def run_jobs(
    jobs: list[dict[str, Any]], directory: Path, devices: int, worker: Path = WORKER
) -> dict[str, Any]:
    """Runs engines in a process of their own (`worker`) with `devices` JAX devices."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "jobs.json").write_text(json.dumps(jobs))
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        # Without a TPU the default KV cache would be as large as the machine's memory allows.
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    environment.pop("MODEL_IMPL_TYPE", None)
    with (directory / "log.txt").open("w") as log:
        subprocess.run(
            [sys.executable, str(worker), str(directory / "jobs.json"), str(directory / "answers.json")],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    answers = json.loads((directory / "answers.json").read_text())
    if len(answers) < len(jobs):
        pytest.fail(f"the engines' process died: {(directory / 'log.txt').read_text()[-3000:]}")
    return answers


def reference_logprobs(directory: Path, change: Callable[[Any], None] | None = None) -> list[np.ndarray]:
    """Log-probs of the next token after each prompt: transformers, float32, on the twin."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        if change is not None:
            change(model)
        return [model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1).numpy() for prompt in PROMPTS]


def distance(said: list[dict[str, float]], reference: list[np.ndarray]) -> float:
    """Root mean square difference of log-probs over the whole vocabulary and all prompts."""
    squares = [
        (logprob - expected[int(token)]) ** 2
        for answer, expected in zip(said, reference, strict=True)
        for token, logprob in answer.items()
    ]
    return math.sqrt(sum(squares) / len(squares))


def bound(layers: int, spread: float) -> float:
    """What bfloat16 explains of the distance to float32.

    A bfloat16 rounding is off by at most 2**-9 of the value, by 2**-9/sqrt(3) in the root mean square. Each layer rounds its
    residual stream, its attention, its MLP and (in a mixture) its experts: about a dozen roundings a layer that reach the
    output, independent of one another, so that their squares add up. Relative to logits of the given spread (standard
    deviation) this is spread * 2**-9 / sqrt(3) * sqrt(12 * layers); times 4, because errors of early layers are amplified
    on their way by the norms and by attention.
    """
    return 4 * spread * 2**-9 / math.sqrt(3) * math.sqrt(12 * layers)


def read_config(directory: Path) -> dict[str, Any]:
    """A directory's config.json."""
    return json.loads((directory / "config.json").read_text())


def vocabulary(directory: Path) -> int:
    """Number of tokens of a text model."""
    return read_config(directory)["vocab_size"]
