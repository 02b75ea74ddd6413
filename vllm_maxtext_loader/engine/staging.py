"""Brings a step into host memory while the engine serves another one.

A thread reads and converts; it runs no program of JAX's and touches nothing of the engine. It stays on a few cores, so that
the engine has the others. What it makes is checked against the engine's arrays before it is called staged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.logger import init_logger

from vllm_maxtext_loader.api import Checkpoint, numpy_dtype
from vllm_maxtext_loader.engine.loader import (
    NonFiniteWatch,
    check_complete,
    checksum_filter,
    record_names,
    weights_of,
)
from vllm_maxtext_loader.engine.origin import run_of
from vllm_maxtext_loader.errors import ReloadError, describe_error
from vllm_maxtext_loader.options import GIB, available_nbytes

if TYPE_CHECKING:
    from vllm_maxtext_loader.checkpoint.find import ItemLocation
    from vllm_maxtext_loader.checkpoint.reader import DecodedRegion
    from vllm_maxtext_loader.checkpoint.regions import Region
    from vllm_maxtext_loader.engine.origin import Origin
    from vllm_maxtext_loader.tpu.swap import Slot, StagedArray, Values

logger = init_logger("vllm." + __name__)

_SHARE_OF_CORES = 4
"""Staging takes one core in so many, and one at least."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be served.

    Attributes:
        path: the checkpoint or its run.
        step: None means the newest committed one.
        checksums: file to compare array data with, or None.
        given: the path as the user gave it.
    """

    path: str
    step: int | None
    checksums: str | None
    given: str


class Cancelled(Exception):
    """Staging was given up."""


class Staging:
    """One step on its way into host memory.

    Args:
        request: what is wanted.
        origin: how the engine's model was loaded.
        slots: the engine's arrays.
        serving: what the engine serves.
        previous: staging that was given up; its memory is waited for.

    Attributes:
        state: "staging", "staged", "serving" (the engine has this step already) or "failed".
        location: where the step was found; None before.
        error: why it failed.
        arrays: what was staged, by the parameter's name.
        seconds: that staging took, or has taken so far.
    """

    def __init__(
        self,
        request: Request,
        origin: Origin,
        slots: Mapping[str, Slot],
        serving: ItemLocation | None,
        previous: Staging | None = None,
    ) -> None:
        self.request = request
        self.state = "staging"
        self.location: ItemLocation | None = None
        self.error: BaseException | None = None
        self.digest = ""
        self.read_bytes = self.total_bytes = 0
        self._origin, self._slots, self._serving = origin, slots, serving
        self._previous = previous
        self.arrays: dict[str, Values] = {}
        self._cancelled = threading.Event()
        self._started = time.perf_counter()
        self._seconds: float | None = None
        self._thread = threading.Thread(target=self._run, name="maxtext-stage", daemon=True)
        self._thread.start()

    @property
    def seconds(self) -> float:
        """See the class."""
        return time.perf_counter() - self._started if self._seconds is None else self._seconds

    def progress(self) -> dict[str, Any]:
        """How far it is, for JSON."""
        location = self.location
        return {
            "host": socket.gethostname(),
            "state": self.state,
            "path": self.request.path if location is None else location.items.url,
            "step": self.request.step if location is None else location.step,
            "read_bytes": self.read_bytes,
            "total_bytes": self.total_bytes,
            "seconds": round(self.seconds, 3),
            "error": None if self.error is None else describe_error(self.error),
            "digest": self.digest,
        }

    def wants(self, request: Request) -> bool:
        """Whether this is, or has found, what is requested."""
        if request == self.request:
            return True
        if self.location is None or request.step is None or request.checksums != self.request.checksums:
            return False
        paths = (self.location.items.url, run_of(self.location), self.request.path)
        return request.step == self.location.step and request.path in paths

    def cancel(self) -> None:
        """Gives it up; the thread ends when its current region has been read."""
        self._cancelled.set()

    def wait(self) -> None:
        """Returns when it is staged, or served already; raises what it failed with."""
        self._thread.join()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            if self._previous is not None:
                self._previous._thread.join()
                self._previous = None
            _confine()
            state = self._stage()
        except Cancelled:
            state, self.error = "failed", ReloadError("given up for another step, or by drop_weights.")
        except BaseException as error:
            state, self.error = "failed", error
            logger.error("Staging failed, and the engine serves what it served: %s", describe_error(error))
        if self.error is not None:
            self.arrays = {}
        self._seconds = self.seconds
        self.state = state

    def _stage(self) -> str:
        request = self.request
        checkpoint = self._origin.open(request.path, request.step)
        self.location = location = checkpoint.location
        # Where no name tells the step, the same path may hold other weights by now.
        if self._serving is not None and location.step is not None and location.items == self._serving.items:
            return "serving"
        _Stage(checkpoint, self._origin, self._slots, self).run()
        self.digest = checkpoint.digest
        logger.info(
            "Staged %s: %.3g GiB read in %.1f s.", location.items, self.read_bytes / GIB, self.seconds
        )
        return "staged"

    def read(self, decoded: DecodedRegion, _: float = 0.0) -> None:
        """Counts a region that is in its place."""
        self.read_bytes += decoded.array.nbytes

    def check(self) -> None:
        """Ends the thread where staging has been given up.

        Raises:
            Cancelled: it has.
        """
        if self._cancelled.is_set():
            raise Cancelled


class _Stage:
    """The work of a `Staging`: the steps of a load, into memory of the host."""

    def __init__(
        self, checkpoint: Checkpoint, origin: Origin, slots: Mapping[str, Slot], staging: Staging
    ) -> None:
        self._checkpoint, self._origin, self._slots, self._staging = checkpoint, origin, slots, staging
        self._where = checkpoint.plan.where

    def run(self) -> None:
        """Reads everything, and gives the staging its arrays."""
        from vllm_maxtext_loader.tpu import placement
        from vllm_maxtext_loader.tpu.host_form import final_arrays

        checkpoint, origin, staging = self._checkpoint, self._origin, self._staging
        model, plan = origin.blueprint.model, checkpoint.plan
        watch = checksum_filter(staging.request.checksums, checkpoint)
        direct = self._direct_arrays()
        writer = placement.ShardWriter(
            model, plan, numpy_dtype(origin.dtype), origin.fold_expert_scales, weights=dict(direct), threads=1
        )
        wanted = weights_of(model, plan.family.buffers)
        arrays = {name: array for array in direct.values() for name in array.parameters}
        rest = wanted - set(arrays)
        self._check_memory(arrays, writer.targets())
        given = writer.targets()
        values = NonFiniteWatch(self._where)
        local = writer.is_local if placement.several_processes() else None
        staging.total_bytes = plan.nbytes
        # What is loaded into buffers (a vision tower's statistics) only `load_weights` knows; untouched ones take no memory.
        buffers = {name for name, _ in model.named_buffers()}
        host = origin.blueprint.on_host(rest | buffers)
        # Checksums are of whole chunks: with them, none comes in parts.
        regions = watch(checkpoint.iter_regions(needed=local, in_parts=staging.request.checksums is None))
        with torch.no_grad():
            loaded = host.load_weights(  # type: ignore[operator]
                record_names(
                    checkpoint.hf_weights(
                        fold_expert_scales=origin.fold_expert_scales,
                        dtype=origin.dtype,
                        fused_experts=True,
                        regions=writer.stream(
                            self._interruptible(values.stream(regions)), on_written=staging.read
                        ),
                        on_region=staging.read,
                    ),
                    given,
                )
            )
        filled = set(loaded or ())
        check_complete(checkpoint, wanted, filled | writer.filled, given)
        made: dict[str, Values] = {name: array.values for name, array in arrays.items()}
        for name, array in final_arrays(host, rest | filled & buffers):
            self._check_fit(name, array.shape, array.dtype)
            made[name] = _part_of(array)
        values.report()
        staging.check()
        staging.arrays = made

    def _direct_arrays(self) -> dict[tuple[int, str], StagedArray]:
        """By layer and leaf, the arrays that regions are written to.

        Raises:
            EngineError: the engine's arrays are of other shapes.
        """
        from vllm_maxtext_loader.tpu.placement import plan_weights
        from vllm_maxtext_loader.tpu.swap import StagedArray

        origin = self._origin
        pending = plan_weights(origin.blueprint.model, self._checkpoint.plan, numpy_dtype(origin.dtype))
        staged: dict[int, StagedArray] = {}
        for array in pending.values():
            if id(array) in staged:
                continue
            kept = {
                field.name: getattr(array, field.name)
                for field in dataclasses.fields(array)
                if field.name != "_shards"
            }
            staged[id(array)] = StagedArray(**kept)
            for name in array.parameters:
                self._check_fit(name, array.shape, array.dtype)
        return {key: staged[id(array)] for key, array in pending.items()}

    def _check_fit(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        from vllm_maxtext_loader.tpu.swap import check_fit

        check_fit(self._slots, name, shape, dtype, self._where)

    def _check_memory(self, arrays: Mapping[str, StagedArray], direct: set[str]) -> None:
        """Refuses to stage what does not fit.

        Raises:
            ReloadError: with both numbers.
        """
        size = numpy_dtype(self._origin.dtype).itemsize
        targets = self._checkpoint.plan.targets
        needed = sum(array.nbytes for array in arrays.values()) + sum(
            target.nbytes // target.dtype.itemsize * size
            for name, target in targets.items()
            if name not in direct
        )
        needed += self._checkpoint.concurrent_bytes
        if needed > (free := available_nbytes()):
            raise ReloadError(
                f"{self._where}: staging takes {needed / GIB:.3g} GiB of the host's memory, {free / GIB:.3g} GiB are free. "
                f"Free some, or restart the engine to serve this step."
            )

    def _interruptible(self, regions: Iterator[DecodedRegion]) -> Iterator[DecodedRegion]:
        for decoded in regions:
            self._staging.check()
            yield decoded


def _part_of(array: np.ndarray) -> Callable[[Any, Region], np.ndarray]:
    """An array's values as `Slot.make` asks for them."""
    return lambda _, region: np.ascontiguousarray(array[region])


def _confine() -> None:
    """Keeps this thread, and those it starts, on a few cores."""
    cores = sorted(os.sched_getaffinity(0))
    # Some sandboxes do not allow it.
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, cores[-max(1, len(cores) // _SHARE_OF_CORES) :])
