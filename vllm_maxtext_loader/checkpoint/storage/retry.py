"""How long to wait and how often to try again; what is said about it, without credentials.

One setting bounds everything: VLLM_MAXTEXT_TIMEOUT, the seconds without progress after which a load gives up.
"""

from __future__ import annotations

import dataclasses
import enum
import errno
import logging
import os
import re

from vllm_maxtext_loader.errors import OptionError, StorageError, printable

logger = logging.getLogger("vllm." + __name__)

NO_PROGRESS_SECONDS = 60.0
"""Give up after this long without progress; override with VLLM_MAXTEXT_TIMEOUT (seconds)."""

TIMEOUT_VARIABLE = "VLLM_MAXTEXT_TIMEOUT"

USER_PROJECT_VARIABLE = "GOOGLE_CLOUD_QUOTA_PROJECT"
"""The project that is billed for requests to a requester-pays bucket; google-auth's name for it."""


def no_progress_seconds() -> float:
    """Seconds without any progress after which a read is given up.

    Raises:
        OptionError: VLLM_MAXTEXT_TIMEOUT is not a number of seconds.
    """
    raw = os.environ.get(TIMEOUT_VARIABLE, "")
    if not raw:
        return NO_PROGRESS_SECONDS
    try:
        seconds = float(raw)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e6:
        raise OptionError(f"{TIMEOUT_VARIABLE} must be a number of seconds > 0, found {raw!r}.")
    return seconds


@dataclasses.dataclass(frozen=True)
class Backoff:
    """Pauses between attempts: doubling, then of equal length.

    Attributes:
        initial: first pause in seconds.
        longest: longest pause in seconds.
        retries: attempts after the first.
        total: seconds all attempts may take.
    """

    initial: float
    longest: float
    retries: int
    total: float

    @classmethod
    def within(cls, seconds: float) -> Backoff:
        """Pauses that fill three quarters of a time limit; the rest is for the answers."""
        # In parts of the limit: (1 + 2 + 4 + 8 + 16 + 32) / 240 + 3 / 6 = 0.76.
        return cls(initial=seconds / 240, longest=seconds / 6, retries=9, total=seconds)


class Failure(enum.Enum):
    """Why the storage could not be read; the value is the advice."""

    BUCKET_ACCESS = (
        "Give the account storage.objects.get and storage.objects.list on the bucket: "
        "`gcloud auth application-default login`, a service account on the VM, or "
        "GOOGLE_APPLICATION_CREDENTIALS=key.json."
    )
    BUCKET_WRITE = (
        "Give the account storage.objects.create, storage.objects.delete, storage.objects.get and storage.objects.list "
        "on the bucket (roles/storage.objectUser): `gcloud auth application-default login`, a service account on the "
        "VM (whose access scope must allow writing), or GOOGLE_APPLICATION_CREDENTIALS=key.json."
    )
    FILE_ACCESS = "Make the files, and every directory above them, readable for the user this runs as."
    PERIMETER = (
        "The bucket lies in a VPC Service Controls perimeter: run inside the perimeter, or ask its "
        "administrator. Permissions on the bucket do not help."
    )
    REQUESTER_PAYS = (
        f"The reader of this bucket pays: name a project that is billed ({USER_PROJECT_VARIABLE}=PROJECT; "
        "the account needs serviceusage.services.use on it), or copy the checkpoint into a bucket whose "
        "owner pays (`gcloud storage cp --recursive --billing-project PROJECT`)."
    )
    BILLING = "The bucket's owner must enable the billing account of the bucket's project."
    KEY = (
        "The bucket's owner must enable the Cloud KMS key of the bucket, and grant its use to Cloud Storage."
    )
    OVERLOADED = "The storage failed at every attempt: try again later."
    NO_ANSWER = f"The storage did not answer in time; {TIMEOUT_VARIABLE} (seconds) raises the limit."
    UNREACHABLE = (
        "Every attempt to reach the storage failed, or broke off: check the network, then try again."
    )
    OTHER = "Check that the path is right and readable from this machine."

    @property
    def may_pass(self) -> bool:
        """Whether the failure may be gone at the next attempt."""
        return self in (Failure.OVERLOADED, Failure.NO_ANSWER, Failure.UNREACHABLE)


class RequestError(Exception):
    """One request to Cloud Storage failed.

    Attributes:
        failure: why.
        status: HTTP status, None where there was no answer.
    """

    def __init__(self, message: str, failure: Failure, status: int | None = None) -> None:
        super().__init__(message)
        self.failure = failure
        self.status = status


_REASONS = {
    "vpcServiceControls": Failure.PERIMETER,
    "accountDisabled": Failure.BILLING,
    "userProjectAccountProblem": Failure.BILLING,
    **dict.fromkeys(
        ("userProjectMissing", "userProjectInvalid", "userProjectInconsistent"), Failure.REQUESTER_PAYS
    ),
    # "A required parameter is missing": of a GET, that can only be userProject.
    "required": Failure.REQUESTER_PAYS,
    **dict.fromkeys(("rateLimitExceeded", "userRateLimitExceeded"), Failure.OVERLOADED),
}
"""`errors[0].reason` in Cloud Storage's answers, where that says more than the HTTP status."""


