"""What the reader sees of an exchange: the regions of this host, those that others read among them, in the plan's order.

**Why no host waits for ever.** All hosts go through the same regions in the same order. Memory is given to regions in this order, and an
owner queues what it sends in this order for each receiver. Take the first region that some host still waits for. Whatever comes
before it has arrived everywhere, so nothing before it holds memory, nor a place in a queue, for longer than writers need. Its
owner is at this region, then it reads it and waits for nobody; or is past it, then it has queued it, and nothing
is in front. Its receivers have memory for it, since it is the next region of each. So it arrives; and then the next one does.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Self

import numpy as np

from vllm_maxtext_loader.checkpoint.exchange.peers import Peers
from vllm_maxtext_loader.checkpoint.exchange.sharing import Assignment, Share
from vllm_maxtext_loader.checkpoint.reader import DecodedRegion
from vllm_maxtext_loader.checkpoint.regions import RegionRead


class Exchange:
    """One load's exchange. As a context: ends on all hosts alike, with the error of the first that fails.

    Args:
        assignment: who reads what.
        peers: the other hosts.
    """

    def __init__(self, assignment: Assignment, peers: Peers) -> None:
        self._peers = peers
        self._own = [share for share in assignment.shares if share.part(peers.host) is not None]

    def __enter__(self) -> Self:
        self._peers.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._peers.finish()
        else:
            self._peers.fail(error)

    def reads(self) -> Iterator[RegionRead]:
        """What this host reads or receives, in order."""
        final = {share.leaf.key: share.number for share in self._own}
        for share in self._own:
            part = share.part(self._peers.host)
            assert part is not None
            last = final[share.leaf.key] == share.number
            if self._is_read_here(share):
                yield RegionRead(share.leaf, share.region, last)
            else:
                yield RegionRead(share.leaf, part, last, source=share.owner, number=share.number)

    def receive(self, read: RegionRead, memory: np.ndarray) -> Future[None]:
        """Receives a region that another host reads, into `memory` (bytes)."""
        assert read.source is not None
        return self._peers.receive(read.source, read.number, memory)

    def offer(self, regions: Iterator[DecodedRegion]) -> Iterator[DecodedRegion]:
        """Passes this host's regions on, and sends the others what they need of those that are read here.

        Args:
            regions: those of `reads`, in order; whoever verifies values has done so.
        """
        for decoded, share in zip(regions, self._own, strict=True):
            for host in share.receivers() if self._is_read_here(share) else ():
                part = share.part(host)
                assert part is not None
                inside = tuple(
                    slice(of.start - whole.start, of.stop - whole.start)
                    for of, whole in zip(part, share.region, strict=True)
                )
                decoded.readers.append(self._peers.send(host, share.number, decoded.array[inside]))
            self._peers.step()
            yield decoded

    def _is_read_here(self, share: Share) -> bool:
        return share.owner is None or share.owner == self._peers.host
