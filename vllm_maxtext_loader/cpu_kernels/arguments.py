"""Small helpers of the kernels: arguments that are refused, rounding, padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def refuse(function: str, **arguments: Any) -> None:
    """Raise for arguments that would be ignored."""
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{function}: {name}={value!r} has no CPU reference")


def cdiv(a: Any, b: int) -> Any:
    """a / b rounded up, for ints and for traced integers."""
    return -(-a // b)


def round_up(value: int, multiple: int) -> int:
    return cdiv(value, multiple) * multiple


def pad_to(array: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Zeros after the end of each axis."""
    return jnp.pad(array, [(0, new - old) for new, old in zip(shape, array.shape, strict=True)])
