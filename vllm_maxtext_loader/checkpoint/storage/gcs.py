"""Listings, look-ups, metadata files and byte ranges in a bucket, by gcsfs; `upload` writes with it.

Every request is bounded in time and repeated where that can help; a repetition is logged with the object's
path. TensorStore reads the arrays (see `storage`); here are the few small files around them.

Requests are made with `GCSFileSystem.call`: its `ls`, `info` and `exists` send a second request where nothing is
found, and `cat_file` does not compare checksums.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import math
import os
import random
import re
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from vllm_maxtext_loader.checkpoint.storage.retry import (
    USER_PROJECT_VARIABLE,
    Backoff,
    Failure,
    RequestError,
    http_failure,
    no_progress_seconds,
    retry_warning,
    to_storage_error,
)
from vllm_maxtext_loader.errors import CheckpointNotFoundError

if TYPE_CHECKING:
    import aiohttp

_ATTEMPTS_IN_LIMIT = 3
"""A request that hangs is given up after this fraction of the limit, so that it can be repeated within it."""

_READ = "https://www.googleapis.com/auth/devstorage.read_only"
_WRITE = "https://www.googleapis.com/auth/devstorage.read_write"

BUCKET_NAMING = (
    "Bucket names must have 3 to 63 characters (with dots up to 222): lower-case letters, digits, dots, hyphens and "
    "underscores, with a letter or digit first and last."
)

_BUCKET_NAME = re.compile(r"(?!.*(?:\.\.|-\.|\.-))[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_LONGEST_PART = 63
_LONGEST_PATH = 1024


def is_bucket_name(name: str) -> bool:
    """Whether TensorStore takes it for a bucket's name (0.1.86, `IsValidBucketName`)."""
    return bool(_BUCKET_NAME.fullmatch(name)) and all(len(part) <= _LONGEST_PART for part in name.split("."))


def is_object_name(name: str) -> bool:
    """Whether TensorStore takes it for an object's name (0.1.86, `IsValidObjectName`)."""
    return len(name.encode()) <= _LONGEST_PATH and all(c >= " " and c != "\x7f" for c in name)


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
    _, path = split(url)
    prefix = f"{path}/" if path else ""
    names: set[str] = set()
    page: str | None = None
    while True:
        listing = _list_page(
            url,
            prefix=prefix or None,
            delimiter="/",
            fields="items(name),prefixes,nextPageToken",
            maxResults=most,
            pageToken=page,
        )
        names.update(item["name"] for item in listing.get("items", ()))
        names.update(listing.get("prefixes", ()))
        page = listing.get("nextPageToken")
        if not page or (most is not None and len(names) >= most):
            break
    # An object named like the "directory" itself is how some tools mark an empty one.
    return sorted({name.removeprefix(prefix).strip("/") for name in names} - {""})[:most]


def list_sizes(url: str, most: int) -> dict[str, int] | None:
    """Bytes of every object below a "directory", by path relative to it; one request per 1000 of them.

    Args:
        url: the directory.
        most: objects after which to stop.

    Returns:
        None where there are more objects than `most`.

    Raises:
        CheckpointNotFoundError: there is no such bucket.
        StorageError: it cannot be listed.
    """
    _, path = split(url)
    prefix = f"{path}/" if path else ""
    sizes: dict[str, int] = {}
    page: str | None = None
    while len(sizes) <= most:
        listing = _list_page(
            url, prefix=prefix or None, fields="items(name,size),nextPageToken", pageToken=page
        )
        for item in listing.get("items", ()):
            sizes[item["name"].removeprefix(prefix)] = int(item["size"])
        page = listing.get("nextPageToken")
        if not page:
            return sizes if len(sizes) <= most else None
    return None


