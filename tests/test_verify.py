"""`vllm-maxtext verify`: the same is called the same, and every kind of difference is found."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch as safetensors_torch
import torch
from rich.console import Console

from support.checkpoints import cases
from vllm_maxtext_loader import MaxTextLoadError, open_checkpoint
from vllm_maxtext_loader.cli.render import show_report
from vllm_maxtext_loader.errors import ConfigMismatchError, HuggingFaceDirectoryError
from vllm_maxtext_loader.huggingface.directory import canonical, read_hf_directory
from vllm_maxtext_loader.tools.verify import Report, Row, Status, _add, _blocks, verify

Tensors = dict[str, "torch.Tensor"]
Twin = Callable[[str], Path]


@pytest.fixture
def changed(twin: Twin, tmp_path: Path) -> Callable[[Callable[[Tensors], None]], Report]:
    """Compares moe_v2 with its twin after `edit(tensors)` changed the twin's tensors."""

    def make(edit: Callable[[Tensors], None], config: bool = True) -> Report:
        directory = tmp_path / "changed"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        tensors = safetensors_torch.load_file(twin("moe_v2") / "model.safetensors")
        edit(tensors)
        safetensors_torch.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        if config:
            shutil.copy(twin("moe_v2") / "config.json", directory)
        report = verify(open_checkpoint(cases()["moe_v2"].items), read_hf_directory(directory))
        json.dumps(report.to_json(), allow_nan=False)
        return report

    return make


def _only(report: Report) -> Row:
    (row,) = report.differences
    assert not report.same
    return row


@pytest.mark.parametrize("name", cases())
def test_every_case_is_its_twin(name: str, twin: Twin) -> None:
    report = verify(open_checkpoint(cases()[name].items), read_hf_directory(twin(name)))
    assert report.same, report.differences[:3]
    assert {row.status for row in report.rows} == {Status.SAME}
    rounded = any(row.dtype == ("float32", "bfloat16") for row in report.rows)
    assert ("compared after rounding to bfloat16" in " ".join(report.notes)) == rounded


def test_one_flipped_bit_is_found(changed: Callable[..., Report]) -> None:
    name = "model.layers.7.experts.down_proj"

    def flip(tensors: Tensors) -> None:
        tensors[name].view(torch.int16)[3, 5, 7] ^= 1

    row = _only(changed(flip))
    assert (row.name, row.status, row.differing, row.max_ulp) == (name, Status.DIFFERS, 1, 1)
    assert row.values == 8 * 96 * 40
    assert row.max_abs > 0


def test_swapped_gate_and_up_are_found(changed: Callable[..., Report]) -> None:
    def swap(tensors: Tensors) -> None:
        gate, up = tensors["model.layers.3.experts.gate_up_proj"].chunk(2, dim=1)
        tensors["model.layers.3.experts.gate_up_proj"] = torch.cat([up, gate], dim=1).contiguous()

    row = _only(changed(swap))
    assert row.name == "model.layers.3.experts.gate_up_proj"
    assert row.differing > row.values / 2


def test_swapped_layers_and_heads_are_found(changed: Callable[..., Report]) -> None:
    def swap(tensors: Tensors) -> None:
        first, second = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"
        tensors[first], tensors[second] = tensors[second], tensors[first]
        heads = tensors["model.layers.2.self_attn.o_proj.weight"].reshape(96, 8, 32)
        tensors["model.layers.2.self_attn.o_proj.weight"] = heads.flip(1).reshape(96, 256).contiguous()

    assert [row.name for row in changed(swap).differences] == [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.2.self_attn.o_proj.weight",
    ]


def test_missing_and_surplus_tensors_are_differences(changed: Callable[..., Report]) -> None:
    def edit(tensors: Tensors) -> None:
        del tensors["model.layers.4.layer_scalar"]
        tensors["model.layers.4.mlp.bias"] = torch.ones(3)

    found = {row.name: row.status for row in changed(edit).differences}
    assert found == {
        "model.layers.4.layer_scalar": Status.NOT_IN_HF,
        "model.layers.4.mlp.bias": Status.NOT_IN_CHECKPOINT,
    }


