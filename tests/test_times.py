"""The parts of the summary line: where the time of a load went, and what would help."""

from __future__ import annotations

import re

import pytest

from vllm_maxtext_loader.checkpoint.storage.ranges import Transfers
from vllm_maxtext_loader.engine.times import LoadTimes

GIB = 1 << 30
FETCHED = Transfers(requests=500, nbytes=3 * GIB, seconds=6.0, request_seconds=600.0)


@pytest.mark.parametrize(
    ("times", "says"),
    [
        (
            LoadTimes(network=4.0, decoding=1.0, placing=2.0, transfers=FETCHED, remote=True),
            "in the bucket's region",
        ),
        (
            LoadTimes(network=4.0, transfers=Transfers(9, GIB, 6.0, 60.0), remote=True),
            "network was the limit: a larger concurrent_gib",
        ),
        (
            LoadTimes(network=1.0, decoding=4.0, transfers=FETCHED, remote=True),
            "decoding was the limit: more cores",
        ),
        (
            LoadTimes(network=1.0, hosts=4.0, transfers=FETCHED, remote=True),
            r"for other hosts 4\.0 s, .*other hosts were the limit",
        ),
        (LoadTimes(decoding=4.0, placing=1.0), "reading was the limit: more cores .* faster disk"),
        (LoadTimes(decoding=1.0, placing=4.0), "placing was the limit"),
        (LoadTimes(decoding=1.0, converting=4.0), "converting was the limit"),
    ],
)
def test_what_limited_the_load(times: LoadTimes, says: str) -> None:
    assert re.search(says, times.describe())


def test_network_decoding_and_placing_are_told_apart() -> None:
    times = LoadTimes(network=4.0, decoding=1.0, converting=0.5, placing=2.0, transfers=FETCHED, remote=True)
    assert times.describe().startswith(
        "waiting for the network 4.0 s (3 GiB stored, 0.5 GiB/s, 100 requests in flight), for decoding 1.0 s, "
        "converting 0.5 s, placing 2.0 s; "
    )
    assert (
        LoadTimes(decoding=1.0, placing=2.0)
        .describe()
        .startswith("waiting for storage and decoding 1.0 s, converting 0.0 s, placing 2.0 s; ")
    )
