"""What is in a checkpoint, and would it load? From metadata and the names and sizes of files; without torch.

Array data is read by `read_values` only.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vllm_maxtext_loader.checkpoint.data_files import DataFiles, check_data_files
from vllm_maxtext_loader.checkpoint.find import TMP_MARK, ItemLocation, locate
from vllm_maxtext_loader.checkpoint.names import STEP_NAME
from vllm_maxtext_loader.checkpoint.reader import DecodedRegion, read_regions
from vllm_maxtext_loader.checkpoint.statistics import ValueStatistics, statistics
from vllm_maxtext_loader.checkpoint.storage.path import Location, tensorstore_context
from vllm_maxtext_loader.checkpoint.tree import Leaf, Tree, read_tree
from vllm_maxtext_loader.conversion.config_check import refuse_sliding_end
from vllm_maxtext_loader.conversion.family import Preset
from vllm_maxtext_loader.conversion.layout import describe
from vllm_maxtext_loader.conversion.plan import Plan, make_plan
from vllm_maxtext_loader.errors import (
    CheckpointNotFoundError,
    CorruptMetadataError,
    MaxTextLoadError,
    NotACheckpointError,
    StorageError,
)
from vllm_maxtext_loader.families import FAMILIES, identify
from vllm_maxtext_loader.huggingface import config as hf_config
from vllm_maxtext_loader.options import read_budget

_STEPS_CHECKED = 20
"""Newest steps of a run that are looked into; each costs a few requests."""

_OTHERS_CHECKED = 5
"""The same for directories that are named otherwise than the steps."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of the run the checkpoint belongs to, or what resembles one.

    Attributes:
        number: training step.
        committed: whether its write was finished and it can be read; None where that is not known.
        detail: why not.
        name: of its directory.
        passed_over: whether it is named otherwise than the run's steps, which makes it none of them.
    """

    number: int
    committed: bool | None
    detail: str = ""
    name: str = ""
    passed_over: bool = False


@dataclasses.dataclass(frozen=True)
class Inspection:
    """All that metadata and the data files' names and sizes tell, and statistics of values that were read.

    Attributes:
        tree: leaves and storage.
        data: whether the chunks are there.
        plan: what a load would make of it; None where it would not load.
        preset: the published model it is, or is taken for; None where it is none of them, or one of several.
        candidates: published models of these dimensions that shapes do not tell apart.
        asked: the model name that was given, or None.
        error: why it would not load, else None.
        steps: steps of the run, oldest first; empty where the path belongs to no run.
        values: statistics by leaf key, of the leaves that a load reads; None where no array data was read.
    """

    tree: Tree
    data: DataFiles
    plan: Plan | None
    preset: Preset | None
    candidates: tuple[Preset, ...]
    asked: str | None
    error: MaxTextLoadError | None
    steps: tuple[Step, ...]
    values: Mapping[str, ValueStatistics] | None = None

    @property
    def values_ok(self) -> bool | None:
        """Whether every value is finite and no leaf is all zero; None where no array data was read."""
        if self.values is None:
            return None
        return all(found.problem is None for found in self.values.values())

    @property
    def loads(self) -> bool:
        """Whether it would load, perhaps with a configuration, as far as was looked."""
        return self.error is None and not self.data.missing

    @property
    def needs_config(self) -> bool:
        """Whether it loads only with a Hugging Face configuration, or a model name to take the rest from."""
        return self.loads and self.preset is None

    @property
    def skipped(self) -> dict[str, tuple[int, int]]:
        """Reason -> (number of arrays, decoded bytes) of what is not read."""
        totals: dict[str, tuple[int, int]] = {}
        entries = [(entry.reason, entry.nbytes) for entry in self.tree.skipped]
        entries += [(reason, leaf.nbytes) for leaf, reason in self.plan.unused] if self.plan else []
        for reason, nbytes in entries:
            arrays, total = totals.get(reason, (0, 0))
            totals[reason] = arrays + 1, total + nbytes
        return totals

    @property
    def dtypes(self) -> dict[str, int]:
        """Decoded bytes of the model's leaves by dtype."""
        sizes: collections.Counter[str] = collections.Counter()
        for leaf in self.tree.leaves.values():
            sizes[leaf.dtype.name] += leaf.nbytes
        return dict(sizes.most_common())

    @property
    def compression(self) -> str:
        """Codecs of the arrays, most frequent first, e.g. "zstd 3"; "none"."""
        found = collections.Counter(
            _codec(array.codec.to_json() if array.codec else {}) for array in self.tree.arrays.values()
        )
        return ", ".join(name for name, _ in found.most_common())

    def to_json(self) -> dict[str, Any]:
        """What `vllm-maxtext inspect --json` prints; see its help."""
        tree, plan, location = self.tree, self.plan, self.tree.location
        preset = self.preset
        return {
            "checkpoint": str(location.items),
            "requested": str(location.requested),
            "step": location.step,
            "loads": self.loads,
            "needs_config": self.needs_config,
            "error": self.error and {"type": type(self.error).__name__, "message": str(self.error)},
            "data_files": dataclasses.asdict(self.data),
            "values_ok": self.values_ok,
            "model": {
                "family": plan and plan.family.name,
                "name": preset and preset.name,
                "published": preset and preset.published[0],
                "candidates": [candidate.name for candidate in self.candidates],
                "dims": plan and _dims_json(plan),
            },
            "layout": plan
            and {
                "description": describe(plan.layout),
                "title": plan.layout.title,
                "scan_axis": plan.layout.scan_axis,
                "blocks": plan.layout.blocks,
                "layers": plan.layout.num_layers,
            },
            "wrapper": tree.writer,
            "storage": {"ocdbt": tree.ocdbt, "zarr": 3 if tree.zarr3 else 2, "compression": self.compression},
            "dtypes": self.dtypes,
            "bytes": tree.nbytes,
            "skipped_bytes": sum(total for _, total in self.skipped.values()),
            "tensors": plan and len(plan.targets),
            "notes": list(plan.notes) if plan else [],
            "leaves": [
                {
                    "key": leaf.key,
                    "name": leaf.name,
                    "container": container_of(leaf)[0],
                    "shape": list(leaf.shape),
                    "dtype": leaf.dtype.name,
                    "chunk": list(leaf.chunks),
                    "chunks": count_chunks(leaf),
                    "bytes": leaf.nbytes,
                    "values": self.values[leaf.key].to_json()
                    if self.values and leaf.key in self.values
                    else None,
                }
                for leaf in tree.leaves.values()
            ],
            "skipped": [
                {"reason": reason, "arrays": arrays, "bytes": total}
                for reason, (arrays, total) in self.skipped.items()
            ],
            "steps": [
                {
                    "step": step.number,
                    "name": step.name,
                    "committed": step.committed,
                    "passed_over": step.passed_over,
                    "detail": step.detail,
                }
                for step in self.steps
            ],
        }


