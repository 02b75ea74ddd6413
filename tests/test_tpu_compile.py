"""The TPU's own compiler judges what we load: names, shapes, layouts, and that every weight is read.

    pytest -m tpu_compile                       all cases; prints the table of docs/compatibility.md
    pytest -m tpu_compile -k "quick"            what CI runs

No TPU is needed: libtpu compiles for a topology (`vllm_maxtext_loader.tpu.compile`). Checkpoints hold metadata
only.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import tpu_compile
from support.checkpoints import cases as cases_of_maxtext
from support.tpu_compile import CASES, QUICK, SMALL
from vllm_maxtext_loader import open_checkpoint
from vllm_maxtext_loader.tools import serve_defaults, slices
from vllm_maxtext_loader.tools.fit import Fitter, Request
from vllm_maxtext_loader.tools.kv_cache import kv_cache
from vllm_maxtext_loader.tools.text_model import text_model
from vllm_maxtext_loader.tools.tpu_memory import device_arrays, rotary_bytes

pytestmark = [pytest.mark.engine, pytest.mark.tpu_compile]

NEVER_READ = {
    "router.per_expert_scale": "folded into down_proj while loading; tpu-inference 0.32 never applies it "
    "(vllm-project/tpu-inference issue 2332)",
    ".attn.sinks": "tpu-inference 0.32 copies them when the engine starts; the programs hold the copies as "
    "constants",
}
"""Ends of names of weights that no program reads, each with the reason why that is right."""

NEVER_READ_WITH_IMAGES = {"e4b with images": (".embed_tokens_per_layer.weight",)}
"""Weights that a step with images ignores, and should not: tpu-inference 0.32 gives such a step no token ids, of
which it computes per-layer embeddings (models/vllm/experimental/gemma4_mm_patcher.py). docs/compatibility.md
says so."""

RELAID = (
    "gate_up_proj.weight",
    "down_proj.weight",
    "down_proj.linear.weight",
    "o_proj.weight",
    "qkv_proj.weight",
    "w2_weight",
    # Of GPT-OSS, which is 2880 wide.
    "model.embedding.weight",
    "lm_head.weight",
    "cos_sin_cache",
    # Of Gemma 3's vision tower.
    "mlp.fc2.weight",
    "patch_embedding.weight",
)
"""Weights whose share per device may be no multiple of a tile: XLA then prefers another order of axes.

docs/evidence.md says what is done about it.
"""

Compile = Callable[[str], dict[str, Any]]


def accepted(answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the compiler says by topology, without those it refuses."""
    return {name: found for name, found in answer["topologies"].items() if "error" not in found}


def _named(name: str) -> Any:
    return pytest.param(name, id=f"{name}{' quick' if name in QUICK else ''}")


cases = pytest.mark.parametrize("name", [_named(name) for name in CASES])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """What the compiler says of a case; each is compiled once."""
    root = tmp_path_factory.mktemp("compiled")

    @functools.cache
    def run(name: str) -> dict[str, Any]:
        case = CASES[name]
        directory = root / name
        answer = tpu_compile.run(
            case.write(directory / "run"),
            directory,
            topologies=case.topologies,
            arguments=case.arguments(),
            hbm_bytes=case.hbm_bytes,
        )
        tpu_compile.note(name, answer)
        return {**answer, "checkpoint": str(directory / "run")}

    return run


@cases
def test_compiles(compiled: Compile, name: str) -> None:
    """Every program of every topology, within the memory that is said to suffice on a small machine."""
    answer, refused = compiled(name), CASES[name].refused
    for topology, message in refused.items():
        assert message in answer["topologies"][topology]["error"]
    for topology, found in answer["topologies"].items():
        if topology in refused:
            continue
        assert "error" not in found, (topology, found["error"])
        kinds = [program["name"] for program in found["programs"]]
        if CASES[name].vision:
            assert kinds == ["step", "step with embeddings", "logits", "vision encoder"]
        else:
            assert kinds == ["step", "logits"]
    assert answer["peak_bytes"] < (11 if CASES[name].vision else 9) << 30


@cases
def test_every_weight_is_read(compiled: Compile, name: str) -> None:
    for topology, found in accepted(compiled(name)).items():
        ignored = unread_weights(compiled(name), topology)
        assert ignored == [], (topology, ignored)
        assert found["programs"][0]["layouts"]


@cases
def test_arguments_are_what_is_placed(compiled: Compile, name: str) -> None:
    """XLA's bytes of the step's weights are those of the arrays: the device adds no padding of its own."""
    answer = compiled(name)
    for topology, found in accepted(answer).items():
        step, *rest = found["programs"]
        weights = step["argument_bytes"] - step["kv_cache_bytes"]
        assert weights == pytest.approx(found["step_bytes"], rel=0.01), topology
        others = {key for program in rest for key in program["layouts"]} - set(step["layouts"])
        if not CASES[name].vision:
            assert {key.removeprefix("vllm_model.") for key in others} <= {
                "lm_head.weight",
                "model.lm_head.weight",
            }


