"""vLLM's own configuration, made for EngineArgs as users write them: what arrives in it, and what is refused.

One process makes all of them (see support/argument_worker.py), with HF_HUB_OFFLINE=1, as clusters have it. The first one loads
the plugin.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import gcs
from support.checkpoints import FIXTURES, cases
from tiny_tokenizer import write_tokenizer

pytestmark = pytest.mark.engine

WORKER = Path(__file__).parent / "support" / "argument_worker.py"
DENSE, OTHER, VISION = (str(FIXTURES / name / "checkpoints") for name in ("dense_v2", "moe_v2", "moe_mm"))
DENSE_ITEMS = str(cases()["dense_v2"].items)
NAMED = {DENSE: "gemma4-31b", OTHER: "gemma4-26b", VISION: "gemma4-26b"}
GENERATION = {"bos_token_id": 2, "eos_token_id": [1, 106, 50], "pad_token_id": 0}
SAMPLING = {"temperature": 1.0, "top_k": 64, "top_p": 0.95}
NO_TOKENIZER = "a MaxText checkpoint holds no tokenizer. Give one: --tokenizer google/gemma-4-26B-A4B-it"
BUCKET = f"gs://{gcs.BUCKET}/arguments"


def job(name: str, model: str, tokenizer: Path | str | None, **more: Any) -> dict[str, Any]:
    """A job that serves a checkpoint."""
    arguments = {"model": model, "tokenizer": None if tokenizer is None else str(tokenizer), **more}
    arguments.setdefault("model_loader_extra_config", {"model_name": NAMED.get(model, "gemma4-31b")})
    return {"name": name, "arguments": arguments}


SAME_PLACE = {
    "as it is": DENSE,
    "slash": f"{DENSE}/",
    "file URL": f"file://{DENSE}",
    "relative": "copy/0",
    "tilde": "~/dense_v2/checkpoints",
    "link": "link",
    "run": str(Path(DENSE).parent),
    "step": f"{DENSE}/0",
    "items": DENSE_ITEMS,
    "below": f"{DENSE_ITEMS}/ocdbt.process_0",
    "another": OTHER,
    "bucket": f"{BUCKET}/run/checkpoints",
    "bucket slashes": f"gs://{gcs.BUCKET}//arguments/run//checkpoints/",
    "bucket run": f"{BUCKET}/run",
    "bucket step": f"{BUCKET}/run/checkpoints/0",
    "bucket items": f"{BUCKET}/run/checkpoints/0/items",
}
"""Spellings of a checkpoint, given as tokenizer."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("arguments")


