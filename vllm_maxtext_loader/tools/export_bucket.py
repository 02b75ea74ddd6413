"""Writes an export's files to a bucket, as streams, with few tensors in memory.

A file is a stream, so its tensors are sent in order, each when it is complete. Tensors are made group by group (see
`leaf_groups`), several files are sent at a time, and a tensor's memory is freed when it was sent. What is made waits
while the tensors in memory have as many bytes as they may.

Objects appear when they are complete, the index last. Those of an export that ends early are deleted: each carries the
export's number in its metadata.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait

import numpy as np

from vllm_maxtext_loader.atomic import uninterrupted
from vllm_maxtext_loader.checkpoint.reader import read_regions
from vllm_maxtext_loader.checkpoint.ring import aligned
from vllm_maxtext_loader.checkpoint.storage import gcs, upload
from vllm_maxtext_loader.checkpoint.storage.path import Location
from vllm_maxtext_loader.checkpoint.storage.upload import StoppedError
from vllm_maxtext_loader.conversion.convert import convert
from vllm_maxtext_loader.conversion.plan import Plan, TensorSpec
from vllm_maxtext_loader.errors import HuggingFaceDirectoryError, MaxTextLoadError
from vllm_maxtext_loader.tools.export_disk import Writing
from vllm_maxtext_loader.tools.export_layout import OutputFile, tensor_nbytes
from vllm_maxtext_loader.tools.leaf_groups import (
    is_needed,
    memory_limit,
    restrict,
    split_passes,
    tensor_groups,
)

logger = logging.getLogger("vllm." + __name__)

_STREAMS = 8
"""Files that are sent at a time."""

_RUN_KEY = "vllm-maxtext-run"
"""Custom metadata of an object: the export that wrote it."""


class BucketExport:
    """The objects that one process writes.

    Args:
        root: the "directory".
        shared: whether other machines write there.
    """

    def __init__(self, root: Location, *, shared: bool) -> None:
        self.root, self._shared = root, shared
        self._metadata = {_RUN_KEY: uuid.uuid4().hex}
        self._stop = threading.Event()
        self._uploads: list[upload.Upload] = []
        self._lock = threading.Lock()

    def refuse_read_only(self) -> None:
        """Refuses a bucket in which objects may not be written and deleted; nothing is.

        Raises:
            StorageError: the account may not, or the storage does not answer.
        """
        probe = self.root / f".vllm-maxtext-{self._metadata[_RUN_KEY]}"
        try:
            upload.Upload(probe, 1, self._metadata, self._stop).cancel()
        except FileNotFoundError as error:
            raise _no_bucket(self.root) from error
        upload.delete_object(probe)

    @contextlib.contextmanager
    def complete_or_removed(self) -> Iterator[None]:
        """Removes what was written when the block raises: an error, Ctrl-C, a signal."""
        try:
            yield
        except BaseException:
            with uninterrupted():
                self._stop.set()
                self._remove()
            raise

    def write_files(self, write: Writing) -> None:
        """Reads the checkpoint and writes safetensors files.

        Raises:
            HuggingFaceDirectoryError: an object of the same name has appeared.
            OptionError: the memory asked for is less than the largest tensor.
            StorageError, ReadError: the checkpoint cannot be read, or the bucket not be written.
        """
        plan, files, dtype = write.plan, write.files, write.dtype
        order = [target.name for file in files for target in file.targets]
        nbytes = {name: tensor_nbytes(plan.targets[name], dtype) for name in order}
        limit = memory_limit(write.memory_bytes, nbytes, "--memory")
        buffers = _Buffers(nbytes, limit, self._stop, write.on_progress)
        with ThreadPoolExecutor(_STREAMS, "maxtext-upload") as pool:
            sent = [pool.submit(self._send, file, buffers) for file in files]
            try:
                for names in split_passes(order, nbytes, tensor_groups(plan), limit):
                    self._make(write, restrict(plan, names), buffers)
                wait(sent, return_when=FIRST_EXCEPTION)
            except StoppedError:
                # A file could not be sent. Its error is raised when the other threads have ended.
                pass
            finally:
                self._stop.set()
                buffers.close()
                pool.shutdown(cancel_futures=True)
        for future in sent:
            with contextlib.suppress(StoppedError, CancelledError):
                future.result()
        for future in sent:
            future.result()

    def _make(self, write: Writing, plan: Plan, buffers: _Buffers) -> None:
        """Makes all tensors of a part of the plan."""
        checkpoint, on_region = write.checkpoint, write.on_region
        regions = read_regions(
            [entry.leaf for entry in plan.leaves],
            checkpoint.tree.arrays,
            checkpoint.concurrent_bytes,
            plan.where,
            needed=is_needed(plan),
        )
        made = convert(
            plan,
            regions,
            dtype=write.dtype,
            on_region=None if on_region is None else lambda decoded, _: on_region(decoded),
            allocate=buffers.allocate,
        )
        for name, array in made:
            buffers.complete(name, array)
            # It is freed as soon as it is sent, not when the next tensor is made.
            del array

    def _open(self, file: OutputFile) -> upload.Upload:
        location = self.root / file.name
        try:
            opened = upload.Upload(location, file.layout.nbytes, self._metadata, self._stop)
        except FileExistsError as error:
            raise _appeared(location) from error
        except FileNotFoundError as error:
            raise _no_bucket(self.root) from error
        with self._lock:
            self._uploads.append(opened)
        return opened

    def _send(self, file: OutputFile, buffers: _Buffers) -> None:
        """Sends one file, each tensor when it is complete."""
        opened: upload.Upload | None = None
        try:
            opened = self._open(file)
            opened.write(file.layout.prefix)
            for target in file.targets:
                opened.write(memoryview(buffers.wait(target.name).reshape(-1).view(np.uint8)))
                buffers.release(target.name)
        except FileExistsError as error:
            raise _appeared(self.root / file.name) from error
        finally:
            if opened is None or not opened.done:
                # Whoever makes tensors need not go on.
                self._stop.set()

    def write_documents(self, documents: Mapping[str, bytes]) -> None:
        """Writes small files, in order. Other machines that share the export may write the same ones.

        Args:
            documents: content by name.

        Raises:
            HuggingFaceDirectoryError: one is there, and the export is not shared.
            StorageError: the storage refuses or does not answer.
        """
        for name, data in documents.items():
            try:
                upload.write_object(self.root / name, data, self._metadata)
            except FileExistsError as error:
                if not self._shared:
                    raise _appeared(self.root / name) from error

    def _remove(self) -> None:
        """Removes every object that this process has written."""
        with ThreadPoolExecutor(_STREAMS) as pool:
            try:
                for _ in pool.map(lambda opened: opened.cancel(), self._uploads):
                    pass
                ours = [
                    (self.root / name, found["generation"])
                    for name, found in gcs.list_objects(self.root.url).items()
                    if found.get("metadata", {}).get(_RUN_KEY) == self._metadata[_RUN_KEY]
                ]
                for _ in pool.map(lambda found: upload.delete_object(*found), ours):
                    pass
            except MaxTextLoadError as error:
                advice = f"Remove them before the next attempt: gcloud storage rm --recursive {self.root}"
                if self._shared:
                    advice = "They are complete files, and are kept when this share is started again."
                logger.warning(
                    "What this export has written to %s could not be removed: %s %s", self.root, error, advice
                )


def _no_bucket(root: Location) -> HuggingFaceDirectoryError:
    return HuggingFaceDirectoryError(f"{root}: there is no such bucket (any more).")


def _appeared(location: Location) -> HuggingFaceDirectoryError:
    return HuggingFaceDirectoryError(
        f"{location}: has appeared meanwhile; nothing is overwritten. Another export writes to the same place."
    )


class _Buffers:
    """The tensors in memory: those that are being made, and those that wait to be sent.

    Args:
        nbytes: size of each tensor by name.
        limit: bytes in memory at a time.
        stop: set when something has failed.
        on_progress: told how many bytes of how many were sent; by one thread at a time.

    Attributes:
        peak: greatest number of bytes that were in memory at a time.
    """

    def __init__(
        self,
        nbytes: Mapping[str, int],
        limit: int,
        stop: threading.Event,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self._nbytes, self._limit, self._stop, self._on_progress = nbytes, limit, stop, on_progress
        self._tensors: dict[str, Future[np.ndarray]] = {name: Future() for name in nbytes}
        self._changed = threading.Condition()
        self._held = self._sent = self.peak = 0
        self._total = sum(nbytes.values())

    def allocate(self, target: TensorSpec, dtype: np.dtype) -> np.ndarray:
        """Memory of zeros for a tensor, as soon as there is room. There will be: a pass fits, and what earlier passes
        made can be sent without the tensors of this one.

        Raises:
            StoppedError: something has failed.
        """
        nbytes = self._nbytes[target.name]
        with self._changed:
            while self._held + nbytes > self._limit:
                if self._stop.is_set():
                    raise StoppedError
                # Time to look for Ctrl-C, and at what is sent.
                self._changed.wait(0.2)
            self._held += nbytes
            self.peak = max(self.peak, self._held)
        return aligned(nbytes).view(dtype).reshape(target.shape)

    def complete(self, name: str, array: np.ndarray) -> None:
        """Has a tensor sent.

        Raises:
            StoppedError: something has failed.
        """
        if self._stop.is_set():
            raise StoppedError
        self._tensors[name].set_result(array)

    def wait(self, name: str) -> np.ndarray:
        """A tensor, when it is complete.

        Raises:
            CancelledError: it will not be.
        """
        return self._tensors[name].result()

    def release(self, name: str) -> None:
        """Frees a tensor's memory, once nobody else refers to it."""
        del self._tensors[name]
        with self._changed:
            self._held -= self._nbytes[name]
            self._sent += self._nbytes[name]
            self._changed.notify_all()
            if self._on_progress is not None:
                self._on_progress(self._sent, self._total)

    def close(self) -> None:
        """Gives up tensors that are not complete."""
        for future in list(self._tensors.values()):
            future.cancel()
