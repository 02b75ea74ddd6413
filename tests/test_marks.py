"""What is in a tree besides plain weights: state is skipped, adapters and quantized weights are refused by their name."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from support.checkpoints import Tree, cases, read_orbax, write_orbax
from vllm_maxtext_loader import MaxTextLoadError, open_checkpoint
from vllm_maxtext_loader.errors import UnknownLeafError, UnknownModelError, UnsupportedDtypeError
from vllm_maxtext_loader.tools.inspect import inspect_checkpoint

CASE = "dense_024"
BF16 = np.dtype(ml_dtypes.bfloat16)
STREAM = {"count": np.uint32(3), "key": np.zeros(2, np.uint32)}
ATTENTION = ("decoder", "scanned_blocks", "local_layers", "self_attention", "query")


@pytest.fixture(scope="module")
def base() -> Tree:
    return read_orbax(cases()[CASE].items)["params"]["params"]


@pytest.fixture
def params(base: Tree) -> Tree:
    return copy.deepcopy(base)


def nnx(tree: Tree) -> Tree:
    """The tree as NNX's state: below every variable there is a "value"."""
    return {name: nnx(node) if isinstance(node, dict) else {"value": node} for name, node in tree.items()}


def at(tree: Tree, path: tuple[str, ...]) -> Tree:
    for part in path:
        tree = tree.setdefault(part, {})
    return tree


