"""The progress bar over bytes of array data, for the commands and for the loader."""

from __future__ import annotations

import sys

from tqdm import tqdm


def byte_bar(
    total: int, description: str, *, disable: bool | None = None, delay: float = 0.0, leave: bool = True
) -> tqdm:
    """A bar on stderr that counts bytes.

    Args:
        total: bytes.
        description: in front of the bar.
        disable: whether to show nothing; None means where stderr is not a terminal.
        delay: seconds before the bar appears.
        leave: whether the bar stays when it is closed.
    """
    return tqdm(
        total=total,
        desc=description,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=disable,
        delay=delay,
        leave=leave,
        file=sys.stderr,
    )
