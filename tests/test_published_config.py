"""The configuration a checkpoint is served with: the tokenizer's, where it is the checkpoint's, before any preset."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from support.checkpoints import cases
from tiny_tokenizer import write_tokenizer
from vllm_maxtext_loader.errors import ConfigMismatchError

pytestmark = pytest.mark.engine


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A tokenizer's directory without a config.json."""
    return write_tokenizer(tmp_path / "tokenizer", vocab_size=320)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def model_config(name: str, tokenizer: Path, **arguments: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_maxtext_loader.engine.plugin import register

    register()
    return EngineArgs(
        model=str(cases()[name].items), tokenizer=str(tokenizer), load_format="maxtext", **arguments
    ).create_model_config()


def with_config(tokenizer: Path, name: str, **changes: Any) -> Path:
    """The tokenizer's directory with the twin's config.json, changed."""
    config = json.loads((cases()[name].twin_config / "config.json").read_text())
    (tokenizer / "config.json").write_text(json.dumps(config | changes))
    return tokenizer


@pytest.mark.parametrize("name", ["qwen3_scanned", "qwen3moe_scanned", "llama31_scanned"])
def test_configuration_of_the_tokenizers_directory_is_taken(
    name: str, tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Dimensions of no published model, and nothing else given: what shapes do not tell is the tokenizer's."""
    with_config(tokenizer, name, rope_theta=123_456.0)
    with caplog.at_level(logging.INFO, logger="vllm"):
        made = model_config(name, tokenizer)
    assert made.hf_config.rope_parameters["rope_theta"] == 123_456.0
    assert "config.json of the tokenizer's repository" in caplog.text


def test_configuration_of_another_model_is_not_taken(tokenizer: Path) -> None:
    with_config(tokenizer, "qwen3_scanned", num_hidden_layers=5)
    with pytest.raises(ConfigMismatchError, match="no published Qwen3's"):
        model_config("qwen3_scanned", tokenizer)


def test_configuration_of_another_family_is_not_taken(tokenizer: Path) -> None:
    with_config(tokenizer, "qwen2_scanned")
    with pytest.raises(ConfigMismatchError, match="no published Qwen3's"):
        model_config("qwen3_scanned", tokenizer)


def test_model_name_comes_before_the_tokenizers_configuration(tokenizer: Path) -> None:
    with_config(tokenizer, "qwen3_scanned", rope_theta=123_456.0)
    made = model_config("qwen3_scanned", tokenizer, model_loader_extra_config={"model_name": "qwen3-8b"})
    assert made.hf_config.rope_parameters["rope_theta"] == 1_000_000.0


def test_stops_and_sampling_arrive_with_it(tokenizer: Path) -> None:
    with_config(tokenizer, "qwen3_scanned")
    stops = {"eos_token_id": [7, 9], "temperature": 0.6, "top_k": 20}
    (tokenizer / "generation_config.json").write_text(json.dumps(stops))
    made = model_config("qwen3_scanned", tokenizer)
    assert made.try_get_generation_config()["eos_token_id"] == [7, 9]
    assert made.get_diff_sampling_param()["top_k"] == 20


def test_a_name_serves_llama_without_a_configuration(tokenizer: Path) -> None:
    made = model_config("llama31_scanned", tokenizer, model_loader_extra_config={"model_name": "llama3.1-8b"})
    assert made.hf_config.rope_parameters["rope_type"] == "llama3"
    shutil.rmtree(tokenizer)