@pytest.fixture(scope="module")
def answers(root: Path, twin: Callable[[str], Path]) -> dict[str, Any]:
    """What came of every job."""
    storage, proxy = gcs.shared()
    (root / "link").symlink_to(DENSE)
    shutil.copytree(DENSE, root / "copy")
    plain = write_tokenizer(root / "plain", vocab_size=320)
    full = Path(shutil.copytree(plain, root / "full"))
    (full / "generation_config.json").write_text(json.dumps(GENERATION | SAMPLING))
    (full / "processor_config.json").write_text("{}")
    base = Path(shutil.copytree(plain, root / "base"))
    (base / "chat_template.jinja").unlink()
    other = Path(shutil.copytree(plain, root / "other"))
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "temperature": 0.5}))
    smaller = Path(shutil.copytree(cases()["dense_v2"].twin_config, root / "smaller"))
    config = json.loads((smaller / "config.json").read_text())
    (smaller / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    storage.upload(Path(DENSE), gcs.BUCKET, "arguments/run/checkpoints/")
    storage.upload(full, gcs.BUCKET, "arguments/run/tokenizer/")
    # A run that holds its tokenizer: only the tokenizer may be copied.
    storage.upload(full, gcs.BUCKET, "arguments/both/")
    storage.upload(Path(DENSE), gcs.BUCKET, "arguments/both/checkpoints/")
    storage.put(gcs.BUCKET, "arguments/nothing/readme.md", b"x")
    draft = {"method": "eagle3", "num_speculative_tokens": 2}
    jobs = [
        job("typo", "/nonexistent/run/checkpoints", plain),
        job("relative typo", "runs/checkpoints", plain),
        job("file URL", f"file://{DENSE}", plain),
        job("tilde", "~/dense_v2/checkpoints", plain),
        job("relative", "copy", plain),
        {**job("text", DENSE, full), "peer": str(root / "peer")},
        {**job("vision", VISION, full), "peer": str(root / "peer")},
        job("overridden", DENSE, full, override_generation_config={"temperature": 0.2, "eos_token_id": 9}),
        job("directory", DENSE, full, generation_config=str(other)),
        job("vllm", DENSE, full, generation_config="vllm"),
        job("chat", DENSE, plain),
        job("base", DENSE, base),
        job("no tokenizer", DENSE, None, skip_tokenizer_init=True),
        *(job(f"same {name}", DENSE, place) for name, place in SAME_PLACE.items()),
        job("same form", str(cases()["dense_v2"].twin_config), DENSE, model_loader_extra_config={"checkpoint": DENSE}),
        job("bucket tokenizer", VISION, f"{BUCKET}/run/tokenizer"),
        job("bucket both", DENSE, f"{BUCKET}/both"),
        job("bucket nothing", DENSE, f"{BUCKET}/nothing"),
        job("bucket missing", DENSE, f"{BUCKET}/missing"),
        job("images", VISION, plain),
        job("language model only", VISION, plain, language_model_only=True),
        job("no images", VISION, plain, limit_mm_per_prompt={"image": 0, "video": {"count": 0}}),
        job("json", DENSE, plain, model_loader_extra_config='{"model_name": "gemma4-31b", "step": 0}'),
        job("nodes newest", DENSE, plain, data_parallel_size=2, data_parallel_size_local=1),
        job("nodes step", f"{DENSE}/0", plain, data_parallel_size=2, data_parallel_size_local=1),
        job("not json", DENSE, plain, model_loader_extra_config="{model_name: gemma4-31b}"),
        job("list", DENSE, plain, model_loader_extra_config="[1]"),
        {
            **job("reused", DENSE, plain),
            "again": {"model": OTHER, "model_loader_extra_config": {"model_name": "gemma4-26b"}},
        },
        job("fewer tokens", str(smaller), plain, model_loader_extra_config={"checkpoint": DENSE}),
        job("overridden size", DENSE, plain, hf_overrides={"vocab_size": 300}),
        job("draft checkpoint", DENSE, plain, speculative_config={"model": OTHER, **draft}),
        job(
            "draft format",
            DENSE,
            plain,
            speculative_config={"model": "/draft", "draft-load-config": {"load_format": "maxtext"}, **draft},
        ),
        job("draft nowhere", DENSE, plain, speculative_config={"method": "mtp", "num_speculative_tokens": 2}),
    ]  # fmt: skip
    (root / "jobs.json").write_text(json.dumps(jobs))
    with gcs.environment(
        proxy.url,
        HOME=str(FIXTURES),
        VLLM_CACHE_ROOT=str(root / "cache"),
        VLLM_ASSETS_CACHE=str(root / "assets"),
    ):
        done = subprocess.run(
            [sys.executable, str(WORKER), str(root / "jobs.json"), str(root / "answers.json")],
            capture_output=True,
            text=True,
            check=False,
            cwd=root,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    proxy.clear()
    return json.loads((root / "answers.json").read_text())


def log_of(answer: dict[str, Any], part: str) -> list[str]:
    """The lines of ours that contain `part`."""
    return [line for line in answer["log"] if part in line]


@pytest.mark.parametrize(
    ("name", "path"), [("typo", "/nonexistent/run/checkpoints"), ("relative typo", "runs/checkpoints")]
)
def test_offline_typo_is_ours(answers: dict[str, Any], name: str, path: str) -> None:
    assert answers[name]["error"].startswith("CheckpointNotFoundError: ")
    assert f"{path}: no such checkpoint directory." in answers[name]["error"]


@pytest.mark.parametrize("name", ["file URL", "tilde", "relative"])
def test_offline_spellings_are_ours(answers: dict[str, Any], name: str) -> None:
    answer = answers[name]
    assert "error" not in answer, answer["error"]
    assert answer["experts"] is None
    assert answer["left alone"]


@pytest.mark.parametrize("name", ["text", "vision"])
def test_generation_config_arrives(answers: dict[str, Any], name: str) -> None:
    answer = answers[name]
    assert (answer["stops"], answer["sampling"]) == ([1, 106, 50], SAMPLING)
    assert {"config.json", "generation_config.json", "chat_template.jinja"} <= set(answer["files"])
    assert ("processor_config.json" in answer["files"]) == (name == "vision")
    assert not log_of(answer, "Assumed")


def test_options_of_the_generation_config_count(answers: dict[str, Any]) -> None:
    assert answers["overridden"]["sampling"] == {**SAMPLING, "temperature": 0.2}
    assert (answers["directory"]["stops"], answers["directory"]["sampling"]) == (7, {"temperature": 0.5})
    assert (answers["vllm"]["stops"], answers["vllm"]["sampling"]) == ([1, 106, 50], {})


@pytest.mark.parametrize(
    ("name", "stops"), [("chat", [1, 106, 50]), ("base", [1]), ("no tokenizer", [1, 106, 50])]
)
def test_assumed_stops_are_said(answers: dict[str, Any], name: str, stops: list[int]) -> None:
    answer = answers[name]
    (line,) = log_of(answer, "Assumed")
    assert line.startswith(
        f"INFO {DENSE_ITEMS}: the tokenizer comes without a generation_config.json. Assumed: "
    )
    assert f"stops at token ids {stops}, as google/gemma-4-31B-it" in line
    assert ("has no chat template" in line) == (name == "base")
    # transformers says the single one without a list.
    assert answer["stops"] in (stops, stops[0] if len(stops) == 1 else None)
    assert answer["sampling"] == {}


@pytest.mark.parametrize("name", [*(f"same {name}" for name in SAME_PLACE), "same form"])
def test_checkpoint_as_tokenizer(answers: dict[str, Any], name: str, root: Path) -> None:
    assert answers[name]["error"].startswith("EngineError: ")
    assert NO_TOKENIZER in answers[name]["error"]
    assert not list((root / "assets").rglob("*")), "vLLM has copied something"


def test_tokenizer_in_a_bucket(answers: dict[str, Any], root: Path) -> None:
    """For text and vision; of a run that holds its tokenizer, only the tokenizer is copied."""
    for name in ("bucket tokenizer", "bucket both"):
        answer = answers[name]
        assert "error" not in answer, answer["error"]
        assert (answer["stops"], answer["sampling"]) == ([1, 106, 50], SAMPLING)
        copied = sorted(file.name for file in Path(answer["tokenizer"]).iterdir())
        assert copied == sorted(file.name for file in (root / "full").iterdir())
    assert "processor_config.json" in answers["bucket tokenizer"]["files"]
    assert not list((root / "assets").rglob("*"))


def test_url_without_a_tokenizer(answers: dict[str, Any]) -> None:
    assert "holds no tokenizer (none of tokenizer.*" in answers["bucket nothing"]["error"]
    assert "It holds: readme.md." in answers["bucket nothing"]["error"]
    assert "missing: there is no such directory" in answers["bucket missing"]["error"]


def test_no_processor_where_images_are_off(answers: dict[str, Any]) -> None:
    assert log_of(answers["images"], "holds no image processor")
    for name in ("language model only", "no images"):
        answer = answers[name]
        assert "error" not in answer, answer["error"]
        assert not log_of(answer, "image processor")
        assert not [file for file in answer["files"] if file.startswith("tokenizer")]


def test_extra_config_as_json(answers: dict[str, Any]) -> None:
    assert "error" not in answers["json"], answers["json"]["error"]
    assert answers["not json"]["error"].startswith("OptionError: --model-loader-extra-config is not JSON")
    assert answers["list"]["error"].startswith(
        "OptionError: --model-loader-extra-config must be a dictionary or"
    )


@pytest.mark.parametrize("which", ["second", "replaced"])
def test_arguments_can_be_used_again(answers: dict[str, Any], which: str) -> None:
    answer = answers["reused"]
    assert "error" not in answer, answer["error"]
    assert (answer["experts"], answer["served"]) == (None, DENSE)
    assert (answer[which]["experts"], answer[which]["served"]) == (8, OTHER)


@pytest.mark.parametrize("name", ["fewer tokens", "overridden size"])
def test_trained_tokens_are_not_dropped(answers: dict[str, Any], name: str) -> None:
    assert answers[name]["error"].startswith("ConfigMismatchError: ")
    assert "vocab_size 300, and 20 of the 20 rows past it are not zero" in answers[name]["error"]


def test_draft_in_a_checkpoint_is_refused(answers: dict[str, Any]) -> None:
    for name in ("draft checkpoint", "draft format", "draft nowhere"):
        assert answers[name]["error"].startswith("EngineError: --speculative-config (")
    assert f"(draft {OTHER}): is a checkpoint that Orbax wrote" in answers["draft checkpoint"]["error"]
    assert "draft_load_config with load_format maxtext" in answers["draft format"]["error"]
    assert "(method mtp): a MaxText checkpoint holds no draft model" in answers["draft nowhere"]["error"]


@pytest.mark.parametrize("name", ["text", "vision"])
def test_worker_on_another_node_writes_the_directory(answers: dict[str, Any], name: str, root: Path) -> None:
    first, peer = answers[name], answers[name]["peer"]
    assert peer["same"]
    assert Path(peer["model"]).parent == root / "peer" / "maxtext"
    for fact in ("files", "experts", "vocab", "stops", "sampling", "served"):
        assert peer[fact] == first[fact]


def test_newest_step_is_refused_where_nodes_start_one_by_one(answers: dict[str, Any]) -> None:
    error = answers["nodes newest"]["error"]
    assert error.startswith(f"EngineError: {DENSE_ITEMS}: no step was named")
    assert """--model-loader-extra-config '{"step": 0}'""" in error
    assert "no step was named" not in answers["nodes step"].get("error", "")
