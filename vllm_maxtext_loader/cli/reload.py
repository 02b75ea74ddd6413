"""`vllm-maxtext reload` and `follow`: new steps of a run into servers that go on answering."""

from __future__ import annotations

import contextlib
import enum
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_maxtext_loader.cli.runtime import DIFFERENT, exit_codes, sigterm_raises
from vllm_maxtext_loader.errors import MaxTextLoadError, printable

if TYPE_CHECKING:
    from vllm_maxtext_loader.tools.reload import Reloaded
    from vllm_maxtext_loader.tools.server import Server, Staging

_SIGTERM_EXIT = 128 + 15


class InFlight(enum.StrEnum):
    """Values of `--in-flight`."""

    WAIT = "wait"
    KEEP = "keep"
    ABORT = "abort"


Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="Local path or gs:// URL of a run's checkpoint directory. A local path must be the same on the "
        "server.",
    ),
]
Urls = Annotated[
    list[str],
    typer.Option("--url", metavar="URL", help="http://HOST:PORT of a server; may be given several times."),
]
InFlightOption = Annotated[
    InFlight,
    typer.Option(
        "--in-flight",
        metavar="WHAT",
        help="What happens to requests in flight: wait (they end first, new ones wait for that), keep (they "
        "go on with the new weights), abort.",
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        envvar="VLLM_API_KEY",
        show_default=False,
        help="Bearer token for a gateway that wants one; the environment hides it from process lists.",
    ),
]
Timeout = Annotated[
    float,
    typer.Option(
        "--timeout",
        metavar="SECONDS",
        min=0.1,
        help="Seconds to wait for an answer; with wait, also for the requests in flight to end.",
    ),
]


def reload(
    run: Run,
    url: Urls,
    step: Annotated[
        int | None, typer.Option("--step", min=0, help="The step to take. Default: the newest committed one.")
    ] = None,
    in_flight: InFlightOption = InFlight.WAIT,
    api_key: ApiKey = None,
    timeout: Timeout = 300.0,
) -> None:
    """Bring a step of a run into servers that are running, without a restart.

    A server reads the step into its hosts' memory while it answers. Then it is paused for the moment in which
    the arrays are replaced. A step that cannot be loaded, or is another model, is refused before that.
    Whatever fails, the server is resumed. Several servers take the step one after the other.

    The servers run on tpu-inference with --load-format maxtext, and with VLLM_SERVER_DEV_MODE=1, which opens
    vLLM's routes for new weights. No API key protects these routes: let nobody but yourself reach the port.

    [bold]Examples[/bold]
      vllm-maxtext reload gs://bucket/run/checkpoints --url http://127.0.0.1:8000
      vllm-maxtext reload RUN --step 1000 --url http://10.0.0.1:8000 --url http://10.0.0.2:8000
      vllm-maxtext reload RUN --url URL --in-flight keep

    [bold]Exit codes[/bold]
       0  every server answers with the step
       1  some servers do, others could not take it
       2  no server could, or unusable input
      70  a fault of vllm-maxtext-loader, not of the input
    """
    with exit_codes(), sigterm_raises():
        from vllm_maxtext_loader.checkpoint.find import locate
        from vllm_maxtext_loader.tools.reload import reload as bring

        servers = _servers(url, api_key, timeout)
        target = locate(run, step)
        failures: list[MaxTextLoadError] = []
        for server in servers:
            try:
                with _staging_bar() as on_progress:
                    done = bring(server, target, in_flight=in_flight.value, on_progress=on_progress)
            except MaxTextLoadError as error:
                failures.append(error)
                continue
            typer.echo(_sentence(done))
        for error in failures[: len(failures) if len(failures) < len(servers) else -1]:
            typer.echo(f"error: {error}", err=True)
        if len(failures) == len(servers):
            raise failures[-1]
        if failures:
            raise typer.Exit(DIFFERENT)


