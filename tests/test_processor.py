"""What comes from the tokenizer's repository: the image processor of a checkpoint with a vision tower, and <bos>."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.checkpoints import cases
from tiny_tokenizer import write_tokenizer
from vllm_maxtext_loader import errors
from vllm_maxtext_loader.engine.args import warn_without_bos
from vllm_maxtext_loader.engine.config_dir import processor_files, write_config_dir
from vllm_maxtext_loader.engine.probe import probe


def arguments(tokenizer: Path | str | None) -> Any:
    """What is looked at of EngineArgs."""
    return SimpleNamespace(
        tokenizer=None if tokenizer is None else str(tokenizer),
        tokenizer_revision=None,
        revision=None,
        language_model_only=False,
        limit_mm_per_prompt=None,
        download_dir=None,
        hf_token=None,
    )


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A directory with a tokenizer and an image processor."""
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    for name in (
        "tokenizer.json",
        "processor_config.json",
        "preprocessor_config.json",
        "chat_template.jinja",
    ):
        (directory / name).write_text("{}")
    (directory / "model.safetensors").write_text("not wanted")
    return directory


def test_processor_lies_beside_the_configuration(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    found = probe(str(cases()["moe_mm"].items), None, trim=False)
    files = processor_files(arguments(tokenizer), found)
    for _ in range(2):
        directory = write_config_dir(found, "gemma4-26b", files)
    assert {path.name for path in directory.iterdir()} == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "processor_config.json",
        "preprocessor_config.json",
        "chat_template.jinja",
    }
    assert json.loads((directory / "config.json").read_text())["architectures"] == [
        "Gemma4ForConditionalGeneration"
    ]
    assert write_config_dir(found, "gemma4-26b") != directory


def test_text_checkpoint_needs_none(tokenizer: Path) -> None:
    assert processor_files(arguments(tokenizer), probe(str(cases()["moe_v2"].items), None, trim=False)) == []


def test_missing_processor_is_said(tokenizer: Path, caplog: pytest.LogCaptureFixture) -> None:
    for file in tokenizer.glob("*processor_config.json"):
        file.unlink()
    found = probe(str(cases()["moe_mm"].items), None, trim=False)
    logging.getLogger("vllm").propagate = True
    with caplog.at_level("WARNING", logger="vllm"):
        processor_files(arguments(tokenizer), found)
    assert "holds no image processor" in caplog.text
    assert str(tokenizer) in caplog.text


def test_repository_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = probe(str(cases()["moe_mm"].items), None, trim=False)
    with pytest.raises(errors.EngineError, match=r"google/no-such-tokenizer cannot be downloaded"):
        processor_files(arguments("google/no-such-tokenizer"), found)


def model_config(tokenizer: Path, *, skipped: bool = False) -> Any:
    """What is looked at of ModelConfig."""
    return SimpleNamespace(
        skip_tokenizer_init=skipped,
        hf_config=None,
        tokenizer=str(tokenizer),
        runner_type="generate",
        tokenizer_mode="auto",
        tokenizer_revision=None,
        trust_remote_code=False,
    )


def test_tokenizer_that_forgets_bos_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = (write_tokenizer(tmp_path / name, vocab_size=320) for name in ("good", "bad"))
    file = bad / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))
    logging.getLogger("vllm").propagate = True
    with caplog.at_level("WARNING", logger="vllm"):
        warn_without_bos(model_config(good), "Gemma 4")
        warn_without_bos(model_config(bad, skipped=True), "Gemma 4")
        assert "<bos>" not in caplog.text
        for _ in range(2):
            warn_without_bos(model_config(bad), "Gemma 4")
    assert caplog.text.count("does not put <bos> before a completion prompt") == 1
    assert str(bad) in caplog.text


def test_token_and_cache_directory_reach_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """--hf-token and --download-dir count for the processor's files as for everything else that vLLM downloads."""
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    found = probe(str(cases()["moe_mm"].items), None, trim=False)
    options = arguments("google/tokenizer")
    options.hf_token, options.download_dir = "hf_x", str(tmp_path / "cache")
    processor_files(options, found)
    assert (asked["name"], asked["token"]) == ("google/tokenizer", "hf_x")
    assert asked["cache_dir"] == str(tmp_path / "cache")


def test_configuration_is_readable_by_others_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    before = os.umask(0o022)
    try:
        directory = write_config_dir(probe(str(cases()["dense_v2"].items), None, trim=True), "gemma4-31b")
    finally:
        os.umask(before)
    files = sorted(directory.iterdir())
    assert [path.name for path in files] == ["config.json", "generation_config.json"]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o644}


def test_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "maxtext").write_text("a file where the directory should be")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    with pytest.raises(errors.EngineError, match=r"maxtext/.* cannot be written here .* Set VLLM_CACHE_ROOT"):
        write_config_dir(probe(str(cases()["dense_v2"].items), None, trim=True), "gemma4-31b")
