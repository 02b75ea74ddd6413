"""`vllm-maxtext fit`: reports of people who rented a slice in vain, made anew from metadata; and its edges.

Whether the arithmetic is right is for test_tpu_compile.py, which asks an engine and the TPU's own compiler.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import metadata_only
from support.checkpoints import cases
from vllm_maxtext_loader import errors, open_checkpoint
from vllm_maxtext_loader.tools import slices
from vllm_maxtext_loader.tools.fit import Fitter, Request, Row
from vllm_maxtext_loader.tools.kv_cache import KVCache

pytest.importorskip("jax.experimental.pallas.tpu", reason="JAX's table of TPUs comes with vllm-tpu")

KEYS = [
    "topology",
    "chips",
    "tensor_parallel_size",
    "expert_parallel",
    "hbm_bytes",
    "weight_bytes",
    "padding_bytes",
    "program_bytes",
    "kv_bytes_per_token",
    "kv_tokens",
    "max_model_len",
    "max_num_seqs",
    "fits",
    "reason",
]

Run = Callable[[str], Path]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Metadata of a published model's checkpoint."""
    root = tmp_path_factory.mktemp("published")

    def make(name: str) -> Path:
        run = root / name
        return (
            run
            if run.exists()
            else metadata_only.write(run, metadata_only.leaves(metadata_only.published(name)))
        )

    return make


def row(run: Path, topology: str, **request: Any) -> Row:
    """What is said of a checkpoint on a slice."""
    return Fitter(open_checkpoint(run), str(run), Request(**request)).row(topology)


def words(line: str | None) -> list[str]:
    """A command's words after the checkpoint."""
    assert line is not None
    return shlex.split(line)[3:]


def test_26b_on_v5e_8(published: Run) -> None:
    """tpu-inference issue 2453: an error after all weights were loaded and padded. The weights do fit."""
    found = row(published("gemma4-26b"), "v5e-8")
    assert not found.fits
    assert found.reason.startswith(
        "KV cache: one request of 262,144 tokens needs 8.8 GiB of each chip, 6.8 GiB are left"
    )
    # Of the weights, more than a fifth is padding that expert parallelism does without.
    assert found.padding_bytes / found.weight_bytes == pytest.approx(0.207, abs=0.001)
    assert "--enable-expert-parallel" in words(found.line)
    length = int(words(found.line)[-1])
    again = row(published("gemma4-26b"), "v5e-8", expert_parallel=True, max_model_len=length)
    assert again.fits
    assert not row(published("gemma4-26b"), "v5e-8", expert_parallel=True, max_model_len=length + 4096).fits


@pytest.mark.parametrize("topology", ["v6e-1", "v6e-4", "v6e-8"])
def test_31b_on_v6e(published: Run, topology: str) -> None:
    """tpu-inference issue 2333: out of memory on v6e."""
    found = row(published("gemma4-31b"), topology)
    assert not found.fits
    if topology == "v6e-1":
        assert found.reason.startswith("out of memory: weights take 57.8 GiB of each chip")
        assert found.max_model_len == found.max_num_seqs == found.kv_tokens == 0
        assert found.line is not None
        assert found.line.endswith("# on v6e-4")
    else:
        assert found.reason.startswith("KV cache: one request of 262,144 tokens needs")
        length = int(words(found.line)[-1])
        assert row(published("gemma4-31b"), topology, max_model_len=length).fits


def test_e4b_on_one_v6e_chip(published: Run) -> None:
    """vllm issue 43239: it was no lack of memory that kept it from starting, and the text model fits."""
    found = row(published("gemma4-e4b"), "v6e-1")
    assert found.fits
    assert found.reason == ""
    assert words(found.line)[-2:] == ["--tensor-parallel-size", "1"]
    assert found.kv_tokens > found.max_model_len == 131_072


def test_llama_405b(published: Run) -> None:
    """vllm issue 9052: out of memory on slice after slice, found by trying them."""
    run = published("llama3.1-405b")
    for topology in ("v5e-8", "v5e-32", "v6e-8", "v6e-16"):
        found = row(run, topology)
        assert not found.fits
        assert found.reason.startswith(f"out of memory: weights take {found.weight_bytes / 2**30:.1f} GiB")
    fitting = {"v5e": "v5e-64", "v6e": "v6e-32"}
    for generation, larger in fitting.items():
        line = row(run, f"{generation}-8").line
        assert line is not None
        assert line.endswith(f"# on {larger}")
        length = int(line.partition("--max-model-len ")[2].split()[0])
        assert row(run, larger, max_model_len=length).fits
        assert not row(run, larger).fits
    assert row(run, "tpu7x-8").fits


