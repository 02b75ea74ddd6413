"""New steps in the real server, `vllm serve gs://…`, over HTTP: answers before, meanwhile and after.

One server for all tests. Steps are a fixture and the same leaves with other values. Whose answer tokens are
is told by transformers, in float32 on a step's own weights.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from test_serve import Server, serving

from support import gcs
from support.engine import bound
from support.following import follow, vllm_maxtext
from support.steps import write_step
from tiny_tokenizer import write_tokenizer
from vllm_maxtext_loader import open_checkpoint
from vllm_maxtext_loader.checkpoint.names import COMMIT_FILE
from vllm_maxtext_loader.tools import follow as follow_module

pytestmark = pytest.mark.engine

CASE = "dense_v2"
MODEL_NAME = "gemma4-31b"
PREFIX = "followed-by-an-engine/checkpoints"
RUN = f"gs://{gcs.BUCKET}/{PREFIX}"
PROMPT = "a step"
FACTORS = {100: 1.0, 200: -1.0, 300: 0.5}
GREEDY = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
LONG = 400
"""Tokens: an answer of some seconds, in which a reload begins and ends."""


class Steps:
    """The run: step 100 is there from the start."""

    def __init__(self, directory: Path, tokenizer: Path) -> None:
        from transformers import AutoTokenizer

        self.storage, self.proxy = gcs.shared()
        self.items = {step: write_step(directory, step, CASE, factor) for step, factor in FACTORS.items()}
        self.prompt: list[int] = AutoTokenizer.from_pretrained(tokenizer)(PROMPT).input_ids
        self._models: dict[int, Any] = {}
        self.upload(100)
        self.commit(100)

    def upload(self, step: int) -> None:
        """All of a step but the file that commits it."""
        directory = self.items[step].parent
        for path in sorted(directory.rglob("*")):
            if path.is_file() and path != directory / COMMIT_FILE:
                name = f"{PREFIX}/{step}/{path.relative_to(directory).as_posix()}"
                self.storage.put(gcs.BUCKET, name, path.read_bytes())

    def commit(self, step: int) -> None:
        self.storage.put(gcs.BUCKET, f"{PREFIX}/{step}/{COMMIT_FILE}", b"")

    def gaps(self, step: int, tokens: list[int]) -> torch.Tensor:
        """By how much each token of an answer is less likely than the likeliest, in allowed deviations.

        Float32 log-probs by transformers, each on the tokens before. Of two tokens that are almost as likely,
        two runs of the engine need not choose the same.
        """
        from transformers import Gemma4ForCausalLM

        if step not in self._models:
            checkpoint = open_checkpoint(self.items[step], model_name=MODEL_NAME)
            model = Gemma4ForCausalLM(checkpoint.hf_config()).eval()
            model.load_state_dict(dict(checkpoint.hf_weights(dtype=torch.float32)), strict=False)
            model.tie_weights()
            self._models[step] = model
        with torch.no_grad():
            logits = self._models[step](torch.tensor([self.prompt + tokens])).logits[0]
        reference = logits[len(self.prompt) - 1 : -1].log_softmax(-1)
        chosen = reference.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        return (reference.max(-1).values - chosen) / (10 * bound(12, float(reference.std())))

    def said_by(self, tokens: list[int]) -> list[int]:
        """The steps whose answer these tokens are."""
        return [step for step in FACTORS if self.gaps(step, tokens).max() < 1]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), vocab_size=320)


@pytest.fixture(scope="module")
def steps(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    return Steps(tmp_path_factory.mktemp("steps"), tokenizer)


@pytest.fixture(scope="module")
def server(steps: Steps, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    extra = json.dumps({"model_name": MODEL_NAME})
    with (
        gcs.environment(steps.proxy.url, VLLM_SERVER_DEV_MODE="1", VLLM_MAXTEXT_TIMEOUT="10"),
        serving(
            RUN, tokenizer, log, "--model-loader-extra-config", extra, "--max-model-len", "512"
        ) as running,
    ):
        yield running


@pytest.fixture(autouse=True)
def _no_faults(steps: Steps) -> Iterator[None]:
    yield
    steps.proxy.clear()


def answer(server: Server, tokens: int = 16) -> list[int]:
    """The tokens of an answer."""
    body = {"model": server.model, "prompt": PROMPT, "max_tokens": tokens, **GREEDY}
    found = server.post("/v1/completions", body)["choices"][0]["token_ids"]
    assert len(found) == tokens
    return found


def serves(server: Server, step: int) -> bool:
    return server.get("/weight_info") == {"weight_version": f"step-{step}"} and not is_paused(server)


def is_paused(server: Server) -> bool:
    return server.get("/is_paused")["is_paused"]


class Stream:
    """A long answer, token by token."""

    def __init__(self, server: Server) -> None:
        body = {"model": server.model, "prompt": PROMPT, "max_tokens": LONG, "stream": True, **GREEDY}
        self._request = urllib.request.Request(
            f"{server.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        self.begun = threading.Event()
        self.tokens: list[int] = []
        self.reason = None
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        assert self.begun.wait(120)

    def _read(self) -> None:
        with urllib.request.urlopen(self._request, timeout=300) as lines:
            for line in lines:
                if line.startswith(b"data: {"):
                    (choice,) = json.loads(line.removeprefix(b"data: "))["choices"]
                    self.tokens += choice["token_ids"]
                    self.reason = choice["finish_reason"] or self.reason
                    self.begun.set()

    def end(self) -> Stream:
        self._thread.join(300)
        assert not self._thread.is_alive()
        return self


def reload(server: Server, *options: object) -> str:
    done = vllm_maxtext("reload", RUN, "--url", server.url, *options)
    assert done.exit_code == 0, (done.output, done.exception, server.log.read_text()[-3000:])
    return done.output


def test_the_first_step_is_named(server: Server) -> None:
    assert serves(server, 100)


def test_the_answer_is_the_step_s(server: Server, steps: Steps) -> None:
    assert steps.said_by(answer(server)) == [100]
    steps.upload(200)
    steps.commit(200)
    for step, options in ((200, []), (100, ["--step", 100])):
        output = reload(server, *options)
        assert f"serves step {step} of {RUN}/{step}/items" in output
        assert serves(server, step)
        assert steps.said_by(answer(server)) == [step]
    log = server.log.read_text()
    assert len(re.findall(r"Serving gs://\S+/200/items now", log)) == 1


def test_wait_ends_what_has_begun_and_queues_the_rest(server: Server, steps: Steps) -> None:
    reload(server, "--step", 100)
    stream = Stream(server)

    def ask_while_paused() -> list[int]:
        while not is_paused(server):
            time.sleep(0.01)
        return answer(server)

    with ThreadPoolExecutor(1) as pool:
        queued = pool.submit(ask_while_paused)
        output = reload(server, "--step", 200)
        assert steps.said_by(queued.result(120)) == [200]
    assert "for requests in flight" in output
    stream.end()
    assert (len(stream.tokens), stream.reason) == (LONG, "length")
    assert steps.said_by(stream.tokens) == [100]


def test_keep_loses_nothing(server: Server, steps: Steps) -> None:
    reload(server, "--step", 100)
    stream = Stream(server)
    reload(server, "--step", 200, "--in-flight", "keep")
    stream.end()
    assert (len(stream.tokens), stream.reason) == (LONG, "length")
    # It began with one step's tokens and ended with the other's.
    assert steps.said_by(stream.tokens) == []
    assert steps.gaps(100, stream.tokens)[0] < 1
    assert steps.gaps(200, stream.tokens)[-1] < 1
    assert steps.said_by(answer(server)) == [200]


def test_the_server_answers_while_it_stages(server: Server, steps: Steps) -> None:
    reload(server, "--step", 100)
    steps.proxy.faults.append(gcs.Fault(f"^read .*{PREFIX}/200/.*/d/", rate=20_000))

    def staged() -> dict[str, Any] | None:
        return server.post("/collective_rpc", {"method": "weight_state"})["results"][0]["staged"]

    def ask_meanwhile() -> list[tuple[list[int], str]]:
        seen = []
        while not staged():
            time.sleep(0.01)
        while (found := staged()) and found["state"] == "staging":
            seen.append((answer(server, 8), server.get("/weight_info")["weight_version"]))
        return seen

    with ThreadPoolExecutor(1) as pool:
        seen = pool.submit(ask_meanwhile)
        output = reload(server, "--step", 200)
        assert len(seen.result(60)) >= 2
    # The last one may have been asked in the moment of the swap.
    for tokens, version in seen.result()[:-1]:
        assert (steps.said_by(tokens), version) == ([100], "step-100")
    staging = re.search(r"staged in (\d+\.\d) s, paused for (\d+\.\d\d) s", output)
    assert staging is not None
    assert float(staging[1]) > 1
    assert float(staging[2]) < float(staging[1])


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (gcs.Fault(f"^read .*{PREFIX}/100/.*/d/", status=403), "403"),
        (gcs.Fault(f"^read .*{PREFIX}/100/.*/d/", status=404), "100/items"),
    ],
    ids=["forbidden", "deleted"],
)
def test_a_step_that_cannot_be_read_changes_nothing(
    fault: gcs.Fault, says: str, server: Server, steps: Steps
) -> None:
    reload(server, "--step", 200)
    steps.proxy.faults.append(fault)
    done = vllm_maxtext("reload", RUN, "--step", 100, "--url", server.url)
    assert done.exit_code == 2, done.output
    assert "could not stage" in done.output
    assert says in done.output
    assert serves(server, 200)
    assert steps.said_by(answer(server)) == [200]
    steps.proxy.clear()
    reload(server, "--step", 100)
    assert serves(server, 100)


def test_follow_takes_a_step_when_it_is_committed(server: Server, steps: Steps) -> None:
    reload(server, "--step", 200)
    steps.upload(300)
    script: list[Callable[[], object]] = [
        lambda: time.sleep(2),
        lambda: steps.commit(300) if serves(server, 200) else pytest.fail("an uncommitted step was taken"),
        lambda: serves(server, 300),
    ]
    done = follow(RUN, [server.url], *script, options=("--every", "0.2"), most=60)
    assert f"{server.url}: serves step 300 of {RUN}/300/items (before: step 200)" in done.output
    assert "problem" not in done.output
    assert steps.said_by(answer(server)) == [300]


def test_a_killed_follow_is_made_good_by_the_next(
    server: Server, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    reload(server, "--step", 200)
    stream = Stream(server)
    with _following(server) as process:
        _wait(lambda: is_paused(server))
        process.kill()
    assert steps.said_by(stream.end().tokens) == [200]
    assert is_paused(server)
    monkeypatch.setattr(follow_module, "_PAUSED_SECONDS", 1.0)
    done = follow(RUN, [server.url], lambda: serves(server, 300), options=("--every", "0.2"), most=60)
    assert "was left paused; resumed" in done.output
    assert steps.said_by(answer(server)) == [300]


def test_sigterm_while_requests_in_flight_are_waited_for(server: Server, steps: Steps) -> None:
    reload(server, "--step", 200)
    stream = Stream(server)
    with _following(server) as process:
        _wait(lambda: is_paused(server))
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 0, output
    assert serves(server, 200)
    assert steps.said_by(stream.end().tokens) == [200]
    assert steps.said_by(answer(server)) == [200]


@contextlib.contextmanager
def _following(server: Server) -> Iterator[subprocess.Popen[str]]:
    code = "from vllm_maxtext_loader.cli.app import main; main()"
    command = [sys.executable, "-c", code, "follow", RUN, "--url", server.url, "--every", "0.2"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ.copy()
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _wait(condition: Callable[[], bool], most: float = 60.0) -> None:
    deadline = time.monotonic() + most
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
