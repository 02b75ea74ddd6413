"""Time limits, and what is never said."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from gcsfs.retry import HttpError
from google.auth.exceptions import DefaultCredentialsError, TransportError

from vllm_maxtext_loader import errors
from vllm_maxtext_loader.checkpoint.limits import NoProgressError, no_progress_seconds, redact, storage_error
from vllm_maxtext_loader.checkpoint.location import locate


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf"])
def test_time_limit_must_be_a_number(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("VLLM_MAXTEXT_TIMEOUT", value)
    with pytest.raises(
        errors.OptionError, match=f"VLLM_MAXTEXT_TIMEOUT must be a number of seconds > 0, found '{value}'"
    ):
        no_progress_seconds()


@pytest.mark.parametrize(
    "text",
    [
        "https://storage.googleapis.com/b/o?X-Goog-Signature=SECRET&X-Goog-Credential=SECRET%2F2026",
        "https://storage.googleapis.com/b/o?GoogleAccessId=SECRET&Expires=1&Signature=SECRET",
        "https://storage.googleapis.com/storage/v1/b?alt=json&key=SECRET",
        "grant_type=x&refresh_token=SECRET&client_secret=SECRET",
        "Authorization: Bearer SECRET.x-y_z",
        "token ya29.SECRET_abc-def",
        '{"refresh_token": "SECRET", "client_secret": "SECRET"}',
        "https://me:SECRET@proxy:3128/",
        "-----BEGIN PRIVATE KEY-----\nSECRET\n-----END PRIVATE KEY-----",
    ],
)
def test_credentials_are_left_out(text: str) -> None:
    assert "SECRET" not in redact(text)


@pytest.mark.parametrize(
    "text",
    ["leaf self_attention.key: 3 requests failed", "token_embedder.embedding", "gs://bucket/key=1/items"],
)
def test_names_of_leaves_are_no_credentials(text: str) -> None:
    assert redact(text) == text


def test_credentials_file_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    with pytest.raises(errors.StorageError) as raised:
        locate("gs://some-bucket/run")
    for part in ("cannot list gs://some-bucket/run", "key.json", "gcloud auth"):
        assert part in str(raised.value)


PERMISSION, SERVER, TIMEOUT, NETWORK = (
    "storage.objects.get",
    "try again later",
    "did not answer in time",
    "check the network",
)
OTHER = "Check that the path is right"


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (HttpError({"code": 401, "message": "no"}), PERMISSION),
        (HttpError({"code": "503", "message": "no"}), SERVER),
        (HttpError({"code": 429, "message": "credentials forbidden 403"}), SERVER),
        (HttpError({"code": 400, "message": "permission 503"}), OTHER),
        (OSError("Forbidden: https://host/o\nno"), PERMISSION),
        (PermissionError(13, "denied", "/a/503"), PERMISSION),
        (ConnectionRefusedError(111, "no"), NETWORK),
        (TimeoutError(), TIMEOUT),
        (OSError(5, "Input/output error", "/runs/403/credentials-1"), OTHER),
        (ValueError("PERMISSION_DENIED: Error reading gs://b/500/x [http_response_code='403']"), PERMISSION),
        (ValueError("UNAVAILABLE: Error reading gs://b/403/x [http_response_code='503']"), SERVER),
        (ValueError("UNAVAILABLE: CURL error reading gs://credentials-1/403"), NETWORK),
        (ValueError("DEADLINE_EXCEEDED: gs://forbidden/401"), TIMEOUT),
        (ValueError("INTERNAL: gs://permission/timeout/503"), OTHER),
        (DefaultCredentialsError("File key.json was not found."), PERMISSION),
        (TransportError("HTTPSConnectionPool: refused"), NETWORK),
        (NoProgressError("timed out", server_failed=True), SERVER),
        (NoProgressError("timed out", server_failed=False), TIMEOUT),
    ],
)
def test_advice_is_chosen_by_status_not_by_words(error: Exception, advice: str) -> None:
    """A step may be named 403 or 500, and a run credentials-1."""
    for path in ("gs://credentials-1/403", "gs://timeout/forbidden/503/500"):
        message = str(storage_error(f"cannot read {path}", error))
        assert advice in message
        assert sum(other in message for other in (PERMISSION, SERVER, TIMEOUT, NETWORK, OTHER)) == 1


def test_kinds_of_errors() -> None:
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.MaxTextLoadError)
    ]
    assert len(kinds) > 15
    for kind in kinds:
        if kind is not errors.MaxTextLoadError:
            assert issubclass(kind, OSError) != issubclass(kind, ValueError), kind
        copy = pickle.loads(pickle.dumps(kind("said")))
        assert (type(copy), str(copy)) == (kind, "said")
    assert issubclass(errors.StorageError, OSError)
    assert issubclass(errors.ReadError, OSError)
    assert issubclass(errors.OptionError, ValueError)
