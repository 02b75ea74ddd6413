"""Loading from a real GCS server: the same tensors as from the disk, every object's bytes read once."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from support import gcs
from support.checkpoints import FIXTURES, cases
from support.damage import regions, without_database
from vllm_maxtext_loader import open_checkpoint
from vllm_maxtext_loader.api import Checkpoint
from vllm_maxtext_loader.checkpoint.storage.path import Location


@pytest.fixture(scope="module", params=["moe_v2", "moe_v1", "moe_v2 in files", "moe_v1 in files"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A run on the disk and in the bucket: zarr v3 (v2) and v2 (v1), in a database and in files."""
    name, _, files = request.param.partition(" ")
    path = FIXTURES / name / "checkpoints"
    if files:
        path = without_database(path, tmp_path_factory.mktemp("files") / name)
    server = gcs.shared()[0]
    prefix = request.param.replace(" ", "-")
    server.upload(path, gcs.BUCKET, f"{prefix}/")
    # The v1 fixture was written to a disk by an Orbax that leaves no commit file there.
    server.put(gcs.BUCKET, f"{prefix}/0/commit_success.txt", b"")
    return f"gs://{gcs.BUCKET}/{prefix}", path


@pytest.fixture
def proxy() -> Iterator[gcs.Proxy]:
    proxy = gcs.shared()[1]
    proxy.clear()
    with gcs.environment(proxy.url):
        yield proxy


def with_config(checkpoint: Checkpoint, case: str) -> Checkpoint:
    """As vLLM opens it: with a Hugging Face configuration."""
    import transformers

    config = json.loads((cases()[case].twin_config / "config.json").read_text())
    return checkpoint.with_config(transformers.AutoConfig.for_model(**config))


def test_same_tensors_and_nothing_twice(run: tuple[str, Path], proxy: gcs.Proxy) -> None:
    url, path = run
    expected = regions(open_checkpoint(path))
    checkpoint = open_checkpoint(url)
    tree = checkpoint.tree
    opened = proxy.counts()
    assert (opened["list"], opened["stat"]) == (2, 1), "the run, the step; the item's _METADATA"
    arrays = len(tree.leaves) + len(tree.skipped)
    small = [request.name.rsplit("/", 1)[-1] for request in proxy.reads()]
    if tree.ocdbt:
        nodes = [name for name in small if len(name) == 32]
        assert Counter(small) - Counter(nodes) == Counter(
            ["_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"]
        )
        assert len(nodes) <= 3, "the database's B-tree, not one object per array"
    else:
        assert Counter(small)[".zarray"] + Counter(small)["zarr.json"] == arrays
        assert len(small) == arrays + 2
    proxy.clear()

    for actual, wanted in zip(regions(checkpoint), expected, strict=True):
        assert (actual.leaf, actual.region) == (wanted.leaf, wanted.region)
        np.testing.assert_array_equal(actual.array, wanted.array, err_msg=actual.leaf.key)
    assert proxy.counts().keys() == {"read"}
    chunks = sum(
        math.prod(math.ceil(size / step) for size, step in zip(leaf.shape, leaf.chunks, strict=True))
        for leaf in tree.leaves.values()
    )
    # Small chunks lie inside the database's B-tree and need no request of their own.
    assert proxy.counts()["read"] <= chunks if tree.ocdbt else proxy.counts()["read"] == chunks
    gcs.assert_once(proxy)


def test_whole_load_as_vllm_does_it(proxy: gcs.Proxy) -> None:
    gcs.shared()[0].upload(FIXTURES / "dense_v2/checkpoints", gcs.BUCKET, "whole/")
    url = f"gs://{gcs.BUCKET}/whole"
    # As vLLM loads it, with a configuration, and without one: the vocabulary is then measured.
    for configured in (True, False):
        checkpoint = open_checkpoint(url)
        checkpoint = with_config(checkpoint, "dense_v2") if configured else checkpoint
        names = [name for name, _ in checkpoint.hf_weights()]
        assert len(names) == len(checkpoint.plan.targets)
        gcs.assert_once(proxy)
        proxy.clear()


