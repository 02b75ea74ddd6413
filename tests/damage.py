"""Reading a checkpoint without a model, other forms of one, and damage to it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import tensorstore as ts

from vllm_maxtext_loader.api import Checkpoint
from vllm_maxtext_loader.checkpoint.reader import Piece, read_pieces


def pieces(checkpoint: Checkpoint) -> list[Piece]:
    tree = checkpoint.tree
    return list(
        read_pieces(tree.leaves.values(), tree.arrays, checkpoint.concurrent_bytes, checkpoint.plan.where)
    )


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
