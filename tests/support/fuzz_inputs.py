"""Random and damaged metadata, for test_fuzz: trees of leaves, JSON, bytes, directories."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from hypothesis import strategies as st

from vllm_maxtext_loader.checkpoint.tree import EMBEDDING_LEAF, Leaf
from vllm_maxtext_loader.families import FAMILIES

SIZES = st.one_of(st.integers(0, 9), st.sampled_from([16, 96, 160, 2816, 262_144, 2**31, 2**40, 2**62]))
SHAPES = st.lists(SIZES, max_size=5).map(tuple)
DTYPES = st.sampled_from([np.dtype(np.float32), np.dtype(np.float16)])
PARTS = sorted(
    {part for family in FAMILIES for row in family.converters for part in row.leaf.split(".")}
    | {
        part
        for family in FAMILIES
        for group in family.groups
        for part in group.pattern.replace("\\", "").split(".")
        if part.isidentifier()
    }
    | {
        "layers_0",
        "layers_7",
        "layers_00",
        "layers_99999999999",
        "layer_3",
        "value",
        "scanned_blocks",
        "layers",
    }
    | {"Gemma4DecoderLayerToLinen_1", "vision_encoder", "Gemma4VisionEncoderLayer_0", *EMBEDDING_LEAF}
)
PART = st.one_of(st.sampled_from(PARTS), st.text(min_size=1, max_size=6))


class Leaves(list[Leaf]):
    """Leaves that are shown by how they differ from a real checkpoint's."""

    original: frozenset[Leaf] = frozenset()

    def __repr__(self) -> str:
        gone = [f"- {leaf.name} {leaf.shape}" for leaf in self.original - set(self)]
        new = [f"+ {leaf.name} {leaf.shape} {leaf.dtype}" for leaf in self if leaf not in self.original]
        return "\n".join([f"{len(self)} leaves", *sorted(gone), *new])


@st.composite
def changed(draw: st.DrawFn, original: list[Leaf]) -> list[Leaf]:
    """The leaves of a real checkpoint after a few changes of every kind."""
    leaves = Leaves(original)
    leaves.original = frozenset(original)
    for _ in range(draw(st.integers(0, 4))):
        if not leaves:
            break
        at = draw(st.integers(0, len(leaves) - 1))
        leaf = leaves[at]
        path, shape = list(leaf.path), list(leaf.shape)
        match draw(
            st.sampled_from(
                ["drop", "rename", "copy", "resize", "swap", "grow", "shrink", "dtype", "add", "many"]
            )
        ):
            case "drop":
                leaves.pop(at)
                continue
            case "rename":
                path[draw(st.integers(0, len(path) - 1))] = draw(PART)
            case "copy":
                path[draw(st.integers(0, len(path) - 1))] = draw(PART)
                leaves.append(leaf)
            case "resize" if shape:
                shape[draw(st.integers(0, len(shape) - 1))] = draw(SIZES)
            case "swap" if shape:
                one, other = (draw(st.integers(0, len(shape) - 1)) for _ in range(2))
                shape[one], shape[other] = shape[other], shape[one]
            case "grow":
                shape.insert(draw(st.integers(0, len(shape))), draw(SIZES))
            case "shrink" if shape:
                shape.pop(draw(st.integers(0, len(shape) - 1)))
            case "dtype":
                leaf = dataclasses.replace(leaf, dtype=draw(DTYPES))
            case "add":
                leaves.append(leaf)
                path, shape = draw(st.lists(PART, min_size=1, max_size=6)), list(draw(SHAPES))
            case "many":
                keep = draw(st.integers(0, len(leaves)))
                del leaves[:keep]
                continue
        leaves[at] = dataclasses.replace(
            leaf, key=".".join(path), path=tuple(path), shape=tuple(shape), chunks=tuple(shape)
        )
    return leaves


@st.composite
def invented(draw: st.DrawFn) -> list[Leaf]:
    """Leaves of random paths and shapes."""
    found = []
    for _ in range(draw(st.integers(0, 8))):
        path, shape = tuple(draw(st.lists(PART, min_size=1, max_size=6))), draw(SHAPES)
        found.append(Leaf(".".join(path), path, shape, draw(DTYPES), shape))
    return found


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from(PARTS)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@st.composite
def damaged_json(draw: st.DrawFn, value: Any) -> Any:
    """The value with one place in it replaced, removed or doubled."""
    if isinstance(value, dict) and value and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(list(value)))
        match draw(st.integers(0, 5)):
            case 0:
                return {name: entry for name, entry in value.items() if name != key}
            case 1:
                return {(draw(PART) if name == key else name): entry for name, entry in value.items()}
        return {**value, key: draw(damaged_json(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 5)):
        at = draw(st.integers(0, len(value) - 1))
        match draw(st.integers(0, 5)):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return value[: at + 1] + value[at:]
        return [*value[:at], draw(damaged_json(value[at])), *value[at + 1 :]]
    if isinstance(value, int) and draw(st.booleans()):
        return draw(SIZES)
    return draw(JSON)


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes with a part cut off, overwritten, inserted or removed."""
    start, stop = sorted(draw(st.integers(0, len(data))) for _ in range(2))
    match draw(st.sampled_from(["end", "start", "flip", "insert", "remove", "random"])):
        case "end":
            return data[:start]
        case "start":
            return data[start:]
        case "flip" if start < len(data):
            return data[:start] + bytes([data[start] ^ draw(st.integers(1, 255))]) + data[start + 1 :]
        case "insert":
            return data[:start] + draw(st.binary(max_size=8)) + data[start:]
        case "remove":
            return data[:start] + data[stop:]
    return draw(st.binary(max_size=40))


NAMES = st.one_of(
    st.sampled_from(
        [
            "0",
            "7",
            "007",
            "10",
            "99999999999999999999",
            "step_3",
            "3_",
            "items",
            "items.orbax-checkpoint-tmp-1",
            "default",
            "000010",
            "before_crash_900",
            "params",
            "checkpoint",
        ]
    ),
    st.sampled_from(
        ["7.orbax-checkpoint-tmp-12", "checkpoints", "model_params", "optimizer_state", "\u0663", "a b", "-"]
    ),
    st.sampled_from(
        [
            "_METADATA",
            "_CHECKPOINT_METADATA",
            "commit_success.txt",
            "manifest.ocdbt",
            "ocdbt.process_0",
            "orbax.checkpoint",
        ]
    ),
)
CONTENTS = st.sampled_from(
    [b"", b"{}", b"[]", b'{"commit_timestamp_nsecs": null}', b'{"custom_metadata": 3}', b"\xff"]
)
DIRECTORIES = st.recursive(
    st.dictionaries(NAMES, CONTENTS, max_size=4),
    lambda inner: st.dictionaries(NAMES, st.one_of(inner, CONTENTS), max_size=4),
    max_leaves=8,
)