@cases
def test_arithmetic_of_fit_is_right(compiled: Compile, name: str) -> None:
    """Weights within 1 % of XLA's bytes, and the tokens of KV cache that vLLM plans in as much memory."""
    case, answer = CASES[name], compiled(name)
    checkpoint = open_checkpoint(answer["checkpoint"], model_name=case.model)
    model, devices = text_model(checkpoint), case.tensor_parallel
    arrays = device_arrays(model, devices, expert_parallel=case.expert_parallel)
    weights = sum(array.nbytes for array in arrays) + rotary_bytes(model)
    assert weights == pytest.approx(answer["bytes_per_device"], rel=0.01)
    for topology, found in accepted(answer).items():
        step = found["programs"][0]
        read = step["argument_bytes"] - step["kv_cache_bytes"]
        # The step reads neither the vision tower nor an output head of its own.
        others = sum(array.nbytes for array in arrays if re.search("vision|multi_modal|lm_head", array.name))
        assert weights - others == pytest.approx(read, rel=0.01), topology
        held = step["kv_cache_bytes"] + answer["bytes_per_device"]
        assert held <= case.hbm_bytes * serve_defaults.UTILIZATION, topology
    cache = kv_cache(model, devices, **SMALL)
    left = int(devices * case.hbm_bytes * serve_defaults.UTILIZATION - devices * answer["bytes_per_device"])
    assert cache.tokens(left) == answer["kv_tokens"]


@cases
def test_loading_takes_tiles_and_little_else(compiled: Compile, name: str) -> None:
    """Tiles are put into shards in place; what loading takes of a device besides the model is less than 2 % of it."""
    steps = compiled(name)["filling"]
    for topology, found in accepted(compiled(name)).items():
        assert len(found["updates"]) == steps["programs"] - 1
        assert found["allocation_bytes"] < steps["device_bytes"] / 100
        for update in found["updates"].values():
            assert update["aliased_bytes"] >= update["shard_bytes"], topology
            assert update["temporary_bytes"] <= max(update["tile_bytes"], 1 << 20), topology
            if update["row_major"]:
                assert update["layout"] == sorted(update["layout"]), topology
        temporary = max(update["temporary_bytes"] for update in found["updates"].values())
        # A device that has no tile keeps one that it was sent.
        besides = steps["staged_bytes"] + steps["tile_bytes"] + temporary
        assert besides < steps["device_bytes"] / 50, topology


@cases
def test_layouts_that_are_not_row_major_are_known(compiled: Compile, name: str) -> None:
    """Most of the bytes are row-major: the experts' w13, and embeddings of a multiple of 128."""
    for topology, found in accepted(compiled(name)).items():
        assert [key for key in found["relaid"] if not key.endswith(RELAID)] == [], topology


@pytest.mark.parametrize("name", [_named(name) for name, case in CASES.items() if case.vision])
def test_images_cost_no_weight_but_the_embedding(compiled: Compile, name: str) -> None:
    """A step that is given embeddings instead of tokens reads what a step reads, but for the embedding table."""
    answer = compiled(name)
    for topology, found in accepted(answer).items():
        programs = {program["name"]: set(program["layouts"]) for program in found["programs"]}
        missing = set(answer["weights"]) & programs["step"] - programs["step with embeddings"]
        ends = (".embed_tokens.weight", *NEVER_READ_WITH_IMAGES.get(name, ()))
        assert all(any(weight.endswith(end) for end in ends) for weight in missing), (topology, missing)
        assert all(any(weight.endswith(end) for weight in missing) for end in ends), (topology, missing)


def unread_weights(answer: dict[str, Any], topology: str) -> list[str]:
    """Weights that came from the checkpoint and that no program reads, without the exceptions."""
    unread = set(answer["topologies"][topology]["unread"])
    return sorted(name for name in unread & set(answer["weights"]) if not name.endswith(tuple(NEVER_READ)))


def test_exceptions_are_needed(compiled: Compile) -> None:
    """The table above has no row that has become untrue."""
    for name, suffix in zip(("26b TP 8", "gpt-oss-20b TP 8"), NEVER_READ, strict=True):
        answer = compiled(name)
        (unread, *_) = (set(found["unread"]) for found in accepted(answer).values())
        assert any(weight.endswith(suffix) for weight in unread & set(answer["weights"])), suffix


