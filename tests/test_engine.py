"""The real engine: vLLM with tpu-inference on JAX's CPU backend, from MaxText's checkpoints.

Truth number two: what the engine holds after `load_format="maxtext"` is what it holds after loading the Hugging Face twin by
vLLM's default loader, bit by bit and device by device, except what folding and the embedding change, which are checked by
value. All ways of loading (straight to the device, by the host or by the device; from a bucket, large chunks in parts; through
`model.load_weights`) end in the same bits.

Truth number three: what it says is what transformers says in float32.

One process starts all engines of a device count (see support/engine_worker.py); the tests read what it wrote down.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support import gcs
from support.checkpoints import FIXTURES, cases
from support.engine import PROMPTS, bound, distance, read_config, reference_logprobs, run_jobs, vocabulary
from vllm_maxtext_loader import open_checkpoint

pytestmark = pytest.mark.engine

PARALLEL = {
    "moe_v2": ["1", "2", "4", "8", "4-ep", "8-ep"],
    "dense_v2": ["8"],
    "e2b": ["4"],
    "qwen3_scanned": ["1", "8"],
    "qwen3moe_scanned": ["1", "2", "8", "4-ep"],
    "llama31_scanned": ["1", "8"],
    "mistral_scanned": ["4"],
    "qwen2_scanned": ["4"],
    "mixtral_scanned": ["8", "4-ep"],
    "gemma3_scanned": ["8"],
    "gptoss_scanned": ["1", "4-ep"],
}
"""Tensor parallel sizes per checkpoint; -ep with expert parallelism."""


IN_PARTS = ("moe_v2-tp4-ep", "dense_v2-tp8", "qwen3moe_scanned-tp2", "gptoss_scanned-tp1")
"""Settings that are loaded from a bucket, too, by chunks in parts."""

COMPUTED = ("gemma3", "llama", "mistral", "mixtral")
"""Families whose values MaxText stores computed; they come back within a rounding."""


def parallel_ids() -> list[str]:
    """Every checkpoint and parallel setting, as "moe_v2-tp8-ep"."""
    return [f"{name}-tp{setting}" for name, settings in PARALLEL.items() for setting in settings]


WAYS = [
    *((key, "device") for key in parallel_ids()),
    *((f"{name}-tp{settings[-1]}", "load_weights") for name, settings in PARALLEL.items()),
    *((key, "parts") for key in IN_PARTS),
]
"""Settings that are loaded in another way, too. Through `load_weights` vLLM's own code packs and shards: once per checkpoint."""


