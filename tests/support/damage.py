"""Checkpoints on a disk and in the bucket, read without a model; other forms of them, and damage to them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import tensorstore as ts

from support import gcs
from support.checkpoints import FIXTURES
from vllm_maxtext_loader.api import Checkpoint
from vllm_maxtext_loader.checkpoint.reader import DecodedRegion, read_regions

CASE = "moe_v2"
"""The fixture whose step stands for any other's."""


class Place:
    """A directory tree, on the disk, and (where the place is a bucket) copied there before it is named."""

    def __init__(self, root: Path, prefix: str | None) -> None:
        self.root = root
        self.prefix = prefix

    @property
    def is_remote(self) -> bool:
        return self.prefix is not None

    def url(self, *parts: str) -> str:
        """What a user would type for a path below the root; copies the tree first."""
        if self.prefix is None:
            return str(self.root.joinpath(*parts))
        gcs.shared()[0].upload(self.root, gcs.BUCKET, f"{self.prefix}/")
        return "/".join([f"gs://{gcs.BUCKET}/{self.prefix}", *parts])

    def step(self, name: str = "0", *, parent: str = "run") -> Path:
        """Adds a step of the run, as MaxText wrote it."""
        return Path(shutil.copytree(FIXTURES / CASE / "checkpoints/0", self.root / parent / name))


def regions(checkpoint: Checkpoint) -> list[DecodedRegion]:
    tree = checkpoint.tree
    return [
        dataclasses.replace(decoded, array=decoded.array.copy())
        for decoded in read_regions(
            tree.leaves.values(), tree.arrays, checkpoint.concurrent_bytes, checkpoint.plan.where
        )
    ]


def without_database(source: Path, target: Path) -> Path:
    """A copy of a run whose arrays lie in a directory each: the OCDBT database's content as plain files."""
    ignored = shutil.ignore_patterns("d", "ocdbt.process_*", "manifest.ocdbt", "array_metadatas", "_sharding")
    shutil.copytree(source, target, ignore=ignored)
    for items in source.glob("*/items"):
        store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{items}/"}).result()
        for key in store.list().result():
            path = target / items.relative_to(source) / key.decode()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(store.read(key).result().value)
        metadata = target / items.relative_to(source) / "_METADATA"
        metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"use_ocdbt": False}))
    return target


def biggest(directory: Path) -> Path:
    """The largest file of array data."""
    found = (path for path in directory.rglob("*") if path.is_file() and {"c", "d"} & set(path.parts))
    return max(found, key=lambda path: path.stat().st_size)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """As a user who may not read everything; root may."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
