"""What goes wrong between here and the array data: recovered with a word, or one clear error within the
limit.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from support import gcs
from support.checkpoints import FIXTURES, read_orbax
from support.damage import biggest, cut, flip, regions, unprivileged, without_database
from vllm_maxtext_loader import errors, open_checkpoint

LIMIT = 2.0
"""Seconds without progress after which these tests let a load give up."""

SLACK = 4.0
"""Seconds a busy machine may add."""

NODE = r"read .*/items/(ocdbt.process_0/)?d/"


class Remote:
    """A run in the bucket, below a prefix of its own: requests of earlier tests may be on their way."""

    def __init__(self, prefix: str) -> None:
        self.server, self.proxy = gcs.shared()
        self.prefix = prefix
        self.url = f"gs://{gcs.BUCKET}/{prefix}"

    def upload(self, run: Path) -> Remote:
        self.server.upload(run, gcs.BUCKET, f"{self.prefix}/")
        self.proxy.clear()
        return self

    def fault(self, match: str, **what: object) -> None:
        kind, _, rest = match.partition(" ")
        self.proxy.faults.append(gcs.Fault(f"{kind} .*{self.prefix}{rest}", **what))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def _environment() -> Iterator[None]:
    with gcs.environment(gcs.shared()[1].url, VLLM_MAXTEXT_TIMEOUT=str(LIMIT)):
        yield


@pytest.fixture
def remote(_environment: None, tmp_path: Path) -> Iterator[Remote]:
    found = Remote(tmp_path.name)
    yield found.upload(FIXTURES / "moe_v2/checkpoints")
    found.proxy.clear()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Our log, also where vLLM has taken its loggers out of the root's hands."""
    ours = logging.getLogger("vllm.vllm_maxtext_loader")
    ours.addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING, ours.name):
        yield caplog
    ours.removeHandler(caplog.handler)


def load(url: str | Path) -> int:
    return len(regions(open_checkpoint(url)))


def refused(what: Callable[[], object], kind: type[Exception], *says: str) -> str:
    """Asserts that `what` ends in this very error, within the limit, and that its message says all of it."""
    started = time.monotonic()
    with pytest.raises(errors.MaxTextLoadError) as raised:
        what()
    assert time.monotonic() - started < LIMIT + SLACK
    assert type(raised.value) is kind, repr(raised.value)
    message = str(raised.value)
    for part in says:
        assert re.search(part, message), f"{part!r} is not in {message}"
    assert len(message) < 1200
    assert "\n" not in message
    return message


RECOVERS: dict[str, tuple[str, dict[str, object], str]] = {
    "503 when listing": ("list /", {"status": 503, "times": 3}, r"{url}: cannot list: HTTP 503"),
    "429 when looking up": (
        "stat /0/items/_METADATA",
        {"status": 429, "times": 2},
        r"/0/items/_METADATA: cannot look up",
    ),
    "hang when listing": ("list /", {"hang": 60, "times": 1}, r"{url}: cannot list: .*timed out"),
    "cut metadata": (
        "read /0/items/_METADATA",
        {"cut": 100, "times": 1},
        r"_METADATA: cannot read: .*Incomplete",
    ),
    "damaged metadata": (
        "read /0/items/_METADATA",
        {"flip": True, "times": 2},
        r"_METADATA: cannot read: the content was damaged on the way: CRC-32C",
    ),
    "500 for the manifest": (
        "read .*manifest",
        {"status": 500, "times": 3},
        r"/0/items.*failed \(HTTP 500\)",
    ),
    "503 burst for arrays": ("read .*process_0/d/", {"status": 503, "times": 20}, r"/0/items.*\(HTTP 503\)"),
    "cut arrays": (
        "read .*process_0/d/",
        {"cut": 50, "times": 10},
        r"/0/items.*\(connection broken or stalled\)",
    ),
    "array request hangs": ("read .*process_0/d/", {"hang": 60, "times": 1}, r"/0/items.*1 request failed"),
}


