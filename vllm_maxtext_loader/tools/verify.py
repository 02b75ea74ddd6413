"""Is a MaxText checkpoint the same model as a Hugging Face directory? Tensor by tensor, in bounded memory.

Every region that is read is compared with its place in the memory-mapped Hugging Face tensor, through the view a
conversion would write it through: neither side is ever held whole, however many layers one leaf stacks. Tensors in a
bucket are read whole, those that share leaves together, and in several passes where they are larger than the memory.

What counts as the same:

- Values are compared in the coarser of the two dtypes: float32 masters against a bfloat16 directory after one
  rounding.
- MaxText stores the embedding times sqrt(hidden size), rounded; dividing brings 8 to 15 % of bfloat16 values
  back one unit in the last place off, and no way of undoing it does better. A value therefore also counts as
  the same where Hugging Face's, scaled and rounded as MaxText does it, is the stored one.
- A tensor only one side can have (vision tower, audio tower, clip bounds, a tied lm_head, keys of layers that
  share them) is listed as not compared. Any other tensor that one side lacks is a difference.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from vllm_maxtext_loader.api import Checkpoint
from vllm_maxtext_loader.checkpoint.reader import DecodedRegion, read_regions
from vllm_maxtext_loader.checkpoint.regions import Region
from vllm_maxtext_loader.checkpoint.storage.path import Location
from vllm_maxtext_loader.conversion.convert import ScaleStore, cast, compute, layer_of, locate
from vllm_maxtext_loader.conversion.family import WeightConverter
from vllm_maxtext_loader.conversion.plan import CopyOp, LeafConversion, Plan, TensorSpec
from vllm_maxtext_loader.conversion.published import expert_parts, published_tensors
from vllm_maxtext_loader.conversion.values import to_float32
from vllm_maxtext_loader.dtypes import FLOATS
from vllm_maxtext_loader.huggingface.directory import (
    HfDirectory,
    canonical,
    ends_in_full_attention,
    natural_order,
    read_config,
)
from vllm_maxtext_loader.huggingface.safetensors_files import HfTensor
from vllm_maxtext_loader.tools.leaf_groups import (
    in_groups,
    is_needed,
    memory_limit,
    read_nbytes,
    restrict,
    split_passes,
    tensor_groups,
)

_BLOCK = 4 << 20
"""Values compared at a time: bounds the temporary float32 arrays, and stays in the cache's reach."""

_VISION = ("model.vision_tower.", "model.embed_vision.", "vision_tower.", "multi_modal_projector.")
_AUDIO = ("model.audio_tower.", "model.embed_audio.")
_CLIP_BOUNDS = (".input_min", ".input_max", ".output_min", ".output_max")
_SHARED = re.compile(r"model\.layers\.(\d+)\.self_attn\.(?:k_proj|v_proj|k_norm|v_norm)\.")


class Status(enum.StrEnum):
    """What the comparison of one tensor found."""

    SAME = "same"
    DIFFERS = "differs"
    SHAPE = "other shape"
    DTYPE = "not comparable"
    NOT_IN_HF = "not in HF_DIR"
    NOT_IN_CHECKPOINT = "not in checkpoint"
    NOT_COMPARED = "not compared"

    @property
    def is_difference(self) -> bool:
        """Whether it makes the two models different."""
        return self not in (Status.SAME, Status.NOT_COMPARED)


