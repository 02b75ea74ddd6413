"""`vllm-maxtext reload` against a server that keeps the protocol."""

from __future__ import annotations

import base64
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import Result

from support.damage import Place
from support.following import items, one_step, quicken, vllm_maxtext, write, write_uncommitted
from support.weight_server import SWAP, Fault, WeightServer, serving
from vllm_maxtext_loader.tools import reload as reload_module


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> Place:
    """A run with step 0."""
    return one_step(tmp_path)


@pytest.fixture
def server(run: Place) -> Iterator[WeightServer]:
    with serving(items(run, 0)) as running:
        yield running


def reload(place: Place, *arguments: object) -> Result:
    return vllm_maxtext("reload", place.root / "run", *arguments)


def test_reload_takes_the_newest_committed_step(run: Place, server: WeightServer) -> None:
    write(run, 100)
    write(run, 200)
    write_uncommitted(run, 300)
    done = reload(run, "--url", server.url)
    assert done.exit_code == 0, done.output
    server.assert_serves(200)
    assert server.served == [(items(run, 200), 200)]
    order = [name for name in server.requests if name.startswith("/")]
    assert order == SWAP
    assert server.requests.index("/pause") > max(
        n for n, name in enumerate(server.requests) if name == "pull_weights"
    )
    assert re.search(
        r"serves step 200 of \S+/200/items \(before: step 0\)\. 3\.00 MiB staged in 0\.5 s, "
        r"paused for \d\.\d\d s",
        done.output,
    )
    again = reload(run, "--url", server.url)
    assert again.exit_code == 0
    assert "serves step 200" in again.output
    assert "already" in again.output
    assert len(server.served) == 1


def test_reload_goes_back_where_a_step_is_given(run: Place, server: WeightServer) -> None:
    write(run, 100)
    assert reload(run, "--url", server.url).exit_code == 0
    assert reload(run, "--step", 0, "--url", f"{server.url}/v1/").exit_code == 0
    assert [step for _, step in server.served] == [100, 0]
    missing = reload(run, "--step", 7, "--url", server.url)
    assert missing.exit_code == 2
    assert "has no step 7. Steps: 0, 100" in missing.output
    server.assert_serves(0)


@pytest.mark.parametrize("in_flight", ["wait", "keep", "abort"])
def test_requests_in_flight(in_flight: str, run: Place, server: WeightServer) -> None:
    write(run, 100)
    assert reload(run, "--url", server.url, "--in-flight", in_flight).exit_code == 0
    assert server.pauses == [in_flight]
    server.assert_serves(100)


def test_a_step_of_another_model_pauses_nothing(run: Place, server: WeightServer) -> None:
    write(run, 100, source="dense_v2")
    done = reload(run, "--url", server.url)
    assert done.exit_code == 2
    assert "is another model than the one that" in done.output
    assert "served" in done.output
    assert set(server.requests) <= {"weight_state", "drop_weights"}
    server.assert_serves(0)


def test_another_layout_of_the_same_model_is_taken(run: Place, server: WeightServer) -> None:
    write(run, 100, source="moe_v1")
    done = reload(run, "--url", server.url)
    assert done.exit_code == 0, done.output
    server.assert_serves(100)


def test_served_step_may_be_deleted(run: Place, server: WeightServer) -> None:
    write(run, 100)
    shutil.rmtree(run.root / "run/0")
    assert reload(run, "--url", server.url).exit_code == 0
    server.assert_serves(100)


def test_step_that_cannot_be_staged(run: Place, server: WeightServer) -> None:
    write(run, 100)
    server.bad[items(run, 100)] = "ReadError: decoder.norm: chunk 0 is truncated"
    done = reload(run, "--url", server.url)
    assert done.exit_code == 2
    assert "could not stage" in done.output
    assert "chunk 0 is truncated" in done.output
    assert server.staged is None
    assert "/pause" not in server.requests
    server.assert_serves(0)
    server.bad.clear()
    assert reload(run, "--url", server.url).exit_code == 0
    server.assert_serves(100)


