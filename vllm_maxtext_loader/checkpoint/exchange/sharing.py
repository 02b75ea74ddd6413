"""Which host reads which region: data, computed by every host alike from the plan. Nothing is asked, nothing is sent."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from vllm_maxtext_loader.checkpoint.regions import Region, chunk_regions, region_nbytes
from vllm_maxtext_loader.checkpoint.tree import Leaf

_SMALL_BYTES = 1 << 20
"""A region of less is read by all that need it: one request costs the bucket about as much as a megabyte."""

_SMALL_SHARE = 4096
"""The same of a small checkpoint: regions below so small a part of it."""

_REGIONS_OF_A_HOST = 32
_EVEN_BYTES = 8 << 20
"""As large as a request may be; smaller regions would cost more requests."""

LEAST_SAVED = 0.05
"""Hosts exchange where that saves more than this part of the bytes that all of them would read."""


@dataclasses.dataclass(frozen=True)
class Needs:
    """What hosts need of a region.

    Attributes:
        hosts: those that need any of it, ascending.
        boxes: [hosts, axes, 2]: first index and end, along the leaf's axes, of what each needs.
    """

    hosts: np.ndarray
    boxes: np.ndarray


NeedsOf = Callable[[Leaf, Region], Needs | None]
"""What hosts need of a region; None where every host needs all of it and must read it itself."""


@dataclasses.dataclass(frozen=True)
class Share:
    """A region, and who reads it.

    Attributes:
        number: position among all shares; every host's numbers are the same.
        leaf, region: what is read.
        owner: the host that reads it and sends it to the others; None where every host that needs it reads it.
        needs: who needs which part; None means that all hosts need all of it.
    """

    number: int
    leaf: Leaf
    region: Region
    owner: int | None
    needs: Needs | None

    @property
    def nbytes(self) -> int:
        """Decoded size of the region."""
        return region_nbytes(self.region, self.leaf.dtype.itemsize)

    def part(self, host: int) -> Region | None:
        """The part that a host needs; None where it needs nothing."""
        if self.needs is None:
            return self.region
        found = np.flatnonzero(self.needs.hosts == host)
        if not found.size:
            return None
        return tuple(slice(int(first), int(stop)) for first, stop in self.needs.boxes[found[0]])

    def receivers(self) -> list[int]:
        """The hosts that the owner sends a part to."""
        if self.owner is None or self.needs is None:
            return []
        return [int(host) for host in self.needs.hosts if host != self.owner]


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Every region of a plan, in order, and what each host reads of them.

    Attributes:
        shares: regions that some host needs, in the order in which all hosts go through them.
        read: bytes that each host reads, by host.
        alone: the same, where every host reads for itself.
    """

    shares: Sequence[Share]
    read: dict[int, int]
    alone: dict[int, int]

    @property
    def is_gain(self) -> bool:
        """Whether the hosts read noticeably less in all."""
        return sum(self.read.values()) < (1 - LEAST_SAVED) * sum(self.alone.values())

    def digest(self) -> str:
        """The same for hosts that agree in every region, owner and part."""
        found = hashlib.sha256()
        for share in self.shares:
            bounds = [(part.start, part.stop) for part in share.region]
            found.update(f"{share.leaf.key} {bounds} {share.owner}".encode())
            if share.needs is not None:
                found.update(np.ascontiguousarray(share.needs.boxes).tobytes())
        return found.hexdigest()


def small_nbytes(total: int) -> int:
    """Regions of fewer bytes are read by every host that needs them.

    Args:
        total: decoded size of the checkpoint.
    """
    return min(_SMALL_BYTES, total // _SMALL_SHARE)


def even_nbytes(total: int, hosts: int) -> int:
    """Regions of so many bytes are enough for hosts to read about equally much.

    Args:
        total: decoded size of the checkpoint.
        hosts: how many.
    """
    return max(_EVEN_BYTES, total // (hosts * _REGIONS_OF_A_HOST))


def assign(
    leaves: Iterable[Leaf], hosts: Sequence[int], limit: int, needs_of: NeedsOf, small: int
) -> Assignment:
    """Gives each region to the host that has the fewest bytes so far, of those that need it (of equals, the first).

    Args:
        leaves: what is read, in order.
        hosts: all hosts, ascending.
        limit: bytes of a region; see `chunk_regions`. The same on every host.
        needs_of: what hosts need of a region.
        small: regions of fewer bytes have no owner.
    """
    shares: list[Share] = []
    places = np.array(hosts)
    owned, read, alone = (np.zeros(len(places), np.int64) for _ in range(3))
    for leaf in leaves:
        for region in chunk_regions(leaf, limit):
            needs, nbytes = needs_of(leaf, region), region_nbytes(region, leaf.dtype.itemsize)
            needing = np.arange(len(places)) if needs is None else np.searchsorted(places, needs.hosts)
            if not needing.size:
                continue
            alone[needing] += nbytes
            owner = None
            if needs is None or nbytes < small:
                read[needing] += nbytes
            else:
                first = needing[np.argmin(owned[needing])]
                owner = int(places[first])
                owned[first] += nbytes
                read[first] += nbytes
            shares.append(Share(len(shares), leaf, region, owner, needs))
    return Assignment(
        shares,
        dict(zip(places.tolist(), read.tolist(), strict=True)),
        dict(zip(places.tolist(), alone.tolist(), strict=True)),
    )
