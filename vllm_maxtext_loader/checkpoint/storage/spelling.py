"""Paths that lost or gained something on their way: a slash, the scheme, quotes, a percent-encoding.

A path of the local disk that exists is taken as it is, however it looks.
"""

from __future__ import annotations

import os
import re
import urllib.parse

from vllm_maxtext_loader.checkpoint.storage import gcs
from vllm_maxtext_loader.checkpoint.storage.retry import redact
from vllm_maxtext_loader.checkpoint.storage.web_address import refuse_web_address
from vllm_maxtext_loader.errors import CheckpointNotFoundError

_AROUND = " \t\r\n\"'`\u201c\u201d\u2018\u2019<>()[]{},;\u00a0\u200b\ufeff"
"""What a pasted path has around it: quotes of all kinds, brackets of chat programs, invisible spaces."""

_WEB = re.compile(r"(?i)(?:^|[^a-z0-9])https?:[/\\]+(?P<rest>.+)", re.DOTALL)
_GS = re.compile(r"(?i)(?:^(?:gc?s)[:;]|(?:^|.*[^a-z0-9])gc?s[:;][/\\])[/\\]*(?P<rest>.+)", re.DOTALL)
_GS_WITHOUT_COLON = re.compile(r"(?i)gc?s[/\\]{2,}(?P<rest>.+)", re.DOTALL)
_GS_WITHOUT_SCHEME = re.compile(r":?//(?P<rest>[^/].*)", re.DOTALL)
_MOUNTED = re.compile(r"/(?:gcs|gs)/(?P<rest>.+)", re.DOTALL)
"""Where Vertex AI mounts buckets."""
_FILE = re.compile(r"(?i)file:/*(?P<rest>/.+)", re.DOTALL)


def refuse_misspelled(text: str) -> None:
    """Refuses what is no path of the disk and resembles one of a bucket, or of the disk in quotes.

    Raises:
        CheckpointNotFoundError: with the form that was meant.
    """
    if _exists(text):
        return
    for form in (text, urllib.parse.unquote(text)):
        if web := _WEB.search(form.strip(_AROUND)):
            refuse_web_address(f"https://{web['rest'].strip(_AROUND)}")
    if (meant := _meant(text)) is not None and meant != text:
        pathlib = " (A pathlib.Path drops a slash.)" if re.search(r"(?i):/(?!/)", text) else ""
        raise CheckpointNotFoundError(
            f"{_shown(text)}: no such checkpoint directory. Did you mean {_shown(meant)}?{pathlib}"
        )


def _meant(text: str) -> str | None:
    """The path that a text is a spelling of; None where it looks like none."""
    bare = text.strip(_AROUND)
    if re.search(r"(?i)%(?:3A|2F)", bare) and "/" not in bare:
        bare = urllib.parse.unquote(bare).strip(_AROUND)
    if match := _GS.match(bare):
        return _in_bucket(match["rest"])
    if match := _FILE.fullmatch(bare):
        return f"file://{match['rest']}"
    if match := _GS_WITHOUT_COLON.fullmatch(bare):
        return _in_bucket(match["rest"])
    if (match := _GS_WITHOUT_SCHEME.fullmatch(bare) or _MOUNTED.fullmatch(bare)) and _is_bucket(
        match["rest"]
    ):
        return _in_bucket(match["rest"])
    return bare if bare != text and _exists(bare) else None


def spelling_hint(text: str, url: str) -> str:
    """A sentence, or nothing, on what was meant by a path that leads nowhere.

    Args:
        text: what was typed.
        url: what it was taken for.
    """
    text = text.strip()
    bare = text.rstrip(_AROUND)
    decoded = urllib.parse.unquote(bare)
    if decoded != text:
        return f" Did you mean {_shown(decoded)}?"
    if not text.isprintable():
        return " The path has characters that cannot be seen."
    if "$" in text:
        return " Is a variable in it that was not expanded?"
    if "?" in text:
        return f" Did you mean {_shown(text)}?"
    if match := re.match(r"([^*]*)/[^/]*\*", text):
        return f" Give a directory, not a pattern: {_shown(match[1])}"
    path = text.removeprefix("/")
    first = path.partition("/")[0]
    is_local = not url.startswith("gs://") and "://" not in text
    top = text.removesuffix(path) + first
    if is_local and "/" in path.rstrip("/") and _is_bucket(path) and not _exists(top):
        return f" If it is in a bucket, give {_shown(_in_bucket(path))}."
    return ""


def bucket_hint(rest: str) -> str:
    """A sentence, or nothing, on what was meant by a gs:// URL without a valid bucket name.

    Args:
        rest: what follows "gs://".
    """
    for form in (rest, urllib.parse.unquote(rest)):
        meant = _meant(form) or _in_bucket(form.strip(_AROUND))
        if meant != f"gs://{rest}" and _is_bucket(meant.removeprefix("gs://")):
            return f" Did you mean {_shown(meant)}?"
    return ""


def _in_bucket(rest: str) -> str:
    return "gs://" + rest.replace("\\", "/").lstrip("/").rstrip(_AROUND)


def _is_bucket(path: str) -> bool:
    """Whether the first part of a path could be a bucket's name."""
    return gcs.is_bucket_name(path.partition("/")[0])


def _exists(text: str) -> bool:
    return os.path.lexists(os.path.expanduser(text))


def _shown(text: str) -> str:
    """For messages: without secrets, and without a query, which may be a signature."""
    return redact(text.partition("?")[0])
