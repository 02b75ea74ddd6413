"""A directory on a disk or in a bucket, and how to read it: small files here, arrays by TensorStore.

gcsfs reads the small files, TensorStore's own client the arrays. Both use Application Default
Credentials, and public buckets without any. What bounds them is in `limits`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import urllib.parse
from pathlib import Path

import tensorstore as ts

from vllm_maxtext_loader.checkpoint import bucket
from vllm_maxtext_loader.checkpoint.limits import (
    Backoff,
    no_progress_seconds,
    printable,
    redact,
    storage_error,
)
from vllm_maxtext_loader.checkpoint.waiting import abort_stalled_transfers
from vllm_maxtext_loader.errors import CheckpointNotFoundError


@dataclasses.dataclass(frozen=True)
class Location:
    """A directory (or file) on the local disk or in a bucket.

    Attributes:
        url: absolute local path, or gs://bucket/path; no trailing slash.
    """

    url: str

    @classmethod
    def parse(cls, path: str | os.PathLike[str]) -> Location:
        """Normalises what a user typed.

        Raises:
            CheckpointNotFoundError: the path is empty, no path at all, of a scheme that is not supported, or not
                valid.
        """
        text = os.fsdecode(path).strip()
        if not text:
            raise CheckpointNotFoundError("The checkpoint path is empty. Give a local path or a gs:// URL.")
        if "\0" in text or not is_unicode(text):
            raise CheckpointNotFoundError(
                f"{printable(text)}: is not a valid path: it has characters no file name may have."
            )
        if (pasted := gs_form(text)) is not None:
            raise CheckpointNotFoundError(
                f"{printable(redact(text.partition('?')[0]))}: is a web address of an object in a bucket. Give {printable(pasted)}."
            )
        scheme, separator, rest = text.partition("://")
        if separator and scheme == "file":
            host, _, rest = rest.partition("/")
            if host not in ("", "localhost"):
                raise CheckpointNotFoundError(
                    f"{printable(redact(text))}: names a file of another machine, {printable(host)}. Give a local path or a gs:// URL."
                )
            return cls(os.path.abspath(f"/{rest}"))
        if separator and scheme not in ("gs", "gcs"):
            raise CheckpointNotFoundError(
                f"{printable(redact(text))}: the scheme {printable(scheme)}:// is not supported. Give a local path or a gs:// URL."
            )
        if separator:
            parts = [part for part in rest.split("/") if part]
            if not parts:
                raise CheckpointNotFoundError(f"{text}: names no bucket. Give gs://BUCKET/path.")
            if not _BUCKET_NAME.fullmatch(parts[0]) or ".." in parts[0]:
                raise CheckpointNotFoundError(
                    f"{printable(redact(text))}: {printable(redact(parts[0]))} is not a valid bucket name: 3 to 63 (with dots, 222) lowercase "
                    f"letters, digits, dashes, underscores and dots, a letter or digit at both ends."
                )
            if not rest.isprintable() or {".", ".."} & set(parts):
                raise CheckpointNotFoundError(
                    f"{printable(redact(text))}: is not a valid object name: it has a character that is not printable, or . or .. as a part."
                )
            return cls("gs://" + "/".join(parts))
        return cls(os.path.abspath(os.path.expanduser(text)))

    @property
    def is_remote(self) -> bool:
        """Whether this is in a bucket."""
        return self.url.startswith("gs://")

    @property
    def name(self) -> str:
        """Last component."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def parent(self) -> Location | None:
        """The directory above, None at the bucket or file system root."""
        head = self.url.rsplit("/", 1)[0]
        if self.is_remote:
            return Location(head) if self.url.count("/") > 2 else None
        return Location(head or "/") if self.url != "/" else None

    def __truediv__(self, name: str) -> Location:
        return Location(f"{self.url.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return printable(redact(self.url))

    def listdir(self, most: int | None = None) -> list[str]:
        """Names of the entries of this directory, sorted. In a bucket: one request per 1000 entries.

        Args:
            most: names after which to stop; None means all.

        Raises:
            FileNotFoundError: there is no such directory; in a bucket, nothing below it.
            NotADirectoryError: this is a file.
            CheckpointNotFoundError: there is no such bucket.
            StorageError: it cannot be listed.
        """
        if self.is_remote:
            names = bucket.list_names(self.url, most)
            if not names:
                raise FileNotFoundError(self.url)
            return names
        try:
            return sorted(os.listdir(self.url))[:most]
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            raise storage_error(f"cannot list {self}", error) from error

    def is_file(self) -> bool:
        """Whether a file (object) is here. In a bucket: one request.

        Raises:
            StorageError: it cannot be looked up.
        """
        if self.is_remote:
            return bucket.is_object(self.url)
        try:
            return Path(self.url).is_file()
        except OSError as error:
            raise storage_error(f"cannot look up {self}", error) from error

    def read_bytes(self) -> bytes:
        """The file's content. In a bucket: one request.

        Raises:
            FileNotFoundError, NotADirectoryError: there is no such file.
            StorageError: it cannot be read.
        """
        if self.is_remote:
            return bucket.read_object(self.url)
        try:
            return Path(self.url).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            raise storage_error(f"cannot read {self}", error) from error

    def kvstore(self) -> dict[str, str]:
        """TensorStore key-value store specification of this directory."""
        if self.is_remote:
            name, path = bucket.split(self.url)
            return {"driver": "gcs", "bucket": name, "path": f"{path}/" if path else ""}
        return {"driver": "file", "path": f"{self.url.rstrip('/')}/"}


_BUCKET_NAME = re.compile(
    r"(?=.{3,222}$)[a-z0-9](?:[a-z0-9_-]{0,61}[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9_-]{0,61}[a-z0-9])?)*"
)
"""https://cloud.google.com/storage/docs/buckets#naming; TensorStore refuses other names as well."""

_WEB_PATHS = {
    "storage.googleapis.com": r"/(?:storage/v1/b/)?(?P<bucket>[^/]+)(?:/o)?(?:/(?P<path>.*))?",
    "www.googleapis.com": r"/storage/v1/b/(?P<bucket>[^/]+)(?:/o)?(?:/(?P<path>.*))?",
    "storage.cloud.google.com": r"/(?P<bucket>[^/]+)(?:/(?P<path>.*))?",
    "console.cloud.google.com": r"/storage/browser/(?:_details/)?(?P<bucket>[^/;]+)(?:/(?P<path>[^;]*))?(?:;.*)?",
}
"""By host, the paths of Cloud Storage's web addresses."""


def gs_form(address: str) -> str | None:
    """The gs:// form of a pasted web address of Cloud Storage; None where it is none."""
    parts = urllib.parse.urlsplit(address) if address.startswith(("https://", "http://")) else None
    if parts is None:
        return None
    host, path = parts.netloc.rpartition("@")[2].lower(), urllib.parse.unquote(parts.path)
    bucket = host.removesuffix(".storage.googleapis.com")
    if bucket != host:
        return f"gs://{bucket}{path}".rstrip("/")
    found = re.fullmatch(_WEB_PATHS[host], path) if host in _WEB_PATHS else None
    return f"gs://{found['bucket']}/{found['path'] or ''}".rstrip("/") if found else None


def tensorstore_context() -> ts.Context:
    """Shared TensorStore resources of one load: caches, threads, and how long a request may be retried."""
    abort_stalled_transfers()
    backoff = Backoff.within(no_progress_seconds())
    return ts.Context(
        {
            # Decoded chunks go straight into the destination; caching them would hold them twice.
            "cache_pool": {"total_bytes_limit": 0},
            # OCDBT's B-tree nodes are needed again by every leaf.
            "cache_pool#ocdbt": {"total_bytes_limit": 256 << 20},
            "data_copy_concurrency": {"limit": os.cpu_count() or 1},
            # The default retries for a quarter of an hour.
            "gcs_request_retries": {
                "max_retries": backoff.retries,
                "initial_delay": f"{backoff.initial:.3f}s",
                "max_delay": f"{backoff.longest:.3f}s",
            },
        }
    )


def is_unicode(text: str) -> bool:
    """Whether TensorStore, which takes UTF-8, can be given this name."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