@dataclasses.dataclass
class Row:
    """One tensor.

    Attributes:
        name: Hugging Face name; of the checkpoint's tensor where both sides have it.
        status: the finding.
        detail: why, where the status does not say it all.
        shape: (of the checkpoint, of HF_DIR); None for the side that lacks it.
        dtype: likewise, numpy's names.
        compared_as: dtype in which the values were compared, None where they were not.
        values: number of values compared.
        differing: how many of them differ.
        max_abs: greatest absolute difference; nan where one side has a NaN and the other does not.
        max_ulp: greatest difference in units in the last place of `compared_as`.
        rescaled: embedding only: how many values came back off by a rounding, and are the same once scaled.
    """

    name: str
    status: Status = Status.SAME
    detail: str = ""
    shape: tuple[tuple[int, ...] | None, tuple[int, ...] | None] = (None, None)
    dtype: tuple[str | None, str | None] = (None, None)
    compared_as: str | None = None
    values: int = 0
    differing: int = 0
    max_abs: float = 0.0
    max_ulp: int = 0
    rescaled: int = 0

    def to_json(self) -> dict[str, Any]:
        """The row with JSON's types; a NaN becomes null."""
        shapes = [None if shape is None else list(shape) for shape in self.shape]
        return {
            **dataclasses.asdict(self),
            "shape": {"checkpoint": shapes[0], "hf": shapes[1]},
            "dtype": {"checkpoint": self.dtype[0], "hf": self.dtype[1]},
            "max_abs": self.max_abs if self.compared_as and math.isfinite(self.max_abs) else None,
            "max_ulp": self.max_ulp if self.compared_as else None,
        }


@dataclasses.dataclass(frozen=True)
class Report:
    """The whole comparison.

    Attributes:
        checkpoint: path of the checkpoint.
        hf_dir: path of the Hugging Face directory.
        rows: one per tensor of either side.
        notes: what was assumed, one sentence each.
    """

    checkpoint: str
    hf_dir: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def differences(self) -> list[Row]:
        """Rows that make the models different."""
        return [row for row in self.rows if row.status.is_difference]

    @property
    def same(self) -> bool:
        """Whether the models are the same."""
        return not self.differences

    def to_json(self, *, every_row: bool = True) -> dict[str, Any]:
        """What `vllm-maxtext verify --json` prints; see its help."""
        shown = self.rows if every_row else self.differences
        counts = {status.value: sum(row.status is status for row in self.rows) for status in Status}
        return {
            "checkpoint": self.checkpoint,
            "hf_dir": self.hf_dir,
            "same": self.same,
            "counts": counts,
            "notes": list(self.notes),
            "tensors": [row.to_json() for row in shown],
        }