def test_small_read_budget_reads_nothing_twice(proxy: gcs.Proxy) -> None:
    gcs.shared()[0].upload(FIXTURES / "moe_v2/checkpoints", gcs.BUCKET, "budget/")
    regions(open_checkpoint(f"gs://{gcs.BUCKET}/budget", concurrent_gib=1e-6))
    gcs.assert_once(proxy)


def test_newest_and_wanted_step(proxy: gcs.Proxy, copy_case: Callable[[str], Path]) -> None:
    steps = copy_case("dense_v2") / "checkpoints"
    shutil.copytree(steps / "0", steps / "20")
    (shutil.copytree(steps / "0", steps / "30") / "commit_success.txt").unlink()
    gcs.shared()[0].upload(steps, gcs.BUCKET, "steps/")
    url = f"gs://{gcs.BUCKET}/steps"
    assert open_checkpoint(url).location.step == 20
    assert open_checkpoint(url, step=0).location.items.url == f"{url}/0/items"


def load_elsewhere(url: str, proxy: gcs.Proxy, **variables: str) -> subprocess.CompletedProcess[str]:
    """A load in a process of its own: Google's client finds credentials as it would outside of tests."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("GOOGLE_", "STORAGE_"))}
    # An endpoint (fsspec's variable for a constructor argument), unlike an emulator, is given credentials.
    kept |= {"FSSPEC_GCS_ENDPOINT_URL": proxy.url, "TENSORSTORE_GCS_HTTP_URL": proxy.url, **variables}
    return subprocess.run(
        [sys.executable, "-c", gcs.LOAD, url], env=kept, capture_output=True, text=True, timeout=120
    )


def test_public_bucket_without_credentials(proxy: gcs.Proxy, tmp_path: Path) -> None:
    gcs.shared()[0].upload(FIXTURES / "dense_v2/checkpoints", gcs.BUCKET, "public/")
    home = {
        "HOME": str(tmp_path),
        "CLOUDSDK_CONFIG": str(tmp_path),
        "GCE_METADATA_ROOT": f"127.0.0.1:{gcs.free_port()}",
    }
    (tmp_path / ".netrc").write_text("default login me password SECRET\n")
    (tmp_path / ".netrc").chmod(0o600)
    done = load_elsewhere(f"gs://{gcs.BUCKET}/public", proxy, **home)
    assert done.returncode == 0, done.stderr
    assert proxy.counts()["read"] > 3
    assert not any(request.authorization for request in proxy.requests)


def write_key(path: Path, token_uri: str) -> str:
    """A service account's key that gets its tokens at `token_uri`; returns the private key."""
    pem = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    key = {
        "type": "service_account",
        "client_email": "a@b.iam.gserviceaccount.com",
        "private_key": pem.decode(),
        "token_uri": token_uri,
    }
    path.write_text(json.dumps(key))
    return pem.decode()