@pytest.mark.parametrize("name", list(RECOVERS))
def test_passing_trouble_is_outlived_and_told(
    remote: Remote, log: pytest.LogCaptureFixture, name: str
) -> None:
    match, what, says = RECOVERS[name]
    remote.fault(match, **what)
    assert load(remote.url) > 40
    warnings = [record.getMessage() for record in log.records if record.levelno == logging.WARNING]
    pattern = says.format(url=re.escape(remote.url))
    assert any(re.search(f"Trying again: .*{pattern}", warning) for warning in warnings), warnings


# Where requests fail until TensorStore gives up on one, that and our own limit race on a busy machine.
STAYS: dict[str, tuple[str, dict[str, object], tuple[str, ...]]] = {
    "403 when listing": ("list /", {"status": 403}, ("cannot list {url}: HTTP 403", "storage.objects.list")),
    "403 for metadata": (
        "read .*_METADATA",
        {"status": 403},
        ("cannot read {url}/0/_CHECKPOINT_METADATA", "403"),
    ),
    "403 for arrays": (
        "read .*/d/",
        {"status": 403},
        ("cannot open leaf .* of {url}/0/items", "gcloud auth"),
    ),
    "401": ("list /", {"status": 401}, ("cannot list {url}", "GOOGLE_APPLICATION_CREDENTIALS")),
    "503 for ever when listing": (
        "list /",
        {"status": 503},
        ("cannot list {url}: HTTP 503", "try again later"),
    ),
    "503 for ever for arrays": (
        "read .*process_0/d/",
        {"status": 503},
        ("cannot read leaf params", "{url}/0/items", "HTTP 503", "try again later"),
    ),
    "metadata always damaged": (
        "read /0/_CHECKPOINT_METADATA",
        {"flip": True},
        ("cannot read {url}/0/_CHECKPOINT_METADATA: the content was damaged on the way", "try again later"),
    ),
    "hang when listing": ("list /", {"hang": 60}, ("cannot list {url}", "timed out", "VLLM_MAXTEXT_TIMEOUT")),
    "manifest hangs": (
        "read .*manifest",
        {"hang": 60},
        ("cannot open leaf", "nothing arrived for 2 s", "_TIMEOUT"),
    ),
    "arrays hang": (
        "read .*process_0/d/",
        {"hang": 60},
        (
            "cannot read leaf params.* of {url}/0/items: timed out: nothing arrived for 2 s",
            "VLLM_MAXTEXT_TIMEOUT",
        ),
    ),
    "always cut": (
        "read .*process_0/d/",
        {"cut": 50},
        ("cannot read leaf params", "partial file|broken", "check the network|_TIMEOUT"),
    ),
    "always broken": (
        "read .*process_0/d/",
        {"hang": 0},
        ("cannot read leaf params", "check the network|_TIMEOUT"),
    ),
}


@pytest.mark.parametrize("name", list(STAYS))
def test_lasting_trouble_ends_in_one_error_in_time(remote: Remote, name: str) -> None:
    match, what, says = STAYS[name]
    remote.fault(match, **what)
    refused(
        lambda: load(remote.url),
        errors.StorageError,
        *(part.format(url=re.escape(remote.url)) for part in says),
    )


@pytest.mark.parametrize(("status", "times"), [(403, 1), (503, 3)])
def test_every_request_that_failed_is_logged(
    remote: Remote, log: pytest.LogCaptureFixture, status: int, times: int
) -> None:
    """The client repeats nothing by itself."""
    remote.fault("list /", status=status, times=times)
    if status == 403:
        refused(lambda: load(remote.url), errors.StorageError, "HTTP 403")
    else:
        load(remote.url)
    failed = [request for request in remote.proxy.requests if request.status == status]
    assert len(failed) == times
    # The root's handler may have seen a record as well.
    again = {id(record) for record in log.records if "Trying again" in record.getMessage()}
    assert len(again) == (times if status == 503 else 0)


