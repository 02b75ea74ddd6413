"""Listings, look-ups and metadata files in a bucket, by gcsfs.

Every request is bounded in time and repeated where that can help; a repetition is logged with the object's
path. TensorStore reads the arrays (see `storage`); here are the few small files around them. Written against gcsfs
2026.1.0: `GCSFileSystem.call` makes one request of the JSON API, with no listing cache in between.
"""

from __future__ import annotations

import base64
import functools
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import google_crc32c

from vllm_maxtext_loader.checkpoint.limits import (
    Backoff,
    Fault,
    fault_of,
    no_progress_seconds,
    reason_of,
    retry_warning,
    storage_error,
)
from vllm_maxtext_loader.errors import CheckpointNotFoundError

if TYPE_CHECKING:
    from gcsfs import GCSFileSystem

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
    bucket, path = split(url)
    prefix = f"{path}/" if path else ""
    fields: dict[str, Any] = {
        "delimiter": "/",
        "prefix": prefix,
        "fields": "items(name),prefixes,nextPageToken",
    }
    if most is not None:
        fields["maxResults"] = most
    names: set[str] = set()
    try:
        while True:
            page = _call(
                "list", url, lambda client: client.call("GET", "b/{}/o", bucket, json_out=True, **fields)
            )
            names |= {item["name"] for item in page.get("items", ())} | set(page.get("prefixes", ()))
            fields["pageToken"] = page.get("nextPageToken")
            if fields["pageToken"] is None or (most is not None and len(names) >= most):
                break
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(
            f"{url}: there is no bucket {bucket}, or this account may not know of it. Check the bucket's name."
        ) from error
    # An object named like the "directory" itself is how some tools mark an empty one.
    return sorted({name.removeprefix(prefix).strip("/") for name in names} - {""})


def is_object(url: str) -> bool:
    """Whether an object is here: one request.

    Raises:
        StorageError: the storage refuses or does not answer.
    """
    try:
        _call("look up", url, lambda client: client.call("GET", "b/{}/o/{}", *split(url), fields="name"))
    except FileNotFoundError:
        return False
    return True


def read_object(url: str) -> bytes:
    """An object's content: one request; compared with the checksum that Cloud Storage sends along.

    Raises:
        FileNotFoundError: there is no such object.
        StorageError: the storage refuses or does not answer.
    """

    def read(client: Any) -> bytes:
        headers, content = client.call("GET", client.url("/".join(split(url))))
        check_hash(headers, content)
        return content

    return _call("read", url, read)


def check_hash(headers: Any, content: bytes) -> None:
    """Compares the CRC-32C in `x-goog-hash`; gcsfs's own check needs another library and fails where there is none.

    Raises:
        ChecksumError: the content is another one.
    """
    from gcsfs.retry import ChecksumError

    hashes = ",".join(headers.getall("x-goog-hash", ())).split(",")
    sent = dict(entry.strip().split("=", 1) for entry in hashes if "=" in entry).get("crc32c")
    # Cloud Storage decompresses an object stored with gzip on the way; the checksum is of the stored bytes.
    if sent is None or headers.get("x-goog-stored-content-encoding", "identity") != "identity":
        return
    found = base64.b64encode(google_crc32c.value(content).to_bytes(4, "big")).decode()
    if found != sent:
        raise ChecksumError(f"CRC-32C is {found}, Cloud Storage sent {sent}")


def _call[T](what: str, url: str, request: Callable[[Any], T]) -> T:
    """Makes one request; again, within the limit, where a failure may pass."""
    from gcsfs.retry import ChecksumError, HttpError
    from google.auth.exceptions import GoogleAuthError

    limit = no_progress_seconds()
    backoff = Backoff.within(limit * (1 - 1 / _ATTEMPTS_IN_LIMIT))
    started, pause = time.monotonic(), backoff.initial
    while True:
        try:
            return request(_client(os.getpid(), *_endpoint(), limit / _ATTEMPTS_IN_LIMIT))
        except FileNotFoundError as error:
            raise FileNotFoundError(url) from error
        except (HttpError, ChecksumError, GoogleAuthError, OSError, ValueError, *_network_errors()) as error:
            over = time.monotonic() - started + pause > backoff.total
            if over or not (fault_of(error) in _MAY_PASS or isinstance(error, ChecksumError)):
                raise storage_error(f"cannot {what} {url}", error) from error
            retry_warning(url, f"cannot {what}: {reason_of(error)}")
        time.sleep(pause)
        pause = min(2 * pause, backoff.longest)


_MAY_PASS = (Fault.SERVER, Fault.NETWORK, Fault.TIMEOUT)


@functools.cache
def _network_errors() -> tuple[type[Exception], ...]:
    """What gcsfs lets through of its HTTP clients; most of it is no OSError."""
    from aiohttp import ClientError
    from requests.exceptions import RequestException

    return (ClientError, RequestException)


@functools.lru_cache(maxsize=8)
def _client(process: int, emulator: str, endpoint: str, seconds: float) -> GCSFileSystem:
    """One client per process, address and time limit: credentials are looked up once.

    Args:
        process: its number; gcsfs's event loop does not survive a fork.
        emulator: STORAGE_EMULATOR_HOST, which gcsfs reads itself.
        endpoint: another address of Cloud Storage; "" for the usual one.
        seconds: after which a request that hangs is given up.
    """
    del process
    from gcsfs import GCSFileSystem

    class Client(GCSFileSystem):
        # Undecorated: gcsfs repeats a request six times and does not say so; `_call` does both.
        _request = GCSFileSystem._request.__wrapped__  # type: ignore[attr-defined]

    return Client(
        access="read_only",
        endpoint_url=endpoint.rstrip("/") or None,
        token=_credentials(emulator),
        requests_timeout=seconds,
        session_kwargs={"trust_env": True},
        skip_instance_cache=True,
    )


def _endpoint() -> tuple[str, str]:
    """Where requests go: an emulator, and the address that TensorStore is given as well."""
    emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
    return emulator, "" if emulator else os.environ.get("TENSORSTORE_GCS_HTTP_URL", "")


def _credentials(emulator: str) -> Any:
    """Application Default Credentials; "anon" where there are none: public buckets can still be read."""
    from google import auth
    from google.auth.exceptions import DefaultCredentialsError

    named = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    if emulator and not named:
        return "anon"
    try:
        return auth.default(scopes=["https://www.googleapis.com/auth/devstorage.read_only"])[0]
    except DefaultCredentialsError:
        # TensorStore does the same. Credentials that were named and cannot be used are an error.
        if named:
            raise
        return "anon"