def flat(tree: Tree, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, node in tree.items():
        if isinstance(node, dict):
            yield from flat(node, (*path, name))
        else:
            yield (*path, name), node


def unflat(leaves: dict[tuple[str, ...], Any]) -> Tree:
    tree: Tree = {}
    for path, value in leaves.items():
        at(tree, path[:-1])[path[-1]] = value
    return tree


def loads_as_before(items: Path) -> dict[str, str]:
    """Compares the tensors with the untouched fixture's; the reasons for which arrays were skipped, by key."""
    expected = dict(open_checkpoint(cases()[CASE].items).hf_weights())
    checkpoint = open_checkpoint(items)
    actual = dict(checkpoint.hf_weights())
    assert actual.keys() == expected.keys()
    assert all(actual[name].equal(tensor) for name, tensor in expected.items())
    return {entry.key: entry.reason for entry in checkpoint.tree.skipped}


def refused(kind: type[MaxTextLoadError], items: Path, *parts: str) -> str:
    with pytest.raises(kind) as caught:
        open_checkpoint(items)
    message = str(caught.value)
    assert [part for part in (str(items), *parts) if part not in message] == [], message
    return message


@pytest.mark.parametrize("wrap", [lambda tree: tree, lambda tree: {"base": tree}], ids=["sft", "rl"])
@pytest.mark.parametrize(
    "path",
    [
        ("rngs", "params"),
        ("to_nnx__rngs", "params"),
        ("decoder", "to_nnx__rngs", "dropout"),
        (*ATTENTION, "qwix_rngs", "default"),
        ("decoder", "rng"),
        ("decoder", "dropout"),
        # NNX's streams by their two variables, whatever the module calls them.
        ("decoder", "noise"),
    ],
    ids=".".join,
)
def test_random_number_state_of_any_name(
    params: Tree, tmp_path: Path, path: tuple[str, ...], wrap: Any
) -> None:
    at(params, path).update(STREAM)
    skipped = loads_as_before(write_orbax(tmp_path / "1", wrap(nnx(params)), item="model_params"))
    assert set(skipped.values()) == {"random number state"}
    assert len(skipped) == 2


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ((*ATTENTION[:-1], "KVCache_0", "cached_ar_key"), np.zeros((2, 3), BF16), "key and value cache"),
        ((*ATTENTION[:-1], "cache_ar_index"), np.zeros(1, np.int32), "key and value cache"),
        (("decoder", "moe_lb_loss", "0"), np.float32(1), "intermediate values"),
        (("intermediates", "decoder", "activation_mean"), np.float32(1), "intermediate values"),
        (("batch_stats", "decoder", "mean"), np.zeros(4, np.float32), "batch statistics"),
        ((*ATTENTION, "kernel_amax_history"), np.zeros(4, np.float32), "statistics of quantized training"),
        (("training_step",), np.int32(3), "training step"),
        (("outer_opt_state", "trace", "x"), np.zeros(4, np.float32), "optimizer state"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_state_that_is_no_weight(
    params: Tree, tmp_path: Path, path: tuple[str, ...], value: np.ndarray, reason: str
) -> None:
    at(params, path[:-1])[path[-1]] = value
    skipped = loads_as_before(write_orbax(tmp_path / "1", nnx(params), item="model_params"))
    assert skipped == {f"{'.'.join(path)}.value": reason}


def test_quantized_optimizer_state_next_to_plain_weights(base: Tree, tmp_path: Path) -> None:
    moments = {
        path: {"array": {"qvalue": np.zeros(value.shape, np.int8), "scale": np.ones(1, np.float32)}}
        for path, value in flat(base)
    }
    tree = {
        "params": {"params": base},
        "opt_state": {"0": {"mu": {"params": unflat(moments)}, "nu": {"params": unflat(moments)}}},
        "step": np.int32(1),
    }
    skipped = loads_as_before(write_orbax(tmp_path / "1", tree))
    assert set(skipped.values()) == {"optimizer state", "training step"}


@pytest.mark.parametrize("dtype", ["uint32", "int32", "uint8", "bool"])
def test_integers_of_unknown_use_are_not_called_quantized(params: Tree, tmp_path: Path, dtype: str) -> None:
    params["decoder"]["visits"] = np.zeros(3, dtype)
    message = refused(
        UnsupportedDtypeError,
        write_orbax(tmp_path / "1", nnx(params), item="model_params"),
        f"decoder.visits.value [3] is stored as {dtype}",
        "the use of this leaf is not known",
    )
    assert "quantized" not in message.lower()


@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.int4, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_kernels_of_quantized_dtypes(params: Tree, tmp_path: Path, dtype: type) -> None:
    query = at(params, ATTENTION)
    query["kernel"] = np.zeros(query["kernel"].shape, dtype)
    refused(
        UnsupportedDtypeError,
        write_orbax(tmp_path / "1", {"params": {"params": params}}),
        ".".join((*ATTENTION, "kernel")),
        f"is stored as {np.dtype(dtype).name}",
        "The weights are quantized",
        "load the unquantized checkpoint",
    )


def quantized(base: Tree, names: set[str], below: tuple[str, ...], keep: int) -> tuple[Tree, Tree]:
    """(leaves that stay plain, quantized ones): `below` replaces the end of a path from the `keep`-th name on."""
    plain: dict[tuple[str, ...], Any] = {}
    values: dict[tuple[str, ...], Any] = {}
    for path, value in flat(base):
        if path[-1] not in names:
            plain[path] = value
            continue
        start = (*path[: len(path) - 1 + keep], *below)
        values[(*start, "qvalue")] = np.zeros(value.shape, np.int8)
        values[(*start, "scale")] = np.ones((1,) * value.ndim, np.float32)
    return unflat(plain), unflat(values)


def merged(first: Tree, second: Tree) -> Tree:
    return unflat(dict([*flat(first), *flat(second)]))


FROZEN = ("AqtDotGeneral_0", "qrhs", "frozen")
FORMS: dict[str, Any] = {
    "AQT": lambda base: {
        "params": dict(zip(("params", "aqt"), quantized(base, {"kernel"}, FROZEN, 0), strict=True))
    },
    "AQT, NNX": lambda base: nnx(merged(*quantized(base, {"kernel"}, FROZEN, 0))),
    "AQT of some layers": lambda base: {
        "params": {
            "params": quantized(base, {"kernel"}, (), 0)[0],
            "aqt": {
                "decoder": {
                    "layers_0": {"mlp": {"wi_0": unflat({(*FROZEN, "qvalue"): np.zeros(3, np.int8)})}}
                }
            },
        }
    },
    "Qwix": lambda base: {"params": {"params": merged(*quantized(base, {"kernel"}, ("array",), 1))}},
    "Qwix with the embedding": lambda base: {
        "params": {"params": merged(*quantized(base, {"kernel", "embedding"}, ("array",), 1))}
    },
    "Qwix, NNX": lambda base: nnx(merged(*quantized(base, {"kernel", "embedding"}, ("array",), 1))),
}


@pytest.mark.parametrize("form", FORMS)
def test_quantizers_by_name(base: Tree, tmp_path: Path, form: str) -> None:
    refused(
        UnsupportedDtypeError,
        write_orbax(tmp_path / "0", FORMS[form](base)),
        f"is quantized by {form[:4].strip(' ,')}",
        "qvalue",
        "load the unquantized checkpoint",
    )


def test_values_of_aqt_next_to_all_kernels_lack_nothing(base: Tree, tmp_path: Path) -> None:
    tree = {"params": {"params": base, "aqt": quantized(base, {"kernel"}, FROZEN, 0)[1]}}
    skipped = loads_as_before(write_orbax(tmp_path / "0", tree))
    assert set(skipped.values()) == {"outside the model (params)"}


def adapters(base: Tree, names: tuple[str, str]) -> Tree:
    """LoRA leaves of the attention's kernels."""
    return unflat(
        {
            (*path[:-1], name): np.ones((4, 4), np.float32)
            for path, _ in flat(base)
            if path[-1] == "kernel" and "self_attention" in path
            for name in names
        }
    )


@pytest.mark.parametrize(
    "names",
    [
        ("kernel_lora_a", "kernel_lora_b"),
        ("lora_a", "lora_b"),
        ("w_lora_a", "w_lora_b"),
        ("lora_a.kernel", "lora_b.kernel"),
    ],
    ids=",".join,
)
@pytest.mark.parametrize("wrap", [nnx, lambda tree: {"params": {"params": tree}}], ids=["nnx", "linen"])
def test_adapters_without_a_base(base: Tree, tmp_path: Path, names: tuple[str, str], wrap: Any) -> None:
    items = write_orbax(tmp_path / "100", {**wrap(adapters(base, names)), "step": np.int32(100)})
    refused(
        UnknownModelError,
        items,
        f"holds LoRA adapters only (14 leaves such as {'params.params.' if wrap is not nnx else ''}decoder",
        f"{names[0]} and {names[1]}",
        "rank and alpha are not recorded",
        "no base weights",
        f"load_parameters_path=BASE lora.lora_restore_path={items}",
    )


def test_rank_and_alpha_that_maxtext_recorded(base: Tree, tmp_path: Path) -> None:
    tree = {"params": {"params": adapters(base, ("kernel_lora_a", "kernel_lora_b"))}}
    tree["opt_state"] = {"mu": tree["params"]}
    items = write_orbax(tmp_path / "100", tree)
    # MaxText 0.2.5 `save_checkpoint`: custom_metadata["lora"] = config.lora.model_dump()
    metadata = items.parent / "_CHECKPOINT_METADATA"
    lora = {"enable_lora": True, "lora_rank": 16, "lora_alpha": 32.0, "lora_weight_qtype": None}
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "custom_metadata": {"lora": lora}}))
    refused(
        UnknownModelError, items, "14 leaves", "rank 16, alpha 32", "lora.lora_rank=16 lora.lora_alpha=32"
    )