def test_wrong_shape_and_dtype_are_differences(changed: Callable[..., Report]) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"] = tensors[
            "model.layers.1.mlp.up_proj.weight"
        ].T.contiguous()
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)

    shape, dtype = changed(edit).differences
    assert shape.status is Status.SHAPE
    assert shape.detail == "checkpoint [112, 96], HF_DIR [96, 112]"
    assert dtype.status is Status.DTYPE
    assert "HF_DIR I8" in dtype.detail
    assert dtype.to_json()["max_abs"] is None


def test_nan_is_a_difference_and_the_zeros_are_not(changed: Callable[..., Report]) -> None:
    name = "model.layers.0.post_feedforward_layernorm.weight"

    def edit(tensors: Tensors) -> None:
        tensors[name][3] = math.nan

    row = _only(changed(edit))
    assert row.differing == 1
    assert math.isnan(row.max_abs)
    assert row.to_json()["max_abs"] is None
    row = Row("x", compared_as="float32")
    values = np.array([0.0, np.nan, 1.0], np.float32)
    _add(row, values, np.array([-0.0, np.nan, 1.0], np.float32), None)
    assert row.status is Status.SAME
    assert row.values == 3


def _embedding_neighbours(tensors: Tensors) -> tuple[tuple[int, int, float], tuple[int, int, float]]:
    """Two changes of one unit in the last place: one that MaxText's scaling hides, one that it does not."""
    table = tensors["model.embed_tokens.weight"]
    root = torch.tensor(math.sqrt(table.shape[1]), dtype=torch.float32)
    above = (table.view(torch.int16) + 1).view(torch.bfloat16)
    hidden = (above.float() * root).bfloat16() == (table.float() * root).bfloat16()
    hidden_at, seen_at = hidden.nonzero()[0].tolist(), (~hidden).nonzero()[0].tolist()
    return (*hidden_at, above[*hidden_at].item()), (*seen_at, above[*seen_at].item())


def test_embedding_off_by_what_scaling_hides_is_the_same(changed: Callable[..., Report]) -> None:
    def edit(tensors: Tensors) -> None:
        row, column, value = _embedding_neighbours(tensors)[0]
        tensors["model.embed_tokens.weight"][row, column] = value

    report = changed(edit)
    assert report.same
    (row,) = (row for row in report.rows if row.name == "model.embed_tokens.weight")
    assert 0 < row.rescaled < row.values / 4
    assert any("embed_tokens" in note for note in report.notes)


def test_embedding_off_by_more_is_found(changed: Callable[..., Report]) -> None:
    def edit(tensors: Tensors) -> None:
        row, column, value = _embedding_neighbours(tensors)[1]
        tensors["model.embed_tokens.weight"][row, column] = value

    row = _only(changed(edit))
    assert row.name == "model.embed_tokens.weight"
    assert row.differing == 1
    assert row.max_ulp <= 2


def test_unscaled_embedding_is_found(changed: Callable[..., Report]) -> None:
    """A table that was never divided, or twice: no rounding excuses it."""

    def edit(tensors: Tensors) -> None:
        table = tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.weight"] = (table.float() * math.sqrt(table.shape[1])).bfloat16()

    assert _only(changed(edit)).differing > 30_000


def test_towers_copies_and_prefixes_are_no_differences(changed: Callable[..., Report]) -> None:
    def edit(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.replace("model.", "model.language_model.", 1)] = tensors.pop(name)
        tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].clone()
        tensors["model.vision_tower.std_bias"] = torch.ones(3)
        tensors["model.embed_vision.embedding_projection.weight"] = torch.ones(3)
        tensors["model.audio_tower.layers.0.norm.weight"] = torch.ones(3)

    report = changed(edit)
    assert report.same
    left_out = [row.name for row in report.rows if row.status is Status.NOT_COMPARED]
    assert len(left_out) == 4
    assert "lm_head.weight" in left_out


