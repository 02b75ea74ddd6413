"""How long to wait and how often to try again; what is said about it, without credentials.

One setting bounds everything: VLLM_MAXTEXT_TIMEOUT, the seconds without progress after which a load gives up.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re

from vllm_maxtext_loader.errors import StorageError

logger = logging.getLogger("vllm." + __name__)

NO_PROGRESS_SECONDS = 60.0
"""Give up after this long without progress; override with VLLM_MAXTEXT_TIMEOUT (seconds)."""

TIMEOUT_VARIABLE = "VLLM_MAXTEXT_TIMEOUT"


def no_progress_seconds() -> float:
    """Seconds without any progress after which a read is given up.

    Raises:
        StorageError: VLLM_MAXTEXT_TIMEOUT is not a number of seconds.
    """
    raw = os.environ.get(TIMEOUT_VARIABLE, "")
    if not raw:
        return NO_PROGRESS_SECONDS
    try:
        seconds = float(raw)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e6:
        raise StorageError(f"{TIMEOUT_VARIABLE} must be a number of seconds > 0, found {raw!r}.")
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
    logger.warning("Trying again: %s: %s", redact(where), brief(why, 300))


def storage_error(what: str, error: BaseException) -> StorageError:
    """A `StorageError` that says what failed, why, and what to do, without credentials.

    Args:
        what: "cannot read gs://…".
        error: what the client library raised.
    """
    detail = brief(str(error)) or type(error).__name__
    kind = f"{type(error).__name__} {detail}".lower()
    codes = set(re.findall(r"(?<![\w.])[45]\d\d(?!\w)", kind))
    if codes & {"401", "403"} or any(
        word in kind for word in ("permission", "forbidden", "unauthenticated", "credentials", "refresherror")
    ):
        advice = (
            "Give the account storage.objects.get and storage.objects.list on the bucket: "
            "`gcloud auth application-default login`, a service account on the VM, or "
            "GOOGLE_APPLICATION_CREDENTIALS=key.json."
            if "gs://" in what
            else "Make the files, and every directory above them, readable for the user this runs as."
        )
    elif codes & {"408", "429", "500", "502", "503", "504"}:
        advice = "The storage failed at every attempt: try again later."
    elif any(word in kind for word in ("timeout", "deadline", "timed out")):
        advice = f"The storage did not answer in time; {TIMEOUT_VARIABLE} (seconds) raises the limit."
    elif any(word in kind for word in ("refused", "resolve", "unreachable", "connection", "curl")):
        advice = "Every attempt to reach the storage failed, or broke off: check the network, then try again."
    else:
        advice = "Check that the path is right and readable from this machine."
    return StorageError(f"{redact(what)}: {detail.rstrip('.')}. {advice}")


def brief(text: str, most: int = 600) -> str:
    """What a client library said, on one line, without secrets, source locations and copies of its input."""
    for pattern, replacement in _NOISE:
        text = re.sub(pattern, replacement, text)
    return redact(" ".join(text.split()))[:most]


_NOISE: tuple[tuple[str, str], ...] = (
    (r"(?s) \[source locations=.*", ""),
    (r" \[(?:tensorstore_spec|http_response_body)='(?:[^'\\]|\\.)*'\]", ""),
    (r" \[http_response_code='(\d+)'\]", r" (HTTP \1)"),
    (r"(?s): \('Request failed with status code'.*", ""),
    (r"\b(\d{3}) (?:GET|HEAD) https?://\S+: ", r"HTTP \1: "),
    (
        r"HTTPS?ConnectionPool\(host='([^']*)', port=(\d+)\): (?:Max retries exceeded with url: \S+ )?",
        r"\1:\2: ",
    ),
)
"""What TensorStore, google-cloud-storage and requests say beyond the reason, and what is left of it."""
