"""Time limits, and what is never said."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_maxtext_loader import errors
from vllm_maxtext_loader.checkpoint.find import locate
from vllm_maxtext_loader.checkpoint.storage.retry import Failure, http_failure, no_progress_seconds, redact


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
        "https://storage.googleapis.com/upload/storage/v1/b/b/o?name=x&upload_id=SECRET",
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


@pytest.mark.parametrize("name", ["credentials-1", "403", "timeout", "connection"])
def test_advice_is_not_chosen_from_words_of_a_path(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to(tmp_path / name)
    with pytest.raises(errors.StorageError) as raised:
        locate(tmp_path / name / "checkpoints")
    assert "Too many levels of symbolic links" in str(raised.value)
    assert str(raised.value).endswith(Failure.OTHER.value)


@pytest.mark.parametrize(
    ("status", "reason", "failure"),
    [
        (401, "authError", Failure.BUCKET_ACCESS),
        (403, "forbidden", Failure.BUCKET_ACCESS),
        (403, "vpcServiceControls", Failure.PERIMETER),
        (403, "accountDisabled", Failure.BILLING),
        (400, "required", Failure.REQUESTER_PAYS),
        (400, "userProjectInvalid", Failure.REQUESTER_PAYS),
        (400, "kmsKeyDisabled", Failure.KEY),
        (403, "cloudKmsEncryptionKeyPermissionDenied", Failure.KEY),
        (403, "userRateLimitExceeded", Failure.OVERLOADED),
        (400, "invalid", Failure.OTHER),
        (408, "", Failure.OVERLOADED),
        (429, "rateLimitExceeded", Failure.OVERLOADED),
        (503, "backendError", Failure.OVERLOADED),
    ],
)
def test_advice_by_status_and_reason(status: int, reason: str, failure: Failure) -> None:
    assert http_failure(status, reason) is failure
