"""`vllm-maxtext follow` against servers that keep the protocol, and steps that appear in every way."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from typer.testing import Result

from support.checkpoints import FIXTURES
from support.damage import CASE, Place
from support.following import commit, follow, items, one_step, quicken, vllm_maxtext, write, write_uncommitted
from support.weight_server import Fault, WeightServer, serving
from vllm_maxtext_loader.checkpoint.names import COMMIT_FILE, TMP_MARK
from vllm_maxtext_loader.tools import follow as follow_module

FAST = ("--every", "0.1", "--timeout", "5")


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


def following(
    place: Place, servers: Sequence[WeightServer], *script: Callable[[], object], options: Sequence[str] = ()
) -> Result:
    urls = [server.url for server in servers]
    return follow(place.root / "run", urls, *script, options=(*FAST, *options))


def serves(server: WeightServer, step: int) -> Callable[[], bool]:
    return lambda: (server.step, server.paused) == (step, False)


def polled(server: WeightServer, times: int = 4) -> Callable[[], bool]:
    """That so many looks pass."""
    target: list[int] = []

    def looked() -> bool:
        count = server.requests.count("weight_state")
        target[:] = target or [count + times]
        return count >= target[0]

    return looked


def test_follow_takes_newer_committed_steps_only(run: Place, server: WeightServer) -> None:
    late = write_uncommitted(run, 200)
    done = following(
        run,
        [server],
        polled(server),
        lambda: write(run, 100),
        serves(server, 100),
        lambda: write(run, 50),  # older
        lambda: write(run, "0000100"),  # twice the same number
        polled(server),
        lambda: commit(late),
        serves(server, 200),
        lambda: shutil.rmtree(late),  # what is served is deleted
        polled(server),
        lambda: write(run, 300),
        lambda: write(run, 400),
        lambda: (run.root / f"run/500{TMP_MARK}-7").mkdir(),
        serves(server, 400),
        polled(server),
    )
    assert [step for _, step in server.served][:2] == [100, 200]
    # 300 may have been seen before 400 was there.
    assert [step for _, step in server.served][-1] == 400
    server.assert_serves(400)
    assert server.pauses == ["wait"] * len(server.served)
    lines = done.output.splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4} ", line) for line in lines), done.output
    swaps = [line for line in lines if "paused for" in line]
    assert len(swaps) == len(server.served)
    assert "serves step 200" in swaps[1]
    assert "(before: step 100)" in swaps[1]
    assert "problem" not in done.output


def test_follow_skips_what_it_missed(run: Place, server: WeightServer) -> None:
    for name in ("100", "200", "300"):
        write(run, name)
    following(run, [server], serves(server, 300), polled(server))
    assert [step for _, step in server.served] == [300]


def test_follow_from_a_step_on(run: Place, server: WeightServer) -> None:
    write(run, 100)
    following(
        run,
        [server],
        polled(server),
        lambda: write(run, 150),
        serves(server, 150),
        options=("--from", "150", "--in-flight", "keep"),
    )
    assert [step for _, step in server.served] == [150]
    assert server.pauses == ["keep"]


def test_follow_sets_a_bad_step_aside(run: Place, server: WeightServer) -> None:
    write(run, 100)
    write(run, 200)
    server.bad[items(run, 200)] = "ReadError: chunk 0 is truncated"
    done = following(
        run,
        [server],
        serves(server, 100),  # the next best
        polled(server, 8),
        lambda: write(run, 300),
        serves(server, 300),
    )
    assert done.output.count("chunk 0 is truncated") == 2
    assert done.output.count("step 200 is tried once more") == 1
    assert done.output.count("step 200 is set aside after 2 failures") == 1
    assert server.requests.count("/pause") == 2
    server.assert_serves(300)


def test_follow_sets_a_damaged_step_aside_without_a_pause(run: Place, server: WeightServer) -> None:
    step = write(run, 100)
    (step / "items/_METADATA").write_text("{")
    write(run, 90, source="dense_v2")
    done = following(run, [server], polled(server, 10), lambda: write(run, 110), serves(server, 110))
    for number, says in ((100, "100/items/_METADATA"), (90, "is another model")):
        assert f"step {number} is set aside after 2 failures" in done.output
        assert done.output.count(says) == 2
    assert server.pauses == ["wait"]
    server.assert_serves(110)


def test_follow_replaces_weights_of_two_steps(run: Place, server: WeightServer) -> None:
    server.torn = True
    done = following(run, [server], lambda: not server.torn, polled(server))
    assert done.output.count("the weights are of two steps") == 1
    assert server.served == [(items(run, 0), 0)]
    server.assert_serves(0)


def test_follow_asks_for_a_look_at_two_directories_of_one_number(run: Place, server: WeightServer) -> None:
    write(run, 90)
    write(run, 100)
    write(run, "0100")
    done = following(run, [server], serves(server, 90))
    assert "0100 and 100 are both step 100" in done.output
    assert "step 100 is set aside" in done.output


def test_follow_tries_again_a_step_that_was_written_anew(run: Place, server: WeightServer) -> None:
    write(run, 100)
    server.bad[items(run, 100)] = "ReadError: chunk 0 is truncated"
    following(
        run,
        [server],
        polled(server, 6),
        lambda: shutil.rmtree(run.root / "run/100"),
        polled(server),
        server.bad.clear,
        lambda: write(run, 100),
        serves(server, 100),
    )
    server.assert_serves(100)


def test_follow_waits_for_the_first_step(run: Place, server: WeightServer) -> None:
    shutil.rmtree(run.root / "run")
    server.restart("/elsewhere/5/items", 5)
    done = following(
        run,
        [server],
        polled(server, 3),
        # Numbers of something else.
        lambda: (run.root / "run/tensorboard_3").mkdir(parents=True),
        polled(server, 3),
        lambda: (run.root / "run/checkpoints").mkdir(),
        polled(server, 3),
        lambda: write(run, 3, "run/checkpoints"),
        polled(server, 3),
        lambda: write(run, 7, "run/checkpoints"),
        serves(server, 7),
    )
    assert "no such directory" in done.output
    assert "no numbered step yet" in done.output
    assert done.output.count("problem:") == 2
    assert "which is not of" in done.output
    assert [step for _, step in server.served] == [7]


def test_follow_survives_a_restart_of_the_server(run: Place, server: WeightServer) -> None:
    write(run, 100)

    def restart() -> None:
        server.restart(items(run, 0), 0)
        server.start()

    done = following(
        run, [server], serves(server, 100), server.stop, lambda: time.sleep(0.5), restart, serves(server, 100)
    )
    assert [step for _, step in server.served] == [100, 100]
    assert done.output.count("Connection refused") == 1
    assert done.output.count("serves step 0,") == 2
    server.assert_serves(100)


def test_follow_waits_for_a_server_that_is_not_there_yet(run: Place, server: WeightServer) -> None:
    write(run, 100)
    server.stop()
    done = following(run, [server], lambda: time.sleep(0.5), server.start, serves(server, 100))
    assert done.output.count("Connection refused") == 1


def test_follow_brings_a_step_into_one_server_after_the_other(run: Place, server: WeightServer) -> None:
    with serving(items(run, 0)) as second:
        both: list[bool] = []
        watch = lambda _: both.append(server.paused and second.paused)  # noqa: E731
        server.on_request = second.on_request = watch
        server.bad[items(run, 200)] = "ReadError: only here"
        done = following(
            run,
            [server, second],
            polled(second, 2),
            lambda: write(run, 100),
            serves(server, 100),
            serves(second, 100),
            lambda: write(run, 200),
            serves(second, 200),
            polled(second, 4),
            second.stop,
            lambda: write(run, 300),
            serves(server, 300),
            second.start,
            serves(second, 300),
        )
        second.assert_serves(300)
    server.assert_serves(300)
    assert not any(both)
    assert [step for _, step in server.served] == [100, 300]
    assert f"{server.url}: step 200 is set aside" in done.output
    assert f"{second.url}: step 200" not in done.output


def test_follow_does_not_repeat_a_swap_that_fails(run: Place, server: WeightServer) -> None:
    write(run, 100)
    server.faults = [Fault("/update_weights", 500, {"error": {"message": "no room"}})]
    done = following(run, [server], polled(server, 8))
    assert server.requests.count("/pause") == 2
    assert "step 100 is set aside after 2 failures" in done.output
    server.assert_serves(0)


def test_follow_resumes_what_a_killed_client_left(
    run: Place, server: WeightServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow_module, "_PAUSED_SECONDS", 0.5)
    server.paused = server.updating = True
    done = following(
        run, [server], lambda: server.paused is False, lambda: write(run, 100), serves(server, 100)
    )
    assert "was left paused; resumed" in done.output
    server.assert_serves(100)


def test_follow_lets_another_client_end_its_pause(run: Place, server: WeightServer) -> None:
    write(run, 100)
    server.paused = True
    following(run, [server], polled(server, 5), lambda: setattr(server, "paused", False), serves(server, 100))
    assert server.requests[: server.requests.index("pull_weights")].count("/resume") == 0


@pytest.mark.parametrize(
    ("path", "says"), [("run/0", "is one checkpoint"), ("run/0/items", "is one checkpoint")]
)
def test_follow_needs_a_run(path: str, says: str, run: Place, server: WeightServer) -> None:
    done = vllm_maxtext("follow", run.root / path, "--url", server.url, *FAST)
    assert done.exit_code == 2
    assert says in done.output


def test_follow_refuses_a_server_that_takes_nothing(run: Place, server: WeightServer) -> None:
    server.dev_mode = False
    done = vllm_maxtext("follow", run.root / "run", "--url", server.url, *FAST)
    assert done.exit_code == 2
    assert "VLLM_SERVER_DEV_MODE=1" in done.output


def test_follow_in_a_bucket_until_the_commit_marker_is_there(tmp_path: Path) -> None:
    from support import gcs

    storage, proxy = gcs.shared()
    prefix = "followed/checkpoints"
    source = FIXTURES / CASE / "checkpoints/0"
    storage.upload(source, gcs.BUCKET, f"{prefix}/0/")
    url = f"gs://{gcs.BUCKET}/{prefix}"
    uncommitted = shutil.copytree(source, tmp_path / "100")
    (uncommitted / COMMIT_FILE).unlink()

    with gcs.environment(proxy.url, VLLM_MAXTEXT_TIMEOUT="5"), serving(f"{url}/0/items") as server:
        proxy.clear()

        def quiet_look() -> bool:
            """One look costs one listing while nothing is new."""
            count = len(proxy.requests)
            looks = server.requests.count("weight_state")
            time.sleep(0.5)
            looks = server.requests.count("weight_state") - looks
            return looks > 0 and len(proxy.requests) - count <= looks + 1

        follow(
            url,
            [server.url],
            polled(server, 2),
            quiet_look,
            lambda: storage.upload(uncommitted, gcs.BUCKET, f"{prefix}/100/"),
            polled(server, 3),
            lambda: storage.put(gcs.BUCKET, f"{prefix}/100/{COMMIT_FILE}", b""),
            serves(server, 100),
            options=FAST,
        )
        server.assert_serves(100)