def test_an_untied_head_is_a_difference(changed: Callable[..., Report]) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    assert _only(changed(edit)).name == "lm_head.weight"


def test_half_a_vision_tower_is_a_difference(twin: Twin, tmp_path: Path) -> None:
    tensors = safetensors_torch.load_file(twin("moe_mm") / "model.safetensors")
    vision = [name for name in tensors if "vision" in name]
    for gone, same in ((vision[:1], False), (vision, True)):
        some = {name: value for name, value in tensors.items() if name not in gone}
        safetensors_torch.save_file(some, tmp_path / "model.safetensors", {"format": "pt"})
        report = verify(open_checkpoint(cases()["moe_mm"].items), read_hf_directory(tmp_path))
        assert report.same is same
        assert sum(row.status is not Status.SAME for row in report.rows) == len(gone)


def test_tensors_only_hugging_face_has(twin: Twin, tmp_path: Path) -> None:
    tensors = safetensors_torch.load_file(twin("e2b") / "model.safetensors")
    tensors["model.layers.9.self_attn.k_proj.weight"] = torch.ones(3)
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    report = verify(open_checkpoint(cases()["e2b"].items), read_hf_directory(tmp_path))
    assert report.same
    assert sum(row.status is Status.NOT_COMPARED for row in report.rows) == 1


def test_float32_directory_is_compared_in_bfloat16(changed: Callable[..., Report]) -> None:
    def widen(tensors: Tensors) -> None:
        for name, value in tensors.items():
            tensors[name] = value.float() * (1 + 2**-12)

    def change(tensors: Tensors) -> None:
        widen(tensors)
        tensors["model.norm.weight"] *= 1 + 2**-6

    report = changed(widen)
    assert report.same
    assert "264 tensors are bfloat16 in the checkpoint and float32 in HF_DIR" in " ".join(report.notes)
    assert _only(changed(change)).name == "model.norm.weight"


def test_contradicting_configuration_is_unusable(twin: Twin, tmp_path: Path) -> None:
    shutil.copytree(twin("moe_v2"), tmp_path / "hf")
    config = tmp_path / "hf" / "config.json"
    settings = json.loads(config.read_text())
    for change, kind in (
        ({"num_experts": 16}, ConfigMismatchError),
        ({"model_type": "llama"}, ConfigMismatchError),
        ({"layer_types": 3}, HuggingFaceDirectoryError),
    ):
        config.write_text(json.dumps(settings | change))
        with pytest.raises(kind):
            verify(open_checkpoint(cases()["moe_v2"].items), read_hf_directory(tmp_path / "hf"))
    config.write_text("{")
    with pytest.raises(HuggingFaceDirectoryError):
        verify(open_checkpoint(cases()["moe_v2"].items), read_hf_directory(tmp_path / "hf"))