def inspect_checkpoint(
    path: str | os.PathLike[str], *, step: int | None = None, model_name: str | None = None
) -> Inspection:
    """Reads a checkpoint's metadata, looks for its data files, and tries to plan a load.

    Args:
        path: local path or gs:// URL of an items directory, a step or a run's checkpoint directory.
        step: step to take from a run's checkpoint directory; None means the newest committed one.
        model_name: published model to take from what shapes cannot tell; None means chosen by shape.

    Raises:
        MaxTextLoadError: there is no committed checkpoint, or its metadata cannot be read. What is wrong with
            the model itself is in `Inspection.error` instead.
    """
    location = locate(path, step)
    context = tensorstore_context()
    tree = read_tree(location, context)
    plan, preset, candidates, error = None, None, (), None
    try:
        plan = make_plan(tree, identify(tree.leaves, str(location.items)))
        preset, candidates = _preset(plan, model_name)
    except MaxTextLoadError as raised:
        error = raised
    try:
        data = check_data_files(
            tree.base, tree.arrays, ocdbt=tree.ocdbt, complete=tree.complete, context=context
        )
    except CorruptMetadataError as raised:
        data, error = DataFiles(False, str(raised)), error or raised
    return Inspection(tree, data, plan, preset, candidates, model_name, error, _steps(location))


def read_values(
    plan: Plan, tree: Tree, on_region: Callable[[DecodedRegion], None] | None = None
) -> dict[str, ValueStatistics]:
    """Reads every leaf that a load reads, once, and takes statistics of its values.

    Args:
        plan: what a load makes of the checkpoint.
        tree: the checkpoint's leaves and opened arrays.
        on_region: called with each region that was counted, for progress.

    Returns:
        Statistics by leaf key.

    Raises:
        ReadError, StorageError: as while loading.
    """
    leaves = [entry.leaf for entry in plan.leaves]
    chunk = max((leaf.chunk_nbytes for leaf in leaves), default=0)
    cores = len(os.sched_getaffinity(0))
    budget = read_budget(None, plan.nbytes, chunk, cores, remote=tree.location.items.is_remote)
    found = {leaf.key: ValueStatistics() for leaf in leaves}
    for decoded in read_regions(leaves, tree.arrays, budget, plan.where):
        found[decoded.leaf.key] += statistics(decoded.array)
        if on_region is not None:
            on_region(decoded)
    return found


