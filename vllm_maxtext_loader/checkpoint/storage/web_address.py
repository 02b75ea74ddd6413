"""Web addresses of a bucket's content, as browsers show them: refused with the gs:// form that was meant."""

from __future__ import annotations

import urllib.parse

from vllm_maxtext_loader.checkpoint.storage.retry import redact
from vllm_maxtext_loader.errors import CheckpointNotFoundError

_DOWNLOAD_HOSTS = (
    "storage.googleapis.com",
    "storage.cloud.google.com",
    "storage.mtls.googleapis.com",
    "storage.mtls.cloud.google.com",
    "storage-download.googleapis.com",
    "commondatastorage.googleapis.com",
)
_CONSOLE_HOSTS = ("console.cloud.google.com", "console.developers.google.com")
_CONSOLE_PREFIXES = (
    ("storage", "browser", "_details"),
    ("storage", "browser"),
    ("storage", "overview"),
)
_API_HOST = "www.googleapis.com"


def refuse_web_address(text: str) -> None:
    """Refuses the address of a page or a download of Cloud Storage; with or without its "https://".

    Raises:
        CheckpointNotFoundError: with the gs:// form. The query, which may be a signature, is left out.
    """
    has_scheme = text.lower().startswith(("https://", "http://"))
    try:
        parsed = urllib.parse.urlsplit(text if has_scheme else f"https://{text}")
        host = (parsed.hostname or "").lower()
    except ValueError:
        return
    parts = _object_of(host, [urllib.parse.unquote(part) for part in parsed.path.split("/") if part])
    if parts is None:
        return
    meant = "gs://" + "/".join(part for part in parts if part) if parts else "gs://BUCKET/path"
    raise CheckpointNotFoundError(
        f"{redact(f'https://{host}{parsed.path}')}: is a web address; give the path in the bucket: {redact(meant)}"
    )


def _object_of(host: str, path: list[str]) -> list[str] | None:
    """Bucket and object that an address shows, in parts; None where it is not an address of Cloud Storage."""
    if host in _CONSOLE_HOSTS:
        # The console appends its state to the last part: "checkpoints;tab=objects".
        shown = [part.partition(";")[0] for part in path]
        for prefix in _CONSOLE_PREFIXES:
            if tuple(shown[: len(prefix)]) == prefix:
                return shown[len(prefix) :]
        return []
    if host in _DOWNLOAD_HOSTS or host == _API_HOST:
        if path[:1] == ["download"]:
            path = path[1:]
        if path[:3] == ["storage", "v1", "b"]:
            bucket, *rest = path[3:] or [""]
            return [bucket, *(part for part in rest[1:] for part in part.split("/"))]
        return None if host == _API_HOST else path
    for known in _DOWNLOAD_HOSTS:
        if host.endswith(f".{known}"):
            return [host.removesuffix(f".{known}"), *path]
    return None