def follow(
    run: Run,
    url: Urls,
    every: Annotated[
        float,
        typer.Option("--every", metavar="SECONDS", min=0.1, help="Seconds between two looks for a new step."),
    ] = 30.0,
    in_flight: InFlightOption = InFlight.WAIT,
    first: Annotated[
        int | None,
        typer.Option(
            "--from", min=0, metavar="STEP", help="Take no step before this one. Default: any newer one."
        ),
    ] = None,
    api_key: ApiKey = None,
    timeout: Timeout = 300.0,
) -> None:
    """Keep servers on the newest committed step of a run, while training goes on.

    Looks for a newer step, and brings it into each server as `reload` does: one server after the other, each
    answering until the short pause. Of several new steps the newest is taken; no server goes back. A step
    that fails twice on a server is set aside with its reason. A server that is not there yet, or restarts,
    is waited for. One line is printed per swap. Run one `follow` per server, and nothing else that changes
    its weights.

    SIGTERM and Ctrl-C end it at once; in the middle of a swap, when the server answers again.

    [bold]Examples[/bold]
      vllm-maxtext follow gs://bucket/run/checkpoints --url http://127.0.0.1:8000
      vllm-maxtext follow RUN --url URL --every 300 --in-flight keep
      vllm-maxtext follow RUN --url http://10.0.0.1:8000 --url http://10.0.0.2:8000 --from 5000

    [bold]Exit codes[/bold]
       0  ended by SIGTERM
       2  unusable input, or a server that takes no new weights
      70  a fault of vllm-maxtext-loader, not of the input
     130  ended by Ctrl-C
    """
    with exit_codes(), _sigterm_is_good(), sigterm_raises():
        from vllm_maxtext_loader.tools.follow import Notice
        from vllm_maxtext_loader.tools.follow import follow as watch

        servers = _servers(url, api_key, timeout)
        _say(f"Following {printable(run)}: a look every {every:g} s.")
        for event in watch(run, servers, every=every, in_flight=in_flight.value, first=first):
            if isinstance(event, Notice):
                _say(f"{'problem: ' if event.problem else ''}{event.message}")
            else:
                _say(_sentence(event))


def _servers(urls: list[str], api_key: str | None, timeout: float) -> list[Server]:
    from vllm_maxtext_loader.tools.server import Server

    return [Server(url, api_key, timeout) for url in dict.fromkeys(urls)]


@contextlib.contextmanager
def _sigterm_is_good() -> Iterator[None]:
    """SIGTERM is how a command without an end is ended: no failure."""
    try:
        yield
    except SystemExit as ended:
        if ended.code == _SIGTERM_EXIT:
            raise typer.Exit from ended
        raise


@contextlib.contextmanager
def _staging_bar() -> Iterator[Callable[[Staging], None]]:
    """A bar over the bytes that a server stages, from the first answer on."""
    from vllm_maxtext_loader.progress import byte_bar

    with contextlib.ExitStack() as stack:
        bars = []

        def on_progress(staging: Staging) -> None:
            if not bars:
                bars.append(stack.enter_context(byte_bar(staging.total_bytes, "Staging", leave=False)))
            bars[0].total = staging.total_bytes
            bars[0].update(staging.read_bytes - bars[0].n)

        yield on_progress


def _sentence(done: Reloaded) -> str:
    """What a server answers with now, and what that took."""
    from vllm_maxtext_loader.cli.render import size

    what = printable(done.items) if done.step is None else f"step {done.step} of {printable(done.items)}"
    if not done.nbytes:
        return f"{done.server}: serves {what} already."
    before = "" if done.previous is None else f" (before: step {done.previous})"
    waited = (
        f" after {done.waited_seconds:.2f} s for requests in flight" if done.waited_seconds >= 0.01 else ""
    )
    return (
        f"{done.server}: serves {what}{before}. {size(done.nbytes)} staged in {done.staging_seconds:.1f} s, "
        f"paused for {done.paused_seconds:.2f} s{waited}."
    )


def _say(line: str) -> None:
    """A line with the time, at once, also where stdout is a pipe."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S%z')} {line}", flush=True)