ADVICE: dict[str, tuple[str, dict[str, object], str]] = {
    "listing fails": ("list .*", {"status": 503}, "try again later"),
    "listing hangs": ("list .*", {"hang": 60}, "VLLM_MAXTEXT_TIMEOUT"),
    "listing breaks off": ("list .*", {"hang": 0}, "check the network"),
    "a bad request": ("list .*", {"status": 400}, "Check that the path is right"),
    "manifest fails": ("read .*manifest", {"status": 503}, "try again later"),
    "manifest hangs": ("read .*manifest", {"hang": 60}, "VLLM_MAXTEXT_TIMEOUT"),
    "manifest is a bad request": ("read .*manifest", {"status": 405}, "Check that the path is right"),
    "manifest is refused": ("read .*manifest", {"status": 403}, "gcloud auth"),
}


@pytest.mark.parametrize("step", ["403", "500"])
@pytest.mark.parametrize("name", list(ADVICE))
def test_advice_follows_the_status_not_the_path(remote: Remote, tmp_path: Path, name: str, step: str) -> None:
    match, what, advice = ADVICE[name]
    shutil.copytree(FIXTURES / "moe_v2/checkpoints/0", tmp_path / "run" / step)
    parts = "credentials-1/permission timed out 401 unauthenticated"
    remote.prefix, remote.url = f"{remote.prefix}/{parts}", f"{remote.url}/{parts}"
    remote.upload(tmp_path / "run").fault(match, **what)
    message = refused(lambda: load(remote.url), errors.StorageError, re.escape(remote.url), advice)
    others = {"try again later", "_TIMEOUT", "check the network", "Check that the path", "gcloud auth"}
    assert [other for other in others if other in message] == [
        other for other in others if other in advice
    ], message


REASONS = {
    "requester pays": (
        400,
        "required",
        "Bucket is a requester pays bucket but no user project provided.",
        "copy the checkpoint",
    ),
    "service perimeter": (
        403,
        "vpcServiceControls",
        "Request is prohibited by organization's policy.",
        "run inside the perimeter",
    ),
    "closed billing": (
        403,
        "accountDisabled",
        "The billing account for the owning project is disabled in state absent",
        "enable the billing account",
    ),
    "disabled key": (
        400,
        "kmsKeyDisabled",
        "Cloud KMS key is disabled: projects/p",
        "enable the Cloud KMS key",
    ),
}


@pytest.mark.parametrize("match", ["list /", "read .*manifest"])
@pytest.mark.parametrize("name", list(REASONS))
def test_advice_follows_the_reason_that_cloud_storage_gives(remote: Remote, name: str, match: str) -> None:
    status, reason, sentence, advice = REASONS[name]
    entry = {"message": sentence, "domain": "global", "reason": reason}
    body = json.dumps({"error": {"code": status, "message": sentence, "errors": [entry]}})
    remote.fault(match, status=status, body=body)
    message = refused(lambda: load(remote.url), errors.StorageError, advice)
    assert "gcloud auth" not in message
    if match == "list /":
        assert f"HTTP {status}: {sentence.rstrip('.')}. " in message