def test_staging_that_stalls_is_given_up(
    run: Place, server: WeightServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(run, 100)
    server.polls = 1 << 30
    monkeypatch.setattr(reload_module, "_STALLED_SECONDS", 0.2)
    done = reload(run, "--url", server.url)
    assert done.exit_code == 2
    assert "no byte" in done.output
    assert server.staged is None
    server.assert_serves(0)


def test_weights_of_two_steps_are_replaced(run: Place, server: WeightServer) -> None:
    server.tears = True
    write(run, 100)
    done = reload(run, "--url", server.url)
    assert done.exit_code == 2
    assert "TornWeightsError: some arrays are of the new step" in done.output
    assert (server.torn, server.paused) == (True, False)
    server.tears = False
    assert reload(run, "--step", 0, "--url", server.url).exit_code == 0
    assert server.served == [(items(run, 0), 0)]
    server.assert_serves(0)


def test_workers_that_disagree(run: Place) -> None:
    write(run, 100)
    with serving(items(run, 0), workers=3) as server:
        assert reload(run, "--url", server.url).exit_code == 0
        server.assert_serves(100)
        assert "9.00 MiB" in reload(run, "--step", 0, "--url", server.url).output
        workers = [{"items": "/x", "step": step, "torn": False} for step in (100, 100, 0)]
        server.faults = [Fault("weight_state", 200, {"results": workers})]
        done = reload(run, "--url", server.url)
    assert done.exit_code == 2
    assert "its workers hold different steps (0, 100)" in done.output


@pytest.mark.parametrize("done", [False, True], ids=["refused", "answer lost"])
@pytest.mark.parametrize("status", [500, 0])
@pytest.mark.parametrize("route", SWAP)
def test_a_swap_that_fails_ends_with_a_server_that_answers(
    route: str, status: int, done: bool, run: Place, server: WeightServer
) -> None:
    write(run, 100)
    server.faults = [Fault(route, status, {"error": {"message": "no room"}}, done=done, times=1)]
    result = reload(run, "--url", server.url)
    # What was swapped in before the answer got lost is kept, and called by its name.
    swapped = bool(server.served)
    assert swapped == (
        route in SWAP[SWAP.index("/finish_weight_update") :] or (route == "/update_weights" and done)
    )
    server.assert_serves(100 if swapped else 0)
    assert result.exit_code == (0 if swapped else 2), result.output
    if not swapped and status:
        assert "no room" in result.output


@pytest.mark.parametrize("route", SWAP)
def test_a_server_that_hangs_is_not_left_paused(route: str, run: Place, server: WeightServer) -> None:
    write(run, 100)
    server.faults = [Fault(route, 200, {}, hang=1.5, done=True, times=1)]
    result = reload(run, "--url", server.url, "--timeout", "1")
    deadline = time.monotonic() + 5
    while server.paused and time.monotonic() < deadline:
        time.sleep(0.05)
    server.assert_serves(100 if server.served else 0)
    assert result.exit_code == (0 if server.served else 2), result.output
    if not server.served:
        assert "did not answer" in result.output
        assert "--timeout" in result.output


def test_a_pause_that_is_carried_out_after_it_was_given_up(
    run: Place, server: WeightServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(run, 100)
    server.faults = [Fault("/pause", 200, {}, late=1.3, done=True, times=1)]
    monkeypatch.setattr(reload_module, "_SETTLE_SECONDS", 0.6)
    result = reload(run, "--url", server.url, "--timeout", "1")
    assert result.exit_code == 2
    assert server.requests.count("/resume") == 2
    server.assert_serves(0)


def test_requests_in_flight_that_do_not_end(run: Place, server: WeightServer) -> None:
    write(run, 100)
    server.in_flight = 3.0
    result = reload(run, "--url", server.url, "--timeout", "1")
    assert result.exit_code == 2
    assert "did not answer /pause within 1 s" in result.output
    server.assert_serves(0)


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda server: server.stop(), "cannot be reached ([Errno 111] Connection refused). Check the URL"),
        (lambda server: setattr(server, "dev_mode", False), "Start it with VLLM_SERVER_DEV_MODE=1"),
        (
            lambda server: server.faults.append(
                Fault(
                    "weight_state", 500, {"error": {"message": "Method 'weight_state' is not implemented."}}
                )
            ),
            "with --load-format maxtext",
        ),
        (
            lambda server: server.faults.append(Fault("weight_state", 401, {"error": "Unauthorized"})),
            "VLLM_API_KEY",
        ),
        (lambda server: server.faults.append(Fault("weight_state", 200, "<html>")), "it is no vLLM server"),
        (
            lambda server: server.faults.append(Fault("weight_state", 200, {"results": ["OK"]})),
            "same version",
        ),
        (lambda server: server.faults.append(Fault("weight_state", 502, "<html>bad gateway")), "HTTP 502"),
        (lambda server: server.faults.append(Fault("weight_state", 307, "")), "HTTP 307"),
        (
            lambda server: server.faults.append(
                Fault("weight_state", 500, {"error": {"message": "LoRA is on"}})
            ),
            "weight_state failed (HTTP 500): LoRA is on",
        ),
    ],
)
def test_unusable_servers(
    prepare: Callable[[WeightServer], None], says: str, run: Place, server: WeightServer
) -> None:
    write(run, 100)
    prepare(server)
    done = reload(run, "--url", server.url)
    assert done.exit_code == 2, done.output
    assert says in done.output
    assert "internal error" not in done.output
    assert server.served == []
    assert server.paused is False


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "http://a:b", "http://a/?x=1", ""])
def test_urls_that_are_none(url: str, run: Place) -> None:
    done = reload(run, "--url", url)
    assert done.exit_code == 2
    assert "Give http://HOST:PORT." in done.output


