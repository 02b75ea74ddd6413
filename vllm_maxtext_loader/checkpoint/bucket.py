"""Listings, look-ups and metadata files in a bucket, by Google's own client (google-cloud-storage).

Every request is bounded in time and repeated where that can help; a repetition is logged with the object's
path. TensorStore reads the arrays (see `storage`); here are the few small files around them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_maxtext_loader.checkpoint.limits import Backoff, no_progress_seconds, retry_warning, storage_error
from vllm_maxtext_loader.errors import CheckpointNotFoundError, StorageError

if TYPE_CHECKING:
    from google.cloud.storage import Bucket, Client

_ATTEMPTS_IN_LIMIT = 3
"""A request that hangs is given up after this fraction of the limit, so that it can be repeated within it."""


def split(url: str) -> tuple[str, str]:
    """gs://bucket/path -> (bucket, path); the path may be empty."""
    bucket, _, path = url.removeprefix("gs://").partition("/")
    return bucket, path


def list_names(url: str, most: int | None = None) -> list[str]:
    """Names of what is directly below a "directory", sorted; one request per 1000 of them.

    Args:
        url: the directory.
        most: names after which to stop; None means all.

    Raises:
        CheckpointNotFoundError: there is no such bucket.
        StorageError: it cannot be listed.
    """
    path = split(url)[1]
    prefix = f"{path}/" if path else ""

    def list_once(bucket: Bucket, timeout: float) -> set[str]:
        found = bucket.client.list_blobs(
            bucket,
            max_results=most,
            prefix=prefix,
            delimiter="/",
            fields="items(name),prefixes,nextPageToken",
            **_once(timeout),
        )
        names = {blob.name for blob in found} | set(found.prefixes)
        return {name.removeprefix(prefix).strip("/") for name in names}

    try:
        # An object named like the "directory" itself is how some tools mark an empty one.
        return sorted(_call("list", url, list_once) - {""})
    except FileNotFoundError as error:
        name = split(url)[0]
        raise CheckpointNotFoundError(
            f"{url}: there is no bucket {name}, or this account may not know of it. Check the bucket's name."
        ) from error


def is_object(url: str) -> bool:
    """Whether an object is here: one request.

    Raises:
        StorageError: the storage refuses or does not answer.
    """
    return _call("look up", url, lambda bucket, timeout: bucket.blob(split(url)[1]).exists(**_once(timeout)))


def read_object(url: str) -> bytes:
    """An object's content: one request; the client compares it with the checksum Cloud Storage sends along.

    Raises:
        FileNotFoundError: there is no such object.
        StorageError: the storage refuses or does not answer.
    """
    return _call(
        "read", url, lambda bucket, timeout: bucket.blob(split(url)[1]).download_as_bytes(**_once(timeout))
    )


def _once(timeout: float) -> dict[str, Any]:
    """Options of a request that is not repeated by the client itself, which would not say so."""
    return {"timeout": timeout, "retry": None}


def _call[T](what: str, url: str, operation: Callable[[Bucket, float], T]) -> T:
    """Carries out one operation on the bucket of `url`; again, within the limit, where a failure may pass."""
    from google.api_core import exceptions, retry
    from google.auth.exceptions import GoogleAuthError
    from google.cloud.storage.exceptions import DataCorruption
    from urllib3.exceptions import HTTPError

    limit = no_progress_seconds()
    backoff = Backoff.within(limit * (1 - 1 / _ATTEMPTS_IN_LIMIT))
    attempts = retry.Retry(
        predicate=_may_pass,
        # This client pauses for a random part of what it is told.
        initial=4 * backoff.initial,
        maximum=backoff.longest,
        multiplier=2.0,
        timeout=backoff.total,
        on_error=lambda error: retry_warning(url, f"cannot {what}: {str(error) or type(error).__name__}"),
    )
    try:
        bucket = _client(os.environ.get("STORAGE_EMULATOR_HOST", "")).bucket(split(url)[0])
        return attempts(operation)(bucket, max(0.1, round(limit / _ATTEMPTS_IN_LIMIT, 1)))
    except exceptions.NotFound as error:
        raise FileNotFoundError(url) from error
    except exceptions.RetryError as error:
        raise storage_error(f"cannot {what} {url}", error.cause or error) from error
    except (exceptions.GoogleAPIError, GoogleAuthError, HTTPError, DataCorruption, OSError) as error:
        raise storage_error(f"cannot {what} {url}", error) from error
    except StorageError:
        raise
    except ValueError as error:
        # The client's own checks of bucket and object names.
        raise storage_error(f"cannot {what} {url}", error) from error


def _may_pass(error: Exception) -> bool:
    """Whether a failure may be gone at the next attempt."""
    from google.api_core.exceptions import GoogleAPICallError
    from google.auth.exceptions import TransportError
    from google.cloud.storage.exceptions import DataCorruption
    from requests import exceptions
    from urllib3.exceptions import HTTPError

    if isinstance(error, GoogleAPICallError):
        code = int(error.code or 0)
        return code in (408, 429) or code >= 500
    broken = (exceptions.ConnectionError, exceptions.Timeout, exceptions.ChunkedEncodingError, HTTPError)
    return isinstance(error, (*broken, TransportError, DataCorruption))


@functools.cache
def _client(emulator: str) -> Client:
    """One client per process (and emulator, which tests change): credentials are looked up once."""
    # Else the client asks for the bucket's properties in the background, to label traces nobody takes.
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    from google import auth
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import storage

    if emulator:
        return storage.Client(project=None)
    try:
        credentials, _ = auth.default(scopes=["https://www.googleapis.com/auth/devstorage.read_only"])
    except DefaultCredentialsError:
        if os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
            raise
        # As TensorStore does: without credentials, public buckets can still be read.
        return storage.Client.create_anonymous_client()
    return storage.Client(project=None, credentials=credentials)
