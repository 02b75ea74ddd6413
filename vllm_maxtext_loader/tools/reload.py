"""A new step into a running server: staged while it answers, swapped in a short pause.

The order is vLLM's: pause, start_weight_update, update_weights, finish_weight_update, resume. Whatever fails,
the update is closed and the server resumed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

from vllm_maxtext_loader.api import open_checkpoint
from vllm_maxtext_loader.checkpoint.find import ItemLocation
from vllm_maxtext_loader.conversion.config_check import VOCAB
from vllm_maxtext_loader.conversion.dims import ModelDims
from vllm_maxtext_loader.errors import ConfigMismatchError, MaxTextLoadError, ReloadError, ServerError
from vllm_maxtext_loader.tools.server import InFlight, Server, Serving, Staging
from vllm_maxtext_loader.tools.signals import HeldSignals

_ASK_SECONDS = 0.5
"""Between two questions how far staging is."""

_STALLED_SECONDS = 600.0
"""Give staging up after this long without a byte; the server's own limit (VLLM_MAXTEXT_TIMEOUT) is below."""

_ATTEMPTS = 5
"""To resume a server."""

_SETTLE_SECONDS = 1.0
"""Within this time a server has carried a pause out whose answer was not waited for."""


@dataclasses.dataclass(frozen=True)
class Reloaded:
    """A step that a server now answers with.

    Attributes:
        server: the server's URL.
        items: directory the weights were read from.
        step: training step, None where the directory's name does not tell.
        previous: the step before; the same one where nothing had to be done.
        nbytes: bytes that were staged; 0 where nothing had to be done.
        staging_seconds: how long that took, while the server answered.
        waited_seconds: how long new requests waited for those in flight.
        paused_seconds: how long the server answered nothing.
    """

    server: str
    items: str
    step: int | None
    previous: int | None
    nbytes: int = 0
    staging_seconds: float = 0.0
    waited_seconds: float = 0.0
    paused_seconds: float = 0.0


def reload(
    server: Server,
    target: ItemLocation,
    *,
    in_flight: InFlight = "wait",
    on_progress: Callable[[Staging], None] | None = None,
) -> Reloaded:
    """Brings a committed step into a server.

    Args:
        server: a server on tpu-inference that was started with --load-format maxtext.
        target: the step, from `locate`.
        in_flight: what happens to requests in flight.
        on_progress: called while the server stages.

    Raises:
        ServerError: the server does not answer.
        EngineError: the server takes no new weights as it was started.
        ConfigMismatchError: the step is another model's.
        ReloadError: the server could not read the step or swap it in.
        MaxTextLoadError: the step cannot be loaded.
    """
    before = server.serving()
    # Without a step in its name, the same directory may hold other weights by now.
    if before.items == target.items.url and target.step is not None and not before.torn:
        return Reloaded(server.name, before.items, before.step, before.step)
    refuse_other_model(server, before, target)
    update: dict[str, Any] = {"path": target.items.url}
    if target.step is not None:
        update["step"] = target.step
    try:
        staged = _stage(server, update, on_progress)
        waited, paused = _swap(server, target, update, in_flight)
    except BaseException:
        # What was staged takes as much of the host's memory as the model.
        with HeldSignals(), contextlib.suppress(MaxTextLoadError):
            server.drop()
        raise
    return Reloaded(
        server.name,
        target.items.url,
        target.step,
        before.step,
        staged.total_bytes,
        staged.seconds,
        waited,
        paused,
    )


def refuse_other_model(server: Server, serving: Serving, target: ItemLocation) -> None:
    """Refuses, from its metadata, a step that cannot be loaded or has other dimensions than what is served.

    Raises:
        ConfigMismatchError: it is another model.
        MaxTextLoadError: it cannot be loaded.
    """
    found = _dims(target.items.url)
    try:
        served = _dims(serving.items)
    except MaxTextLoadError:
        # The step was deleted, or lies where only the server can read. The server compares, too.
        return
    if differences := _differences(found, served):
        raise ConfigMismatchError(
            f"{target.items}: is another model than the one that {server.name} serves: "
            f"{'; '.join(differences)}. Give the run that the server was started from."
        )


@functools.lru_cache(maxsize=16)
def _dims(items: str) -> ModelDims:
    """The dimensions of a checkpoint's text model, from its metadata."""
    return open_checkpoint(items).plan.dims.without_vision()


