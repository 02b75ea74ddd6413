"""What a node says of itself. Sent to nodes that may not have this package, so that it stands on the standard library alone."""

from __future__ import annotations

from typing import Any


def report(distributions: list[str], files: list[str], variables: list[str]) -> dict[str, Any]:
    """Looks around on the node it runs on.

    Args:
        distributions: whose versions are asked for.
        files: paths that should exist.
        variables: of the environment.

    Returns:
        {"host", "versions": {distribution: version or None}, "missing": [path], "environment": {variable: value, where it is set}}
    """
    import importlib.metadata
    import os
    import socket

    def version(distribution: str) -> str | None:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    environment = {name: os.environ[name] for name in variables if name in os.environ}
    own = environment.get("GOOGLE_APPLICATION_CREDENTIALS")
    return {
        "host": socket.gethostname(),
        "versions": {name: version(name) for name in distributions},
        "missing": [path for path in [*files, *([own] if own else [])] if not os.path.exists(path)],
        "environment": environment,
    }
