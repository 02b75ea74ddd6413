"""Export to a bucket and on several machines, and verify against a bucket: real requests, to a real server."""

from __future__ import annotations

import base64
import dataclasses
import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy as safetensors_numpy
import transformers
from typer.testing import CliRunner

import vllm_maxtext_loader.tools.export_bucket as bucket_module
from support import gcs, metadata_only
from support.checkpoints import cases
from support.gcs import BUCKET, Fault
from vllm_maxtext_loader import open_checkpoint
from vllm_maxtext_loader.checkpoint.storage import upload
from vllm_maxtext_loader.checkpoint.storage.path import Location
from vllm_maxtext_loader.cli.app import app
from vllm_maxtext_loader.errors import (
    HuggingFaceDirectoryError,
    MaxTextLoadError,
    OptionError,
    ReadError,
    StorageError,
)
from vllm_maxtext_loader.huggingface.directory import read_hf_directory
from vllm_maxtext_loader.options import GIB
from vllm_maxtext_loader.tools.export import ExportResult, export
from vllm_maxtext_loader.tools.export_layout import Share, make_grouped_layout
from vllm_maxtext_loader.tools.leaf_groups import (
    in_groups,
    read_nbytes,
    restrict,
    split_passes,
    tensor_groups,
)
from vllm_maxtext_loader.tools.verify import Report, verify

Edited = Callable[..., Path]

SHARD = 400_000
"""Bytes of a file: the largest fixtures then have a dozen."""


@pytest.fixture
def proxy() -> Iterator[gcs.Proxy]:
    proxy = gcs.shared()[1]
    proxy.clear()
    with gcs.environment(proxy.url, VLLM_MAXTEXT_TIMEOUT="6"):
        yield proxy
    proxy.clear()


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A "directory" that does not exist yet."""
    return f"gs://{BUCKET}/{tmp_path.name}/out"


def _names(url: str) -> list[str]:
    prefix = url.removeprefix(f"gs://{BUCKET}/") + "/"
    return sorted(name.removeprefix(prefix) for name in gcs.shared()[0].names(BUCKET, prefix))


def _download(url: str, directory: Path) -> Path:
    directory.mkdir(parents=True)
    prefix = url.removeprefix(f"gs://{BUCKET}/")
    for name in _names(url):
        (directory / name).write_bytes(gcs.shared()[0].get(BUCKET, f"{prefix}/{name}"))
    return directory


def _export(name: str, out: str | Path, **settings: Any) -> ExportResult:
    case = cases()[name]
    settings = {"config": case.twin_config, "max_shard_bytes": SHARD, **settings}
    return export(open_checkpoint(case.items), out, **settings)


def _tensors(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory as bits, by the safetensors library itself."""
    found: dict[str, np.ndarray] = {}
    for file in sorted(directory.glob("*.safetensors")):
        inside = safetensors_numpy.load_file(file)
        assert not found.keys() & inside.keys()
        found |= {name: value.view(np.uint8) for name, value in inside.items()}
    return found