def _differences(found: ModelDims, served: ModelDims) -> list[str]:
    """What differs, one phrase each; the padding of the vocabulary may."""
    if found.family != served.family:
        return [f"family {found.family}, served {served.family}"]
    differences = [
        f"{axis} {found.sizes.get(axis)}, served {served.sizes.get(axis)}"
        for axis in dict.fromkeys([*served.sizes, *found.sizes])
        if axis != VOCAB and found.sizes.get(axis) != served.sizes.get(axis)
    ]
    if len(found.layers) != len(served.layers):
        differences.append(f"{len(found.layers)} layers, served {len(served.layers)}")
    elif found.layers != served.layers:
        layer = next(
            n for n, pair in enumerate(zip(found.layers, served.layers, strict=True)) if pair[0] != pair[1]
        )
        differences.append(f"layer {layer} {found.layers[layer]}, served {served.layers[layer]}")
    return differences


def _stage(server: Server, update: dict[str, Any], on_progress: Callable[[Staging], None] | None) -> Staging:
    """Has the server read a step into its hosts' memory, and waits for it.

    Raises:
        ReloadError: it could not, or nothing arrives.
    """
    read, since = -1, time.monotonic()
    while (progress := server.pull(update)).state == "staging":
        if on_progress is not None:
            on_progress(progress)
        if progress.read_bytes != read:
            read, since = progress.read_bytes, time.monotonic()
        if time.monotonic() - since > _STALLED_SECONDS:
            raise ReloadError(
                f"{server.name}: no byte of {update['path']} arrived there in {_STALLED_SECONDS:g} s. "
                "Look into the server's log."
            )
        time.sleep(_ASK_SECONDS)
    if progress.state == "failed":
        raise ReloadError(
            f"{server.name}: could not stage {update['path']}: {progress.error or 'no reason given'}"
        )
    return progress


def _swap(
    server: Server, target: ItemLocation, update: dict[str, Any], in_flight: InFlight
) -> tuple[float, float]:
    """Swaps the staged step in.

    Returns:
        Seconds that requests in flight were waited for, and seconds of the pause after that.

    Raises:
        ServerError, ReloadError: it was not swapped in.
    """
    version = version_of(target.items.url, target.step)
    with HeldSignals() as held:
        begun = paused = time.monotonic()
        complete = False
        try:
            # Requests in flight may take minutes; the rest is short, and is not interrupted.
            with held.released():
                server.pause(in_flight)
            paused, complete = time.monotonic(), True
            try:
                server.start_update()
                server.update(update)
                server.finish_update(version)
            except MaxTextLoadError:
                if not close_update(server, target.items.url, version):
                    raise
        finally:
            resume(server, overtaken=not complete)
        ended = time.monotonic()
    after = server.serving()
    if after.torn or after.items != target.items.url:
        raise ReloadError(f"{server.name}: took {target.items}, and does not serve it but {after.items}.")
    return paused - begun, ended - paused


def version_of(items: str, step: int | None) -> str:
    """What vLLM calls the weights of a step (`/weight_info`)."""
    return items if step is None else f"step-{step}"


def close_update(server: Server, items: str, version: str) -> bool:
    """Closes an update that failed, or whose answer was lost: an open one leaves the engine without KV cache.

    Args:
        items: the directory whose weights were to be swapped in.
        version: what they are called.

    Returns:
        Whether the server holds these weights.
    """
    done = False
    with contextlib.suppress(MaxTextLoadError):
        state = server.serving()
        done = state.items == items and not state.torn
    with contextlib.suppress(MaxTextLoadError):
        server.finish_update(version if done else None)
        return done
    return False


def resume(server: Server, *, overtaken: bool = False) -> None:
    """Resumes a server, whatever happened.

    Args:
        overtaken: whether the pause was given up, so that the server may still be about to carry it out.

    Raises:
        ServerError: it could not be resumed.
    """
    failure: MaxTextLoadError | None = None
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_SETTLE_SECONDS)
        try:
            server.resume()
            if not overtaken:
                return
            time.sleep(_SETTLE_SECONDS)
            if not server.is_paused():
                return
        except MaxTextLoadError as error:
            failure = error
    raise ServerError(
        f"{server.name}: could not be resumed. Send POST /resume to it, or restart it. {failure or ''}"
    )
