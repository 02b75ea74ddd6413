"""Memory that is decoded into and used over and over.

New memory for every region would cost the kernel as long to hand out as the decoder needs to fill it.
"""

from __future__ import annotations

import collections
import math
import mmap

import numpy as np

_ALIGNMENT = 64
"""Bytes; JAX on the CPU takes memory so aligned without copying it."""


class Ring:
    """Memory for regions that are taken and given back in the same order.

    Args:
        size: bytes. Pages that were never used cost nothing.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._memory = aligned(size)
        self._in_use: collections.deque[tuple[int, int]] = collections.deque()

    def allocate(self, size: int) -> np.ndarray | None:
        """`size` bytes, aligned for JAX; None where they are not free. With nothing taken, any size is given."""
        size = math.ceil(size / _ALIGNMENT) * _ALIGNMENT
        if not self._in_use and size > self._size:
            # Kept for the next one of this size: new memory would cost as much as decoding into it.
            self._memory, self._size = aligned(size), size
        first, last = (self._in_use[0][0], self._in_use[-1][1]) if self._in_use else (0, 0)
        wrapped = bool(self._in_use) and last <= first
        start = last
        if not wrapped and last + size > self._size:
            start, wrapped = 0, True
        if wrapped and start + size > first:
            return None
        self._in_use.append((start, start + size))
        return self._memory[start : start + size]

    def release(self) -> None:
        """Frees what was taken first."""
        self._in_use.popleft()


def aligned(size: int) -> np.ndarray:
    """`size` bytes of zeros that JAX on the CPU takes without copying them; pages that were never used cost nothing.

    Not NumPy's own memory: that asks for huge pages, and where a virtual machine's host takes freed memory back (free page
    reporting, by blocks of that very size), a huge page is one that the host has to give anew.
    """
    memory = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, np.uint8)[:size]