def test_adapters_next_to_their_base(base: Tree, tmp_path: Path) -> None:
    tree = {"params": {"params": merged(base, adapters(base, ("kernel_lora_a", "kernel_lora_b")))}}
    items = write_orbax(tmp_path / "100", tree)
    refused(
        UnknownLeafError,
        items,
        "holds 14 LoRA leaves next to the base weights",
        "self_attention.key.kernel_lora_a [4, 4]",
        "Merge them with MaxText first",
    )
    found = inspect_checkpoint(items)
    assert isinstance(found.error, UnknownLeafError)
    assert not found.loads


def test_adapters_of_a_quantized_base(base: Tree, tmp_path: Path) -> None:
    plain, values = quantized(base, {"kernel"}, ("array",), 1)
    tree = merged(merged(plain, values), adapters(base, ("kernel_lora_a", "kernel_lora_b")))
    items = write_orbax(tmp_path / "100", {"params": {"params": tree}})
    refused(UnsupportedDtypeError, items, "is quantized by Qwix", "with 14 LoRA leaves")


def test_adapters_next_to_another_item(base: Tree, tmp_path: Path) -> None:
    """The item is chosen by its tree, and then refused as what it is."""
    import orbax.checkpoint as ocp

    trees = {
        "weights": adapters(base, ("kernel_lora_a", "kernel_lora_b")),
        "iterator": {"position": np.zeros(3, np.float32)},
    }
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
        checkpointer.save(tmp_path / "7", ocp.args.Composite(**items))
    with pytest.raises(UnknownModelError, match=r"7/weights: holds LoRA adapters only"):
        open_checkpoint(tmp_path / "7")