def verify(
    checkpoint: Checkpoint,
    hf: HfDirectory,
    *,
    memory_bytes: int | None = None,
    on_region: Callable[[DecodedRegion], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Compares a checkpoint with a Hugging Face directory.

    Args:
        checkpoint: opened checkpoint. Where the directory has a config.json, that decides what is padding.
        hf: opened directory.
        memory_bytes: bytes of its tensors that are held at a time where it is in a bucket; None means half of the
            memory that is free.
        on_region: told each region that has been compared.
        on_progress: told how many bytes of how many have been compared.

    Raises:
        ConfigMismatchError: the directory's config.json contradicts the checkpoint's shapes.
        HuggingFaceDirectoryError: its config.json cannot be used.
        OptionError: `memory_bytes` is less than the largest tensor.
        ReadError: a chunk of the checkpoint is missing, truncated or corrupt.
        StorageError: the storage refuses or does not answer.
    """
    notes: list[str] = []
    if hf.config_file is not None and ends_in_full_attention(hf.config_file):
        checkpoint = checkpoint.with_config(read_config(hf.config_file))
    elif hf.config_file is not None:
        notes.append(
            f"{hf.config_file} is not used: its last layer is no full-attention layer; transformers would "
            f"make it one."
        )
    plan = checkpoint.trimmed_plan()
    rows: dict[str, Row] = {}
    pairs: dict[str, tuple[Row, HfTensor]] = {}
    hf_has_vision = any(name.startswith(_VISION) for name in hf.tensors)
    for target in _published(plan, hf):
        tensor = hf.tensors.get(canonical(target.name))
        row = rows[canonical(target.name)] = _pair(target, tensor)
        if tensor is None and target.name.startswith(_VISION) and not hf_has_vision:
            row.status, row.detail = Status.NOT_COMPARED, "vision tower; HF_DIR has none"
        elif row.status is Status.SAME:
            assert tensor is not None
            pairs[target.name] = row, tensor
    parts = _passes(plan, hf, pairs, memory_bytes)
    total, compared = sum(read_nbytes(part) for part in parts), 0

    def on_compared(decoded: DecodedRegion) -> None:
        nonlocal compared
        compared += decoded.array.nbytes
        if on_progress is not None:
            on_progress(compared, total)
        if on_region is not None:
            on_region(decoded)

    for part in parts:
        _compare(checkpoint, part, pairs, on_compared)
    for name, tensor in hf.tensors.items():
        if name not in rows:
            rows[name] = _only_in_hf(name, tensor, hf.tensors, plan)
    for leaf, reason in plan.unused:
        rows[leaf.key] = Row(
            leaf.key, Status.NOT_COMPARED, reason, (leaf.shape, None), (leaf.dtype.name, None)
        )
    ordered = sorted(rows.values(), key=lambda row: natural_order(row.name))
    return Report(plan.where, str(hf.path), tuple(ordered), (*notes, *plan.notes, *_notes(ordered)))


def _published(plan: Plan, hf: HfDirectory) -> Iterator[TensorSpec]:
    """The plan's tensors as the directory spells them: per expert, unless it has them fused."""
    for target in plan.targets.values():
        if not target.expert_names or canonical(target.name) in hf.tensors:
            yield target
        else:
            for name, shape in published_tensors(target):
                yield dataclasses.replace(target, name=name, shape=shape, expert_names=())


def _pair(target: TensorSpec, tensor: HfTensor | None) -> Row:
    """A row before any value was compared: SAME where the values can be."""
    ours = target.dtype.name
    if tensor is None:
        return Row(target.name, Status.NOT_IN_HF, "", (target.shape, None), (ours, None))
    theirs = tensor.dtype_name if tensor.dtype is None else tensor.dtype.name
    row = Row(target.name, shape=(target.shape, tensor.shape), dtype=(ours, theirs))
    if target.shape != tensor.shape:
        row.status = Status.SHAPE
        row.detail = f"checkpoint {list(target.shape)}, HF_DIR {list(tensor.shape)}"
    elif tensor.dtype is None:
        row.status, row.detail = Status.DTYPE, f"checkpoint {ours}, HF_DIR {theirs}"
    else:
        row.compared_as = min(target.dtype, tensor.dtype, key=[*FLOATS.values()].index).name
    return row


def _passes(
    plan: Plan, hf: HfDirectory, pairs: Mapping[str, tuple[Row, HfTensor]], memory_bytes: int | None
) -> list[Plan]:
    """The plan, in parts whose tensors are compared at a time: all of them where they are mapped from a disk."""
    if not isinstance(hf.path, Location) or not pairs:
        return [plan]
    order = list(in_groups(plan))
    nbytes = {
        name: sum(pairs[part][1].nbytes for part in _spellings(plan.targets[name]) if part in pairs)
        for name in order
    }
    limit = memory_limit(memory_bytes, nbytes, "--memory")
    return [restrict(plan, names) for names in split_passes(order, nbytes, tensor_groups(plan), limit)]


def _spellings(target: TensorSpec) -> set[str]:
    """The names under which a directory may have a tensor, or its parts."""
    return {target.name, *(name for name, _ in published_tensors(target))}


def _compare(
    checkpoint: Checkpoint,
    plan: Plan,
    found: Mapping[str, tuple[Row, HfTensor]],
    on_region: Callable[[DecodedRegion], None],
) -> None:
    """Reads the leaves of a (restricted) plan and fills in the rows of its tensors."""
    names = [name for target in plan.targets.values() for name in sorted(_spellings(target)) if name in found]
    entries = {entry.leaf.key: entry for entry in plan.leaves if _is_compared(entry, plan, found)}
    leaves = [entry.leaf for entry in entries.values()]
    regions = read_regions(
        leaves, checkpoint.tree.arrays, checkpoint.concurrent_bytes, plan.where, needed=is_needed(plan)
    )
    pairs = {name: (found[name][0], found[name][1].array()) for name in names}
    for entry in entries.values():
        _compare_absent_rows(entry, pairs)
    for decoded in regions:
        entry = entries[decoded.leaf.key]
        for copy_op in entry.copies:
            if (located := layer_of(entry, copy_op, decoded)) is None:
                continue
            for stored, region in locate(entry, copy_op, *located):
                _compare_region(entry, copy_op, plan.targets[copy_op.target], pairs, stored, region)
        on_region(decoded)
    for row, theirs in pairs.values():
        # No region is lost, by design; but a row that says "same" must have seen all of them.
        if row.values != theirs.size:
            raise AssertionError(f"{row.name}: compared {row.values} of {theirs.size} values")


def _is_compared(entry: LeafConversion, plan: Plan, pairs: Mapping[str, tuple[Row, HfTensor]]) -> bool:
    """Whether anything of a leaf is compared."""
    return any(name in pairs for copy_op in entry.copies for name in _spellings(plan.targets[copy_op.target]))


def _compare_absent_rows(entry: LeafConversion, pairs: Mapping[str, tuple[Row, np.ndarray]]) -> None:
    """Compares rows of a vocabulary that the checkpoint does not store with zero."""
    axis = entry.converter.padded_axis()
    for copy_op in entry.copies if axis is not None else ():
        if copy_op.target in pairs:
            row, theirs = pairs[copy_op.target]
            absent = theirs[entry.leaf.shape[axis or 0] :]
            if absent.size:
                _add(row, np.zeros_like(absent), absent, None)


def _compare_region(
    entry: LeafConversion,
    copy_op: CopyOp,
    spec: TensorSpec,
    pairs: Mapping[str, tuple[Row, np.ndarray]],
    stored: np.ndarray,
    region: Region,
) -> None:
    """Compares the values of a region, as stored, with the tensors they become."""
    converter, sizes = entry.converter, copy_op.sizes

    def compare(name: str, values: np.ndarray, there: np.ndarray) -> None:
        ours = compute(entry, copy_op, values, region[0], False, ScaleStore())
        for block in _blocks(there.shape):
            judged = (values[block], converter, sizes) if converter.values else None
            _add(pairs[name][0], ours[block], there[block], judged)

    if spec.name in pairs:
        compare(spec.name, stored, converter.rearrange.view(pairs[spec.name][1], sizes)[region])
    elif spec.expert_names:
        for part in expert_parts(spec, converter, sizes, region):
            if part.name in pairs:
                compare(part.name, stored[part.selection], part.view(pairs[part.name][1])[part.region])


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Cuts along the first axes: a block has at most `_BLOCK` values where the last axis allows it."""
    if not shape or math.prod(shape) <= _BLOCK:
        yield ()
        return
    inner = math.prod(shape[1:])
    if inner > _BLOCK:
        for index in range(shape[0]):
            for rest in _blocks(shape[1:]):
                yield (slice(index, index + 1), *rest)
        return
    step = max(1, _BLOCK // inner)
    for start in range(0, shape[0], step):
        yield (slice(start, start + step),)


def _add(
    row: Row,
    ours: np.ndarray,
    theirs: np.ndarray,
    judged: tuple[np.ndarray, WeightConverter, Mapping[str, int]] | None,
) -> None:
    """Counts the differences of one block into its row.

    Args:
        row: of the tensor.
        ours: converted values of the checkpoint.
        theirs: the same values of the Hugging Face tensor.
        judged: where values are computed with, those that are stored, the converter and the sizes of its axes.
    """
    row.values += theirs.size
    assert row.compared_as is not None
    coarse = FLOATS[row.compared_as]
    ours, theirs_coarse = cast(ours, coarse), cast(theirs, coarse)
    bits = np.dtype(f"u{coarse.itemsize}")
    suspects = ours.view(bits) != theirs_coarse.view(bits)
    if not suspects.any():
        return
    left, right = ours[suspects], theirs_coarse[suspects]
    left32, right32 = to_float32(left), to_float32(right)
    # Not by their bits: the two zeros are equal, and so is a NaN to a NaN.
    unequal = (left32 != right32) & ~(np.isnan(left32) & np.isnan(right32))
    if judged is not None:
        stored, converter, sizes = judged
        expected = _ordinal(cast(stored[suspects], coarse))
        # Two roundings in float32 may be one unit off; in a coarser dtype they vanish in the last one.
        close = 1 if coarse == FLOATS["float32"] else 0
        excused = np.zeros_like(unequal)
        # A float32 directory may have been rounded before MaxText computed with it, or not.
        for values in (to_float32(theirs[suspects]), right32):
            for made in converter.stored_forms(values, sizes):
                excused |= np.abs(_ordinal(cast(made, coarse)) - expected) <= close
        excused &= unequal
        row.rescaled += int(excused.sum())
        unequal &= ~excused
    if not unequal.any():
        return
    row.status = Status.DIFFERS
    row.differing += int(unequal.sum())
    with np.errstate(invalid="ignore"):
        gap = np.abs(left32[unequal].astype(np.float64) - right32[unequal].astype(np.float64))
    row.max_abs = float(np.fmax(row.max_abs, gap.max()) if not np.isnan(gap).any() else np.nan)
    row.max_ulp = max(row.max_ulp, int(np.abs(_ordinal(left[unequal]) - _ordinal(right[unequal])).max()))


def _ordinal(values: np.ndarray) -> np.ndarray:
    """Integers that count the representable numbers, in order; the two zeros are one."""
    bits = values.view(np.dtype(f"i{values.dtype.itemsize}")).astype(np.int64)
    lowest = -(1 << (8 * values.dtype.itemsize - 1))
    return np.where(bits < 0, lowest - bits, bits)


def _only_in_hf(name: str, tensor: HfTensor, all_tensors: Mapping[str, HfTensor], plan: Plan) -> Row:
    """A tensor that the checkpoint does not have: a difference, unless it cannot have it."""
    row = Row(tensor.name, Status.NOT_COMPARED, "", (None, tensor.shape))
    row.dtype = (None, tensor.dtype_name if tensor.dtype is None else tensor.dtype.name)
    shared = _SHARED.match(name)
    if name.startswith(_AUDIO):
        row.detail = "audio tower; MaxText has none"
    elif name.startswith(_VISION) and not plan.dims.has_vision:
        row.detail = "vision tower; the checkpoint has none"
    elif name.startswith(_VISION) and name.endswith(_CLIP_BOUNDS):
        row.detail = "clip bounds of the vision tower; MaxText does not clip"
    elif (
        shared
        and int(shared[1]) < len(plan.dims.layers)
        and "kv_heads" not in plan.dims.layers[int(shared[1])].sizes
    ):
        row.detail = "keys and values of a layer that uses those of an earlier one"
    elif name == "lm_head.weight" and _equal(tensor, all_tensors.get("model.embed_tokens.weight")):
        row.detail = "copy of embed_tokens (tied)"
    else:
        row.status = Status.NOT_IN_CHECKPOINT
        if name == "lm_head.weight":
            row.detail = "differs from embed_tokens; the checkpoint ties them"
    return row


def _equal(one: HfTensor, other: HfTensor | None) -> bool:
    if other is None or one.shape != other.shape or one.dtype_name != other.dtype_name or one.dtype is None:
        return False
    bits, size, step = np.dtype(f"u{one.dtype.itemsize}"), math.prod(one.shape), 8 * _BLOCK
    spans = [(start, min(size, start + step)) for start in range(0, size, step)]
    return all(np.array_equal(one.flat(*span).view(bits), other.flat(*span).view(bits)) for span in spans)


def _notes(rows: Any) -> Iterator[str]:
    """What the reader of the result has to know about how values were compared."""
    rounded: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.compared_as is not None and row.dtype[0] != row.dtype[1]:
            rounded[row.dtype] = rounded.get(row.dtype, 0) + 1
        if row.rescaled:
            yield (
                f"{row.name}: {row.rescaled:,} of {row.values:,} values ({row.rescaled / row.values:.1%}) "
                f"come back off by a rounding, but times sqrt(hidden size) they are what MaxText stores."
            )
    for (ours, theirs), count in rounded.items():
        coarse = min(ours, theirs, key=[*FLOATS].index)
        yield (
            f"{count} tensors are {ours} in the checkpoint and {theirs} in HF_DIR: compared after rounding "
            f"to {coarse}."
        )