def test_sharded_directory(twin: Twin, tmp_path: Path) -> None:
    tensors = safetensors_torch.load_file(twin("moe_v2") / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, some in enumerate((names[:100], names[100:])):
        file = f"part-{number}.safetensors"
        safetensors_torch.save_file({name: tensors[name] for name in some}, tmp_path / file)
        weight_map |= dict.fromkeys(some, file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert verify(open_checkpoint(cases()["moe_v2"].items), read_hf_directory(tmp_path)).same
    index.write_text(json.dumps({"weight_map": weight_map | {"model.absent": "part-0.safetensors"}}))
    with pytest.raises(HuggingFaceDirectoryError, match=r"lacks model\.absent"):
        read_hf_directory(tmp_path)
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(HuggingFaceDirectoryError, match="1 of 2 shards are missing"):
        read_hf_directory(tmp_path)


@pytest.mark.parametrize(
    "file",
    [
        *("../a.safetensors", "/etc/passwd", "sub/a.safetensors", "..", ".", "", "a\\b.safetensors"),
        *("a\0.safetensors", "a\x1b[2J/b", 7, None, ["a"]),
    ],
)
def test_index_names_only_files_of_its_directory(file: object, twin: Twin, tmp_path: Path) -> None:
    shutil.copy(twin("moe_v2") / "model.safetensors", tmp_path / "a.safetensors")
    directory = tmp_path / "hf"
    (directory / "sub").mkdir(parents=True)
    shutil.copy(tmp_path / "a.safetensors", directory / "sub")
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": file}})
    )
    with pytest.raises(HuggingFaceDirectoryError, match="expected the bare name") as raised:
        read_hf_directory(directory)
    assert str(raised.value).isprintable()


def test_header_that_contradicts_itself(tmp_path: Path) -> None:
    """Overlap, holes, wrong sizes and out-of-range places are found before a value is read."""
    for entries in (
        {"a": ("F32", [2], [0, 8]), "b": ("F32", [2], [4, 12])},
        {"a": ("F32", [2], [0, 8]), "b": ("F32", [1], [12, 16])},
        {"a": ("F32", [3], [0, 8])},
        {"a": ("F32", [2], [0, 80])},
        {"a": ("F99", [2], [0, 8])},
        {"a": ("F32", [-2], [0, 8])},
    ):
        header = {
            name: {"dtype": dtype, "shape": shape, "data_offsets": place}
            for name, (dtype, shape, place) in entries.items()
        }
        encoded = json.dumps(header).encode()
        (tmp_path / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(16))
        with pytest.raises(HuggingFaceDirectoryError, match=r"model\.safetensors: is truncated or not"):
            read_hf_directory(tmp_path)


def test_names_in_the_table_are_escaped(changed: Callable[..., Report]) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["model.\x1b[2Jbad\nname"] = torch.ones(3)

    out = io.StringIO()
    show_report(Console(file=out, width=200), changed(edit), every_row=True)
    assert "\x1b" not in out.getvalue()
    assert "model.\\x1b[2Jbad\\nname" in out.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"[]", b"\x05" + b"\0" * 7 + b'{"a":']
)
def test_damaged_directory(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(HuggingFaceDirectoryError, match=r"model\.safetensors"):
        read_hf_directory(tmp_path)


def test_truncated_missing_and_empty_directories(twin: Twin, tmp_path: Path) -> None:
    whole = (twin("moe_v2") / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(MaxTextLoadError, match="truncated"):
        read_hf_directory(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(MaxTextLoadError, match=r"no \.safetensors files"):
        read_hf_directory(tmp_path)
    with pytest.raises(MaxTextLoadError, match="no such directory"):
        read_hf_directory(tmp_path / "absent")


def test_memory_holds_neither_side_whole(twin: Twin) -> None:
    hf = dataclasses.replace(read_hf_directory(twin("moe_v2")), config_file=None)
    checkpoint = open_checkpoint(cases()["moe_v2"].items, concurrent_gib=1e-4)
    assert verify(checkpoint, hf).same  # Whatever is imported or cached once is not what is measured.
    regions: list[int] = []
    tracemalloc.start()
    try:
        assert verify(checkpoint, hf, on_region=lambda decoded: regions.append(decoded.array.nbytes)).same
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(regions) == checkpoint.plan.nbytes
    assert peak < checkpoint.plan.nbytes / 5


def test_blocks_cover_every_value_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_maxtext_loader.tools.verify._BLOCK", 10)
    for shape in ((), (1,), (25,), (3, 4), (4, 3, 7), (2, 3, 2, 2)):
        seen = np.zeros(shape, int)
        for block in _blocks(shape):
            seen[block] += 1
        assert (seen == 1).all()


def test_names_of_both_forms_are_one() -> None:
    assert canonical("model.language_model.layers.0.layer_scalar") == "model.layers.0.layer_scalar"
    assert canonical("model.vision_tower.std_bias") == "model.vision_tower.std_bias"
