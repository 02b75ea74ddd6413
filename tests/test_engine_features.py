"""What is served together with a checkpoint: LoRA adapters, an EAGLE-3 draft; and a worker on a node of its own.

The engines start in one process, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from support.checkpoints import FIXTURES, cases
from support.companions import write_eagle3, write_lora
from support.engine import PROMPTS, read_config, run_jobs
from tiny_tokenizer import write_tokenizer
from vllm_maxtext_loader import open_checkpoint

pytestmark = pytest.mark.engine

CASE, VISION = "dense_v2", "moe_mm"
LORA = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1}
TOKENS = 8


@pytest.fixture(scope="module")
def answers(twin: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every engine's answer, by name."""
    root = tmp_path_factory.mktemp("features")
    tokenizer = str(write_tokenizer(root / "tokenizer", vocab_size=320))
    model = twin(CASE)
    config = read_config(model)
    exported = root / "exported"
    exported.mkdir()
    (exported / "config.json").write_bytes((model / "config.json").read_bytes())
    # The twin's embedding differs from MaxText's by its rounding; here all bits are the same.
    save_file(dict(open_checkpoint(cases()[CASE].items).hf_weights()), exported / "model.safetensors")
    adapter = str(write_lora(root / "adapter", model))
    draft = str(write_eagle3(root / "draft", config["hidden_size"], config["vocab_size"]))
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
            "arguments": LORA,
            "environment": {"MODEL_IMPL_TYPE": "vllm"},
            "lora": adapter,
            **said,
        },
        {"name": "adapter", "model": str(model), "arguments": {**ours, **LORA}, "lora": adapter, **said},
        served("peer text", CASE, "gemma4-31b"),
        served("peer vision", VISION, "gemma4-26b"),
        with_draft("draft", draft),
        # The directory has safetensors only.
        with_draft("draft as pt", draft, draft_load_config={"load_format": "pt"}),
    ]
    return run_jobs(jobs, root / "jobs", devices=1)


def test_adapter_in_hugging_face_format(answers: dict[str, Any]) -> None:
    """The tokens of the default loader with the same adapter, and others than without it."""
    answer, default = answers["adapter"], answers["default"]
    assert "error" not in answer, answer.get("traceback")
    assert answer["tokens"] == default["tokens"]
    assert answer["tokens without"] == default["tokens without"]
    assert answer["tokens"] != answer["tokens without"]


@pytest.mark.parametrize("name", ["peer text", "peer vision"])
def test_worker_on_another_node_loads(answers: dict[str, Any], name: str) -> None:
    answer = answers[name]
    assert "error" not in answer, answer.get("traceback")
    assert [len(tokens) for tokens in answer["tokens"]] == [TOKENS] * len(PROMPTS)
    assert [line for line in answer["log"] if "is not on this node: written again" in line]


def test_draft_in_hugging_face_format(answers: dict[str, Any]) -> None:
    """A draft only proposes: the tokens are those without one."""
    answer = answers["draft"]
    assert "error" not in answer, answer.get("traceback")
    assert answer["tokens"] == answers["adapter"]["tokens without"]


def test_draft_is_loaded_as_its_own_configuration_says(answers: dict[str, Any]) -> None:
    assert "Cannot find any model weights" in answers["draft as pt"]["error"]
