"""A directory on a disk or in a bucket, and how to read it: small files here, arrays by TensorStore.

gcsfs reads the small files of a bucket, TensorStore's own client the arrays. Both use Application Default
Credentials, and public buckets without any. What bounds them is in `limits`.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import tensorstore as ts

from vllm_maxtext_loader.checkpoint.storage import gcs
from vllm_maxtext_loader.checkpoint.storage.ranges import REQUESTS
from vllm_maxtext_loader.checkpoint.storage.retry import (
    Backoff,
    no_progress_seconds,
    redact,
    to_storage_error,
)
from vllm_maxtext_loader.checkpoint.storage.spelling import bucket_hint, refuse_misspelled
from vllm_maxtext_loader.checkpoint.storage.stall import abort_stalled_transfers
from vllm_maxtext_loader.checkpoint.storage.web_address import refuse_web_address
from vllm_maxtext_loader.errors import CheckpointNotFoundError, printable

_OTHER_STORAGE = ("s3",)
"""Schemes of storage that `gcloud storage` copies from."""


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
            CheckpointNotFoundError: the path is empty, no path at all, or of a scheme that is not supported.
        """
        text = os.fsdecode(path).strip()
        if not text:
            raise CheckpointNotFoundError("The checkpoint path is empty. Give a local path or a gs:// URL.")
        if "\0" in text or not is_unicode(text):
            raise CheckpointNotFoundError(f"{text!r}: is no path: it has characters no file name may have.")
        refuse_web_address(text)
        scheme, separator, rest = text.partition("://")
        match (scheme.lower() if separator else "", rest):
            case ("gs" | "gcs", _):
                return cls(_bucket_url(rest))
            case ("file", _):
                return cls(os.path.abspath(_path_of_file_url(text, rest)))
        refuse_misspelled(text)
        if separator and not os.path.lexists(text):
            shown, elsewhere = redact(text.partition("?")[0]), ""
            if scheme.lower() in _OTHER_STORAGE:
                copy = f"gcloud storage cp --recursive {shown} gs://BUCKET/path"
                elsewhere = f" Copy the checkpoint first, e.g. with `{copy}`."
            raise CheckpointNotFoundError(
                f"{shown}: the scheme {scheme}:// is not supported. Give a local path or a gs:// URL.{elsewhere}"
            )
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
            names = gcs.list_names(self.url, most)
            if not names:
                raise FileNotFoundError(self.url)
            return names
        try:
            return sorted(os.listdir(self.url))[:most]
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            raise to_storage_error(f"cannot list {self}", error) from error

    def sizes(self, most: int) -> dict[str, int] | None:
        """Bytes of every file below this directory, by relative path. In a bucket: a request per 1000 files.

        Args:
            most: files after which to stop.

        Returns:
            None where there are more files than `most`.

        Raises:
            CheckpointNotFoundError, StorageError: it cannot be listed.
        """
        if self.is_remote:
            return gcs.list_sizes(self.url, most)
        found: dict[str, int] = {}
        pending = [""]
        try:
            while pending:
                base = pending.pop()
                with os.scandir(os.path.join(self.url, base)) as entries:
                    for entry in entries:
                        name = f"{base}/{entry.name}" if base else entry.name
                        if entry.is_dir():
                            pending.append(name)
                        # A link that leads nowhere is a file that is not there.
                        elif entry.is_file():
                            found[name] = entry.stat().st_size
                        if len(found) + len(pending) > most:
                            return None
        except OSError as error:
            raise to_storage_error(f"cannot list {self}", error) from error
        return found

    def is_file(self) -> bool:
        """Whether a file (object) is here. In a bucket: one request.

        Raises:
            StorageError: it cannot be looked up.
        """
        if self.is_remote:
            return gcs.is_object(self.url)
        try:
            return Path(self.url).is_file()
        except OSError as error:
            raise to_storage_error(f"cannot look up {self}", error) from error

    def read_bytes(self) -> bytes:
        """The file's content. In a bucket: one request.

        Raises:
            FileNotFoundError, NotADirectoryError: there is no such file.
            StorageError: it cannot be read.
        """
        if self.is_remote:
            return gcs.read_object(self.url)
        try:
            return Path(self.url).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            raise to_storage_error(f"cannot read {self}", error) from error

    def kvstore(self) -> dict[str, str]:
        """TensorStore key-value store specification of this directory."""
        if self.is_remote:
            name, path = gcs.split(self.url)
            return {"driver": "gcs", "bucket": name, "path": f"{path}/" if path else ""}
        return {"driver": "file", "path": f"{self.url.rstrip('/')}/"}


def _bucket_url(rest: str) -> str:
    """The normal form of what follows "gs://".

    Raises:
        CheckpointNotFoundError: no bucket or object can have that name.
    """
    name, *parts = [part for part in rest.split("/") if part] or [""]
    path = "/".join(parts)
    url = f"gs://{name}/{path}".rstrip("/")
    if not name:
        raise CheckpointNotFoundError(f"gs://{rest}: names no bucket. Give gs://BUCKET/path.")
    refuse_web_address(f"https://{rest}")
    if not gcs.is_bucket_name(name):
        raise CheckpointNotFoundError(
            f"{redact(url)}: is not a valid bucket name. {gcs.BUCKET_NAMING}{bucket_hint(rest)}"
        )
    if not gcs.is_object_name(path):
        raise CheckpointNotFoundError(
            f"{redact(url)}: is not a valid object name: it has control characters, or more than 1024 bytes."
        )
    return url


def _path_of_file_url(text: str, rest: str) -> str:
    """The path of a file:// URL: file:///x and file://localhost/x mean /x.

    Raises:
        CheckpointNotFoundError: the URL names another host.
    """
    host, separator, path = rest.partition("/")
    if host and host.lower() != "localhost":
        raise CheckpointNotFoundError(
            f"{redact(text)}: names another host; only files of this machine can be read. Give a local path, "
            "file:///path or a gs:// URL."
        )
    return separator + path if separator else "/"


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
            "data_copy_concurrency": {"limit": len(os.sched_getaffinity(0))},
            "gcs_request_concurrency": {"limit": REQUESTS},
            # The default retries for a quarter of an hour.
            "gcs_request_retries": {
                "max_retries": backoff.retries,
                "initial_delay": f"{backoff.initial:.3f}s",
                "max_delay": f"{backoff.longest:.3f}s",
            },
            **({"gcs_user_project": {"project_id": project}} if (project := gcs.user_project()) else {}),
        }
    )


def is_unicode(text: str) -> bool:
    """Whether TensorStore, which takes UTF-8, can be given this name."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
