"""Where the time of a load went, and what limited it: parts of the summary line."""

from __future__ import annotations

import dataclasses
import os

from vllm_maxtext_loader.checkpoint.storage.ranges import REQUESTS, Transfers
from vllm_maxtext_loader.options import GIB


@dataclasses.dataclass
class LoadTimes:
    """Where the time of a load went, as its consumer sees it: what overlaps with placing is not counted.

    Attributes:
        network: seconds in which the bytes of the next region had not arrived; from a bucket only.
        decoding: seconds in which they were being decoded; from a disk this is reading and decoding.
        hosts: seconds in which the next region had not arrived from the host that reads it.
        converting: seconds in which the host rearranged what the device does not take directly.
        placing: the rest.
        transfers: what was fetched; empty where a disk was read.
        remote: whether a bucket was read.
    """

    network: float = 0.0
    decoding: float = 0.0
    hosts: float = 0.0
    converting: float = 0.0
    placing: float = 0.0
    transfers: Transfers = dataclasses.field(default_factory=Transfers)
    remote: bool = False

    def describe(self) -> str:
        """The times, and what limited the load."""
        rest = f"converting {self.converting:.1f} s, placing {self.placing:.1f} s"
        if not self.remote:
            return f"waiting for storage and decoding {self.decoding:.1f} s, {rest}; {self._limit()}"
        fetched = self.transfers
        rate = fetched.nbytes / fetched.seconds / GIB if fetched.seconds else 0.0
        hosts = f"for other hosts {self.hosts:.1f} s, " if self.hosts else ""
        return (
            f"waiting for the network {self.network:.1f} s ({fetched.nbytes / GIB:.3g} GiB stored, {rate:.3g} GiB/s, "
            f"{fetched.in_flight:.0f} requests in flight), for decoding {self.decoding:.1f} s, {hosts}{rest}; {self._limit()}"
        )

    def _limit(self) -> str:
        longest = max(self.network, self.decoding, self.hosts, self.converting, self.placing)
        if longest == self.placing:
            return "placing was the limit: the devices, or the host's memory"
        if longest == self.hosts:
            return "other hosts were the limit: their lines say what limited them"
        if longest == self.converting:
            return "converting was the limit: faster cores help"
        if longest == self.decoding:
            cores = f"more cores than {len(os.sched_getaffinity(0))} help"
            return (
                f"decoding was the limit: {cores}"
                if self.remote
                else f"reading was the limit: {cores}, or a faster disk"
            )
        if self.transfers.in_flight < REQUESTS / 2:
            return "the network was the limit: a larger concurrent_gib allows more requests in flight"
        return "the network was the limit: a VM in the bucket's region, or with a faster network, helps"