def list_objects(
    url: str, most: int | None = None, *, recursive: bool = False, write: bool = False
) -> dict[str, dict[str, Any]]:
    """Size, generation and metadata of the objects in a "directory", by path relative to it.

    Args:
        url: the directory.
        most: objects after which to stop; None means all.
        recursive: whether those in "directories" below it are listed.
        write: whether the account needs to be allowed to write there.

    Raises:
        CheckpointNotFoundError: there is no such bucket.
        StorageError: it cannot be listed.
    """
    _, path = split(url)
    prefix = f"{path}/" if path else ""
    found: dict[str, dict[str, Any]] = {}
    page: str | None = None
    while True:
        listing = _list_page(
            url,
            prefix=prefix or None,
            delimiter=None if recursive else "/",
            fields="items(name,size,generation,metadata),nextPageToken",
            maxResults=most,
            pageToken=page,
            write=write,
        )
        found |= {item["name"].removeprefix(prefix): item for item in listing.get("items", ())}
        page = listing.get("nextPageToken")
        if not page or (most is not None and len(found) >= most):
            return found


def _list_page(url: str, **params: Any) -> dict[str, Any]:
    """One page of a listing: one request."""
    bucket, _ = split(url)
    try:
        body = _get("list", url, "b/{}/o", bucket, **params)
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(
            f"{url}: there is no bucket {bucket}, or this account may not know of it. Check the bucket's "
            "name."
        ) from error
    return _parse_listing(url, body)


def _parse_listing(url: str, body: bytes) -> dict[str, Any]:
    try:
        listing = json.loads(body)
    except ValueError as error:
        raise to_storage_error(f"cannot list {url}", error) from error
    if not isinstance(listing, dict):
        raise to_storage_error(f"cannot list {url}", ValueError("the answer is not a listing"))
    return listing


def is_object(url: str) -> bool:
    """Whether an object is here: one request.

    Raises:
        StorageError: the storage refuses or does not answer.
    """
    try:
        _get("look up", url, "b/{}/o/{}", *split(url), fields="name")
    except FileNotFoundError:
        return False
    return True


