"""Files that lack, or that hold something else: found by name and size, and told as what they are."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import tensorstore as ts
from typer.testing import CliRunner

from support import gcs
from support.checkpoints import FIXTURES, cases, read_orbax, write_orbax
from support.damage import biggest, cut, regions, unprivileged, without_database
from vllm_maxtext_loader import MaxTextLoadError, open_checkpoint
from vllm_maxtext_loader.checkpoint import data_files
from vllm_maxtext_loader.checkpoint.data_files import read_extents
from vllm_maxtext_loader.checkpoint.storage.path import Location, tensorstore_context
from vllm_maxtext_loader.cli.app import app
from vllm_maxtext_loader.errors import CorruptMetadataError
from vllm_maxtext_loader.tools.inspect import Inspection, inspect_checkpoint

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
LFS = "is a Git LFS pointer, not the file: run `git lfs pull`"
NOT_LOOKED = "metadata only: array data was not looked at"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose arrays are in an OCDBT database, zarr v3."""
    return Path(shutil.copytree(FIXTURES / "moe_v2/checkpoints", tmp_path / "run"))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A run whose arrays are in a directory each, zarr v3."""
    return without_database(FIXTURES / "moe_v2/checkpoints", tmp_path / "files")


@pytest.fixture
def proxy() -> Iterator[gcs.Proxy]:
    proxy = gcs.shared()[1]
    proxy.clear()
    with gcs.environment(proxy.url):
        yield proxy
    proxy.clear()


def shown(*args: object) -> tuple[int, str]:
    """Exit code of `inspect` and what it prints, on one line."""
    result = CliRunner().invoke(app, ["inspect", *map(str, args)], env={"COLUMNS": "200"})
    return result.exit_code, " ".join((result.stdout + result.stderr).split())


def chunks(found: Inspection) -> int:
    return sum(leaf.missing for leaf in found.data.missing)


@pytest.mark.parametrize("name", cases())
def test_nothing_is_missing_from_what_was_written(name: str) -> None:
    data = inspect_checkpoint(cases()[name].items).data
    assert (data.checked, data.missing) == (True, ())


def test_half_of_the_files_of_a_database(run: Path) -> None:
    for file in sorted((run / "0/items").rglob("d/*"), key=lambda file: file.stat().st_size)[::-2]:
        if file.parent.parent.name.startswith("ocdbt.process_"):
            file.unlink()
    found = inspect_checkpoint(run)
    assert not found.loads
    assert chunks(found) > 4
    content = json.loads(shown(run, "--json")[1])
    assert content["loads"] is content["needs_config"] is False
    assert content["data_files"]["checked"] is True
    missing = content["data_files"]["missing"]
    assert {leaf["key"] for leaf in missing} <= {leaf["key"] for leaf in content["leaves"]}
    assert all(0 < leaf["missing"] <= leaf["chunks"] for leaf in missing)
    assert "ocdbt.process_0/d/" in missing[0]["first"]
    code, text = shown(run)
    assert code == 1
    assert f"data {chunks(found)} chunks of {len(missing)} leaves are MISSING" in text
    assert (
        f"{missing[0]['key']}: {missing[0]['missing']} of {missing[0]['chunks']}; {missing[0]['first']}"
        in text
    )
    assert "loads no: chunks are missing" in text


def test_truncated_file_of_a_database(run: Path) -> None:
    file = biggest(run / "0/items")
    cut(file, size := file.stat().st_size // 2)
    found = inspect_checkpoint(run)
    assert not found.loads
    first = found.data.missing[0].first
    assert first.startswith(f"ocdbt.process_0/d/{file.name} has {size:,} bytes; at least ")
    with pytest.raises(MaxTextLoadError):
        regions(open_checkpoint(run))


def test_chunks_that_are_not_in_the_database(run: Path) -> None:
    key = "params.params.token_embedder.embedding"
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{run}/0/items/"}).result()
    for chunk in (f"{key}/c/1/0", f"{key}/c/3/0"):
        store.delete_range(ts.KvStore.KeyRange(chunk, chunk + "\0")).result()
    (leaf,) = inspect_checkpoint(run).data.missing
    assert (leaf.key, leaf.missing, leaf.chunks) == (key, 2, 4)
    assert leaf.first == f"{key}/c/1/0 does not exist"


@pytest.mark.parametrize("zarr3", [True, False])
def test_chunks_in_files(tmp_path: Path, zarr3: bool) -> None:
    tree = read_orbax(cases()["moe_v2"].items)
    items = write_orbax(tmp_path / "0", tree, ocdbt=False, zarr3=zarr3)
    assert inspect_checkpoint(items).loads
    leaf = items / "params.params.token_embedder.embedding"
    (first, *_) = sorted(leaf.rglob("0")) if zarr3 else sorted(leaf.glob("[0-9]*"))
    first = first if first.is_file() else next(file for file in first.rglob("*") if file.is_file())
    first.write_bytes(b"")
    norm = items / "params.params.decoder.decoder_norm.scale"
    (one,) = [file for file in norm.rglob("*") if file.is_file() and not file.name.startswith((".", "zarr"))]
    one.unlink()
    found = inspect_checkpoint(items)
    assert {leaf.key: leaf.missing for leaf in found.data.missing} == {norm.name: 1, leaf.name: 1}
    assert {leaf.first for leaf in found.data.missing} == {
        f"{one.relative_to(items)} does not exist",
        f"{first.relative_to(items)} is empty",
    }
    assert shown(items)[0] == 1


def test_chunks_of_zeros_that_were_not_written(files: Path) -> None:
    """Nothing tells a lost chunk from them, so nothing is claimed."""
    metadata = files / "0/items/_METADATA"
    without = json.loads(metadata.read_text()) | {"store_array_data_equal_to_fill_value": False}
    metadata.write_text(json.dumps(without))
    biggest(files / "0/items").unlink()
    code, text = shown(files)
    assert code == 0
    assert f"{NOT_LOOKED} (chunks that are all zero were not written" in text
    assert "--values reads all" in text


def test_lost_files_of_a_database_without_chunks_of_zeros(run: Path) -> None:
    metadata = run / "0/items/_METADATA"
    without = json.loads(metadata.read_text()) | {"store_array_data_equal_to_fill_value": False}
    metadata.write_text(json.dumps(without))
    assert inspect_checkpoint(run).loads
    biggest(run / "0/items").unlink()
    assert chunks(inspect_checkpoint(run)) > 0


def test_index_names_the_files_and_how_long_they_must_be(run: Path) -> None:
    items = run / "0/items"
    extents = read_extents(Location(str(items)), tensorstore_context())
    assert extents is not None
    needed: dict[str, int] = {}
    for extent in filter(None, extents.values()):
        needed[extent.file] = max(extent.stop, needed.get(extent.file, 0))
    assert len(needed) > 2
    assert all(0 < stop <= (items / file).stat().st_size for file, stop in needed.items())
    next((items / "d").iterdir()).unlink()
    with pytest.raises(CorruptMetadataError, match="cannot read the index of"):
        read_extents(Location(str(items)), tensorstore_context())


def test_index_of_several_nodes(tmp_path: Path) -> None:
    config = {"max_decoded_node_bytes": 300, "max_inline_value_bytes": 10}
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{tmp_path}/", "config": config}).result()
    with ts.Transaction() as transaction:
        for number in range(40):
            store.with_transaction(transaction)[f"layer/c/{number}"] = b"x" * (5 if number == 7 else 20)
    extents = read_extents(Location(str(tmp_path)), tensorstore_context())
    assert extents is not None
    assert extents.keys() == {f"layer/c/{number}" for number in range(40)}
    assert [key for key, extent in extents.items() if extent is None] == ["layer/c/7"]
    assert all(extent is None or (tmp_path / extent.file).is_file() for extent in extents.values())


def test_bucket_is_looked_at_with_few_requests(proxy: gcs.Proxy, run: Path, files: Path) -> None:
    server = gcs.shared()[0]
    for name, path in (("database", run), ("files", files)):
        prefix = f"data-files-{name}"
        server.upload(path, gcs.BUCKET, f"{prefix}/")
        open_checkpoint(f"gs://{gcs.BUCKET}/{prefix}/0/items")
        opened = proxy.counts()
        proxy.clear()
        found = inspect_checkpoint(f"gs://{gcs.BUCKET}/{prefix}/0/items")
        more = proxy.counts() - opened
        assert found.data.checked
        assert found.loads
        # One listing of all files, and one of the run's steps, which `inspect` names.
        assert more["list"] == 2
        assert more["read"] <= 3, "the manifest and the nodes of the database's B-tree"
        proxy.clear()
    lost = biggest(run / "0/items").relative_to(run)
    proxy.faults = [gcs.Fault("list .*items/$", status=200, body=json.dumps({"items": []}), after=1)]
    found = inspect_checkpoint(f"gs://{gcs.BUCKET}/data-files-database/0/items")
    assert any(str(lost).removeprefix("0/items/") in leaf.first for leaf in found.data.missing)


def test_bucket_with_too_many_files(proxy: gcs.Proxy, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_files, "_MOST_FILES_REMOTE", 12)
    gcs.shared()[0].upload(run, gcs.BUCKET, "data-files-many/")
    proxy.page_size = 4
    try:
        code, text = shown(f"gs://{gcs.BUCKET}/data-files-many/0/items")
    finally:
        proxy.page_size = None
    assert code == 0
    assert f"{NOT_LOOKED} (there are more than 12 files)" in text
    assert sum(request.name.endswith("/items/") for request in proxy.requests if request.kind == "list") <= 8


def test_directory_that_may_not_be_listed() -> None:
    """Its files can be read by name, so the checkpoint loads."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        run = Path(shutil.copytree(FIXTURES / "moe_v2/checkpoints", Path(directory) / "run"))
        data = run / "0/items/ocdbt.process_0/d"
        data.chmod(0o311)
        try:
            with unprivileged():
                found = inspect_checkpoint(run)
        finally:
            data.chmod(0o755)
    assert found.loads
    assert not found.data.checked
    assert "cannot list" in found.data.detail