@pytest.fixture(scope="module")
def ignoring(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An engine that computes without layer_scalar, whatever it loads into it; compiled for chips that are none."""
    case, directory = CASES["26b TP 8"], tmp_path_factory.mktemp("ignoring")
    return tpu_compile.run(
        case.write(directory / "run"),
        directory,
        topologies=("v6e:2x4", "v4:2x2x1", "v9:1x1"),
        arguments=case.arguments(),
        ignore="layer_scalar",
    )


def test_ignored_weight_is_caught_quick(ignoring: dict[str, Any]) -> None:
    ignored = unread_weights(ignoring, "v6e:2x4")
    assert ignored == sorted(f"vllm_model.model.layers.{layer}.layer_scalar" for layer in range(6))


def test_what_tpu_inference_refuses_is_one_named_error_quick(ignoring: dict[str, Any]) -> None:
    old, unknown = (ignoring["topologies"][name]["error"] for name in ("v4:2x2x1", "v9:1x1"))
    assert old.startswith("EngineError: v4:2x2x1: the step program")
    assert "Unsupported tpu_version=4" in old
    assert unknown.startswith("EngineError: v9:1x1: libtpu knows no such topology")


def test_head_dimension_without_a_kernel_quick(tmp_path: Path) -> None:
    """`fit` says so before a load (test_fit.py)."""
    answer = tpu_compile.run(
        cases_of_maxtext()["e2b"].items,
        tmp_path,
        topologies=("v6e:1x1",),
        arguments={**SMALL, "max_model_len": 128, "model_loader_extra_config": {"model_name": "gemma4-e2b"}},
    )
    assert "not supported on the head_dim==64" in answer["topologies"]["v6e:1x1"]["error"]


def test_defaults_of_fit_are_those_of_vllm_serve_quick() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    assert EngineArgs.gpu_memory_utilization == serve_defaults.UTILIZATION
    tokens, sequences = (found[UsageContext.OPENAI_API_SERVER] for found in EngineArgs.get_batch_defaults(1))
    assert (tokens, sequences) == (serve_defaults.BATCHED_TOKENS, serve_defaults.SEQUENCES)


@pytest.mark.parametrize(
    ("name", "topology", "request_"),
    [
        ("26b, all layers", "v6e-8", Request()),
        ("26b, all layers", "v6e-8", Request(max_model_len=10_000, max_num_seqs=64, kv_cache_dtype="fp8")),
        ("e2b, all layers", "v6e-1", Request(max_model_len=1000, gpu_memory_utilization=0.7)),
        ("e2b, all layers", "tpu7x-4", Request(tensor_parallel_size=2, max_num_seqs=16)),
        # Sliding windows: the lengths are longer and shorter than window and tokens under way.
        pytest.param("gemma3-4b, all layers", "v6e-1", Request(), id="gemma3-4b quick"),
        ("gemma3-4b, all layers", "v5e-4", Request(max_model_len=3000, max_num_seqs=64)),
        ("gemma3-4b TP 8", "v6e-8", Request(max_model_len=20_000, kv_cache_dtype="fp8")),
        ("gpt-oss-20b TP 8", "v6e-8", Request(max_model_len=10_000)),
        ("qwen3-30b-a3b TP 8", "v5e-8", Request(max_model_len=10_000)),
        ("qwen3-8b TP 8", "tpu7x-4", Request()),
    ],
)
def test_kv_tokens_are_the_engines(name: str, topology: str, request_: Request, tmp_path: Path) -> None:
    """At lengths and numbers of requests that make other block sizes; the engine is told the same memory."""
    case = CASES[name]
    run = case.write(tmp_path / "run")
    fitter = Fitter(open_checkpoint(run, model_name=case.model), str(run), request_)
    row, chosen = fitter.row(topology), slices.parse(topology)
    per_chip = min(chosen.devices_per_chip, row.tensor_parallel_size)
    answer = tpu_compile.run(
        run,
        tmp_path / "engine",
        arguments={
            **fitter.engine_arguments(row),
            "model_loader_extra_config": {"model_name": case.model},
        },
        hbm_bytes=chosen.hbm_bytes // chosen.devices_per_chip,
        used_bytes=row.weight_bytes // per_chip,
    )
    assert answer["kv_tokens"] == row.kv_tokens


def test_fit_with_the_compiler(tmp_path: Path) -> None:
    """The command at its defaults: the shapes that `vllm serve` compiles at start, and its KV cache."""
    run = CASES["e2b, all layers"].write(tmp_path / "run")
    command = [sys.executable, "-c", "from vllm_maxtext_loader.cli.app import main; main()", "fit", str(run)]
    arguments = [*command, "--topology", "v6e-1", "--json"]
    (by_arithmetic, compiled) = (
        json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout)[0]
        for line in (arguments, [*arguments, "--compile"])
    )
    assert compiled["fits"]
    assert 0 < compiled["program_bytes"] < 0.08 * compiled["hbm_bytes"]
    assert compiled["weight_bytes"] == pytest.approx(by_arithmetic["weight_bytes"], rel=0.01)
    # The arrays' bytes and the compiler's differ by less than a block of the cache per device.
    assert compiled["kv_tokens"] == pytest.approx(by_arithmetic["kv_tokens"], abs=1024)
    same = by_arithmetic.keys() - {"program_bytes", "weight_bytes", "kv_tokens"}
    assert {key: compiled[key] for key in same} == {key: by_arithmetic[key] for key in same}