@pytest.fixture(scope="module")
def unmerged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose writer ended before Orbax merged the databases of its processes."""
    import jax
    import orbax.checkpoint as ocp
    from etils import epath

    run = tmp_path_factory.mktemp("unmerged")
    shutil.copytree(FIXTURES / "moe_v2/checkpoints/0", run / "0")
    shutil.rmtree(run / "0/items")
    tree = jax.tree.map(np.asarray, read_orbax(FIXTURES / "moe_v2/checkpoints/0/items"))
    handler = ocp.PyTreeCheckpointHandler()
    items = epath.Path(run / "0/items")
    items.mkdir()

    async def save() -> None:
        for future in await handler.async_save(items, args=ocp.args.PyTreeSave(tree)) or []:
            future.result()

    asyncio.run(save())
    (run / "0/items/commit_success.txt").touch()
    return run


def test_database_that_was_never_merged(
    remote: Remote, unmerged: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    import orbax.checkpoint as ocp
    from etils import epath

    run = shutil.copytree(unmerged, tmp_path / "run")
    expected = load(FIXTURES / "moe_v2/checkpoints")
    remote.prefix, remote.url = f"{remote.prefix}-unmerged", f"{remote.url}-unmerged"
    remote.upload(run)
    for where in (str(run), remote.url):
        log.clear()
        assert load(where) == expected
        (warning,) = {text for text in log.messages if "manifest.ocdbt" in text}
        assert f"{where}/0/items: manifest.ocdbt does not exist; reading ocdbt.process_0" in warning
        assert "PyTreeCheckpointHandler().finalize" in warning
    # The advice helps.
    ocp.PyTreeCheckpointHandler().finalize(epath.Path(run / "0/items"))
    log.clear()
    assert load(run) == expected
    assert not [text for text in log.messages if "manifest.ocdbt" in text]


def test_refused_connection(remote: Remote) -> None:
    checkpoint = open_checkpoint(remote.url)
    remote.proxy.refuse()
    try:
        network = ("[Cc]onnection refused|Could ?n.t connect|broken", "check the network|_TIMEOUT")
        refused(
            lambda: open_checkpoint(remote.url), errors.StorageError, f"cannot list {remote.url}", *network
        )
        refused(lambda: regions(checkpoint), errors.StorageError, "cannot read leaf params", *network)
    finally:
        remote.proxy.listen()
    assert load(remote.url) > 40


def test_missing_bucket_and_missing_object(remote: Remote) -> None:
    kind = errors.CheckpointNotFoundError
    refused(
        lambda: load("gs://missing-bucket/run"),
        kind,
        "gs://missing-bucket/run: there is no bucket missing-bucket",
    )
    refused(lambda: load(f"{remote.url}/nope"), kind, f"{remote.url}/nope: no such .* {remote.url} holds: 0")


def node(items: Path) -> Path:
    """The data file that holds the root of the database's B-tree."""
    return next((items / "d").iterdir())


NORM = "params.params.decoder.decoder_norm.scale"
AGAIN = "copy it again, or choose another step"
CORRUPT, READ = errors.CorruptMetadataError, errors.ReadError

DAMAGE: dict[str, tuple[bool, Callable[[Path], object], type[Exception], tuple[str, ...]]] = {
    "missing data": (False, lambda items: biggest(items).unlink(), READ, ("cannot read leaf params", AGAIN)),
    "truncated data": (
        False,
        lambda items: cut(biggest(items), 40),
        READ,
        ("cannot read leaf params", AGAIN),
    ),
    "empty data": (False, lambda items: cut(biggest(items), 0), READ, ("cannot read leaf params", AGAIN)),
    "missing manifest": (
        False,
        lambda items: [path.unlink() for path in items.rglob("manifest.ocdbt")],
        CORRUPT,
        ("does not exist", AGAIN),
    ),
    "truncated manifest": (
        False,
        lambda items: cut(items / "manifest.ocdbt", 20),
        CORRUPT,
        ("manifest.ocdbt", AGAIN),
    ),
    "corrupt manifest": (
        False,
        lambda items: flip(items / "manifest.ocdbt", 40),
        CORRUPT,
        ("manifest.ocdbt", AGAIN),
    ),
    "missing node": (False, lambda items: node(items).unlink(), CORRUPT, ("cannot open leaf", "/d/", AGAIN)),
    "corrupt node": (False, lambda items: flip(node(items), 500), CORRUPT, ("b-tree node", AGAIN)),
    "truncated node": (False, lambda items: cut(node(items), 500), CORRUPT, ("byte range", AGAIN)),
    "missing chunk": (
        True,
        lambda items: shutil.rmtree(items / NORM / "c"),
        READ,
        (f"leaf {NORM} of", "is missing|size of 0"),
    ),
    "truncated chunk": (
        True,
        lambda items: cut(biggest(items), 99),
        READ,
        ("cannot read leaf params", AGAIN),
    ),
    "missing leaf": (
        True,
        lambda items: shutil.rmtree(items / NORM),
        CORRUPT,
        (f"leaf {NORM} of", "does not exist"),
    ),
    "damaged leaf metadata": (
        True,
        lambda items: cut(items / NORM / "zarr.json", 30),
        CORRUPT,
        (NORM, "Invalid JSON"),
    ),
    "leaf metadata of another kind": (
        True,
        lambda items: (items / NORM / "zarr.json").write_text('{"zarr_format": 2}'),
        CORRUPT,
        (NORM, AGAIN),
    ),
    "truncated tree": (
        False,
        lambda items: cut(items / "_METADATA", 300),
        CORRUPT,
        ("_METADATA: is damaged", "opy the"),
    ),
}


