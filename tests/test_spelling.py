"""How a user may spell a path: what is taken, and what is refused with the form that was meant."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tensorstore as ts

from support import gcs
from vllm_maxtext_loader import errors
from vllm_maxtext_loader.checkpoint.find import locate
from vllm_maxtext_loader.checkpoint.storage.path import Location


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("", "path is empty"),
        ("  ", "path is empty"),
        ("gs://", "gs://: names no bucket"),
        ("gs:///", "gs:///: names no bucket"),
        ("s3://bucket/run", "scheme s3:// is not supported"),
        ("gs://me:secret@bucket/run", "is not a valid bucket name"),
        ("a\0b", "is no path"),
        (b"/tmp/\xff\xfe", "is no path"),
        (
            "https://user:secret@host/x?X-Goog-Signature=abc&X-Goog-Credential=me&z=abc",
            "scheme https:// is not supported",
        ),
    ],
)
def test_what_is_no_path(path: str | bytes, says: str) -> None:
    with pytest.raises(errors.CheckpointNotFoundError, match=says) as raised:
        locate(path)  # type: ignore[arg-type]
    assert "secret" not in str(raised.value)
    assert "abc" not in str(raised.value)


BUCKET_NAMES = {
    "b": False,
    "abc": True,
    "UPPER": False,
    "a..b": False,
    "a.b-c_d": True,
    "a.-b": False,
    "a-.b": False,
    "-abc": False,
    "abc-": False,
    "abc_": False,
    "a._b": True,
    "a b": False,
    "a:b": False,
    "b\u00fccher": False,
    "a" * 63: True,
    "a" * 64: False,
    f"{'a' * 63}.{'b' * 63}": True,
    f"{'a' * 60}." * 3 + "b" * 39: True,
    f"{'a' * 60}." * 3 + "b" * 40: False,
}


@pytest.mark.parametrize("name", list(BUCKET_NAMES))
def test_bucket_names_that_tensorstore_refuses(name: str) -> None:
    valid = True
    try:
        ts.KvStore.Spec({"driver": "gcs", "bucket": name, "path": "x/"})
    except ValueError:
        valid = False
    assert valid == BUCKET_NAMES[name], "the table is TensorStore's"
    if valid:
        assert Location.parse(f"gs://{name}/run").url == f"gs://{name}/run"
        return
    with pytest.raises(
        errors.CheckpointNotFoundError, match=r"is not a valid bucket name\. Bucket names must"
    ):
        Location.parse(f"gs://{name}/run")


@pytest.mark.parametrize("path", ["run\x1b", "a\nb", "a\x7fb", "a" * 1025, "\u00fc" * 600])
def test_object_names_that_tensorstore_refuses(path: str) -> None:
    with pytest.raises(ValueError, match="Invalid GCS path"):
        ts.KvStore.Spec({"driver": "gcs", "bucket": "abc", "path": path})
    with pytest.raises(errors.CheckpointNotFoundError, match="is not a valid object name") as raised:
        Location.parse(f"gs://abc/{path}")
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("file:///x/run", "/x/run"),
        ("file://localhost/x/run", "/x/run"),
        ("FILE://LOCALHOST/x/run/", "/x/run"),
        ("file:///", "/"),
        ("GS://bucket/Run", "gs://bucket/Run"),
        ("gs://bucket", "gs://bucket"),
        ("gs://bucket/a/../b/", "gs://bucket/a/../b"),
        ("gs://bucket/run?x=1#2", "gs://bucket/run?x=1#2"),
    ],
)
def test_forms_of_a_url(text: str, url: str) -> None:
    assert Location.parse(text).url == url


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("gs:/bucket/run", "gs://bucket/run"),
        (Path("gs://bucket/run"), "gs://bucket/run"),
        ("gs:bucket/run", "gs://bucket/run"),
        ("file:/x/run", "file:///x/run"),
    ],
)
def test_lost_slash(text: str | Path, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(errors.CheckpointNotFoundError, match=rf"Did you mean {meant}\?"):
        locate(text)
    monkeypatch.chdir(tmp_path)
    (tmp_path / text).mkdir(parents=True, exist_ok=True)
    if not os.path.isabs(text):
        assert Location.parse(text).url == str(tmp_path / text)


@pytest.mark.parametrize("text", ["file://otherhost/x", "file://me:secret@otherhost/x", "file://x"])
def test_file_of_another_host(text: str) -> None:
    with pytest.raises(errors.CheckpointNotFoundError, match="only files of this machine") as raised:
        Location.parse(text)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("address", "meant"),
    [
        ("https://storage.googleapis.com/bucket/run/30", "gs://bucket/run/30"),
        ("http://storage.googleapis.com/bucket/run%20a/", "gs://bucket/run a"),
        ("storage.googleapis.com/bucket/run", "gs://bucket/run"),
        ("https://bucket.storage.googleapis.com/run/30", "gs://bucket/run/30"),
        ("https://a.b.c.storage.googleapis.com/run", "gs://a.b.c/run"),
        ("https://storage.cloud.google.com/bucket/run?authuser=1", "gs://bucket/run"),
        ("https://storage.googleapis.com/storage/v1/b/bucket/o/run%2F30?alt=media", "gs://bucket/run/30"),
        ("https://www.googleapis.com/download/storage/v1/b/bucket/o/run%2F30", "gs://bucket/run/30"),
        ("https://console.cloud.google.com/storage/browser/bucket/run/30", "gs://bucket/run/30"),
        (
            "https://console.cloud.google.com/storage/browser/bucket/run;tab=objects?project=p&prefix=&forceOnObjects=x",
            "gs://bucket/run",
        ),
        (
            "https://console.cloud.google.com/storage/browser/_details/bucket/run/x;tab=live_object",
            "gs://bucket/run/x",
        ),
        ("https://console.cloud.google.com/storage/browser/bucket;tab=objects#x", "gs://bucket"),
        ("https://console.cloud.google.com/welcome?project=p", "gs://BUCKET/path"),
        ("https://me:secret@storage.googleapis.com/bucket/run", "gs://bucket/run"),
    ],
)
def test_web_address_is_refused_with_its_gs_form(address: str, meant: str) -> None:
    signature = "X-Goog-Signature=SIGNATURE&X-Goog-Credential=SIGNATURE&Expires=1&x=SIGNATURE"
    for pasted in (address, f"{address}{'&' if '?' in address else '?'}{signature}"):
        with pytest.raises(errors.CheckpointNotFoundError) as raised:
            locate(pasted)
        message = str(raised.value)
        assert message.endswith(f"is a web address; give the path in the bucket: {meant}")
        assert "SIGNATURE" not in message
        assert "secret" not in message
        assert "?" not in message


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("/home/me/gs:/bucket/run/checkpoints", "gs://bucket/run/checkpoints"),
        ("runs/gs:/bucket/run", "gs://bucket/run"),
        ("/home/me/gs://bucket/run", "gs://bucket/run"),
        ("gs:////bucket/run", None),
        ("gs//bucket/run", "gs://bucket/run"),
        ("gs;//bucket/run", "gs://bucket/run"),
        ("GS:/bucket/run", "gs://bucket/run"),
        (r"gs:\bucket\run\checkpoints", "gs://bucket/run/checkpoints"),
        (r"C:\work\gs:\bucket\run", "gs://bucket/run"),
        ("://bucket/run", "gs://bucket/run"),
        ("//bucket/run", "gs://bucket/run"),
        ("/gcs/bucket/run", "gs://bucket/run"),
        ('"gs://bucket/run"', "gs://bucket/run"),
        ("'gs://bucket/run", "gs://bucket/run"),
        ("`gs://bucket/run`", "gs://bucket/run"),
        ("\u201cgs://bucket/run\u201d", "gs://bucket/run"),
        ("<gs://bucket/run>", "gs://bucket/run"),
        ("[run](gs://bucket/run)", "gs://bucket/run"),
        ("\u200bgs://bucket/run", "gs://bucket/run"),
        ("--model=gs://bucket/run", "gs://bucket/run"),
        ("model: gs://bucket/run", "gs://bucket/run"),
        ("gs%3A%2F%2Fbucket%2Frun%20a", "gs://bucket/run a"),
        ("gs://gs://bucket/run", "gs://bucket/run"),
        ("gs://bucket%2Frun", "gs://bucket/run"),
        (r"gs://bucket\run", "gs://bucket/run"),
        ("file:/x/run", "file:///x/run"),
        ("gs://'bucket/run'", "gs://bucket/run"),
    ],
)
def test_spelling_of_a_bucket_path(
    text: str, meant: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if meant is None:
        assert Location.parse(text).url == "gs://bucket/run"
        return
    with pytest.raises(errors.CheckpointNotFoundError) as raised:
        locate(text)
    assert f"Did you mean {meant}?" in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "https:/storage.googleapis.com/bucket/run",
        "/home/me/https:/storage.googleapis.com/bucket/run",
        '"https://storage.googleapis.com/bucket/run?x=SIGNATURE"',
        "<https://storage.cloud.google.com/bucket/run>",
        "https%3A%2F%2Fstorage.googleapis.com%2Fbucket%2Frun",
        "gs://storage.googleapis.com/bucket/run",
        "https://storage-download.googleapis.com/bucket/run?x=SIGNATURE",
    ],
)
def test_spelling_of_a_web_address(text: str) -> None:
    with pytest.raises(errors.CheckpointNotFoundError, match=r"in the bucket: gs://bucket/run$") as raised:
        locate(text)
    assert "SIGNATURE" not in str(raised.value)


def test_quotes_around_a_path_of_the_disk(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(errors.CheckpointNotFoundError, match=rf"Did you mean {tmp_path}/run\?"):
        locate(f'"{tmp_path}/run"')
    for name in ('"run"', "gs:", "a?b", "run,"):
        (tmp_path / name).mkdir()
        assert Location.parse(str(tmp_path / name)).url == str(tmp_path / name)
    assert Location.parse(f" {tmp_path}/run\n").url == f"{tmp_path}/run"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("some-bucket/run/checkpoints", "If it is in a bucket, give gs://some-bucket/run/checkpoints."),
        ("/some-bucket/run/checkpoints", "If it is in a bucket, give gs://some-bucket/run/checkpoints."),
        ("present/run/checkpoints", None),
        ("/usr/no-such-run", None),
        ("/present/my%20run", "Did you mean /present/my run?"),
        ("/present/run,", "Did you mean /present/run?"),
        ("/present/$RUN/checkpoints", "Is a variable in it that was not expanded?"),
        ("present/run/*", "Give a directory, not a pattern: present/run"),
        ("/present/ru\u200bn", "characters that cannot be seen"),
    ],
)
def test_hint_for_a_path_that_leads_nowhere(
    text: str, hint: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "present").mkdir()
    with pytest.raises(errors.CheckpointNotFoundError, match="no such checkpoint directory") as raised:
        locate(text)
    message = str(raised.value)
    if hint is None:
        assert "bucket" not in message
        assert "Did you mean" not in message
    else:
        assert message.endswith(hint) or hint in message.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("my%20run", "Did you mean gs://{}/my run?"),
        ('run"', "Did you mean gs://{}/run?"),
        ("*", "Give a directory, not a pattern: gs://{}"),
        ("run?authuser=1", "Did you mean gs://{}/run?"),
        ("$RUN", "Is a variable in it that was not expanded?"),
    ],
)
def test_hint_for_a_bucket_path_that_leads_nowhere(name: str, hint: str) -> None:
    with gcs.environment(gcs.shared()[1].url), pytest.raises(errors.CheckpointNotFoundError) as raised:
        locate(f"gs://{gcs.BUCKET}/{name}")
    assert str(raised.value).endswith(hint.format(gcs.BUCKET))


def test_other_storage() -> None:
    with pytest.raises(
        errors.CheckpointNotFoundError,
        match=r"the scheme s3:// is not supported\. .*`gcloud storage cp --recursive s3://bucket/run gs://BUCKET/path`",
    ):
        locate("s3://bucket/run")
    with pytest.raises(errors.CheckpointNotFoundError, match="the scheme hdfs:// is not supported") as raised:
        locate("hdfs://bucket/run")
    assert "gcloud" not in str(raised.value)