def test_several_servers(run: Place, server: WeightServer) -> None:
    write(run, 100)
    with serving(items(run, 0)) as second:
        server.faults = [Fault("/update_weights", 500, {"error": {"message": "no room"}}, times=1)]
        done = reload(run, "--url", server.url, "--url", second.url)
        assert done.exit_code == 1
        assert "no room" in done.stderr
        assert f"{second.url}: serves step 100" in done.stdout
        server.assert_serves(0)
        second.assert_serves(100)
        assert reload(run, "--url", server.url, "--url", second.url).exit_code == 0
        server.assert_serves(100)
        server.stop()
        second.faults = [Fault("weight_state", 500, {"error": {"message": "LoRA is on"}})]
        done = reload(run, "--url", server.url, "--url", second.url)
    assert done.exit_code == 2
    assert "Connection refused" in done.stderr
    assert "LoRA is on" in done.stderr
    server.start()


def test_api_key_is_sent_and_not_shown(
    run: Place, server: WeightServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write(run, 100)
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login a password from-netrc\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    outputs = [reload(run, "--url", server.url).output]
    assert server.authorization == ""
    outputs.append(reload(run, "--url", server.url, "--step", 0, "--api-key", "sesame-1").output)
    assert server.authorization == "Bearer sesame-1"
    monkeypatch.setenv("VLLM_API_KEY", "sesame-2")
    outputs.append(reload(run, "--url", server.url, "--step", 100).output)
    assert server.authorization == "Bearer sesame-2"
    server.faults = [Fault("weight_state", 401, {"error": "Unauthorized"})]
    outputs.append(reload(run, "--url", server.url).output)
    server.stop()
    monkeypatch.delenv("VLLM_API_KEY")
    login = server.url.replace("http://", "http://user:sesame-3@")
    outputs.append(reload(run, "--url", login).output)
    server.start()
    server.faults.clear()
    outputs.append(reload(run, "--url", login).output)
    assert server.authorization == f"Basic {base64.b64encode(b'user:sesame-3').decode()}"
    assert "sesame" not in "".join(outputs)


@pytest.mark.parametrize(("command", "number"), [("reload", signal.SIGINT), ("follow", signal.SIGTERM)])
@pytest.mark.parametrize("stage", ["weight_state", "pull_weights", *SWAP])
def test_a_signal_at_any_request_ends_with_a_server_that_answers(
    stage: str, number: signal.Signals, command: str, run: Place, server: WeightServer
) -> None:
    write(run, 100)
    server.in_flight = 1.0 if stage == "/pause" else 0.0
    sent: list[str] = []

    def interrupt(name: str) -> None:
        if name == stage and not sent:
            sent.append(name)
            os.kill(os.getpid(), number)
            # The request is under way when the signal is handled.
            time.sleep(0.2)

    server.on_request = interrupt
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    arguments = ("--every", "0.1") if command == "follow" else ()
    done = vllm_maxtext(command, run.root / "run", "--url", server.url, *arguments)
    assert sent == [stage]
    time.sleep(0.1)
    swapped = stage in SWAP[1:]
    server.assert_serves(100 if swapped else 0)
    assert server.staged is None
    assert done.exit_code == (130 if number == signal.SIGINT else 0), (done.output, done.exception)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_signal_does_not_hinder_the_resuming(run: Place, server: WeightServer) -> None:
    write(run, 100)
    server.in_flight = 1.0
    server.on_request = lambda name: (
        os.kill(os.getpid(), signal.SIGINT) if name in ("/pause", "/resume") else None
    )
    done = reload(run, "--url", server.url)
    time.sleep(0.1)
    assert server.requests.count("/resume") == 1
    server.assert_serves(0)
    assert done.exit_code == 130