def _assert_equal(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(actual[name], values, err_msg=name)


def _verify(name: str, directory: str | Path, **settings: Any) -> Report:
    return verify(open_checkpoint(cases()[name].items), read_hf_directory(directory), **settings)


@pytest.mark.parametrize("name", ["moe_v2", "dense_v1", "moe_unscanned", "moe_mm", "qwen3moe_scanned"])
def test_bucket_holds_what_a_disk_would(name: str, proxy: gcs.Proxy, url: str, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    done = _export(name, url, on_progress=lambda *step: told.append(step))
    local = _export(name, tmp_path / "local")
    assert (str(done.path), done.tensors, done.nbytes) == (url, local.tensors, local.nbytes)
    assert told == sorted(told)
    assert told[-1] == (done.nbytes, done.nbytes)
    there = _download(url, tmp_path / "there")
    _assert_equal(_tensors(there), _tensors(tmp_path / "local"))
    for file in ("config.json", "generation_config.json"):
        assert (there / file).read_bytes() == (tmp_path / "local" / file).read_bytes()
    # The index comes last, config.json before it.
    written = [request.name.rsplit("/", 1)[-1] for request in proxy.requests if request.kind == "write"]
    assert list(dict.fromkeys(written))[-2:] == ["config.json", "model.safetensors.index.json"]
    index = json.loads((there / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == done.nbytes
    assert {file.name for file in there.glob("*.safetensors")} == set(index["weight_map"].values())
    for file, names in _by_file(index).items():
        assert names == safetensors_numpy.load_file(there / file).keys()
    report = _verify(name, url)
    assert report.same
    expected = _verify(name, there)
    assert [row.to_json() for row in report.rows] == [row.to_json() for row in expected.rows]


def _by_file(index: dict[str, Any]) -> dict[str, set[str]]:
    files: dict[str, set[str]] = {}
    for name, file in index["weight_map"].items():
        files.setdefault(file, set()).add(name)
    return files


def test_transformers_loads_what_was_downloaded(proxy: gcs.Proxy, url: str, tmp_path: Path) -> None:
    _export("dense_v2", url)
    directory = _download(url, tmp_path / "there")
    _, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_one_file_has_no_index(proxy: gcs.Proxy, url: str) -> None:
    done = _export("dense_v2", url, max_shard_bytes=10**9)
    assert done.shards == 1
    assert _names(url) == ["config.json", "generation_config.json", "model.safetensors"]
    assert [request.name for request in proxy.requests if request.kind == "write"][-1].endswith("config.json")
    assert _verify("dense_v2", url).same


def test_checkpoint_and_export_in_buckets(proxy: gcs.Proxy, url: str, tmp_path: Path) -> None:
    case = cases()["dense_v2"]
    source = url.removesuffix("/out") + "/0"
    gcs.shared()[0].upload(case.items.parent, BUCKET, source.removeprefix(f"gs://{BUCKET}/") + "/")
    export(open_checkpoint(source), url, config=case.twin_config, dtype="float32")
    report = verify(open_checkpoint(source), read_hf_directory(url))
    assert report.same
    assert {row.dtype[1] for row in report.rows} == {"float32"}


def _noted_buffers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The buffers of every export from now on."""
    made: list[Any] = []

    class Noted(bucket_module._Buffers):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(bucket_module, "_Buffers", Noted)
    return made


@pytest.mark.parametrize("name", ["moe_v2", "moe_unscanned"])
def test_memory_is_bounded(name: str, proxy: gcs.Proxy, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scanned leaf fills the tensors of all layers at once; they are made in passes that fit."""
    plan = open_checkpoint(cases()[name].items).plan
    sizes = {target: spec.nbytes for target, spec in plan.targets.items()}
    limit = max(sizes.values())
    made = _noted_buffers(monkeypatch)
    regions: list[str] = []
    _export(name, url, memory_bytes=limit, on_region=lambda decoded: regions.append(decoded.leaf.key))
    (buffers,) = made
    assert 0 < buffers.peak <= limit < plan.nbytes / 3
    again = len(regions) - len(set(regions))
    # Chunks of an unscanned model hold one layer: nothing is read a second time.
    assert again > 10 if name == "moe_v2" else again == 0
    assert _verify(name, url).same
    held: list[int] = []
    array = bucket_module.aligned

    def noted(nbytes: int) -> np.ndarray:
        held.append(nbytes)
        return array(nbytes)

    monkeypatch.setattr("vllm_maxtext_loader.huggingface.safetensors_files.aligned", noted)
    assert _verify(name, url, memory_bytes=limit).same
    assert max(held) <= limit
    with pytest.raises(OptionError, match=f"--memory is {limit - 1} bytes, but .* alone has {limit}"):
        _export(name, f"{url}-2", memory_bytes=limit - 1)
    with pytest.raises(OptionError, match="--memory is 1 bytes"):
        _verify(name, url, memory_bytes=1)
    assert _names(f"{url}-2") == []


def test_slow_bucket_holds_back_what_is_made(
    proxy: gcs.Proxy, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors wait to be made until others were sent."""
    plan = open_checkpoint(cases()["moe_v2"].items).plan
    limit = 2 * max(target.nbytes for target in plan.targets.values())
    proxy.faults.append(Fault("write .*safetensors", before=lambda: time.sleep(0.05)))
    made = _noted_buffers(monkeypatch)
    _export("moe_v2", url, memory_bytes=limit)
    assert limit / 2 < made[0].peak <= limit
    assert _verify("moe_v2", url).same


def test_large_tensor_goes_in_parts(
    proxy: gcs.Proxy, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(upload, "PART_NBYTES", 1 << 18)
    # Answers that get lost on the way are not seen here: the server, unlike Cloud Storage, would store parts twice.
    proxy.faults.append(Fault("write .*safetensors", status=503, after=3, times=3))
    _export("dense_v2", url, max_shard_bytes=10**9)
    sent = [request for request in proxy.requests if request.method == "PUT" and request.status in (200, 308)]
    assert max(len(request.body) for request in sent) == 1 << 18
    assert len(sent) > 3
    _export("dense_v2", tmp_path / "local", max_shard_bytes=10**9)
    _assert_equal(_tensors(_download(url, tmp_path / "there")), _tensors(tmp_path / "local"))


def test_503_is_repeated_and_no_secret_is_logged(
    proxy: gcs.Proxy, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    proxy.faults += [
        Fault("list ", status=503, times=1),
        Fault(r"write .*00002-of", status=503, times=2),
        Fault("write .*config.json", status=503, times=1),
        Fault("write .*index.json", status=503, after=1, times=1),
    ]
    _export("moe_v2", url)
    assert _verify("moe_v2", url).same
    repeated = [record.message for record in caplog.records if "Trying again" in record.message]
    assert len(repeated) == 5
    # An upload's address stands for credentials; gcsfs logs the paths that it asks for.
    assert "/upload/storage/v1/b/" in caplog.text
    assert "upload_id" not in caplog.text


def test_lasting_503_leaves_nothing(proxy: gcs.Proxy, url: str) -> None:
    proxy.faults.append(Fault("write .*00003-of", status=503))
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"cannot write gs://.*00003-of-\d+.safetensors: HTTP 503"):
        _export("moe_v2", url)
    assert time.monotonic() - started < 20, "the time limit is 6 s"
    assert _names(url) == []


def test_no_answer_leaves_nothing(proxy: gcs.Proxy, url: str) -> None:
    proxy.faults.append(Fault("write .*00003-of", hang=60, after=1))
    with pytest.raises(StorageError, match=r"00003-of-\d+.safetensors: timed out"):
        _export("moe_v2", url)
    assert _names(url) == []


def test_upload_that_the_storage_drops(proxy: gcs.Proxy, url: str) -> None:
    proxy.faults.append(Fault("write .*00002-of", status=410, after=1))
    with pytest.raises(StorageError, match="00002-of"):
        _export("moe_v2", url)
    assert _names(url) == []


def test_damage_on_the_way_is_noticed(proxy: gcs.Proxy, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The storage's checksum is compared with that of what was sent."""
    request, sent = upload.gcs.request, []

    def damaged(method: str, *arguments: Any, data: bytes = b"", **settings: Any) -> Any:
        if method == "PUT" and not sent:
            sent.append(data)
            data = data[:-1] + bytes([data[-1] ^ 1])
        if method == "PUT":
            settings["data"] = data
        return request(method, *arguments, **settings)

    monkeypatch.setattr(upload.gcs, "request", damaged)
    with pytest.raises(StorageError, match="was damaged on the way"):
        _export("dense_v2", url)
    assert sent
    assert _names(url) == []


@pytest.mark.parametrize(
    ("match", "says"),
    [
        ("^list ", "cannot list gs://"),
        ("^delete ", "cannot delete gs://"),
        ("^write ", "cannot write gs://"),
    ],
)
def test_403_is_refused_before_array_data_is_read(match: str, says: str, proxy: gcs.Proxy, url: str) -> None:
    case = cases()["moe_v2"]
    source = url.removesuffix("/out") + "/0"
    gcs.shared()[0].upload(case.items.parent, BUCKET, source.removeprefix(f"gs://{BUCKET}/") + "/")
    checkpoint = open_checkpoint(source)
    proxy.clear()
    proxy.faults.append(Fault(match, status=403))
    with pytest.raises(StorageError, match=says + r".*HTTP 403.*storage.objects.create.*objectUser"):
        export(checkpoint, url, config=case.twin_config)
    assert proxy.reads() == []
    assert _names(url) == []


def test_no_such_bucket(proxy: gcs.Proxy) -> None:
    with pytest.raises(HuggingFaceDirectoryError, match="there is no bucket nothing-here"):
        _export("dense_v2", "gs://nothing-here/out")
    with pytest.raises(HuggingFaceDirectoryError, match="there is no bucket nothing-here"):
        read_hf_directory("gs://nothing-here/out")


@pytest.mark.parametrize("out", ["gs:/bucket/out", "gs:bucket/out", "s3://bucket/out", "gs://B_AD!/out"])
def test_misspelled_bucket_is_not_a_directory(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HuggingFaceDirectoryError, match="gs://"):
        _export("dense_v2", out)
    assert list(tmp_path.iterdir()) == []


def test_occupied_directory_is_refused(proxy: gcs.Proxy, url: str) -> None:
    prefix = url.removeprefix(f"gs://{BUCKET}/")
    # Some tools mark a directory by an object of its name: that alone is no content.
    gcs.shared()[0].put(BUCKET, f"{prefix}/", b"")
    _export("dense_v2", url, share=Share(1, 2))
    gcs.shared()[0].delete(BUCKET, f"{prefix}/model")
    gcs.shared()[0].put(BUCKET, f"{prefix}/notes.txt", b"mine")
    with pytest.raises(HuggingFaceDirectoryError, match=r"is not empty \(it holds notes.txt\)"):
        _export("dense_v2", url)
    with pytest.raises(HuggingFaceDirectoryError, match=r"holds notes.txt, which is no file of this export"):
        _export("dense_v2", url, share=Share(1, 2))
    assert _names(url) == ["", "notes.txt"]
    # A neighbour whose name begins alike is no obstacle.
    _export("dense_v2", url[:-1])


def test_object_that_appears_meanwhile_is_not_replaced(proxy: gcs.Proxy, url: str) -> None:
    proxy.faults.append(Fault("write .*config.json", status=412))
    with pytest.raises(HuggingFaceDirectoryError, match="has appeared meanwhile"):
        _export("dense_v2", url)
    assert _names(url) == []
    proxy.clear()
    proxy.faults.append(Fault("write .*00002-of", status=412, after=1))
    with pytest.raises(HuggingFaceDirectoryError, match=r"00002-of-\d+.safetensors: has appeared meanwhile"):
        _export("dense_v2", url)
    assert _names(url) == []


def test_failed_export_removes_its_own_objects_only(proxy: gcs.Proxy, url: str) -> None:
    prefix = url.removeprefix(f"gs://{BUCKET}/")

    def intrude() -> None:
        gcs.shared()[0].put(BUCKET, f"{prefix}/notes.txt", b"mine")

    proxy.faults += [
        Fault("write .*00001-of", before=intrude, times=1),
        Fault("write .*index.json", status=403),
    ]
    with pytest.raises(StorageError):
        _export("moe_v2", url)
    assert _names(url) == ["notes.txt"]


def test_failed_clean_up_is_told(proxy: gcs.Proxy, url: str, caplog: pytest.LogCaptureFixture) -> None:
    proxy.faults += [Fault("write .*config.json", status=403), Fault("delete .*safetensors", status=403)]
    with pytest.raises(StorageError, match="cannot write"):
        _export("dense_v2", url)
    assert f"gcloud storage rm --recursive {url}" in caplog.text


def test_damaged_checkpoint_leaves_nothing(edited: Edited, proxy: gcs.Proxy, url: str) -> None:
    items = edited("moe_v2", lambda params: None, ocdbt=False, zarr3=False)
    leaf = items / "params.params.token_embedder.embedding"
    next(file for file in leaf.iterdir() if file.name[0].isdigit()).unlink()
    with pytest.raises(ReadError):
        export(open_checkpoint(items), url, config=cases()["moe_v2"].twin_config, max_shard_bytes=SHARD)
    assert _names(url) == []


def test_values_too_large_leave_nothing(edited: Edited, proxy: gcs.Proxy, url: str) -> None:
    def edit(params: Any) -> None:
        params["decoder"]["decoder_norm"]["scale"][0] = 1e30

    items = edited("moe_v2", edit)
    with pytest.raises(HuggingFaceDirectoryError, match="too large for float16"):
        export(open_checkpoint(items), url, config=cases()["moe_v2"].twin_config, dtype="float16")
    assert _names(url) == []


EXPORT = [sys.executable, "-c", "from vllm_maxtext_loader.cli.app import main; main()", "export"]


def _start(name: str, url: str, *options: str) -> subprocess.Popen[str]:
    case = cases()[name]
    command = [*EXPORT, str(case.items), url, "--config", str(case.twin_config)]
    return subprocess.Popen(
        [*command, "--max-shard-size", str(SHARD), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_export_leaves_nothing(number: signal.Signals, proxy: gcs.Proxy, url: str) -> None:
    """Some files are complete, others under way, when the signal comes."""
    reached, signalled = threading.Event(), threading.Event()

    def wait() -> None:
        reached.set()
        signalled.wait(20)

    proxy.faults.append(Fault(r"write .*0000[45]-of", before=wait))
    process = _start("moe_v2", url)
    assert reached.wait(60), process.communicate(timeout=30)
    deadline = time.monotonic() + 20
    while not _names(url) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _names(url), "something is there to be removed"
    process.send_signal(number)
    time.sleep(1)
    signalled.set()
    _, said = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else 128 + number), said
    assert "Traceback" not in said
    assert _names(url) == []


def test_interrupted_export_sends_nothing_more(
    proxy: gcs.Proxy, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even of files whose tensors are all complete."""
    monkeypatch.setattr(upload, "PART_NBYTES", 1 << 13)
    proxy.faults.append(Fault("write .*safetensors", before=lambda: time.sleep(0.2)))
    sent: list[int] = []

    def interrupt(decoded: Any) -> None:
        if decoded.last and decoded.leaf.key.endswith("wo"):
            sent.append(proxy.counts()["write"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _export("moe_v2", url, on_region=interrupt)
    assert sent, "a group of several files was made"
    assert proxy.counts()["write"] <= sent[0] + 2 * bucket_module._STREAMS
    assert _names(url) == []


def test_command_line(proxy: gcs.Proxy, url: str, tmp_path: Path) -> None:
    process = _start("dense_v2", url, "--memory", "64MiB")
    printed, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert re.fullmatch(rf"Wrote \d+ tensors, .* in \d+ files to {url}\n", printed), printed


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--shards", "0/2"), "is no share"),
        (("--shards", "3/2"), "is no share"),
        (("--shards", "half"), "is no share"),
        (("--memory", "much"), "is no size"),
        (("--memory", "1KB"), "alone has"),
        (("--shards", "1/1000"), "machines can share it"),
    ],
)
def test_bad_options_are_refused(options: tuple[str, str], says: str, proxy: gcs.Proxy, url: str) -> None:
    case = cases()["dense_v2"]
    command = ["export", str(case.items), url, "--config", str(case.twin_config)]
    done = CliRunner().invoke(app, [*command, "--max-shard-size", str(SHARD), *options])
    assert done.exit_code == 2
    assert says in " ".join(re.sub(r"[│╭╮╰╯─]", " ", done.output).split()), done.output
    assert _names(url) == []


@pytest.mark.parametrize("machines", [2, 3])
@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_shares_make_the_whole(place: str, machines: int, proxy: gcs.Proxy, url: str, tmp_path: Path) -> None:
    out = url if place == "bucket" else tmp_path / "out"
    shares = [_export("moe_v2", out, share=Share(number, machines)) for number in range(machines, 0, -1)]
    directory = _download(url, tmp_path / "there") if place == "bucket" else tmp_path / "out"
    assert [bool(share.missing) for share in shares] == [True] * (machines - 1) + [False]
    assert len(shares[0].missing) == sum(share.shards for share in shares[1:])
    files = sorted(file.name for file in directory.glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert sorted(file.name for file in directory.iterdir()) == sorted(
        [*files, "config.json", "generation_config.json", "model.safetensors.index.json"]
    )
    whole = _export("moe_v2", tmp_path / "whole")
    assert sum(share.nbytes for share in shares) == whole.nbytes
    assert sum(share.tensors for share in shares) == whole.tensors
    _assert_equal(_tensors(directory), _tensors(tmp_path / "whole"))
    assert _verify("moe_v2", out).same
    with pytest.raises(HuggingFaceDirectoryError, match="is a complete model"):
        _export("moe_v2", out, share=Share(1, machines))


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_machines_at_the_same_time(place: str, proxy: gcs.Proxy, url: str, tmp_path: Path) -> None:
    out = url if place == "bucket" else tmp_path / "out"
    with ThreadPoolExecutor(3) as pool:
        shares = [pool.submit(_export, "moe_v2", out, share=Share(number, 3)) for number in (1, 2, 3)]
    # Whoever is last finds all files; two that end at the same moment both do.
    assert any(share.result().missing == () for share in shares)
    names = _names(url) if place == "bucket" else sorted(os.listdir(tmp_path / "out"))
    assert [name for name in names if not name.endswith(".safetensors")] == [
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
    ]
    assert _verify("moe_v2", out).same


def test_shares_read_different_leaves(tmp_path: Path) -> None:
    """Machines share the reading, too, where chunks allow it."""
    seen: list[set[str]] = []
    for number in (1, 2):
        keys: set[str] = set()
        _export(
            "moe_unscanned",
            tmp_path / "out",
            share=Share(number, 2),
            on_region=lambda decoded, keys=keys: keys.add(decoded.leaf.key),
        )
        seen.append(keys)
    assert len(seen[0] & seen[1]) <= 2, "leaves of the tensor at the border"
    assert all(len(keys) > 20 for keys in seen)


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_share_is_taken_up_again(place: str, proxy: gcs.Proxy, url: str, tmp_path: Path) -> None:
    out = url if place == "bucket" else tmp_path / "out"
    _export("moe_v2", out, share=Share(1, 2))
    again = _export("moe_v2", out, share=Share(1, 2))
    assert (again.shards, again.nbytes) == (0, 0)
    assert again.missing
    # What config.json's writer left behind, when it was killed, is no obstacle.
    if place == "bucket":
        gcs.shared()[0].put(BUCKET, url.removeprefix(f"gs://{BUCKET}/") + "/config.json", b"{}")
        proxy.faults.append(Fault("write .*config.json", status=412))
    else:
        (tmp_path / "out" / "config.json").write_text("{}")
        (tmp_path / "out" / ".incomplete-0").mkdir()
    assert _export("moe_v2", out, share=Share(2, 2)).missing == ()
    index = "model.safetensors.index.json"
    assert index in (_names(url) if place == "bucket" else os.listdir(tmp_path / "out"))


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_failed_share_leaves_the_others(place: str, proxy: gcs.Proxy, url: str, tmp_path: Path) -> None:
    out = url if place == "bucket" else tmp_path / "out"
    done = _export("moe_v2", out, share=Share(1, 2))
    before = _names(url) if place == "bucket" else sorted(os.listdir(tmp_path / "out"))
    assert len(before) == done.shards

    def fail(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _export("moe_v2", out, share=Share(2, 2), on_region=fail)
    assert (_names(url) if place == "bucket" else sorted(os.listdir(tmp_path / "out"))) == before


def test_other_content_is_refused_by_a_share(tmp_path: Path) -> None:
    (tmp_path / "out" / "notes").mkdir(parents=True)
    with pytest.raises(HuggingFaceDirectoryError, match="holds notes, which is no file of this export"):
        _export("dense_v2", tmp_path / "out", share=Share(1, 2))
    (tmp_path / "file").write_text("")
    with pytest.raises(HuggingFaceDirectoryError, match="cannot be made"):
        _export("dense_v2", tmp_path / "file", share=Share(1, 2))


@pytest.mark.parametrize(
    "other", [{"dtype": "float32"}, {"max_shard_bytes": SHARD + 10_000}, {"name": "moe_022"}]
)
def test_shares_of_different_exports_do_not_mix(other: dict[str, Any], tmp_path: Path) -> None:
    _export("moe_v2", tmp_path / "out", share=Share(1, 2))
    with pytest.raises(HuggingFaceDirectoryError, match=r"of another export|no file of this export"):
        _export(other.pop("name", "moe_v2"), tmp_path / "out", share=Share(2, 2), **other)


def test_more_machines_than_files(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--shards 1/2: the export has 1 file of at most .* smaller"):
        _export("dense_v2", tmp_path / "out", share=Share(1, 2), max_shard_bytes=10**9)
    assert not (tmp_path / "out").exists()


def test_every_share_has_files_and_all_files_are_shared() -> None:
    plan = open_checkpoint(cases()["moe_v2"].items).plan
    layout = make_grouped_layout(plan, None, SHARD, None)
    for count in range(1, len(layout.files) + 1):
        shares = [layout.share(Share(number, count), SHARD) for number in range(1, count + 1)]
        assert all(shares)
        assert [file.name for share in shares for file in share] == [file.name for file in layout.files]


def test_full_disk_in_a_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("vllm_maxtext_loader.huggingface.safetensors_files.os.posix_fallocate", no_space)
    with pytest.raises(HuggingFaceDirectoryError, match="No space left"):
        _export("moe_v2", tmp_path / "out", share=Share(1, 2))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["moe_v2", "moe_unscanned", "dense_v1", "gemma3_scanned"])
def test_groups_share_no_leaf(name: str) -> None:
    plan = open_checkpoint(cases()[name].items).plan
    groups = tensor_groups(plan)
    leaves: dict[str, set[int]] = {}
    for target in plan.targets.values():
        for key in target.leaves:
            leaves.setdefault(key, set()).add(groups[target.name])
    assert all(len(numbers) == 1 for numbers in leaves.values())
    order = list(in_groups(plan))
    assert sorted(order) == sorted(plan.targets)
    sizes = {name: plan.targets[name].nbytes for name in order}
    limit = max(sizes.values())
    passes = split_passes(order, sizes, groups, limit)
    assert [name for names in passes for name in names] == order
    assert all(sum(sizes[name] for name in names) <= limit for names in passes)
    # With room for the largest group, no leaf is read twice, whatever its chunks.
    totals: dict[int, int] = {}
    for target in order:
        totals[groups[target]] = totals.get(groups[target], 0) + sizes[target]
    passes = split_passes(order, sizes, groups, max(totals.values()))
    assert sum(read_nbytes(restrict(plan, names)) for names in passes) == plan.nbytes
    assert len(passes) > 1


@pytest.mark.parametrize("name", ["gemma4-26b", "qwen3-235b-a22b", "llama3.1-405b"])
def test_documented_reads_of_published_models(name: str, tmp_path: Path) -> None:
    shapes = metadata_only.leaves(metadata_only.published(name))
    plan = open_checkpoint(metadata_only.write(tmp_path / "run", shapes)).plan
    groups, sizes = tensor_groups(plan), {target: spec.nbytes for target, spec in plan.targets.items()}
    layout = make_grouped_layout(plan, None, 5 * 10**9, None)

    def reads(share: Share, gib: int) -> float:
        order = [target.name for file in layout.share(share, 0) for target in file.targets]
        passes = split_passes(order, sizes, groups, gib * GIB)
        return sum(read_nbytes(restrict(plan, names)) for names in passes) / plan.nbytes

    machines = 16
    one, most = [], []
    for gib in (8, 32, 128, 512):
        one.append(f"{reads(Share(1, 1), gib):.1f}")
        if len(layout.files) >= machines:
            shares = [reads(Share(number, machines), gib) for number in range(1, machines + 1)]
            most.append(f"{max(shares):.1f}")
    lines = (Path(__file__).parents[1] / "docs/gcs.md").read_text().splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith(f"| {name},")]
    assert lines[at].endswith(" | ".join(["", *one, ""]).rstrip())
    assert not most or lines[at + 1].endswith(" | ".join(["", *most, ""]).rstrip())


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_verify_finds_the_same_differences(place: str, proxy: gcs.Proxy, url: str, tmp_path: Path) -> None:
    _export("moe_v2", tmp_path / "out")
    file = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 0x40
    file.write_bytes(data)
    gcs.shared()[0].upload(tmp_path / "out", BUCKET, url.removeprefix(f"gs://{BUCKET}/") + "/")
    expected = _verify("moe_v2", tmp_path / "out")
    report = _verify("moe_v2", url if place == "bucket" else tmp_path / "out")
    assert [row.name for row in report.differences] == [row.name for row in expected.differences]
    assert len(report.differences) == 1
    assert report.rows == expected.rows


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _long_header(file: Path) -> None:
    file.write_bytes((1 << 60).to_bytes(8, "little") + file.read_bytes()[8:])


def _pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\n")


@pytest.mark.parametrize("damage", [_cut, _empty, _long_header, _pointer, Path.unlink])
def test_damaged_directory_in_a_bucket(
    damage: Callable[[Path], None], proxy: gcs.Proxy, url: str, tmp_path: Path
) -> None:
    _export("dense_v2", tmp_path / "out")
    damage(sorted((tmp_path / "out").glob("*.safetensors"))[1])
    gcs.shared()[0].upload(tmp_path / "out", BUCKET, url.removeprefix(f"gs://{BUCKET}/") + "/")
    with pytest.raises(HuggingFaceDirectoryError) as local:
        read_hf_directory(tmp_path / "out")
    with pytest.raises(HuggingFaceDirectoryError) as remote:
        read_hf_directory(url)
    said = str(remote.value).replace(url, "DIR")
    assert said == str(local.value).replace(str(tmp_path / "out"), "DIR")


def test_verify_repeats_what_fails(proxy: gcs.Proxy, url: str, caplog: pytest.LogCaptureFixture) -> None:
    _export("dense_v2", url)
    proxy.clear()
    proxy.faults += [
        Fault("read .*safetensors", status=503, after=3, times=2),
        Fault("read .*safetensors", cut=4, after=5, times=1),
    ]
    assert _verify("dense_v2", url).same
    assert sum("Trying again" in record.message for record in caplog.records) == 3
    proxy.faults.append(Fault("read .*safetensors", status=403))
    with pytest.raises(StorageError, match="HTTP 403"):
        _verify("dense_v2", url)
    proxy.clear()
    directory = read_hf_directory(url)
    gcs.shared()[0].delete(BUCKET, url.removeprefix(f"gs://{BUCKET}/"))
    with pytest.raises(MaxTextLoadError, match=r"no such object|cannot be read"):
        verify(open_checkpoint(cases()["dense_v2"].items), dataclasses.replace(directory, config_file=None))


def test_read_only_scope_stays(proxy: gcs.Proxy, url: str, tmp_path: Path) -> None:
    """Tokens to write with are asked for where something is written only."""
    from test_gcs import write_key

    write_key(tmp_path / "key.json", f"{proxy.url}/token")
    proxy.faults.append(
        Fault("other /token", status=200, body='{"access_token": "ya29.SECRET", "expires_in": 3600}')
    )
    code = (
        "import sys; from vllm_maxtext_loader.checkpoint.storage import gcs, upload\n"
        "from vllm_maxtext_loader.checkpoint.storage.path import Location\n"
        "gcs.list_objects(sys.argv[1]); upload.write_object(Location(sys.argv[1]) / 'x', b'1', {})"
    )
    environment = {key: value for key, value in os.environ.items() if key != "STORAGE_EMULATOR_HOST"}
    environment |= {
        "GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "key.json"),
        "FSSPEC_GCS_ENDPOINT_URL": proxy.url,
    }
    done = subprocess.run(
        [sys.executable, "-c", code, url], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    scopes: list[str] = []
    for request in proxy.requests:
        if request.kind == "other":
            assertion = urllib.parse.parse_qs(request.body.decode())["assertion"][0].split(".")[1]
            scopes.append(json.loads(base64.urlsafe_b64decode(assertion + "=="))["scope"])
    assert [scope.rsplit(".", 1)[-1] for scope in scopes] == ["read_only", "read_write"]
    asked = [request for request in proxy.requests if request.kind != "other"]
    assert {request.authorization for request in asked} == {"Bearer ya29.SECRET"}
    assert _names(url) == ["x"]


def test_upload_resumes_where_the_storage_says(
    proxy: gcs.Proxy, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a part, Cloud Storage may take the beginning only, or nothing; the rest is sent again."""
    monkeypatch.setattr(upload, "PART_NBYTES", 100)
    sent: list[tuple[str, bytes]] = []
    answers = iter(["bytes=0-59", None, "bytes=0-99", "bytes=0-149"])

    def answer(method: str, *_: Any, data: bytes = b"", headers: dict[str, str], **__: Any) -> Any:
        if method == "POST":
            return {"Location": "https://elsewhere/upload/storage/v1/b/b/o?upload_id=1"}, b""
        sent.append((headers["Content-Range"], data))
        if (last := next(answers, "")) == "":
            return {}, b'{"size": "160"}'
        return ({} if last is None else {"Range": last}), b""

    monkeypatch.setattr(upload.gcs, "request", answer)
    data = bytes(range(160))
    opened = upload.Upload(Location(url), 160, {}, threading.Event())
    opened.write(data)
    assert opened.done
    spans = [span.removeprefix("bytes ").removesuffix("/160") for span, _ in sent]
    assert spans == ["0-99", "60-99", "60-99", "100-159", "150-159"]
    assert all(
        part == data[int(s.split("-")[0]) : int(s.split("-")[1]) + 1]
        for s, (_, part) in zip(spans, sent, strict=True)
    )