@pytest.mark.parametrize(
    ("name", "topology"),
    [
        ("qwen3-8b", "v6e-1"),
        ("qwen3-30b-a3b", "v5e-8"),
        ("qwen2.5-7b", "v6e-4"),
        ("llama3.1-8b", "v6e-4"),
        ("mistral-7b", "v6e-1"),
        ("mixtral-8x7b", "v6e-8"),
        ("gemma3-4b", "v5e-4"),
        ("gpt-oss-20b", "v6e-4"),
    ],
)
def test_every_family(published: Run, name: str, topology: str) -> None:
    checkpoint = open_checkpoint(published(name), model_name=name)
    found = Fitter(checkpoint, "CKPT", Request(), step=0).row(topology)
    assert found.fits, found.reason
    # Shapes alone do not tell Llama 3.1 from Llama 3: what the user had to say is said again.
    assert words(found.line)[-2:] == [
        "--model-loader-extra-config",
        json.dumps({"step": 0, "model_name": name}),
    ]
    stored = sum(target.nbytes for target in checkpoint.plan.targets.values())
    held = (found.weight_bytes - found.padding_bytes - found.rotary_bytes) * found.chips
    # What every device has whole is small, but for repeated KV heads, which are padding.
    assert held == pytest.approx(stored, rel=0.01)


def test_windows_need_no_cache_for_every_token(published: Run) -> None:
    """Of Gemma 3's layers, 29 of 34 keep 1024 tokens, and those under way."""
    run = published("gemma3-4b")
    long, short = (row(run, "v6e-1", max_model_len=length) for length in (131_072, 2048))
    every_layer = 34 * 2 * 4 * 256 * 2
    assert short.kv_bytes_per_token > every_layer
    assert long.kv_bytes_per_token < every_layer / 5
    most = row(run, "v6e-1", max_model_len=131_072, max_num_seqs=1000)
    assert most.max_num_seqs == long.kv_tokens // 131_072


def test_dimensions_that_are_not_published(published: Run) -> None:
    """A shape without a published model is answered where a name gives the rest."""
    dims = metadata_only.published("qwen3-8b", layers=4)
    run = metadata_only.write(published("qwen3-8b").with_name("cut"), metadata_only.leaves(dims))
    with pytest.raises(errors.ConfigMismatchError, match="published"):
        row(run, "v6e-1")
    checkpoint = open_checkpoint(run, model_name="qwen3-8b")
    assert Fitter(checkpoint, str(run), Request()).row("v6e-1").fits


def test_experts_that_only_some_chips_can_spread_whole(published: Run) -> None:
    """A row of 2880 values is no multiple of 128, which the SparseCores' kernel wants; v5e has none."""
    run = published("gpt-oss-20b")
    refused = row(run, "v6e-8", expert_parallel=True)
    assert refused.reason.startswith("--enable-expert-parallel: tpu-inference has no kernel")
    assert refused.line is None
    assert "--enable-expert-parallel" not in words(row(run, "v6e-8").line)
    assert row(run, "v5e-8", expert_parallel=True).fits
    assert "--enable-expert-parallel" in words(row(run, "v5e-8").line)


def test_sinks_without_a_kernel() -> None:
    case = cases()["gptoss_scanned"]
    found = Fitter(open_checkpoint(case.items, model_name="gpt-oss-20b"), "CKPT", Request()).row("v6e-1")
    assert found.reason.startswith("tpu-inference has an attention kernel with sinks for head_dim 64 only")
    assert found.line is None


def test_every_chip_holds_the_vision_tower(published: Run, tmp_path: Path) -> None:
    dims = metadata_only.published("gemma4-26b", vision=True)
    seeing = metadata_only.write(tmp_path / "run", metadata_only.leaves(dims))
    plan = open_checkpoint(seeing).plan
    tower = sum(
        target.nbytes
        for name, target in plan.targets.items()
        if ".vision_tower." in name or "embed_vision" in name
    )
    assert tower > 1 << 30
    more = row(seeing, "v6e-8").weight_bytes - row(published("gemma4-26b"), "v6e-8").weight_bytes
    assert more == pytest.approx(tower, rel=0.01)


def test_what_no_slice_of_a_kind_holds(published: Run) -> None:
    found = row(published("gemma4-31b"), "v6e-1", tensor_parallel_size=1)
    assert found.line is None
    assert not found.fits


def test_heads_that_cannot_be_spread(published: Run) -> None:
    for name, topology, smaller in (("gemma4-e2b", "v6e-16", "v6e-8"), ("qwen2.5-7b", "v5e-8", "v5e-4")):
        found = row(published(name), topology)
        assert not found.fits
        heads, devices = {"gemma4-e2b": (8, 16), "qwen2.5-7b": (28, 8)}[name]
        assert found.reason == f"{heads} attention heads cannot be spread over {devices} devices"
        assert found.line is not None
        assert found.line.endswith(f"# on {smaller}")
        assert row(published(name), smaller).fits


def test_tensor_parallel_beyond_the_slice(published: Run) -> None:
    assert row(published("gemma4-e2b"), "v6e-1", tensor_parallel_size=4).reason == (
        "--tensor-parallel-size 4: v6e-1 has 1 devices"
    )