def _preset(plan: Plan, model_name: str | None) -> tuple[Preset | None, tuple[Preset, ...]]:
    """The published model to take the rest from, and the candidates where there are several."""
    refuse_sliding_end(plan.family, plan.dims, plan.where)
    if model_name is not None:
        return hf_config.choose_preset(plan.dims, model_name, plan.where), ()
    matched = hf_config.match_presets(plan.dims)
    return (matched[0], ()) if len(matched) == 1 else (None, tuple(matched))


def _steps(location: ItemLocation) -> tuple[Step, ...]:
    """The steps of the checkpoint's run, with temporary directories, and what resembles steps."""
    step_dir = location.step_directory
    run = step_dir and step_dir.parent
    if run is None or step_dir is None:
        return ()
    try:
        names = run.listdir()
    except (OSError, MaxTextLoadError):
        return ()
    schemes: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        if match := STEP_NAME.fullmatch(name.partition(TMP_MARK)[0]):
            schemes.setdefault(match["prefix"] or "", []).append((int(match["number"]), name))

    def look(entries: list[tuple[int, str]], most: int) -> list[Step]:
        entries = sorted(entries, reverse=True)
        with ThreadPoolExecutor(8) as pool:
            found = pool.map(lambda entry: _check(run, *entry, known=step_dir.name), entries[:most])
            steps = [step for step in found if step is not None]
        return steps + [Step(number, None, "not looked into", name) for number, name in entries[most:]]

    own = STEP_NAME.fullmatch(step_dir.name)
    steps = look(schemes.pop("", []), _STEPS_CHECKED)
    if own and own["prefix"] and not any(step.committed is not None for step in steps):
        steps = look(schemes.pop(own["prefix"], []), _STEPS_CHECKED)
    others = look([entry for entries in schemes.values() for entry in entries], _OTHERS_CHECKED)
    steps += [dataclasses.replace(step, passed_over=True) for step in others if step.committed is not None]
    return tuple(sorted(steps, key=lambda step: (step.passed_over, step.number, step.name)))


def _check(run: Location, number: int, name: str, known: str) -> Step | None:
    """One step; None where the directory is no checkpoint.

    Args:
        run: the directory of the steps.
        number: its number.
        name: its directory.
        known: the directory that is known to be committed.
    """
    if TMP_MARK in name:
        return Step(number, False, "temporary directory: its writer has not finished, or died", name)
    if name != known:
        try:
            locate((run / name).url)
        except (CheckpointNotFoundError, NotACheckpointError):
            return None
        except StorageError as error:
            return Step(number, None, str(error), name)
        except MaxTextLoadError as error:
            return Step(number, False, str(error), name)
    return Step(number, True, name=name)


def _dims_json(plan: Plan) -> dict[str, Any]:
    """Dimensions for people and scripts: sizes by name, and per layer what kind of layer it is."""
    of_layers = {tag for layer in plan.dims.layers for tag in layer.tags}
    tags = ["sliding", *(tag for tag in plan.family.tag_fields if tag in of_layers - {"sliding"})]
    layers = [{**layer.sizes, **{tag: tag in layer.tags for tag in tags}} for layer in plan.dims.layers]
    return {**plan.dims.to_json(), "layers": layers}


def container_of(leaf: Leaf) -> tuple[str, str, int | None]:
    """Where a leaf lies.

    Returns:
        (path of its container, the same with `*` for the layer's number, that number or None).
    """
    for group in (group for family in FAMILIES for group in family.groups):
        if match := re.match(group.pattern + r"\.", leaf.name):
            path = match.group(0).removesuffix(".")
            if not match.lastindex:
                return path, path, None
            start, stop = match.span(1)
            return path, f"{path[:start]}*{path[stop:]}", int(match.group(1))
    # Leaves that are nobody's layer: decoder_norm and its like, or what a refused tree holds.
    depth = 1 if leaf.path[:2] == ("decoder", "decoder_norm") else min(2, len(leaf.path) - 1)
    parent = ".".join(leaf.path[:depth])
    return parent, parent, None


def count_chunks(leaf: Leaf) -> int:
    """Number of stored chunks of a leaf."""
    return math.prod(math.ceil(size / chunk) for size, chunk in zip(leaf.shape, leaf.chunks, strict=True))


def _codec(codec: dict[str, Any]) -> str:
    """Compression of a TensorStore codec specification (zarr v2 or v3)."""
    if codec.get("driver") == "zarr":
        compressor = codec.get("compressor")
        return f"{compressor['id']} {compressor.get('level', '')}".strip() if compressor else "none"
    names: list[str] = []
    pending = list(codec.get("codecs", ()))
    while pending:
        entry = pending.pop(0)
        settings = entry.get("configuration", {})
        if entry["name"] in ("zstd", "gzip", "blosc"):
            names.append(f"{entry['name']} {settings.get('level', settings.get('clevel', ''))}".strip())
        pending += settings.get("codecs", ())
    return " + ".join(names) or "none"
