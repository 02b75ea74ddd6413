"""Rows past the configured vocabulary: zero rows are padding and are dropped, anything else is a trained token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
import transformers

from support import metadata_only
from support.checkpoints import Tree, cases, read_orbax, write_orbax
from vllm_maxtext_loader import errors, open_checkpoint
from vllm_maxtext_loader.api import Checkpoint
from vllm_maxtext_loader.checkpoint import tree as trees
from vllm_maxtext_loader.checkpoint.rows import count_nonzero_rows
from vllm_maxtext_loader.conversion.plan import make_plan
from vllm_maxtext_loader.engine.probe import check_vocabulary, probe
from vllm_maxtext_loader.errors import ConfigMismatchError
from vllm_maxtext_loader.families.gemma4 import FAMILY
from vllm_maxtext_loader.families.gemma4_config import PUBLISHED_VOCAB
from vllm_maxtext_loader.tools.export import export
from vllm_maxtext_loader.tools.verify import verify

CASE, ROWS = "dense_v2", 320
SMALLER = 300
BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def smaller(twin: Callable[[str], Path]) -> Any:
    """The configuration of the twin, with fewer tokens than the table has rows."""
    config = transformers.AutoConfig.from_pretrained(twin(CASE))
    config.vocab_size = SMALLER
    return config


def _with_rows(params: Tree, used: int) -> None:
    """Zeros past the smaller vocabulary, but for the last `used` rows."""
    table = np.array(params["token_embedder"]["embedding"])
    table[SMALLER : ROWS - used] = 0
    params["token_embedder"]["embedding"] = table


def _refusal(used: int) -> str:
    return rf"has 320 vocabulary rows, .* vocab_size 300, and {used} of the 20 rows past it are not zero"


@pytest.mark.parametrize("used", [1, 20])
def test_trained_rows_are_refused_everywhere(
    edited: Callable[..., Path], smaller: Any, used: int, tmp_path: Path
) -> None:
    items = edited(CASE, lambda params: _with_rows(params, used))
    with pytest.raises(ConfigMismatchError, match=_refusal(used)) as raised:
        open_checkpoint(items).with_config(smaller)
    for part in (str(items), "token_embedder.embedding", "whose vocab_size is 320"):
        assert part in str(raised.value)
    # The front end, before an engine starts.
    with pytest.raises(ConfigMismatchError, match=_refusal(used)):
        check_vocabulary(str(items), SMALLER)
    check_vocabulary(str(items), ROWS)
    smaller.save_pretrained(tmp_path / "hf")
    with pytest.raises(ConfigMismatchError, match=_refusal(used)):
        export(open_checkpoint(items), tmp_path / "out", config=str(tmp_path / "hf"))
    assert not (tmp_path / "out").exists()


def test_zero_rows_are_dropped(edited: Callable[..., Path], smaller: Any) -> None:
    items = edited(CASE, lambda params: _with_rows(params, 0))
    check_vocabulary(str(items), SMALLER)
    checkpoint = open_checkpoint(items).with_config(smaller)
    assert checkpoint.plan.notes == ("20 rows beyond vocab_size 300 are zero (padding): dropped",)
    weights = dict(checkpoint.hf_weights())
    assert weights["model.embed_tokens.weight"].shape[0] == SMALLER


@pytest.mark.parametrize("value", [np.nan, -1e-30, np.inf])
def test_any_value_but_zero_counts(edited: Callable[..., Path], smaller: Any, value: float) -> None:
    def edit(params: Tree) -> None:
        _with_rows(params, 0)
        params["token_embedder"]["embedding"][310, 3] = value

    with pytest.raises(ConfigMismatchError, match=_refusal(1)):
        open_checkpoint(edited(CASE, edit)).with_config(smaller)


def test_output_head_is_looked_at_too(edited: Callable[..., Path], twin: Callable[[str], Path]) -> None:
    """A head of its own has the vocabulary last: its rows are columns of the leaf."""
    config = transformers.AutoConfig.from_pretrained(twin("qwen3_scanned"))
    rows, config.vocab_size = config.vocab_size, config.vocab_size - 20

    def edit(params: Tree) -> None:
        table, head = params["token_embedder"], params["decoder"]["logits_dense"]
        table["embedding"], head["kernel"] = np.array(table["embedding"]), np.array(head["kernel"])
        table["embedding"][rows - 20 :] = 0
        head["kernel"][:, rows - 20 : rows - 3] = 0

    with pytest.raises(
        ConfigMismatchError,
        match=rf"leaf params\.params\.decoder\.logits_dense\.kernel has {rows} vocabulary rows, .*, and 3 of the 20 rows",
    ):
        open_checkpoint(edited("qwen3_scanned", edit)).with_config(config)


def test_per_layer_vocabulary_is_never_cut(twin: Callable[[str], Path]) -> None:
    """E2B's second table: its rows are not dropped on the word of a configuration, zero or not."""
    config = transformers.AutoConfig.from_pretrained(twin("e2b"))
    rows = config.vocab_size_per_layer_input
    config.vocab_size_per_layer_input = rows - 20
    with pytest.raises(
        ConfigMismatchError,
        match=rf"vocab_size_per_layer_input: configuration {rows - 20}, checkpoint {rows}",
    ):
        open_checkpoint(cases()["e2b"].items).with_config(config)


