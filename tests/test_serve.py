"""Truth number four: the real server, `vllm serve gs://…`, from a bucket behind the real GCS protocol, over HTTP.

Nothing but a checkpoint and a tokenizer is given: no config.json, no weights, no local copy. What the server says is compared
with transformers in float32.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support import gcs
from support.checkpoints import FIXTURES, cases
from support.engine import bound
from tiny_tokenizer import write_tokenizer
from vllm_maxtext_loader import open_checkpoint

pytestmark = pytest.mark.engine

CASE = "dense_v2"
START_SECONDS = 900
PROMPT = "a checkpoint that was never converted, and is longer than a sliding window"


class Server:
    """A running `vllm serve`."""

    def __init__(self, url: str, model: str, log: Path) -> None:
        self.url = url
        self.model = model
        self.log = log

    def get(self, path: str) -> Any:
        """The answer to a GET request, parsed."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=60) as answer:
            return json.loads(answer.read() or "null")

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer to a POST request, parsed."""
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.loads(answer.read())


@contextlib.contextmanager
def serving(model: str, tokenizer: Path, log: Path, *options: str) -> Iterator[Server]:
    """Starts `vllm serve`, waits until it is healthy, and stops it."""
    port = gcs.free_port()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment.pop("MODEL_IMPL_TYPE", None)
    command = [str(Path(sys.executable).parent / "vllm"), "serve", model, "--load-format", "maxtext"]
    command += ["--tokenizer", str(tokenizer), "--port", str(port), "--host", "127.0.0.1"]
    command += ["--max-model-len", "128", "--max-num-seqs", "4", "--max-num-batched-tokens", "128", *options]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    server = Server(f"http://127.0.0.1:{port}", model, log)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError):
                server.get("/health")
                break
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"vllm serve did not come up: {log.read_text()[-3000:]}")
            time.sleep(1)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), vocab_size=320)


@pytest.fixture(scope="module")
def server(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    storage, proxy = gcs.shared()
    storage.upload(FIXTURES / CASE / "checkpoints", gcs.BUCKET, "served/checkpoints/")
    # A newer step that is still being written must not be taken.
    storage.upload(cases()[CASE].items, gcs.BUCKET, "served/checkpoints/7/items/")
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    extra = json.dumps({"model_name": "gemma4-31b"})
    with (
        gcs.environment(proxy.url),
        serving(
            f"gs://{gcs.BUCKET}/served/checkpoints", tokenizer, log, "--model-loader-extra-config", extra
        ) as running,
    ):
        yield running


def _reference(tokens: list[int]) -> Any:
    """Float32 log-probs of the next token, by transformers on the checkpoint's own weights and configuration."""
    from transformers import Gemma4ForCausalLM

    checkpoint = open_checkpoint(cases()[CASE].items, model_name="gemma4-31b")
    model = Gemma4ForCausalLM(checkpoint.hf_config()).eval()
    weights = dict(checkpoint.hf_weights(dtype=torch.float32))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"]
    assert unexpected == []
    model.tie_weights()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)


def test_served_model_is_named_by_its_url(server: Server) -> None:
    (model,) = server.get("/v1/models")["data"]
    assert model["id"] == "gs://checkpoints/served/checkpoints"


def test_completions(server: Server, tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(tokenizer)(PROMPT).input_ids
    assert tokens[0] == 2, "Gemma 4 needs <bos>; vLLM leaves adding it to the tokenizer, as transformers does"
    body = {"model": server.model, "prompt": PROMPT, "max_tokens": 3, "temperature": 0, "logprobs": 5}
    answer = server.post("/v1/completions", {**body, "return_tokens_as_token_ids": True})
    assert answer["usage"]["prompt_tokens"] == len(tokens)
    (top,) = answer["choices"][0]["logprobs"]["top_logprobs"][:1]
    reference = _reference(tokens)
    limit = 5 * bound(12, float(reference.std()))
    for token, logprob in top.items():
        assert abs(logprob - float(reference[int(token.removeprefix("token_id:"))])) < limit


def test_chat_completions(server: Server) -> None:
    messages = [{"role": "user", "content": "hi"}]
    body = {"model": server.model, "messages": messages, "max_tokens": 4, "temperature": 0}
    answer = server.post("/v1/chat/completions", body)
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] == 4


def test_log_is_plain(server: Server) -> None:
    log = server.log.read_text()
    (summary,) = [line for line in log.splitlines() if "Loaded gs://" in line]
    assert "gs://checkpoints/served/checkpoints/0/items step 0" in summary
    assert "Skipped newer steps" in log
    assert "step 7" in log or "/7" in log
    assert log.count("JAX runs on the CPU") == 1


def test_qwen3_moe_with_the_configuration_next_to_the_tokenizer(
    twin: Callable[[str], Path], tmp_path: Path
) -> None:
    """A mixture of experts of no published size: what shapes do not tell is in the tokenizer's directory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = "qwen3moe_scanned"
    tokenizer = write_tokenizer(tmp_path / "tokenizer", vocab_size=320)
    shutil.copyfile(cases()[name].twin_config / "config.json", tokenizer / "config.json")
    storage, proxy = gcs.shared()
    storage.upload(FIXTURES / name / "checkpoints", gcs.BUCKET, "qwen/checkpoints/")
    tokens = AutoTokenizer.from_pretrained(tokenizer)(PROMPT).input_ids
    model = AutoModelForCausalLM.from_pretrained(twin(name), dtype=torch.float32)
    with torch.no_grad():
        reference = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
    with (
        gcs.environment(proxy.url),
        serving(f"gs://{gcs.BUCKET}/qwen/checkpoints", tokenizer, tmp_path / "log.txt") as running,
    ):
        body = {"model": running.model, "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "logprobs": 5}
        answer = running.post("/v1/completions", {**body, "return_tokens_as_token_ids": True})
    (top,) = answer["choices"][0]["logprobs"]["top_logprobs"][:1]
    limit = 5 * bound(model.config.num_hidden_layers, float(reference.std()))
    for token, logprob in top.items():
        assert abs(logprob - float(reference[int(token.removeprefix("token_id:"))])) < limit
    assert "config.json of the tokenizer's repository" in running.log.read_text()