def test_less_precise_cache_saves_where_a_device_has_several_heads(published: Run) -> None:
    """The cache packs four fp8 values, or two of bfloat16; one head has two rows, keys and values."""
    several = [
        row(published("gemma4-31b"), "v6e-4", kv_cache_dtype=dtype).kv_bytes_per_token
        for dtype in ("auto", "fp8")
    ]
    # Of the layers with full attention a device has one head, of the others four.
    assert several == [225_280, 122_880]
    one = [row(published("gemma4-26b"), "v6e-8", kv_cache_dtype=dtype) for dtype in ("auto", "fp8")]
    assert one[0].kv_bytes_per_token == one[1].kv_bytes_per_token
    assert words(one[1].line)[-2:] == ["--kv-cache-dtype", "fp8"]


@pytest.mark.parametrize(
    ("name", "chips", "devices", "topology", "hbm"),
    [
        ("v5e-8", 8, 8, "v5e:2x4", 17_200_000_000),
        ("v6e-1", 1, 1, "v6e:1x1", 34_400_000_000),
        ("v6e:4x4", 16, 16, "v6e:4x4", 34_400_000_000),
        ("v5p-8", 4, 4, "v5p:2x2x1", 103_000_000_000),
        ("tpu7x-4", 4, 8, "tpu7x:2x2x1", 206_000_000_000),
    ],
)
def test_slices(name: str, chips: int, devices: int, topology: str, hbm: int) -> None:
    found = slices.parse(name)
    assert (found.chips, found.devices, found.topology, found.hbm_bytes) == (chips, devices, topology, hbm)


@pytest.mark.parametrize("name", ["v6e", "v6e-3", "v9e-8", "8", "v6e-"])
def test_unknown_slices(name: str) -> None:
    with pytest.raises(errors.OptionError, match=name):
        slices.parse(name)


def test_chips_without_a_kernel_are_refused() -> None:
    with pytest.raises(errors.EngineError, match=r"v4-8: tpu-inference 0\.32 has no attention kernel"):
        slices.parse("v4-8")


@pytest.mark.parametrize(
    ("length", "requests", "block"),
    [(512, 8, 32), (4096, 8, 256), (8192, 8, 256), (8193, 8, 16), (262_144, 128, 256), (262_144, 256, 512)],
)
def test_blocks(length: int, requests: int, block: int) -> None:
    assert KVCache(1, (None,), length, requests).block_size == block


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command."""
    return subprocess.run(
        [sys.executable, "-c", "from vllm_maxtext_loader.cli.app import main; main()", "fit", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "160"},
    )


def test_rows_of_json(published: Run) -> None:
    done = command(str(published("gemma4-26b")), "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [list(found) for found in rows] == [KEYS] * len(slices.COMMON)
    assert [found["topology"] for found in rows] == list(slices.COMMON)
    assert all(found["fits"] == (found["reason"] == "") for found in rows)
    assert {found["program_bytes"] for found in rows} == {None}


def test_answers_without_what_takes_seconds_to_import(published: Run) -> None:
    code = (
        "import sys; from vllm_maxtext_loader.cli.app import main\n"
        "try: main()\n"
        "finally: print(*(m for m in ('torch', 'transformers', 'jax.experimental.pallas') if m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "fit", str(published("gemma4-26b")), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == ""


def test_exit_codes_and_the_table(published: Run) -> None:
    run = str(published("gemma4-31b"))
    short = command(run, "--topology", "v6e-4", "--max-model-len", "8192")
    assert short.returncode == 0
    assert (
        f"vllm serve {run} --load-format maxtext --tokenizer TOKENIZER --tensor-parallel-size 4"
        in short.stdout
    )
    none = command(run, "--topology", "v6e-1")
    assert none.returncode == 1
    assert "out of memory: weights take 57.8 GiB" in none.stdout
    long = command(run, "--topology", "v6e-4", "--max-model-len", "262144")
    assert long.returncode == 1
    for wrong in (["--topology", "v9e-1"], ["--kv-cache-dtype", "int3"], ["--gpu-memory-utilization", "2"]):
        done = command(run, *wrong)
        assert done.returncode == 2, done.stdout
        assert done.stderr.startswith("error: ")
    missing = command(run + "-missing")
    assert missing.returncode == 2


def test_a_checkpoint_that_maxtext_wrote() -> None:
    """Its dimensions are no published model's: a name says what shapes cannot tell."""
    case = cases()["moe_v2"]
    done = command(str(case.items), "--model-name", "gemma4-26b", "--topology", "v6e-1", "--json")
    assert done.returncode == 0, done.stderr
    assert command(str(case.items), "--topology", "v6e-1").returncode == 2


def test_head_dimension_without_a_kernel() -> None:
    case = cases()["e2b"]
    found = Fitter(open_checkpoint(case.items, model_name="gemma4-e2b"), "CKPT", Request()).row("v6e-1")
    assert not found.fits
    assert found.reason.startswith(
        "tpu-inference has no attention kernel for layers that share keys and values"
    )
    assert found.line is None