@pytest.fixture(scope="module")
def in_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return without_database(FIXTURES / "moe_v2/checkpoints", tmp_path_factory.mktemp("in_files") / "run")


@pytest.mark.parametrize("name", list(DAMAGE))
def test_damaged_checkpoint(remote: Remote, in_files: Path, tmp_path: Path, name: str) -> None:
    files, damage, kind, says = DAMAGE[name]
    run = shutil.copytree(in_files if files else FIXTURES / "moe_v2/checkpoints", tmp_path / "run")
    damage(run / "0/items")
    remote.prefix, remote.url = f"{remote.prefix}-damaged", f"{remote.url}-damaged"
    refused(lambda: load(run), kind, str(run / "0/items"), *says)
    remote.upload(run)
    refused(lambda: load(remote.url), kind, f"{remote.url}/0/items", *says)


def test_chunks_that_were_never_stored_are_zero(
    in_files: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    """As Orbax reads them, where the tree says that chunks of zeros were left out."""
    run = shutil.copytree(in_files, tmp_path / "run")
    shutil.rmtree(run / "0/items" / NORM / "c")
    metadata = run / "0/items/_METADATA"
    text = metadata.read_text()
    metadata.write_text(text.replace('"store_array_data_equal_to_fill_value": true', '"unused": null'))
    assert metadata.read_text() != text
    norm = next(decoded for decoded in regions(open_checkpoint(run)) if decoded.leaf.key == NORM)
    assert not norm.array.any()
    assert "a chunk that was lost since cannot be told from them" in log.text


def test_step_deleted_while_it_is_read(remote: Remote, tmp_path: Path) -> None:
    def delete() -> None:
        remote.server.delete(gcs.BUCKET, f"{remote.prefix}/0/")

    says = ("cannot read leaf params", "/0/items", "its writer has deleted the step meanwhile")
    remote.fault("read .*process_0/d/", before=delete, times=1, after=3)
    refused(lambda: load(remote.url), errors.ReadError, remote.url, *says)
    run = shutil.copytree(FIXTURES / "moe_v2/checkpoints", tmp_path / "run")
    checkpoint = open_checkpoint(run)
    shutil.rmtree(run)
    refused(lambda: regions(checkpoint), errors.ReadError, str(run), *says)


def test_tree_deleted_after_it_was_found(remote: Remote) -> None:
    def delete() -> None:
        remote.server.delete(gcs.BUCKET, f"{remote.prefix}/0/items/_METADATA")

    remote.fault("read /0/items/_METADATA", before=delete)
    says = ("/0/items/_METADATA: disappeared", "Was the step deleted")
    refused(lambda: load(remote.url), errors.CorruptMetadataError, remote.url, *says)


def test_unreadable_chunk_on_a_disk(in_files: Path) -> None:
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        run = Path(shutil.copytree(in_files, Path(directory) / "run"))
        os.chmod(biggest(run), 0)
        with unprivileged():
            refused(
                lambda: load(run),
                errors.StorageError,
                "cannot read leaf params",
                "PERMISSION_DENIED",
                "readable for the user",
            )


def test_slow_network_is_no_fault(remote: Remote) -> None:
    """A body that takes longer than the limit, but keeps coming; in a process that has read nothing yet."""
    remote.fault("read .*/items/d/", rate=33000 / (2.5 * LIMIT), times=1)
    variables = {"VLLM_MAXTEXT_TIMEOUT": str(LIMIT + 1)}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", gcs.LOAD, remote.url],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started > 2 * LIMIT
    assert "Trying again" not in done.stderr
