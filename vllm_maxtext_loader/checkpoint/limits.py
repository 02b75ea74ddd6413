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

from vllm_maxtext_loader.errors import OptionError, StorageError

logger = logging.getLogger("vllm." + __name__)

NO_PROGRESS_SECONDS = 60.0
"""Give up after this long without progress; override with VLLM_MAXTEXT_TIMEOUT (seconds)."""

TIMEOUT_VARIABLE = "VLLM_MAXTEXT_TIMEOUT"


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


_SECRETS: tuple[tuple[str, str], ...] = (
    (
        r"(?i)\b(X-Goog-[A-Za-z-]+|Signature|GoogleAccessId|[a-z]*_?token|client_secret|(?<=[?&])key)(=|%3D)[^&\s\"']+",
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
    logger.warning("Trying again: %s: %s", printable(redact(where)), brief(why, 300))


class Fault(enum.Enum):
    """Why a storage did not give what it was asked for; decides what to do about it."""

    PERMISSION = enum.auto()
    SERVER = enum.auto()
    TIMEOUT = enum.auto()
    NETWORK = enum.auto()
    OTHER = enum.auto()


class NoProgressError(TimeoutError):
    """Nothing arrived for the time limit.

    Args:
        message: what was waited for.
        server_failed: whether the server answered with errors meanwhile.
    """

    def __init__(self, message: str, *, server_failed: bool) -> None:
        super().__init__(message)
        self.server_failed = server_failed


def fault_of(error: BaseException) -> Fault:
    """What kind of failure an exception is: by its type, errno, HTTP status or TensorStore status, never by its words.

    Words and digits of a message may be a path's: a step may be named 403, and a run credentials-1.
    """
    if isinstance(error, NoProgressError):
        return Fault.SERVER if error.server_failed else Fault.TIMEOUT
    if (status := _http_status(error)) is not None:
        if status in (401, 403):
            return Fault.PERMISSION
        return Fault.SERVER if status in (408, 429) or status >= 500 else Fault.OTHER
    if isinstance(error, TimeoutError):
        return Fault.TIMEOUT
    module, name = type(error).__module__.partition(".")[0], type(error).__name__
    if module == "google":
        return Fault.NETWORK if name == "TransportError" else Fault.PERMISSION
    if isinstance(error, ConnectionError) or module in ("aiohttp", "requests"):
        return Fault.NETWORK
    if isinstance(error, OSError):
        return Fault.PERMISSION if error.errno in (errno.EACCES, errno.EPERM) else Fault.OTHER
    return _TENSORSTORE_FAULTS.get(_tensorstore_status(error), Fault.OTHER)


_TENSORSTORE_FAULTS = {
    "PERMISSION_DENIED": Fault.PERMISSION,
    "UNAUTHENTICATED": Fault.PERMISSION,
    "DEADLINE_EXCEEDED": Fault.TIMEOUT,
    "UNAVAILABLE": Fault.NETWORK,
    "ABORTED": Fault.NETWORK,
}
"""TensorStore's status, where there is no HTTP status with it."""


def _tensorstore_status(error: BaseException) -> str:
    """The status a TensorStore exception begins with ("NOT_FOUND"); "" where it has none."""
    status, separator, _ = str(error).partition(": ")
    return status if separator and re.fullmatch("[A-Z_]+", status) else ""


def _http_status(error: BaseException) -> int | None:
    """The HTTP status an exception carries, None where it carries none. Written against gcsfs 2026.1.0 retry.py."""
    if (module := type(error).__module__.partition(".")[0]) == "gcsfs":
        code = str(getattr(error, "code", ""))
        return int(code) if code.isdigit() else None
    if module == "requests" and type(error).__name__ == "ProxyError":
        return 502
    # gcsfs's plain OSError stands for 403, and only for that.
    if type(error) is OSError and error.errno is None:
        return 403
    if _tensorstore_status(error):
        codes = re.findall(r" \[http_response_code='(\d+)'\]", str(error))
        return int(codes[-1]) if codes else None
    return None


def reason_of(error: BaseException) -> str:
    """What a client library said, on one line, beginning with the HTTP status if there is one."""
    status, text = _http_status(error), brief(str(error))
    if status is None or _tensorstore_status(error):
        return text or ("timed out" if isinstance(error, TimeoutError) else type(error).__name__)
    # gcsfs repeats the request's address and the status.
    text = re.sub(r"^Forbidden: \S+ ?|, \d{3}$", "", text)
    return f"HTTP {status}: {text}" if text else f"HTTP {status}"


def storage_error(what: str, error: BaseException) -> StorageError:
    """A `StorageError` that says what failed, why, and what to do, without credentials.

    Args:
        what: "cannot read gs://…".
        error: what the client library raised.
    """
    match fault_of(error):
        case Fault.PERMISSION if " gs://" in what:
            advice = (
                "Give the account storage.objects.get and storage.objects.list on the bucket: "
                "`gcloud auth application-default login`, a service account on the VM, or "
                "GOOGLE_APPLICATION_CREDENTIALS=key.json. If the answer names another reason (billing, a service "
                "perimeter), ask the bucket's owner."
            )
        case Fault.PERMISSION:
            advice = "Make the files, and every directory above them, readable for the user this runs as."
        case Fault.SERVER:
            advice = "The storage failed at every attempt: try again later."
        case Fault.TIMEOUT:
            advice = f"The storage did not answer in time; {TIMEOUT_VARIABLE} (seconds) raises the limit."
        case Fault.NETWORK:
            advice = (
                "Every attempt to reach the storage failed, or broke off: check the network, then try again."
            )
        case Fault.OTHER:
            advice = "Check that the path is right and readable from this machine."
    return StorageError(f"{redact(printable(what))}: {reason_of(error).rstrip('.')}. {advice}")


def printable(text: str) -> str:
    """`text` with every character that a terminal would not show as itself escaped: line breaks, ESC, bidi marks."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def brief(text: str, most: int = 600) -> str:
    """What a client library said, on one line, without secrets, source locations and copies of its input."""
    for pattern, replacement in _NOISE:
        text = re.sub(pattern, replacement, text)
    return printable(redact(" ".join(text.split())))[:most]


_NOISE: tuple[tuple[str, str], ...] = (
    (r"(?s) \[source locations=.*", ""),
    (r" \[(?:tensorstore_spec|http_response_body)='(?:[^'\\]|\\.)*'\]", ""),
    (r" \[http_response_code='(\d+)'\]", r" (HTTP \1)"),
    (
        r"HTTPS?ConnectionPool\(host='([^']*)', port=(\d+)\): (?:Max retries exceeded with url: \S+ )?",
        r"\1:\2: ",
    ),
)
"""What TensorStore and the HTTP clients say beyond the reason, and what is left of it."""
