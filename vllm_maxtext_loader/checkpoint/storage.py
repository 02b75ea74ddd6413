"""Access to local directories and gs:// buckets: small files by fsspec, arrays by TensorStore.

Everything that names a credential, a timeout or a retry is here, so that one place answers "what
happens when the network does not". fsspec (gcsfs for gs://) lists and reads metadata files;
TensorStore's own clients read the arrays. Both use Application Default Credentials.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
import tensorstore as ts

from vllm_maxtext_loader.errors import CheckpointNotFoundError, StorageError

T = TypeVar("T")

NO_PROGRESS_SECONDS = 60.0
"""Give up after this long without an answer; override with VLLM_MAXTEXT_TIMEOUT (seconds)."""

_RETRYABLE_CODES = "429, 500, 502, 503, 504"


def no_progress_seconds() -> float:
    """Seconds without any progress after which a read is given up."""
    raw = os.environ.get("VLLM_MAXTEXT_TIMEOUT", "")
    if not raw:
        return NO_PROGRESS_SECONDS
    try:
        seconds = float(raw)
    except ValueError:
        seconds = -1.0
    if seconds <= 0:
        raise StorageError(f"VLLM_MAXTEXT_TIMEOUT must be a number of seconds > 0, found {raw!r}.")
    return seconds


def redact(text: str) -> str:
    """`text` without signed-URL signatures and bearer tokens, for logs and messages."""
    text = re.sub(
        r"(?i)\b(X-Goog-(?:Signature|Credential|Security-Token)|Signature|access_token|token|key)=[^&\s\"']+",
        r"\1=…",
        text,
    )
    text = re.sub(r"(?i)\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]+", r"\1 …", text)
    return re.sub(r"\bya29\.[A-Za-z0-9._-]+", "ya29.…", text)


@dataclasses.dataclass(frozen=True)
class Location:
    """A directory on the local disk or in a bucket.

    Attributes:
        url: absolute local path, or gs://bucket/path; no trailing slash.
    """

    url: str

    @classmethod
    def parse(cls, path: str | os.PathLike[str]) -> Location:
        """Normalises what a user typed.

        Raises:
            CheckpointNotFoundError: the path is empty or of a scheme that is not supported.
        """
        text = os.fspath(path).strip()
        if not text:
            raise CheckpointNotFoundError("The checkpoint path is empty. Give a local path or a gs:// URL.")
        if text.startswith("file://"):
            text = text[len("file://") :]
        scheme, separator, rest = text.partition("://")
        if separator and scheme not in ("gs", "gcs"):
            raise CheckpointNotFoundError(
                f"{redact(text)}: the scheme {scheme}:// is not supported. Give a local path or a gs:// URL."
            )
        if separator:
            parts = [part for part in rest.split("/") if part]
            if not parts:
                raise CheckpointNotFoundError(f"{text}: names no bucket. Give gs://BUCKET/path.")
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
        return redact(self.url)

    def _filesystem(self) -> Any:
        if not self.is_remote:
            return fsspec.filesystem("file")
        # A cached listing would hide a step that another process has just committed.
        return fsspec.filesystem("gcs", use_listings_cache=False)

    def _call(self, what: str, operation: Callable[[Any], T]) -> T:
        try:
            return operation(self._filesystem())
        except FileNotFoundError:
            raise
        except (OSError, RuntimeError, ValueError, TimeoutError) as error:
            raise storage_error(f"cannot {what} {self}", error) from error
        except Exception as error:
            # google.auth and aiohttp raise families of their own, neither of which is imported here.
            if type(error).__module__.partition(".")[0] in ("google", "aiohttp", "gcsfs", "requests"):
                raise storage_error(f"cannot {what} {self}", error) from error
            raise

    def listdir(self) -> list[str]:
        """Names of the entries of this directory, sorted.

        Raises:
            FileNotFoundError: there is no such directory.
            StorageError: it cannot be listed.
        """
        entries = self._call("list", lambda fs: fs.ls(self.url, detail=False))
        names = {entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries}
        if self.is_remote:
            # An object named like the "directory" itself is how some tools mark an empty one.
            own = self.url[len("gs://") :]
            names = {
                entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry.rstrip("/") != own
            }
        return sorted(names - {""})

    def is_file(self) -> bool:
        """Whether a file (object) is here."""
        return self._call("look up", lambda fs: fs.isfile(self.url))

    def read_bytes(self) -> bytes:
        """The file's content.

        Raises:
            FileNotFoundError: there is no such file.
            StorageError: it cannot be read.
        """
        return self._call("read", lambda fs: fs.cat_file(self.url))

    def kvstore(self) -> dict[str, str]:
        """TensorStore key-value store specification of this directory."""
        if self.is_remote:
            bucket, _, path = self.url[len("gs://") :].partition("/")
            return {"driver": "gcs", "bucket": bucket, "path": f"{path}/" if path else ""}
        return {"driver": "file", "path": f"{self.url}/"}


def tensorstore_context(concurrent_bytes: int) -> ts.Context:
    """Shared TensorStore resources of one load.

    Args:
        concurrent_bytes: the read budget; small metadata caches come on top of it.
    """
    seconds = no_progress_seconds()
    return ts.Context(
        {
            # Decoded chunks go straight into the destination; caching them would hold them twice.
            "cache_pool": {"total_bytes_limit": 0},
            # OCDBT's B-tree nodes are needed again by every leaf.
            "cache_pool#ocdbt": {"total_bytes_limit": 256 << 20},
            "data_copy_concurrency": {"limit": os.cpu_count() or 1},
            "gcs_request_retries": {
                "max_retries": 8,
                "initial_delay": "250ms",
                "max_delay": f"{max(1.0, seconds / 8):.3f}s",
            },
        }
    )


def storage_error(what: str, error: BaseException) -> StorageError:
    """A `StorageError` that says what failed, why, and what to do, without credentials.

    Args:
        what: "cannot read gs://…".
        error: what the client library raised.
    """
    detail = redact(" ".join(str(error).split())) or type(error).__name__
    low = f"{type(error).__name__} {detail}".lower()
    if "403" in low or "401" in low or "permission" in low or "forbidden" in low or "unauthenticated" in low:
        advice = (
            "Give the account storage.objects.get and storage.objects.list on the bucket: "
            "`gcloud auth application-default login`, a service account on the VM, or "
            "GOOGLE_APPLICATION_CREDENTIALS=key.json."
        )
    elif "timeout" in low or "deadline" in low or "timed out" in low:
        advice = "The storage did not answer in time (VLLM_MAXTEXT_TIMEOUT raises the limit)."
    elif any(code.strip() in low for code in _RETRYABLE_CODES.split(",")) or "refused" in low or "connect" in low:
        advice = "The storage could not be reached after several retries; try again, or check the network."
    else:
        advice = "Check that the path is right and readable from this machine."
    return StorageError(f"{what}: {detail[:600]}. {advice}")