@pytest.fixture(scope="module")
def parallel(twin: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each checkpoint at each parallel setting, loaded by the default loader and three ways."""
    jobs: list[dict[str, Any]] = []
    for key in parallel_ids():
        name, _, setting = key.partition("-tp")
        directory = twin(name)
        config = json.loads((directory / "config.json").read_text())
        arguments = {
            "tensor_parallel_size": int(setting.partition("-")[0]),
            "enable_expert_parallel": setting.endswith("-ep"),
        }
        ours = {
            **arguments,
            "load_format": "maxtext",
            "model_loader_extra_config": {"checkpoint": str(cases()[name].items)},
        }
        family = cases()[name].facts["family"]
        folded = {
            "folded": family == "gemma4",
            "computed": family in COMPUTED,
            "hidden_size": config["hidden_size"],
        }
        jobs += [
            {
                "name": f"{key} default",
                "model": str(directory),
                "arguments": arguments,
                "environment": {"MODEL_IMPL_TYPE": "vllm"},
                "keep_state": True,
            },
            {
                "name": f"{key} direct",
                "model": str(directory),
                "arguments": ours,
                "compare": f"{key} default",
                "keep_state": True,
                "forget": f"{key} default",
                **folded,
            },
        ]
        for way, variable in (("load_weights", "0"), ("device", "device")):
            if (key, way) in WAYS:
                other = {"environment": {"VLLM_MAXTEXT_DIRECT": variable}, "compare": f"{key} direct"}
                jobs.append({"name": f"{key} {way}", "model": str(directory), "arguments": ours, **other})
        if key in IN_PARTS:
            gcs.shared()[0].upload(cases()[name].items, gcs.BUCKET, f"engine/{name}/")
            # 40 KiB: as small beside these chunks as the default is beside those of large checkpoints.
            extra = {"checkpoint": f"gs://{gcs.BUCKET}/engine/{name}", "concurrent_gib": 40 / (1 << 20)}
            other = {"change": "small parts", "compare": f"{key} direct"}
            arguments = {**ours, "model_loader_extra_config": extra}
            jobs.append({"name": f"{key} parts", "model": str(directory), "arguments": arguments, **other})
        jobs[-1]["forget"] = f"{key} direct"
    with gcs.environment(gcs.shared()[1].url):
        return run_jobs(jobs, tmp_path_factory.mktemp("parallel"), devices=8)


@pytest.mark.parametrize("key", parallel_ids())
def test_state_is_the_default_loaders(parallel: dict[str, Any], key: str) -> None:
    answer = parallel[f"{key} direct"]
    assert "error" not in answer, answer.get("traceback")
    assert answer["parameters"] > 30
    assert answer["differences"] == {}
    assert answer["placed_elsewhere"] == []
    explained = answer["explained"]
    case = cases()[key.partition("-tp")[0]]
    if case.facts["family"] == "gemma4":
        assert any(name.endswith("embed_tokens.weight") for name in explained) or "dense" in key
    elif case.facts["family"] not in COMPUTED:
        assert explained == []
    if case.facts["family"] == "gemma4" and any(
        override.startswith("num_experts=") for override in case.facts["overrides"]
    ):
        assert (
            sum(name.endswith("w2_weight") for name in explained)
            == sum(name.endswith("router.per_expert_scale") for name in explained)
            > 0
        )


@pytest.mark.parametrize(("key", "way"), WAYS)
def test_all_ways_end_in_the_same_bits(parallel: dict[str, Any], key: str, way: str) -> None:
    answer = parallel[f"{key} {way}"]
    assert "error" not in answer, answer.get("traceback")
    assert answer["differences"] == {}
    assert answer["placed_elsewhere"] == []


SMALL = r"norm|router|\.gate\.|scalar|sinks"
"""Names of the tensors that go through `model.load_weights`."""


@pytest.mark.parametrize(
    "key",
    ["moe_v2-tp1", "qwen2_scanned-tp4", "llama31_scanned-tp8", "gptoss_scanned-tp1", "gptoss_scanned-tp4-ep"],
)
def test_matrices_and_their_biases_are_placed_directly(parallel: dict[str, Any], key: str) -> None:
    plan = open_checkpoint(cases()[key.partition("-tp")[0]].items).plan
    (summary,) = [line for line in parallel[f"{key} direct"]["log"] if line.startswith("INFO Loaded ")]
    small = sum(bool(re.search(SMALL, name)) for name in plan.targets)
    assert f" {len(plan.targets)} tensors ({len(plan.targets) - small} placed directly)" in summary


def test_log_says_what_was_loaded_and_assumed(parallel: dict[str, Any]) -> None:
    log = parallel["moe_v2-tp1 direct"]["log"]
    (summary,) = [line for line in log if line.startswith("INFO Loaded ")]
    for part in (
        str(cases()["moe_v2"].items),
        "step 0",
        "scanned v2",
        "47 leaves",
        "264 tensors",
        "GiB/s",
        "peak host memory",
    ):
        assert part in summary
    (folding,) = [line for line in log if "per_expert_scale" in line]
    assert "folded into down_proj" in folding
    assert "2332" in folding


SPOKEN = [
    "dense_v2",
    "moe_v2",
    "e2b",
    "qwen3_scanned",
    "qwen3moe_scanned",
    "llama31_scanned",
    "qwen2_scanned",
    "mixtral_scanned",
    "gemma3_scanned",
]
GOLDEN_LENGTHS = (5, 24, 40)


def golden_prompts(name: str) -> list[list[int]]:
    """Beginnings of the golden token ids: within the sliding window, and beyond it."""
    tokens = np.load(FIXTURES / name / "golden.npz")["tokens"].tolist()
    return [tokens[:length] for length in GOLDEN_LENGTHS]


@pytest.fixture(scope="module")
def spoken(twin: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the engine says after prompts shorter and longer than the sliding window."""
    jobs: list[dict[str, Any]] = []
    for name in SPOKEN:
        extra = {"checkpoint": str(cases()[name].items)}
        vocab_size = vocabulary(twin(name))
        arguments = {"load_format": "maxtext", "model_loader_extra_config": extra, "max_logprobs": vocab_size}
        prompts = [*PROMPTS, *golden_prompts(name)]
        job = {"name": name, "model": str(twin(name)), "arguments": arguments, "prompts": prompts}
        job["late"] = name == "dense_v2"
        jobs.append({**job, "vocab_size": vocab_size})
    vocab_size = vocabulary(twin("moe_v2"))
    moe = {
        "load_format": "maxtext",
        "model_loader_extra_config": {"checkpoint": str(cases()["moe_v2"].items)},
    }
    jobs += [
        {
            "name": "unfolded",
            "model": str(twin("moe_v2")),
            "arguments": {
                **moe,
                "max_logprobs": vocab_size,
                "model_loader_extra_config": {
                    **moe["model_loader_extra_config"],
                    "fold_expert_scales": False,
                },
            },
            "prompts": PROMPTS,
            "vocab_size": vocab_size,
        },
    ]
    return run_jobs(jobs, tmp_path_factory.mktemp("spoken"), devices=1)


@pytest.mark.parametrize("name", SPOKEN)
def test_logprobs_are_transformers_float32(
    spoken: dict[str, Any], twin: Callable[[str], Path], name: str
) -> None:
    answer = spoken[name]
    assert "error" not in answer, answer.get("traceback")
    reference = reference_logprobs(twin(name))
    limit = bound(
        read_config(twin(name))["num_hidden_layers"], float(np.mean([np.std(row) for row in reference]))
    )
    assert {len(row) for row in answer["logprobs"]} == {vocabulary(twin(name))}
    assert distance(answer["logprobs"][: len(PROMPTS)], reference) < limit


@pytest.mark.parametrize("name", SPOKEN)
def test_logprobs_are_maxtexts_own(spoken: dict[str, Any], twin: Callable[[str], Path], name: str) -> None:
    """The last truth: MaxText's own forward pass, in float32, on the same checkpoint and token ids."""
    golden = np.load(FIXTURES / name / "golden.npz")
    reference = [golden["log_probs"][length - 1] for length in GOLDEN_LENGTHS]
    limit = bound(
        read_config(twin(name))["num_hidden_layers"], float(np.mean([np.std(row) for row in reference]))
    )
    assert distance(spoken[name]["logprobs"][len(PROMPTS) :], reference) < limit


def test_a_step_keeps_its_inputs_while_the_next_is_prepared(spoken: dict[str, Any]) -> None:
    """With async scheduling, tpu-inference prepares a step in the memory of the one that has yet to run."""
    answer = spoken["dense_v2"]
    assert answer["logprobs late"] == answer["logprobs"]


def _swap_gate_and_up(model: Any) -> None:
    experts = model.model.layers[3].experts
    gate, up = experts.gate_up_proj.data.chunk(2, dim=1)
    experts.gate_up_proj.data = torch.cat([up, gate], dim=1)


def _forget_layer_scalar(model: Any) -> None:
    model.model.layers[4].layer_scalar.fill_(1)


def _forget_expert_scale(model: Any) -> None:
    for layer in model.model.layers:
        layer.router.per_expert_scale.data.fill_(1)


def _shift_a_layer(model: Any) -> None:
    first, second = model.model.layers[1], model.model.layers[2]
    weights = {key: value.clone() for key, value in first.state_dict().items()}
    first.load_state_dict(second.state_dict())
    second.load_state_dict(weights)


@pytest.mark.parametrize(
    "mistake", [_swap_gate_and_up, _forget_layer_scalar, _forget_expert_scale, _shift_a_layer]
)
def test_bound_catches_mistakes(
    spoken: dict[str, Any], twin: Callable[[str], Path], mistake: Callable[[Any], None]
) -> None:
    """The reference with one mistake in it is further from the engine than the bound allows."""
    reference = reference_logprobs(twin("moe_v2"))
    limit = bound(
        read_config(twin("moe_v2"))["num_hidden_layers"], float(np.mean([np.std(row) for row in reference]))
    )
    said = spoken["moe_v2"]["logprobs"][: len(PROMPTS)]
    assert distance(said, reference_logprobs(twin("moe_v2"), mistake)) > limit


def _swap_gate_and_up_of_qwen(model: Any) -> None:
    experts = model.model.layers[1].mlp.experts
    gate, up = experts.gate_up_proj.data.chunk(2, dim=1)
    experts.gate_up_proj.data = torch.cat([up, gate], dim=1)


def _swap_query_and_key_norms(model: Any) -> None:
    for layer in model.model.layers:
        attention = layer.self_attn
        query, key = attention.q_norm.weight.clone(), attention.k_norm.weight.clone()
        attention.q_norm.weight.copy_(key)
        attention.k_norm.weight.copy_(query)


def _another_theta(model: Any) -> None:
    """theta ** (-2i / d) with the square root of theta."""
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq**0.5


def _pairs_as_halves(model: Any) -> None:
    """Llama 3.1's query and key as MaxText stores them: rotary pairs next to each other."""
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            heads = projection.weight.view(-1, 2, layer.self_attn.head_dim // 2, projection.weight.shape[1])
            projection.weight.copy_(heads.transpose(1, 2).reshape(projection.weight.shape).clone())


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("qwen3moe_scanned", _swap_gate_and_up_of_qwen),
        ("qwen3moe_scanned", _swap_query_and_key_norms),
        ("qwen3_scanned", _swap_query_and_key_norms),
        ("qwen3_scanned", _shift_a_layer),
        ("qwen3_scanned", _another_theta),
        ("llama31_scanned", _pairs_as_halves),
    ],
)
def test_bound_catches_mistakes_of_other_families(
    spoken: dict[str, Any], twin: Callable[[str], Path], name: str, mistake: Callable[[Any], None]
) -> None:
    reference = reference_logprobs(twin(name))
    limit = bound(
        read_config(twin(name))["num_hidden_layers"], float(np.mean([np.std(row) for row in reference]))
    )
    said = spoken[name]["logprobs"][: len(PROMPTS)]
    assert distance(said, reference) < limit
    assert distance(said, reference_logprobs(twin(name), mistake)) > limit


def test_unfolded_scale_is_lost_on_tpu_inference(spoken: dict[str, Any], twin: Callable[[str], Path]) -> None:
    """Why folding is the default: without it the engine computes the model whose scales are one."""
    reference = reference_logprobs(twin("moe_v2"))
    without = reference_logprobs(twin("moe_v2"), _forget_expert_scale)
    limit = bound(
        read_config(twin("moe_v2"))["num_hidden_layers"], float(np.mean([np.std(row) for row in reference]))
    )

    def distances(model: list[np.ndarray]) -> list[float]:
        answers = zip(spoken["unfolded"]["logprobs"], model, strict=True)
        return [distance([answer], [expected]) for answer, expected in answers]

    assert all(near < far for near, far in zip(distances(without), distances(reference), strict=True))
    assert distance(spoken["unfolded"]["logprobs"], reference) > limit
    # Of the prompts, the median: a router that is nearly undecided may choose another expert in bfloat16 on one processor and
    # not on another, which moves one prompt and not the others.
    assert np.median(distances(reference)) > limit
    assert np.median(distances(without)) < limit