def published_tree(name: str, rows: int) -> trees.Tree:
    """A published model's tree with an embedding of so many rows, none of them written: all zero."""
    leaves: dict[str, trees.Leaf] = {}
    for path, shape in metadata_only.leaves(metadata_only.published(name)).items():
        stored = (rows, shape[1]) if path == "token_embedder.embedding" else shape
        chunks = (min(stored[0], 1000), *stored[1:])
        leaves[path] = trees.Leaf(f"params.{path}", tuple(path.split(".")), stored, BF16, chunks)
    embedding = leaves["token_embedder.embedding"]
    grid = {"name": "regular", "configuration": {"chunk_shape": list(embedding.chunks)}}
    metadata = {"shape": list(embedding.shape), "data_type": "bfloat16", "chunk_grid": grid}
    specification = {"driver": "zarr3", "kvstore": "memory://", "metadata": metadata, "create": True}
    array = ts.open(specification).result()
    location = open_checkpoint(cases()["e2b"].items).tree.location
    return trees.Tree(location, "Linen", leaves, (), True, True, True, location.items, {embedding.key: array})


@pytest.mark.parametrize("used", [0, 3])
def test_rows_past_a_published_vocabulary(used: int) -> None:
    """No configuration is given: the published model's is, and its vocabulary is smaller than the table."""
    tree = published_tree("gemma4-e2b", PUBLISHED_VOCAB + 1500)
    array = tree.arrays["params.token_embedder.embedding"]
    for row in range(used):
        array[PUBLISHED_VOCAB + 500 * row, 7] = 1
    checkpoint = Checkpoint(tree, make_plan(tree, FAMILY), None, 1 << 20)
    if used:
        with pytest.raises(
            ConfigMismatchError, match=r"has 263644 vocabulary rows.* vocab_size 262144, and 3 of the 1500"
        ):
            checkpoint.hf_config()
    else:
        assert checkpoint.hf_config().vocab_size == PUBLISHED_VOCAB


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_are_counted_along_any_axis(axis: int) -> None:
    """An output head has the vocabulary last; rows and chunks need not begin together."""
    values = np.zeros((7, 5), np.float32)
    values[5, 2] = values[6, 4] = values[2, 3] = 1
    values = values if axis == 0 else np.ascontiguousarray(values.T)
    leaf = trees.Leaf("k", ("k",), values.shape, values.dtype, (2, 3))
    arrays = {"k": ts.array(values)}
    assert [count_nonzero_rows(leaf, arrays, "here", axis, first) for first in range(8)] == [
        *(3, 3, 3),
        *(2, 2, 2),
        *(1, 0),
    ]


def test_only_the_rows_past_the_vocabulary_are_read(
    copy_case: Callable[[str], Path], twin: Callable[[str], Path], tmp_path: Path
) -> None:
    """A table in chunks of 64 rows whose first chunk is lost: the check does not notice, a load does."""
    tree = read_orbax(cases()[CASE].items)
    _with_rows(tree["params"]["params"], 0)
    items = write_orbax(tmp_path / "0", tree, ocdbt=False)
    (leaf,) = items.glob("*token_embedder.embedding")
    metadata = next(leaf.glob("zarr.json"))
    chunked = ts.open(
        {
            "driver": "zarr3",
            "kvstore": f"file://{leaf}",
            "metadata": {
                "shape": [ROWS, 96],
                "data_type": "bfloat16",
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [64, 96]}},
            },
            "create": True,
            "delete_existing": True,
        }
    ).result()
    chunked.write(tree["params"]["params"]["token_embedder"]["embedding"]).result()
    assert metadata.exists()
    (leaf / "c/0/0").write_bytes(b"")
    config = transformers.AutoConfig.from_pretrained(twin(CASE))
    config.vocab_size = SMALLER
    checkpoint = open_checkpoint(items).with_config(config)
    with pytest.raises(errors.ReadError):
        list(checkpoint.hf_weights())


def test_probe_without_a_configuration_keeps_what_is_used(edited: Callable[..., Path]) -> None:
    """Dimensions of no published model: only zero rows at the end are dropped, values decide."""
    items = edited(CASE, lambda params: _with_rows(params, 0))
    dims = probe(str(items), None, trim=True).dims
    assert dims.sizes["vocab"] == SMALLER
    assert dims.with_sizes(vocab=ROWS) == open_checkpoint(items).plan.dims


def test_verify_refuses_too(edited: Callable[..., Path], twin: Callable[[str], Path], tmp_path: Path) -> None:
    """A Hugging Face directory of the smaller vocabulary: rows that are not zero are not "padding"."""
    from vllm_maxtext_loader.huggingface.directory import read_hf_directory

    items = edited(CASE, lambda params: _with_rows(params, 2))
    config = transformers.AutoConfig.from_pretrained(twin(CASE))
    config.vocab_size = SMALLER
    config.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").write_bytes((twin(CASE) / "model.safetensors").read_bytes())
    with pytest.raises(ConfigMismatchError, match=_refusal(2)):
        verify(open_checkpoint(items), read_hf_directory(tmp_path / "hf"))
