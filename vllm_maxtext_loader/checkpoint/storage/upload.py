"""Writes objects to a bucket, each as a stream: a resumable upload, from the first byte to the last.

An object appears in the bucket when its last byte has arrived, and never replaces another (`ifGenerationMatch=0`).
A part whose answer was lost is sent again: Cloud Storage ignores bytes that it has already.
"""

from __future__ import annotations

import base64
import contextlib
import json
import threading
import urllib.parse
from collections.abc import Mapping

import google_crc32c

from vllm_maxtext_loader.checkpoint.storage import gcs
from vllm_maxtext_loader.checkpoint.storage.path import Location
from vllm_maxtext_loader.checkpoint.storage.retry import Failure, RequestError, to_storage_error
from vllm_maxtext_loader.errors import StorageError

PART_NBYTES = 8 << 20
"""Bytes of one request; Cloud Storage wants a multiple of 256 KiB, except for the last."""

_FRUITLESS_PARTS = 8
"""Answers in a row that no byte was taken, after which an upload is given up."""


class StoppedError(Exception):
    """Nothing more is to be sent."""


class Upload:
    """One object that is being written.

    Args:
        location: of the object, in a bucket.
        nbytes: its size.
        metadata: custom metadata of the object.
        stop: once it is set, no part is sent, and a request that fails is not repeated.

    Raises:
        FileNotFoundError: there is no such bucket.
        StorageError: the storage refuses or does not answer.
    """

    def __init__(
        self, location: Location, nbytes: int, metadata: Mapping[str, str], stop: threading.Event
    ) -> None:
        self.location = location
        self._url, self._nbytes, self._stop = location.url, nbytes, stop
        self._part = bytearray()
        self._sent = self._crc = 0
        self.done = False
        bucket, name = gcs.split(self._url)
        headers, _ = gcs.request(
            "POST",
            "write",
            self._url,
            "/upload/storage/v1/b/{}/o",
            bucket,
            write=True,
            stop=stop,
            headers={"X-Upload-Content-Length": str(nbytes)},
            json={"name": name, "contentType": "application/octet-stream", "metadata": dict(metadata)},
            uploadType="resumable",
            name=name,
            ifGenerationMatch="0",
        )
        # Only the path and the query: tokens go to the endpoint in use, whatever host the answer names. The query
        # stands for credentials, and gcsfs logs paths, not queries.
        session = urllib.parse.urlsplit(headers["Location"])
        self._session, self._query = session.path, dict(urllib.parse.parse_qsl(session.query))

    def write(self, data: memoryview | bytes) -> None:
        """Adds bytes; they are sent when they make a part.

        Raises:
            FileExistsError: an object of this name has appeared.
            StoppedError: `stop` is set.
            StorageError: the storage refuses, does not answer, or did not store what was sent.
        """
        view = memoryview(data).cast("B")
        while len(view):
            taken = view[: PART_NBYTES - len(self._part)]
            self._part += taken
            view = view[len(taken) :]
            if len(self._part) == PART_NBYTES or self._sent + len(self._part) == self._nbytes:
                self._send()

    def _send(self) -> None:
        """Sends the part that is held; what is not taken of it is sent again."""
        data = bytes(self._part)
        self._part.clear()
        self._crc = google_crc32c.extend(self._crc, data)
        fruitless = 0
        while data:
            if self._stop.is_set():
                raise StoppedError
            taken = self._put(data)
            fruitless = 0 if taken else fruitless + 1
            if fruitless == _FRUITLESS_PARTS:
                error = RequestError("it takes no bytes", Failure.OVERLOADED)
                raise to_storage_error(f"cannot write {self._url}", error)
            self._sent += taken
            data = data[taken:]

    def _put(self, data: bytes) -> int:
        """One request; returns how many of its bytes were taken."""
        end = self._sent + len(data)
        try:
            headers, body = gcs.request(
                "PUT",
                "write",
                self._url,
                self._session,
                write=True,
                stop=self._stop,
                headers={"Content-Range": f"bytes {self._sent}-{end - 1}/{self._nbytes}"},
                data=data,
                **self._query,
            )
        except FileNotFoundError as error:
            reason = RequestError("the storage has dropped the upload", Failure.OVERLOADED)
            raise to_storage_error(f"cannot write {self._url}", reason) from error
        if end == self._nbytes and (stored := _json_object(body)).get("size") == str(self._nbytes):
            self._compare(stored)
            self.done = True
            return len(data)
        last = headers.get("Range", "bytes=0--1").partition("-")[2]
        return min(end, max(self._sent, int(last) + 1)) - self._sent

    def _compare(self, stored: Mapping[str, object]) -> None:
        """Compares the checksum of what was stored with that of what was sent."""
        sent = base64.b64encode(self._crc.to_bytes(4, "big")).decode()
        if (found := stored.get("crc32c", sent)) != sent:
            raise StorageError(
                f"{self.location}: was damaged on the way: the storage has CRC-32C {found}, expected {sent}. "
                f"Start again."
            )

    def cancel(self) -> None:
        """Ends an upload whose object has not appeared; it then never does."""
        if not self.done:
            with contextlib.suppress(FileNotFoundError, StorageError):
                # The answer is status 499, "client closed request".
                gcs.request(
                    "DELETE", "cancel", self._url, self._session, write=True, stop=self._stop, **self._query
                )


def write_object(location: Location, data: bytes, metadata: Mapping[str, str]) -> None:
    """Writes a small object.

    Raises:
        FileExistsError: there is one of this name.
        StorageError: the storage refuses or does not answer.
    """
    Upload(location, len(data), metadata, threading.Event()).write(data)


def delete_object(location: Location, generation: str = "") -> bool:
    """Deletes an object; returns whether there was one.

    Args:
        location: of the object.
        generation: only this one; "" means whichever is there.

    Raises:
        StorageError: the storage refuses or does not answer.
    """
    bucket, name = gcs.split(location.url)
    try:
        gcs.request(
            "DELETE",
            "delete",
            location.url,
            "b/{}/o/{}",
            bucket,
            name,
            write=True,
            ifGenerationMatch=generation or None,
        )
    except (FileNotFoundError, FileExistsError):
        return False
    return True


def _json_object(body: bytes) -> dict[str, object]:
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
