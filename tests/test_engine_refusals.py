"""What the engine does with a checkpoint that cannot be loaded as it is: it does not come up, and says why; or it says what it left out.

The engines start in one process (one that hangs in its own), against one bucket behind a real GCS protocol server whose answers a proxy breaks.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from support import gcs
from support.checkpoints import FIXTURES, cases, read_orbax, write_orbax
from support.damage import biggest, cut
from support.engine import PROMPTS, bound, distance, reference_logprobs, run_jobs, vocabulary
from vllm_maxtext_loader import open_checkpoint
from vllm_maxtext_loader.checkpoint import checksums

pytestmark = pytest.mark.engine

MOE = "moe_v2"
TEXT, MULTIMODAL = "moe_zarr2", "moe_mm"
"""A text-only checkpoint of six layers, and a multimodal twin whose language model has the same dimensions."""

RUN = FIXTURES / MOE / "checkpoints"


def _bucket_jobs(model: Path) -> list[dict[str, Any]]:
    """Loads of runs in the bucket, each of which is in trouble of its own."""
    storage, proxy = gcs.shared()
    jobs = []
    for name, fault in (
        ("forbidden", {"status": 403}),
        ("unavailable", {"status": 503}),
        ("hanging", {"hang": 60.0}),
    ):
        storage.upload(RUN, gcs.BUCKET, f"refused/{name}/")
        proxy.faults.append(gcs.Fault(f"read .*refused/{name}/.*process_0/d/", **fault))  # type: ignore[arg-type]
        jobs.append(_job(name, model, f"gs://{gcs.BUCKET}/refused/{name}"))
    storage.upload(RUN, gcs.BUCKET, "refused/deleted/")
    proxy.faults.append(
        gcs.Fault(
            "read .*refused/deleted/.*process_0/d/",
            before=lambda: storage.delete(gcs.BUCKET, "refused/deleted/0/"),
            after=3,
            times=1,
        )
    )
    storage.upload(RUN / "0/items", gcs.BUCKET, "refused/uncommitted/0/items/")
    return [
        *jobs,
        _job("deleted", model, f"gs://{gcs.BUCKET}/refused/deleted"),
        _job("uncommitted", model, f"gs://{gcs.BUCKET}/refused/uncommitted"),
        _job("missing", model, f"gs://{gcs.BUCKET}/refused/nothing-here"),
    ]


def _job(name: str, model: Path, checkpoint: Path | str, **extra: Any) -> dict[str, Any]:
    options = {"checkpoint": str(checkpoint), **extra}
    return {
        "name": name,
        "model": str(model),
        "arguments": {"load_format": "maxtext", "model_loader_extra_config": options},
    }


def _with(job: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """A job with more engine arguments."""
    return {**job, "arguments": {**job["arguments"], **arguments}}


def _another_value(tree: dict[str, Any]) -> None:
    """Bit rot: one value of a leaf is another one."""
    norm = tree["params"]["params"]["decoder"]["decoder_norm"]
    norm["scale"] = np.array(norm["scale"])
    norm["scale"][3] = ml_dtypes.bfloat16(5)


def _diverge(tree: dict[str, Any]) -> None:
    """One kernel of one layer is NaN, everything else is as it was."""
    kernel = tree["params"]["params"]["decoder"]["scanned_blocks"]["local_layers"]["self_attention"]["query"]
    kernel["kernel"] = np.array(kernel["kernel"])
    kernel["kernel"][:, 0, 1] = np.nan


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "pipeline": (
        {"pipeline_parallel_size": 2},
        "--pipeline-parallel-size 2: --load-format maxtext cannot fill",
    ),
    "quantization": (
        {"quantization": "fp8"},
        "--quantization fp8: --load-format maxtext serves weights in the dtype",
    ),
    "qwix": (
        {
            "additional_config": {
                "quantization": {"qwix": {"rules": [{"module_path": ".*", "weight_qtype": "int8"}]}}
            }
        },
        '--additional-config with "quantization" (qwix): --load-format maxtext serves weights in the dtype',
    ),
    "model class": (
        {"model_impl": "transformers"},
        "--model-impl transformers: --load-format maxtext loads into vLLM's own",
    ),
    "draft": (
        {"speculative_config": {"method": "draft_model", "model": "/draft", "num_speculative_tokens": 2}},
        "--speculative-config (method draft_model, model /draft): of the methods with a draft model, --load-format",
    ),
}
"""Engine arguments that cannot be served, and the beginning of the refusal."""


@pytest.fixture(scope="module")
def loads(twin: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every load of this file, by name."""
    root = tmp_path_factory.mktemp("refusals")
    model, moe = twin(MOE), cases()[MOE].items
    truncated = Path(shutil.copytree(RUN, root / "truncated"))
    cut(data := biggest(truncated), data.stat().st_size // 2)
    tree = read_orbax(moe)
    stored = write_orbax(root / "stored" / "0", tree)
    sums = root / "sums.json"
    checkpoint = open_checkpoint(stored)
    sums.write_text(checksums.dumps(checksums.compute(checkpoint), checkpoint.plan.where))
    _another_value(tree)
    rotten = write_orbax(root / "rotten" / "0", tree)
    tree = read_orbax(moe)
    _diverge(tree)
    diverged = write_orbax(root / "diverged" / "0", tree)
    dense = (twin("dense_v2"), cases()["dense_v2"].items)
    multimodal = _job("text only", twin(MULTIMODAL), cases()[TEXT].items)
    multimodal |= {"prompts": PROMPTS, "vocab_size": vocabulary(twin(TEXT))}
    multimodal["arguments"]["max_logprobs"] = multimodal["vocab_size"]
    jobs = [
        {**_job("flax", model, moe), "environment": {"MODEL_IMPL_TYPE": "flax_nnx"}},
        {
            "name": "unknown key",
            "model": str(model),
            "arguments": {"load_format": "maxtext", "model_loader_extra_config": {"checkpoin": "x"}},
        },
        _job("wrong config", twin("dense_v2"), moe),
        {
            "name": "no tokenizer",
            "model": str(moe),
            "arguments": {"load_format": "maxtext", "skip_tokenizer_init": False},
        },
        _job("truncated", model, truncated),
        _job("checksums", model, stored, checksums=str(sums)),
        _job("rotten", model, rotten, checksums=str(sums)),
        _job("diverged", model, diverged),
        {**_job("extra parameter", *dense), "change": "parameter"},
        {**_job("tensor left over", *dense), "change": "less"},
        *(_with(_job(f"option {name}", model, moe), arguments) for name, (arguments, _) in OPTIONS.items()),
        {
            **_with(_job("fp8 cache", model, moe), {"kv_cache_dtype": "fp8", "max_logprobs": 5}),
            "prompts": PROMPTS,
            "vocab_size": 5,
        },
        multimodal,
        *_bucket_jobs(model),
    ]
    with gcs.environment(gcs.shared()[1].url, VLLM_MAXTEXT_TIMEOUT="3"):
        # In a process of its own: TensorStore goes on for a while with the requests of a load that was given up, and what they do is
        # counted with those of the next load.
        (hanging,) = (job for job in jobs if job["name"] == "hanging")
        jobs.remove(hanging)
        answers = run_jobs(jobs, root / "jobs", devices=1) | run_jobs([hanging], root / "hanging", devices=1)
    gcs.shared()[1].clear()
    return answers


REFUSED: dict[str, tuple[str, ...]] = {
    "flax": ("EngineError", "MODEL_IMPL_TYPE=flax_nnx", "Unset MODEL_IMPL_TYPE"),
    "unknown key": (
        "OptionError",
        "'checkpoin'",
        "checkpoint, step, model_name, fold_expert_scales, concurrent_gib",
    ),
    "wrong config": ("ConfigMismatchError", "num_experts: configuration None, checkpoint 8"),
    "no tokenizer": ("EngineError", "--tokenizer"),
    "truncated": ("ReadError", "truncated/0/items"),
    "rotten": ("ReadError", "leaf params.params.decoder.decoder_norm.scale, chunk [", "CRC-32C is "),
    "forbidden": ("StorageError", "gs://checkpoints/refused/forbidden/0/items", "403"),
    "unavailable": ("StorageError", "gs://checkpoints/refused/unavailable/0/items", "503"),
    "hanging": ("StorageError", "gs://checkpoints/refused/hanging/0/items", "VLLM_MAXTEXT_TIMEOUT"),
    # Whether the tree or the arrays are being read when the step goes is a matter of timing; test_faults has both.
    "deleted": ("", "gs://checkpoints/refused/deleted/0"),
    "uncommitted": ("", "gs://checkpoints/refused/uncommitted", "commit"),
    "missing": ("CheckpointNotFoundError", "gs://checkpoints/refused/nothing-here"),
    "extra parameter": (
        "IncompleteLoadError",
        "1 of ",
        "parameters of the engine's model did not come from the checkpoint: renamed_weight",
    ),
    "tensor left over": ("IncompleteLoadError", "tensors were not taken by the engine: model."),
    **{f"option {name}": ("EngineError", says) for name, (_, says) in OPTIONS.items()},
}


@pytest.mark.parametrize("name", REFUSED)
def test_engine_does_not_come_up(loads: dict[str, Any], name: str) -> None:
    answer = loads[name]
    kind, *says = REFUSED[name]
    assert answer["error"].startswith(kind), answer["error"]
    for part in says:
        assert part in answer["error"]
    # Nothing of an engine was there to look at, and nothing says that it was loaded.
    assert "parameters" not in answer
    assert not [line for line in answer["log"] if line.startswith("INFO Loaded ")]


def test_values_that_are_not_finite_are_named(loads: dict[str, Any]) -> None:
    answer = loads["diverged"]
    assert "error" not in answer, answer.get("traceback")
    (said,) = [line for line in answer["log"] if "NaN or inf" in line]
    assert said.startswith("WARNING ")
    assert "1 leaves hold NaN or inf: decoder.scanned_blocks.local_layers.self_attention.query.kernel" in said
    assert not [line for line in loads["checksums"]["log"] if "NaN or inf" in line]


def test_quantized_cache_is_served(loads: dict[str, Any]) -> None:
    """What the refusal of quantization says stays possible."""
    answer = loads["fp8 cache"]
    assert "error" not in answer, answer.get("traceback")
    assert [len(tokens) for tokens in answer["tokens"]] == [1] * len(PROMPTS)


def test_good_checksums_load(loads: dict[str, Any]) -> None:
    answer = loads["checksums"]
    assert "error" not in answer, answer.get("traceback")
    assert answer["parameters"] > 100
    assert any("compared with the checksums in" in line for line in answer["log"])


def test_text_checkpoint_is_served_as_text(loads: dict[str, Any], twin: Callable[[str], Path]) -> None:
    """A multimodal configuration, a checkpoint without a vision tower: text, no vision weights asked for, and said so."""
    answer = loads["text only"]
    assert "error" not in answer, answer.get("traceback")
    (said,) = [line for line in answer["log"] if "no vision tower" in line]
    assert said.startswith("WARNING")
    assert "serving text only (Gemma4ForCausalLM)" in said
    reference = reference_logprobs(twin(TEXT))
    limit = bound(6, float(np.mean([np.std(row) for row in reference])))
    assert distance(answer["logprobs"], reference) < limit