def http_failure(status: int, reason: str = "") -> Failure:
    """Why Cloud Storage refused.

    Args:
        status: HTTP status of its answer.
        reason: `errors[0].reason` of its answer, "" where there is none.
    """
    if status in (400, 403):
        if reason in _REASONS:
            return _REASONS[reason]
        if reason.lower().startswith(("kms", "cloudkms")):
            return Failure.KEY
    if status in (401, 403):
        return Failure.BUCKET_ACCESS
    return Failure.OVERLOADED if status in (408, 429) or status >= 500 else Failure.OTHER


_ERRNO = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), Failure.FILE_ACCESS),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.EREMOTEIO), Failure.OVERLOADED),
    errno.ETIMEDOUT: Failure.NO_ANSWER,
    **dict.fromkeys(
        (errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN),
        Failure.UNREACHABLE,
    ),
}

_TENSORSTORE = {
    "PERMISSION_DENIED": Failure.FILE_ACCESS,
    "UNAUTHENTICATED": Failure.FILE_ACCESS,
    "DEADLINE_EXCEEDED": Failure.NO_ANSWER,
    "UNAVAILABLE": Failure.UNREACHABLE,
    # curl's errors without a status of their own, as a transfer that ends early.
    "UNKNOWN": Failure.UNREACHABLE,
    "INTERNAL": Failure.UNREACHABLE,
    "ABORTED": Failure.UNREACHABLE,
    "CANCELLED": Failure.UNREACHABLE,
    "RESOURCE_EXHAUSTED": Failure.OVERLOADED,
}
"""By the status that begins a message of TensorStore."""

_HTTP_CODE = re.compile(r" \[http_response_code='(\d+)'\]")
_HTTP_REASON = re.compile(r"\\?\"reason\\?\":\s*\\?\"(\w+)")
_HTTP_BODY = re.compile(r" \[http_response_body='((?:[^'\\]|\\.)*)'\]")


def _failure(error: BaseException, *, remote: bool) -> Failure:
    """Why `error` was raised: by its type and status, never by what its message says of paths.

    Args:
        error: of a request to a bucket, the operating system, or TensorStore.
        remote: whether a bucket was read.
    """
    if isinstance(error, RequestError):
        return error.failure
    if isinstance(error, TimeoutError):
        return Failure.NO_ANSWER
    if isinstance(error, OSError):
        return _ERRNO.get(error.errno or 0, Failure.OTHER)
    # TensorStore raises ValueError for everything: "STATUS: words and paths [payload='…'] …".
    text = str(error)
    if codes := _HTTP_CODE.findall(text):
        bodies = _HTTP_BODY.findall(text)
        reason = _HTTP_REASON.search(bodies[-1]) if bodies else None
        return http_failure(int(codes[-1]), reason[1] if reason else "")
    failure = _TENSORSTORE.get(text.partition(":")[0], Failure.OTHER)
    return Failure.BUCKET_ACCESS if remote and failure is Failure.FILE_ACCESS else failure


def to_storage_error(what: str, error: BaseException) -> StorageError:
    """A `StorageError` that says what failed, why, and what to do, without credentials.

    Args:
        what: "cannot read gs://…".
        error: a `RequestError`, or what the operating system or TensorStore raised.
    """
    detail = summarize(str(error)) or type(error).__name__
    # A local path holds no "//", a leaf's name no "/".
    failure = _failure(error, remote="gs://" in what)
    return StorageError(f"{redact(what)}: {detail.rstrip('.')}. {failure.value}")


_SECRETS: tuple[tuple[str, str], ...] = (
    (
        r"(?i)\b(X-Goog-[A-Za-z-]+|Signature|GoogleAccessId|upload_id|[a-z]*_?token|client_secret|(?<=[?&])key)(=|%3D)[^&\s\"']+",
        r"\1\2…",
    ),
    (r"(?i)\"(private_key|client_secret|[a-z]*_?token)\"\s*:\s*\"[^\"]*\"", r'"\1": "…"'),
    (r"(?i)\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]+", r"\1 …"),
    (r"\bya29\.[A-Za-z0-9._-]+", "ya29.…"),
    (r"://[^/\s@]+@", "://…@"),
    (r"(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)", "…"),
)


def redact(text: str) -> str:
    """`text` without signatures of signed URLs, tokens, passwords and keys, for logs and messages."""
    for pattern, replacement in _SECRETS:
        text = re.sub(pattern, replacement, text)
    return text


def retry_warning(where: str, why: str) -> None:
    """Logs that a request failed and is made again.

    Args:
        where: path of the object.
        why: what failed.
    """
    logger.warning("Trying again: %s: %s", printable(redact(where)), summarize(why, 300))


def summarize(text: str, most: int = 600) -> str:
    """What a client library said, on one line, without secrets, source locations and copies of its input."""
    for pattern, replacement in _NOISE:
        text = re.sub(pattern, replacement, text)
    return printable(redact(" ".join(text.split())))[:most]


_NOISE: tuple[tuple[str, str], ...] = (
    (r"(?s) \[source locations=.*", ""),
    (r" \[(?:tensorstore_spec|http_response_body)='(?:[^'\\]|\\.)*'\]", ""),
    (r" \[http_response_code='(\d+)'\]", r" (HTTP \1)"),
)
"""What TensorStore says beyond the reason, and what is left of it."""