def read_object(url: str) -> bytes:
    """An object's content, compared with the checksum that Cloud Storage sends with it: one request.

    Raises:
        FileNotFoundError: there is no such object.
        StorageError: the storage refuses or does not answer, or the content is damaged at every attempt.
    """
    return _get("read", url, "b/{}/o/{}", *split(url), alt="media")


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes of an object: one request.

    Args:
        url: the object.
        start, stop: first byte, and end; fewer bytes come back where the object is shorter.

    Raises:
        FileNotFoundError: there is no such object.
        StorageError: the storage refuses or does not answer.
    """
    headers = {"Range": f"bytes={start}-{stop - 1}"}
    _, body = request("GET", "read", url, "b/{}/o/{}", *split(url), headers=headers, alt="media")
    return body


def user_project() -> str | None:
    """The project that is billed where the reader of a bucket pays; None where none is named."""
    return os.environ.get(USER_PROJECT_VARIABLE) or None


def _get(what: str, url: str, path: str, *args: str, **params: Any) -> bytes:
    """The body of the answer to a GET; see `request`."""
    return request("GET", what, url, path, *args, **params)[1]


def request(
    method: str,
    what: str,
    url: str,
    path: str,
    *args: str,
    write: bool = False,
    stop: threading.Event | None = None,
    **params: Any,
) -> Answer:
    """Headers and body of the answer to a request about `url`, repeated within the limit where its failure may pass.

    Args:
        method: HTTP method.
        what: what is being done, for messages.
        url: what it is done with.
        path: below the JSON interface's root, or below the endpoint if it begins with a slash; a pair of braces for
            each of `args`.
        args: parts of the path, quoted by gcsfs.
        write: whether the account needs to be allowed to write.
        stop: no further attempt is made once it is set.
        params: `headers`, `data` and `json`; all others are the query; None means left out.

    Raises:
        FileNotFoundError: there is no such object, bucket or upload.
        FileExistsError: a condition on the object's generation was not met.
        StorageError: the storage refuses or does not answer.
    """
    params["userProject"] = user_project()
    limit = no_progress_seconds()
    backoff = Backoff.within(limit * (1 - 1 / _ATTEMPTS_IN_LIMIT))
    timeout = max(0.1, round(limit / _ATTEMPTS_IN_LIMIT, 1))
    deadline = time.monotonic() + backoff.total
    # The pauses are random parts of these, so that many hosts do not ask at the same moment.
    pause = 4 * backoff.initial
    stop = stop or threading.Event()
    while True:
        try:
            emulated = bool(os.environ.get("STORAGE_EMULATOR_HOST"))
            client = _client(os.getpid(), emulated, timeout, _WRITE if write else _READ)
            return client.call(method, path, *args, **params)
        except RequestError as error:
            if error.status == 404:
                raise FileNotFoundError(url) from error
            if error.status == 412:
                raise FileExistsError(url) from error
            wait = random.uniform(0, pause)
            if not error.failure.may_pass or time.monotonic() + wait > deadline or stop.is_set():
                raise to_storage_error(
                    f"cannot {what} {url}", _for_writing(error) if write else error
                ) from error
            retry_warning(url, f"cannot {what}: {error}")
        stop.wait(wait)
        pause = min(2 * pause, backoff.longest)


def _for_writing(error: RequestError) -> RequestError:
    """The same error, with the permissions that a writer needs in its advice."""
    if error.failure is Failure.BUCKET_ACCESS:
        return RequestError(str(error), Failure.BUCKET_WRITE, error.status)
    return error


Answer = tuple[Mapping[str, str], bytes]
"""Headers and body."""


class _Client:
    """gcsfs, without the retries that it makes silently.

    `gcsfs.retry.retry_request` (2026.1) repeats a request six times where gcsfs or aiohttp fails, and no argument
    changes that. `_check` is an aiohttp middleware: it turns every failure into a `RequestError`, which gcsfs
    passes on at once.

    Args:
        emulated: whether an emulator is asked, which needs no credentials.
        timeout: seconds without a byte after which a request is given up.
        scope: OAuth scope of its token.
    """

    def __init__(self, emulated: bool, timeout: float, scope: str) -> None:
        import aiohttp
        import google.auth.transport.requests

        # Not `gcsfs.GCSFileSystem`: an environment variable makes that a class that probes the bucket.
        from gcsfs.core import GCSFileSystem

        self._timeout = timeout
        self._authorization: dict[str, str] = {}
        self._credentials = None if emulated else _credentials(scope)
        # Tokens are refreshed here, not by gcsfs: in the caller's thread and within the time limit.
        request = google.auth.transport.requests.Request()
        self._refresh = functools.partial(request, timeout=math.ceil(timeout))
        self._fs = GCSFileSystem(
            token="anon",
            access="read_only",
            use_listings_cache=False,
            skip_instance_cache=True,
            # None would mean aiohttp's total of five minutes: a limit on slow downloads, not on stalled ones.
            # What is sent has a total: aiohttp does not notice a peer that takes no more bytes.
            requests_timeout=aiohttp.ClientTimeout(
                total=_ATTEMPTS_IN_LIMIT * timeout if scope == _WRITE else None,
                connect=timeout,
                sock_connect=timeout,
                sock_read=timeout,
            ),
            session_kwargs={"trust_env": True, "middlewares": (self._check,)},
        )

    def call(self, method: str, path: str, *args: str, **params: Any) -> Answer:
        """Headers and body of the answer to one request; see `request`.

        Raises:
            RequestError: it failed.
        """
        from google.auth.exceptions import GoogleAuthError, TransportError

        if self._credentials is not None:
            headers: dict[str, str] = {}
            try:
                self._credentials.before_request(self._refresh, method, self._fs.base, headers)
            except TransportError as error:
                raise RequestError(f"no token: {error}", Failure.UNREACHABLE) from error
            except GoogleAuthError as error:
                failure = Failure.OVERLOADED if error.retryable else Failure.BUCKET_ACCESS
                raise RequestError(f"no token: {error}", failure) from error
            self._authorization = headers
        if path.startswith("/"):
            path = self._fs.base.removesuffix("/storage/v1/") + path
        if (data := params.get("data")) is not None:
            # aiohttp warns of a large body that is bytes.
            params["data"] = io.BytesIO(data)
        return cast("Answer", self._fs.call(method, path, *args, **params))

    async def _check(
        self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        """Adds the token, reads the answer, and raises what is wrong with it as `RequestError`.

        The token is added here because aiohttp refuses an Authorization header where ~/.netrc has an entry.
        """
        import aiohttp

        request.headers.popall("Authorization", None)
        request.headers.update(self._authorization)
        try:
            response = await handler(request)
            body = await response.read()
        except TimeoutError as error:
            raise RequestError(
                f"timed out: nothing arrived for {self._timeout:g} s", Failure.NO_ANSWER
            ) from error
        except aiohttp.ClientPayloadError as error:
            raise RequestError("Incomplete answer: the connection broke off", Failure.UNREACHABLE) from error
        except (aiohttp.ClientError, OSError) as error:
            raise RequestError(_reason_of(error), Failure.UNREACHABLE) from error
        if response.status >= 400:
            raise _refusal(response.status, body)
        # The checksum is the object's: not that of a range, nor of the answer to an upload.
        if request.method == "GET" and response.status != 206:
            _compare_checksum(body, response.headers)
        return response


@functools.cache
def _client(pid: int, emulated: bool, timeout: float, scope: str) -> _Client:
    """One client per process and scope: credentials are looked up once, and gcsfs's event loop does not survive a fork.

    Args:
        pid: the process.
        emulated: see `_Client`.
        timeout: see `_Client`.
        scope: see `_Client`.
    """
    return _Client(emulated, timeout, scope)


def _credentials(scope: str) -> Any:
    """Application Default Credentials; None where there are none: public buckets can still be read.

    Raises:
        RequestError: GOOGLE_APPLICATION_CREDENTIALS is set and unusable.
    """
    import google.auth
    from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError

    try:
        return google.auth.default(scopes=[scope])[0]
    except (GoogleAuthError, OSError, ValueError) as error:
        if isinstance(error, DefaultCredentialsError) and not os.environ.get(
            "GOOGLE_APPLICATION_CREDENTIALS"
        ):
            return None
        raise RequestError(f"no credentials: {error}", Failure.BUCKET_ACCESS) from error


def _reason_of(error: Exception) -> str:
    """What an error of a connection says: the operating system's words where it has some."""
    import aiohttp

    if isinstance(error, aiohttp.ClientConnectorError) and not isinstance(error, aiohttp.ClientSSLError):
        reason = error.os_error
        number = reason.errno or 0
        # A failed look-up of the name has a number of its own kind, below 0.
        words = os.strerror(number) if number > 0 else str(reason)
        return f"{error.host}:{error.port}: {words}"
    return str(error) or type(error).__name__


def _refusal(status: int, body: bytes) -> RequestError:
    """The error that an answer of 400 and above stands for."""
    message, reason = body.decode(errors="replace"), ""
    try:
        error = json.loads(body)["error"]
        message = str(error["message"])
        reason = str(error["errors"][0]["reason"])
    except (ValueError, KeyError, TypeError, IndexError):
        pass
    return RequestError(f"HTTP {status}: {message}", http_failure(status, reason), status)


def _compare_checksum(body: bytes, headers: Any) -> None:
    """Compares an object's content with the checksum sent with it; listings are sent without one."""
    import google_crc32c

    if "gzip" in (headers.get("Content-Encoding"), headers.get("X-Goog-Stored-Content-Encoding")):
        # The checksum is of the compressed bytes; gzip has one of its content, which aiohttp has compared.
        return
    for entry in ",".join(headers.getall("X-Goog-Hash", ())).split(","):
        kind, _, value = entry.strip().partition("=")
        if kind != "crc32c":
            continue
        actual = base64.b64encode(google_crc32c.value(body).to_bytes(4, "big")).decode()
        if value != actual:
            raise RequestError(
                f"the content was damaged on the way: CRC-32C {actual}, expected {value}", Failure.OVERLOADED
            )