SUBSTITUTES: dict[str, tuple[bytes, str]] = {
    "Git LFS": (POINTER, LFS),
    "HTML": (b"\n<!DOCTYPE html><html><body>403</body></html>", "is an HTML page"),
    "XML": (
        b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
        "is an error message of a storage",
    ),
    "nothing": (b"", "is empty"),
    "zero bytes": (b"\0" * 500, "holds only zero bytes"),
}


@pytest.mark.parametrize("what", SUBSTITUTES)
@pytest.mark.parametrize(
    ("name", "between"),
    [
        ("_CHECKPOINT_METADATA", ": is not valid JSON: it"),
        ("items/_METADATA", ":"),
        ("items/manifest.ocdbt", ""),
    ],
)
def test_what_lies_in_place_of_metadata(tmp_path: Path, name: str, between: str, what: str) -> None:
    run = Path(shutil.copytree(FIXTURES / "moe_024/checkpoints", tmp_path / "run"))
    content, says = SUBSTITUTES[what]
    (run / "0" / name).write_bytes(content)
    with pytest.raises(MaxTextLoadError) as caught:
        open_checkpoint(run)
    assert f"{run}/0/{name}{between} {says}" in str(caught.value)


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "items/_METADATA"])
def test_metadata_that_ends_in_the_middle(tmp_path: Path, name: str) -> None:
    run = Path(shutil.copytree(FIXTURES / "moe_024/checkpoints", tmp_path / "run"))
    cut(run / "0" / name, 60)
    with pytest.raises(MaxTextLoadError, match="ends in the middle, after 60 bytes"):
        open_checkpoint(run)


