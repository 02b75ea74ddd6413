"""What is served together with a checkpoint: LoRA adapters, an EAGLE-3 draft; and a worker on a node of its own.

The engines start in one process, one after the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from support.checkpoints import FIXTURES, cases
from support.companions import write_eagle3, write_lora
from support.engine import PROMPTS, bound, distance, read_config, run_jobs
from tiny_tokenizer import write_tokenizer
from vllm_maxtext_loader import open_checkpoint

pytestmark = pytest.mark.engine

CASE, VISION = "dense_v2", "moe_mm"
LORA = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1}
TOKENS = 8


@pytest.fixture(scope="module")
def exported(twin: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint in Hugging Face format. The twin's embedding differs by MaxText's rounding; here all bits are the same."""
    directory = tmp_path_factory.mktemp("exported")
    (directory / "config.json").write_bytes((twin(CASE) / "config.json").read_bytes())
    weights = dict(open_checkpoint(cases()[CASE].items).hf_weights())
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def adapter(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(tmp_path_factory.mktemp("adapter") / "adapter", exported)


@pytest.fixture(scope="module")
def answers(
    twin: Callable[[str], Path], exported: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Every engine's answer, by name."""
    root = tmp_path_factory.mktemp("features")
    tokenizer = str(write_tokenizer(root / "tokenizer", vocab_size=320))
    model = twin(CASE)
    config = read_config(model)
    vocab = config["vocab_size"]
    draft = str(write_eagle3(root / "draft", config["hidden_size"], vocab))
    ours = {"load_format": "maxtext", "model_loader_extra_config": {"checkpoint": str(cases()[CASE].items)}}
    speculative = {"method": "eagle3", "num_speculative_tokens": 2}
    said = {"prompts": PROMPTS, "max_tokens": TOKENS}

    def served(name: str, case: str, preset: str) -> dict[str, Any]:
        """A checkpoint without a configuration, on a node that has not made one."""
        arguments = {
            "load_format": "maxtext",
            "tokenizer": tokenizer,
            "skip_tokenizer_init": False,
            "language_model_only": case == VISION,
            "model_loader_extra_config": {"model_name": preset},
        }
        checkpoint = str(FIXTURES / case / "checkpoints")
        return {"name": name, "model": checkpoint, "arguments": arguments, "change": "another node", **said}

    def with_draft(name: str, directory: str, **more: Any) -> dict[str, Any]:
        speculative_config = {**speculative, "model": directory, **more}
        return {
            "name": name,
            "model": str(model),
            "arguments": {**ours, "speculative_config": speculative_config},
            **said,
        }

    jobs = [
        {
            "name": "default",
            "model": str(exported),
            "arguments": {**LORA, "max_logprobs": vocab},
            "vocab_size": vocab,
            "environment": {"MODEL_IMPL_TYPE": "vllm"},
            "lora": str(adapter),
            **said,
        },
        {
            "name": "adapter",
            "model": str(model),
            "arguments": {**ours, **LORA, "max_logprobs": vocab},
            "vocab_size": vocab,
            "lora": str(adapter),
            **said,
        },
        served("peer text", CASE, "gemma4-31b"),
        served("peer vision", VISION, "gemma4-26b"),
        with_draft("draft", draft),
        # The directory has safetensors only.
        with_draft("draft as pt", draft, draft_load_config={"load_format": "pt"}),
    ]
    return run_jobs(jobs, root / "jobs", devices=1)


def reference(directory: Path, adapter: Path | None = None) -> Any:
    """The model in float32, by transformers, with the adapter's products added to its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if adapter is not None:
        tensors = load_file(adapter / "adapter_model.safetensors")
        settings = json.loads((adapter / "adapter_config.json").read_text())
        with torch.no_grad():
            for name, weight in model.named_parameters():
                path = f"base_model.model.{name.removesuffix('.weight')}"
                if f"{path}.lora_A.weight" in tensors:
                    product = tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"]
                    weight += product * settings["lora_alpha"] / settings["r"]
    return model


def worst_gap(model: Any, answers: list[list[int]]) -> float:
    """How far a token that was said is from the model's most likely one, at most, in units of what bfloat16 explains.

    Greedy tokens themselves are no measure: of two nearly equal ones, any rounding may choose the other.
    """
    import torch

    worst = 0.0
    for prompt, tokens in zip(PROMPTS, answers, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, len(prompt) - 1 :]
        limit = bound(model.config.num_hidden_layers, float(logits.std()))
        gaps = logits.max(-1).values - logits[range(len(tokens)), tokens]
        worst = max(worst, float(gaps.max()) / limit)
    return worst


def test_adapter_in_hugging_face_format(answers: dict[str, Any], exported: Path, adapter: Path) -> None:
    """What the default loader says with the same adapter, on the same weights; and what the adapter's products say."""
    answer, default = answers["adapter"], answers["default"]
    assert "error" not in answer, answer.get("traceback")
    plain, merged = reference(exported), reference(exported, adapter)
    assert worst_gap(plain, answer["tokens without"]) < 1
    for said in (answer, default):
        assert worst_gap(merged, said["tokens"]) < 1 < worst_gap(plain, said["tokens"])
    expected = [[row[str(token)] for token in range(len(row))] for row in default["logprobs"]]
    limit = bound(plain.config.num_hidden_layers, float(np.std(expected)))
    assert distance(answer["logprobs"], [np.array(row) for row in expected]) < limit


@pytest.mark.parametrize("name", ["peer text", "peer vision"])
def test_worker_on_another_node_loads(answers: dict[str, Any], name: str) -> None:
    answer = answers[name]
    assert "error" not in answer, answer.get("traceback")
    assert [len(tokens) for tokens in answer["tokens"]] == [TOKENS] * len(PROMPTS)
    assert [line for line in answer["log"] if "is not on this node: written again" in line]


def test_draft_in_hugging_face_format(answers: dict[str, Any], exported: Path) -> None:
    """A draft only proposes: the tokens are the target's."""
    answer = answers["draft"]
    assert "error" not in answer, answer.get("traceback")
    assert [len(tokens) for tokens in answer["tokens"]] == [TOKENS] * len(PROMPTS)
    assert worst_gap(reference(exported), answer["tokens"]) < 1


def test_draft_is_loaded_as_its_own_configuration_says(answers: dict[str, Any]) -> None:
    assert "Cannot find any model weights" in answers["draft as pt"]["error"]