def test_service_account_and_no_secret_in_logs(proxy: gcs.Proxy, tmp_path: Path) -> None:
    gcs.shared()[0].upload(FIXTURES / "dense_v2/checkpoints", gcs.BUCKET, "private/")
    pem = write_key(tmp_path / "key.json", f"{proxy.url}/token")
    # A default entry would have aiohttp refuse a request that has a token.
    (tmp_path / ".netrc").write_text("default login me password SECRET\n")
    (tmp_path / ".netrc").chmod(0o600)
    token = {"access_token": "ya29.SECRET", "expires_in": 3600, "token_type": "Bearer"}
    proxy.faults = [
        gcs.Fault("other /token", status=503, times=1),
        gcs.Fault("other /token", status=200, body=json.dumps(token)),
        gcs.Fault("read .*private/0/items/_METADATA", status=503, times=1),
    ]
    done = load_elsewhere(
        f"gs://{gcs.BUCKET}/private",
        proxy,
        HOME=str(tmp_path),
        GOOGLE_APPLICATION_CREDENTIALS=str(tmp_path / "key.json"),
        # TensorStore would fetch a token of its own for the key, from Google only.
        GOOGLE_AUTH_TOKEN_FOR_TESTING="ya29.SECRET",
    )
    assert done.returncode == 0, done.stderr
    asked = [request for request in proxy.requests if request.kind != "other"]
    assert len(asked) > 6
    assert {request.authorization for request in asked} == {"Bearer ya29.SECRET"}
    exchanges = [request for request in proxy.requests if request.kind == "other"]
    assert [request.status for request in exchanges] == [503, 200], "one token for all requests"
    claims = urllib.parse.parse_qs(exchanges[-1].body.decode())["assertion"][0].split(".")[1]
    scope = json.loads(base64.urlsafe_b64decode(claims + "=="))["scope"]
    assert scope == "https://www.googleapis.com/auth/devstorage.read_only"
    said = done.stdout + done.stderr
    assert "private/0/items/_METADATA: cannot read: HTTP 503" in said
    assert "SECRET" not in said
    assert pem.splitlines()[1] not in said


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"status": 400, "body": '{"error": "invalid_grant", "error_description": "no"}'}, "invalid_grant"),
        ({"hang": 60}, "no token"),
    ],
    ids=["refused", "hangs"],
)
def test_no_token(proxy: gcs.Proxy, tmp_path: Path, fault: dict[str, object], says: str) -> None:
    write_key(tmp_path / "key.json", f"{proxy.url}/token")
    proxy.faults = [gcs.Fault("other /token", **fault)]  # type: ignore[arg-type]
    started = time.monotonic()
    done = load_elsewhere(
        f"gs://{gcs.BUCKET}/private",
        proxy,
        GOOGLE_APPLICATION_CREDENTIALS=str(tmp_path / "key.json"),
        VLLM_MAXTEXT_TIMEOUT="3",
    )
    assert time.monotonic() - started < 25, "the time limit, and the start of a process on a busy machine"
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(rf"StorageError: cannot list gs://{gcs.BUCKET}/private: .*{says}", last), last
    assert proxy.counts().keys() == {"other"}, "nothing is asked without the token"


def test_project_that_is_billed(proxy: gcs.Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both clients name it, in listings, look-ups and reads."""
    gcs.shared()[0].upload(FIXTURES / "dense_v2/checkpoints", gcs.BUCKET, "pays/")
    url = f"gs://{gcs.BUCKET}/pays"
    for project in ("my-project", ""):
        monkeypatch.setenv("GOOGLE_CLOUD_QUOTA_PROJECT", project)
        assert len(regions(open_checkpoint(url))) > 20
        assert {"list", "stat", "read"} <= proxy.counts().keys()
        assert {request.user_project for request in proxy.requests} == {project}
        proxy.clear()


LIST_IN_A_FORKED_PROCESS = """
import os, sys
from vllm_maxtext_loader.checkpoint.storage.path import Location
location = Location.parse(sys.argv[1])
here = location.listdir()
pid = os.fork()
if pid == 0:
    os._exit(0 if location.listdir() == here else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_listing_in_a_forked_process(proxy: gcs.Proxy) -> None:
    gcs.shared()[0].upload(FIXTURES / "dense_v2/checkpoints", gcs.BUCKET, "fork/")
    command = [sys.executable, "-c", LIST_IN_A_FORKED_PROCESS, f"gs://{gcs.BUCKET}/fork"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert proxy.counts() == {"list": 2}


def test_many_names_come_in_pages(proxy: gcs.Proxy) -> None:
    server = gcs.shared()[0]
    for number in range(1, 12):
        server.put(gcs.BUCKET, f"pages/{number:02}", b"")
    proxy.page_size = 4
    try:
        names = Location.parse(f"gs://{gcs.BUCKET}/pages").listdir()
    finally:
        proxy.page_size = None
    assert names == [f"{number:02}" for number in range(1, 12)]
    assert proxy.counts()["list"] == 3