@pytest.mark.parametrize("pattern", ["items/d/*", "items/ocdbt.process_0/d/*"])
def test_pointers_in_place_of_a_databases_files(run: Path, pattern: str) -> None:
    for file in (run / "0").glob(pattern):
        file.write_bytes(POINTER)
    with pytest.raises(MaxTextLoadError) as caught:
        regions(open_checkpoint(run))
    assert LFS in str(caught.value)


@pytest.mark.parametrize("pattern", ["zarr.json", "0"])
def test_pointers_in_place_of_an_arrays_files(files: Path, pattern: str) -> None:
    for file in (files / "0/items").rglob(pattern):
        if file.is_file():
            file.write_bytes(POINTER)
    with pytest.raises(MaxTextLoadError) as caught:
        regions(open_checkpoint(files))
    assert LFS in str(caught.value)


def test_pointers_in_a_bucket(proxy: gcs.Proxy, run: Path) -> None:
    for file in (run / "0/items").glob("ocdbt.process_0/d/*"):
        file.write_bytes(POINTER)
    gcs.shared()[0].upload(run, gcs.BUCKET, "data-files-pointers/")
    checkpoint = open_checkpoint(f"gs://{gcs.BUCKET}/data-files-pointers")
    with pytest.raises(MaxTextLoadError) as caught:
        regions(checkpoint)
    assert LFS in str(caught.value)


def test_a_lost_manifest_where_one_process_wrote(run: Path) -> None:
    expected = regions(open_checkpoint(run))
    (run / "0/items/manifest.ocdbt").unlink()
    shutil.rmtree(run / "0/items/d")
    actual = regions(open_checkpoint(run))
    assert all((one.array == other.array).all() for one, other in zip(actual, expected, strict=True))
    found = inspect_checkpoint(run)
    assert found.loads
    assert found.data.checked
    biggest(run / "0/items").unlink()
    assert not inspect_checkpoint(run).loads


def test_a_lost_manifest_and_a_lost_chunk(run: Path) -> None:
    part = run / "0/items/ocdbt.process_0"
    (run / "0/items/manifest.ocdbt").unlink()
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{part}/"}).result()
    chunk = "params.params.token_embedder.embedding/c/1/0"
    store.delete_range(ts.KvStore.KeyRange(chunk, chunk + "\0")).result()
    says = "manifest.ocdbt does not exist next to ocdbt.process_0, and it does not hold every chunk.*finalize"
    with pytest.raises(CorruptMetadataError, match=says):
        open_checkpoint(run)
