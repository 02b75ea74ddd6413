"""Recognizes what lies in place of a file: a pointer of Git LFS, an error page, nothing.

Downloads and clones leave these, and every parser calls them damaged. Nothing is looked at before a parser
has failed.
"""

from __future__ import annotations

import re

from vllm_maxtext_loader.checkpoint.storage.path import Location
from vllm_maxtext_loader.errors import MaxTextLoadError

_GIT_LFS = b"version https://git-lfs.github.com/spec/v1"
_LFS_SIZES = range(100, 1025)
"""Bytes of a pointer: its specification allows less than 1024."""

_MOST_FILES = 1000
_MOST_READS = 8
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')


def describe_substitute(content: bytes, *, is_json: bool = False) -> str | None:
    """What a file is instead, and what to do ("is a Git LFS pointer, …"); None where nothing known is found.

    Args:
        content: the file's content, or its beginning.
        is_json: whether `content` is whole and should be a JSON object.
    """
    start = content[:1024].lstrip().lower()
    if content.startswith(_GIT_LFS):
        return (
            "is a Git LFS pointer, not the file: run `git lfs pull` in the clone, or download the "
            "checkpoint with a client that follows the pointers."
        )
    if start.startswith((b"<!doctype html", b"<html")):
        return "is an HTML page, such as a web server or proxy sends with an error: download the file again."
    if start.startswith(b"<?xml") and b"<error>" in start:
        return "is an error message of a storage server (XML), not the file: download the file again."
    if not content:
        return "is empty: the copy or download did not finish. Copy it again."
    if not content.strip(b"\0"):
        return "holds only zero bytes: the copy or download did not finish. Copy it again."
    if is_json and start.startswith(b"{") and not content.rstrip().endswith(b"}"):
        return (
            f"is damaged: it ends in the middle, after {len(content):,} bytes; the copy or download did not "
            "finish. Copy the checkpoint again."
        )
    return None


def find_substitute(directory: Location, message: str) -> str | None:
    """The file that TensorStore could not read, and what it is instead; None where nothing known is found.

    Costs a few small reads and a listing, all after a failure.

    Args:
        directory: what was being read.
        message: what TensorStore said: it quotes the path of the file, or the key of a chunk.
    """
    try:
        sizes = directory.sizes(_MOST_FILES) or {}
        quoted = {text.removeprefix(f"{directory.url}/") for text in _QUOTED.findall(message)}
        named = [name for name in sizes if name in quoted]
        pointers = [name for name, size in sizes.items() if size in _LFS_SIZES and name not in named]
        # A database's files have names of hexadecimal digits; the manifest is the first to be read.
        pointers.sort(key=lambda name: not name.endswith("manifest.ocdbt"))
        for name in [*(name for name in named if sizes[name] < 1 << 20), *pointers][:_MOST_READS]:
            content = (directory / name).read_bytes()
            if (found := describe_substitute(content)) and (name in named or content.startswith(_GIT_LFS)):
                return f"{directory / name} {found}"
    except (OSError, MaxTextLoadError):
        # The failure itself is reported all the same.
        return None
    return None
