"""Compares what `Holdings` says of leaves with where their values really go; for a process with four devices.

Every leaf of a fixture's plan gets arrays of its own, spread over the devices of three hosts, their columns moved in runs as packing
moves them.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from support.checkpoints import cases
from vllm_maxtext_loader import open_checkpoint
from vllm_maxtext_loader.checkpoint.reader import DecodedRegion
from vllm_maxtext_loader.checkpoint.regions import chunk_regions
from vllm_maxtext_loader.tpu.columns import ColumnRange
from vllm_maxtext_loader.tpu.placement import ShardWriter, _layer, _layer_shape
from vllm_maxtext_loader.tpu.shards import PendingArray
from vllm_maxtext_loader.tpu.targets import LayerLeaf

HOSTS = (0, 0, 1, 2)
"""The host of each device."""

DEVICES = len(HOSTS)


def array_of(entry: Any, rng: np.random.Generator) -> PendingArray:
    """An array for one layer of a leaf, sharded and packed at random."""
    name, shape = entry.converter.leaf, _layer_shape(entry)
    groups = LayerLeaf(entry.converter, shape).axis_groups()
    if len(groups) == 2:
        groups = (groups[1], groups[0])
    sizes = [int(np.prod([shape[axis] for axis in group])) for group in groups]
    # Runs of columns in another order, each padded; heads may be repeated.
    cuts = sorted({0, sizes[-1], *rng.integers(0, sizes[-1] + 1, 3).tolist()})
    runs = list(itertools.pairwise(cuts))
    rng.shuffle(runs)
    ranges, start = [], 0
    for first, stop in [*runs, runs[0]]:
        ranges.append(ColumnRange(name, first, start, stop - first))
        start += stop - first + int(rng.integers(0, 3))
    final = [*sizes[:-1], -(-start // DEVICES) * DEVICES]
    devices = np.array(jax.devices())
    specs = [PartitionSpec(*[None] * (len(final) - 1), "x")]
    specs += [PartitionSpec("x")] if final[0] % DEVICES == 0 else []
    specs += (
        [PartitionSpec("x", *[None] * (len(final) - 2), "y")] if final[0] % 4 == 0 and len(final) > 1 else []
    )
    spec = specs[rng.integers(len(specs))]
    mesh = Mesh(devices.reshape(2, 2), ("x", "y")) if "y" in spec else Mesh(devices, ("x",))
    return PendingArray(
        parameters=(name,),
        shape=tuple(final),
        sharding=NamedSharding(mesh, spec),
        axis_groups={name: groups},
        column_ranges=ranges,
        missing_leaves={name},
        on_complete=lambda array: None,
        dtype=entry.leaf.dtype,
    )


def compare(case: str) -> dict[str, Any]:
    """Compares every part of every leaf of a fixture.

    Returns:
        {"regions": how many were compared, "differences": sentences, "larger": boxes that are larger than need be}
    """
    rng = np.random.default_rng(0)
    facts = cases()[case].facts
    plan = open_checkpoint(cases()[case].items, model_name=facts.get("model_name")).trimmed_plan()
    weights, supported = {}, []
    for entry in plan.leaves:
        groups = LayerLeaf(entry.converter, _layer_shape(entry)).axis_groups()
        if max(map(len, groups)) > 2 or not all(groups) or entry.converter.fold == "scale":
            continue
        supported.append(entry)
        arrays = [array_of(entry, rng) for _ in range(2)]
        for number, copy_op in enumerate(entry.copies):
            # The layers of a leaf may be spread in two ways.
            weights[_layer(entry, copy_op), entry.converter.leaf] = arrays[number % 2]
    writer = ShardWriter(None, plan, np.dtype(np.float32), False, weights=weights)  # type: ignore[arg-type]
    holdings = writer.holdings(lambda device: HOSTS[device.id])
    differences, regions, larger = [], 0, 0
    for entry in supported:
        # Smaller chunks than were written, whose edges fall within heads and within experts.
        leaf = dataclasses.replace(entry.leaf, chunks=tuple(-(-size // 3) for size in entry.leaf.shape))
        for region in chunk_regions(leaf, 1):
            regions += 1
            lengths = [part.stop - part.start for part in region]
            numbers = np.arange(np.prod(lengths)).reshape(lengths)
            moved: dict[int, list[np.ndarray]] = {}
            for move in writer._shard_copies(entry, DecodedRegion(leaf, region, numbers, last=False)):
                moved.setdefault(HOSTS[move.device.id], []).append(move.values.ravel())
            needs = holdings(leaf, region)
            assert needs is not None
            said = dict(zip(needs.hosts.tolist(), needs.boxes.tolist(), strict=True))
            for host in {*moved, *said}:
                if host not in said:
                    differences.append(f"{leaf.key} {region}: host {host} needs some of it")
                    continue
                if host not in moved:
                    larger += 1
                    continue
                indices = np.unravel_index(np.unique(np.concatenate(moved[host])), lengths)
                exact = [
                    [int(index.min()) + part.start, int(index.max()) + 1 + part.start]
                    for index, part in zip(indices, region, strict=True)
                ]
                box = said[host]
                if any(low > a or stop < b for (low, stop), (a, b) in zip(box, exact, strict=True)):
                    differences.append(f"{leaf.key} {region}: host {host}: {box}, holds {exact}")
                larger += box != exact
    return {"regions": regions, "differences": differences, "larger": larger}
