"""`vllm-maxtext export`: what comes out loads in transformers, is the twin, and is whole or not there."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import signal
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch as safetensors_torch
import torch
import transformers

import vllm_maxtext_loader.huggingface.safetensors_files as files_module
import vllm_maxtext_loader.tools.export_disk as export_module
from support.checkpoints import EXPORT_ONLY, Tree, cases, servable
from vllm_maxtext_loader import MaxTextLoadError, open_checkpoint
from vllm_maxtext_loader.cli.runtime import sigterm_raises
from vllm_maxtext_loader.dtypes import BFLOAT16
from vllm_maxtext_loader.errors import ConfigMismatchError, HuggingFaceDirectoryError, ReadError
from vllm_maxtext_loader.huggingface.directory import read_hf_directory
from vllm_maxtext_loader.huggingface.safetensors_files import create_file, file_layout
from vllm_maxtext_loader.tools.export import export, parse_size
from vllm_maxtext_loader.tools.export_layout import split
from vllm_maxtext_loader.tools.verify import verify

Twin = Callable[[str], Path]
Edited = Callable[..., Path]


def _files(directory: Path) -> list[str]:
    return sorted(file.name for file in directory.iterdir())


@pytest.mark.parametrize("name", servable())
def test_export_then_verify_is_the_same(name: str, tmp_path: Path) -> None:
    case = cases()[name]
    done = export(open_checkpoint(case.items), tmp_path / "out", config=case.twin_config)
    assert done.shards == 1
    assert _files(done.path) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    report = verify(open_checkpoint(case.items), read_hf_directory(done.path))
    assert report.same
    assert all(row.max_ulp == row.rescaled == 0 for row in report.rows)
    assert done.tensors == len(report.rows)
    assert done.nbytes == sum(tensor.nbytes for tensor in _load(done.path).values())


def _load(directory: Path) -> dict[str, Any]:
    """All tensors of a directory, by the safetensors library itself."""
    tensors: dict[str, Any] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= safetensors_torch.load_file(file)
    return tensors


@pytest.mark.parametrize(
    "name", ["moe_v2", "dense_v1", "moe_mm", "e2b", "qwen3_tied", "qwen3_scanned", "qwen3moe_scanned"]
)
def test_transformers_loads_it(name: str, twin: Twin, tmp_path: Path) -> None:
    case = cases()[name]
    done = export(
        open_checkpoint(case.items), tmp_path / "out", config=case.twin_config, max_shard_bytes=250_000
    )
    assert done.shards > 2
    assert "model.safetensors" not in _files(done.path)
    for file in done.path.glob("*.safetensors"):
        tensors = safetensors_torch.load_file(file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 250_000
    auto = transformers.AutoModelForImageTextToText if name == "moe_mm" else transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(done.path, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    state, expected = model.state_dict(), safetensors_torch.load_file(twin(name) / "model.safetensors")
    # transformers keeps all experts of a layer in one parameter, whatever the files say.
    for key in [key for key in expected if re.search(r"experts\.\d+\.", key)]:
        prefix, _, rest = key.partition("experts.")
        expert, _, matrix = rest.partition(".")
        if matrix == "down_proj.weight":
            assert torch.equal(state[f"{prefix}experts.down_proj"][int(expert)], expected[key])
        else:
            half = state[f"{prefix}experts.gate_up_proj"][int(expert)].chunk(2)[matrix == "up_proj.weight"]
            assert torch.equal(half, expected[key])
        del expected[key]
    fused = {key for key in state if re.search(r"mlp\.experts\.", key)}
    assert sorted(state.keys() - fused) == sorted({*expected, "lm_head.weight"})
    for key, value in expected.items():
        assert state[key].dtype == torch.bfloat16
        if key.endswith(".embed_tokens.weight") and case.facts["family"] == "gemma4":
            # One unit in the last place off here and there; what MaxText stored comes out again all the same.
            root = torch.tensor(math.sqrt(value.shape[1]), dtype=torch.float32)
            ours, theirs = ((table.float() * root).bfloat16() for table in (state[key], value))
            assert (ours == theirs).float().mean() > 0.99
        else:
            assert torch.equal(state[key], value), key


def test_index_names_every_tensor_and_layers_stay_together(tmp_path: Path) -> None:
    case = cases()["moe_v2"]
    done = export(
        open_checkpoint(case.items), tmp_path / "out", config=case.twin_config, max_shard_bytes=10**6
    )
    index = json.loads((done.path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == done.nbytes
    assert sorted(set(index["weight_map"].values())) == [
        name for name in _files(done.path) if name.endswith("safetensors")
    ]
    for file in set(index["weight_map"].values()):
        inside = set(safetensors_torch.load_file(done.path / file))
        assert inside == {name for name, there in index["weight_map"].items() if there == file}
    assert len({there for name, there in index["weight_map"].items() if ".layers.2." in name}) <= 2


def test_configuration_from_the_preset(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(cases()["moe_v2"].items, model_name="gemma4-26b")
    done = export(checkpoint, tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(done.path)
    assert config.architectures == ["Gemma4ForCausalLM"]
    assert config.num_experts == 8
    assert config.to_dict() == checkpoint.hf_config().to_dict() | {
        "_name_or_path": config.to_dict()["_name_or_path"]
    }
    generation = json.loads((done.path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0}
    assert transformers.GenerationConfig.from_pretrained(done.path).eos_token_id == [1, 106]


def test_no_configuration_can_be_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigMismatchError, match="no published Gemma 4"):
        export(open_checkpoint(cases()["moe_v2"].items), tmp_path / "out")
    assert _files(tmp_path) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype(dtype: str, tmp_path: Path) -> None:
    case = cases()["moe_v2"]
    done = export(
        open_checkpoint(case.items), tmp_path / "out", config=case.twin_config / "config.json", dtype=dtype
    )
    wanted = getattr(torch, dtype)
    assert transformers.AutoConfig.from_pretrained(done.path).dtype == wanted
    expected = dict(open_checkpoint(case.items).hf_weights(dtype=wanted))
    found = _load(done.path)
    assert sorted(found) == sorted(expected)
    assert all(
        torch.equal(found[name], value) and found[name].dtype == wanted for name, value in expected.items()
    )


def test_float16_does_not_turn_large_values_into_infinity(edited: Edited, tmp_path: Path) -> None:
    def edit(params: Tree) -> None:
        params["decoder"]["decoder_norm"]["scale"][0] = 1e6

    checkpoint = open_checkpoint(edited("moe_v2", edit))
    with pytest.raises(MaxTextLoadError, match="too large for float16"):
        export(checkpoint, tmp_path / "out", config=cases()["moe_v2"].twin_config, dtype="float16")
    assert not (tmp_path / "out").exists()


def test_text_checkpoint_under_a_multimodal_configuration(twin: Twin, tmp_path: Path) -> None:
    text = json.loads((cases()["moe_v2"].twin_config / "config.json").read_text())
    whole = transformers.Gemma4Config(text_config=text, eos_token_id=[1, 106], architectures=["X"]).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(whole))
    done = export(open_checkpoint(cases()["moe_v2"].items), tmp_path / "out", config=tmp_path)
    config = json.loads((done.path / "config.json").read_text())
    assert config["architectures"] == ["Gemma4ForCausalLM"]
    assert config["model_type"] == "gemma4_text"
    assert config["eos_token_id"] == [1, 106]
    assert any("text" in note for note in done.notes)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(done.path, output_loading_info=True)
    assert type(model).__name__ == "Gemma4ForCausalLM"
    assert not info["missing_keys"]


def test_what_maxtext_cannot_have_is_taken_out_of_the_configuration(tmp_path: Path) -> None:
    case = cases()["moe_mm"]
    config = json.loads((case.twin_config / "config.json").read_text())
    config["vision_config"]["use_clipped_linears"] = True
    config["audio_config"] = {"model_type": "gemma4_audio"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = export(open_checkpoint(case.items), tmp_path / "out", config=tmp_path)
    written = json.loads((done.path / "config.json").read_text())
    assert written["audio_config"] is None
    assert written["vision_config"]["use_clipped_linears"] is False
    assert len(done.notes) == 2


def test_tokenizer_and_generation_files_are_copied(tmp_path: Path) -> None:
    case = cases()["dense_v2"]
    source = tmp_path / "hf"
    shutil.copytree(case.twin_config, source)
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "processor_config.json",
        "secrets.txt",
        "generation_config.json",
    ):
        (source / name).write_text('{"top_k": 64}' if name.startswith("gen") else name)
    done = export(open_checkpoint(case.items), tmp_path / "out", config=source, tokenizer=source)
    assert _files(done.path) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
    ]
    assert json.loads((done.path / "generation_config.json").read_text()) == {"top_k": 64}
    for wrong in (tmp_path / "absent", case.twin_config):
        with pytest.raises(HuggingFaceDirectoryError):
            export(open_checkpoint(case.items), tmp_path / "other", config=source, tokenizer=wrong)
    assert not (tmp_path / "other").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    case = cases()["dense_v2"]
    (tmp_path / "file").write_text("x")
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(HuggingFaceDirectoryError, match="nothing is overwritten"):
            export(open_checkpoint(case.items), out, config=case.twin_config)
    (tmp_path / "empty").mkdir()
    assert (
        export(open_checkpoint(case.items), tmp_path / "empty", config=case.twin_config).path.name == "empty"
    )
    assert export(open_checkpoint(case.items), tmp_path / "a" / "b", config=case.twin_config).path.is_dir()
    assert _files(tmp_path) == ["a", "empty", "file"]
    assert _files(tmp_path / "a") == ["b"]


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _terminate(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("stop", "kind"), [(_interrupt, KeyboardInterrupt), (_terminate, SystemExit)])
def test_interrupted_export_leaves_nothing(stop: Callable[..., None], kind: type, tmp_path: Path) -> None:
    case = cases()["moe_v2"]
    seen: list[list[str]] = []

    def on_region(decoded: object) -> None:
        seen.append(_files(tmp_path))
        if len(seen) == 5:
            stop()

    with pytest.raises(kind), sigterm_raises():
        export(open_checkpoint(case.items), tmp_path / "out", config=case.twin_config, on_region=on_region)
    # While it ran, only a directory that nobody takes for the finished one was there.
    assert all(len(names) == 1 and names[0].startswith(".out.incomplete-") for names in seen)
    assert _files(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_second_signal_does_not_stop_the_clean_up(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rmtree, before = shutil.rmtree, signal.getsignal(number)

    def interrupted(*arguments: Any, **settings: Any) -> None:
        os.kill(os.getpid(), number)
        rmtree(*arguments, **settings)

    monkeypatch.setattr(export_module.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), sigterm_raises():
        export(
            open_checkpoint(cases()["dense_v2"].items),
            tmp_path / "out",
            config=cases()["dense_v2"].twin_config,
            on_region=_interrupt,
        )
    assert _files(tmp_path) == []
    assert signal.getsignal(number) is before


def test_ignored_hangup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with sigterm_raises():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_half_written_directory_has_no_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Even what a kill -9 leaves behind looks like no model: config.json is written last."""
    case = cases()["dense_v2"]
    monkeypatch.setattr(export_module.shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
        export(open_checkpoint(case.items), tmp_path / "out", config=case.twin_config, on_region=_interrupt)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.incomplete-")
    assert _files(left) == ["model.safetensors"]


def test_damaged_checkpoint_leaves_nothing(edited: Edited, tmp_path: Path) -> None:
    items = edited("moe_v2", lambda params: None, ocdbt=False, zarr3=False)
    chunk = next(
        file
        for file in (items / "params.params.token_embedder.embedding").iterdir()
        if file.name[0].isdigit()
    )
    chunk.unlink()
    with pytest.raises(ReadError):
        export(open_checkpoint(items), tmp_path / "o" / "out", config=cases()["moe_v2"].twin_config)
    assert _files(tmp_path / "o") == []


def test_full_disk_is_one_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    case = cases()["dense_v2"]
    monkeypatch.setattr(files_module.os, "posix_fallocate", no_space)
    with pytest.raises(HuggingFaceDirectoryError, match="No space left"):
        export(open_checkpoint(case.items), tmp_path / "out", config=case.twin_config)
    assert _files(tmp_path) == []


def test_tensors_are_written_in_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Memory holds regions, not tensors: every tensor is a region of a mapped file from the start."""
    case = cases()["moe_v2"]
    checkpoint = open_checkpoint(case.items, concurrent_gib=1e-4)
    made: list[np.ndarray] = []
    convert = export_module.convert

    def watched(plan: Any, regions: Any, *, allocate: Any, **kwargs: Any) -> Any:
        def noted(target: Any, dtype: np.dtype) -> np.ndarray:
            made.append(allocate(target, dtype))
            return made[-1]

        return convert(plan, regions, allocate=noted, **kwargs)

    monkeypatch.setattr(export_module, "convert", watched)
    export(checkpoint, tmp_path / "warm", config=case.twin_config)
    assert len(made) == len(checkpoint.plan.targets)
    for array in made:
        base: Any = array
        while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap)
    made.clear()
    monkeypatch.setattr(export_module, "convert", convert)
    tracemalloc.start()
    try:
        export(checkpoint, tmp_path / "out", config=case.twin_config)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < checkpoint.plan.nbytes / 3


@pytest.mark.parametrize("name", EXPORT_ONLY)
def test_layer_that_no_configuration_describes(name: str, tmp_path: Path) -> None:
    case = cases()[name]
    with pytest.raises(ConfigMismatchError, match="sliding-window layer"):
        export(open_checkpoint(case.items), tmp_path / "out", config=case.twin_config)


def test_a_tensor_larger_than_a_shard_is_one_file() -> None:
    plan = open_checkpoint(cases()["moe_v2"].items).plan
    shards = split(plan, None, 1)
    assert len(shards) == len(plan.targets)
    assert next(iter(shards)) == "model-00001-of-00264.safetensors"
    assert list(split(plan, None, 10**12)) == ["model.safetensors"]


def test_files_hold_layer_after_layer() -> None:
    plan = open_checkpoint(cases()["moe_v2"].items).plan
    shards = split(plan, np.dtype(np.float32), 10**6)
    assert list(shards) == [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]
    assert all(sum(2 * target.nbytes for target in targets) <= 10**6 for targets in shards.values())
    names = [target.name for targets in shards.values() for target in targets]
    assert sorted(names) == sorted(plan.targets)
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers)
    assert layers[-1] == 11


def test_mixed_dtypes_are_aligned(tmp_path: Path) -> None:
    bfloat16 = BFLOAT16
    tensors = [("a", (3,), bfloat16), ("b", (2, 2), np.dtype(np.float32)), ("c", (1,), np.dtype(np.float16))]
    mapped, places = create_file(tmp_path / "x.safetensors", file_layout(tensors))
    for number, place in enumerate(places.values(), 1):
        place[...] = number
    mapped.flush()
    found = safetensors_torch.load_file(tmp_path / "x.safetensors")
    assert {name: tuple(value.shape) for name, value in found.items()} == {"a": (3,), "b": (2, 2), "c": (1,)}
    assert found["b"].dtype == torch.float32
    assert found["b"].unique().tolist() == [1.0]
    assert all(place.flags.aligned for place in places.values())


def test_sizes() -> None:
    assert [parse_size(text) for text in ("5GB", "1.5 MiB", "1000", "2kb")] == [
        5 * 10**9,
        3 << 19,
        1000,
        2000,
    ]
    for wrong in ("", "GB", "5XB", "-1GB", "0", "1e3"):
        with pytest.raises(ValueError, match="is no size"):
            parse_size(wrong)
