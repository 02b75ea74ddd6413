"""Engines compiled for TPUs that are not there: the cases, and one process for each."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from support import metadata_only

WORKER = Path(__file__).with_name("tpu_worker.py")
SMALL = {"max_model_len": 4096, "max_num_seqs": 8, "max_num_batched_tokens": 256}
"""Arguments for programs that compile in seconds; kernels, weights and shardings are the same."""

HBM = 34_400_000_000
"""Memory of a v6e chip; that an engine is told of each device, where a test does not say."""

IMAGES: dict[str, dict[str, Any]] = {
    "gemma3": {"limit_mm_per_prompt": {"image": 1}},
    "gemma4": {
        "limit_mm_per_prompt": {"image": 1, "video": 0, "audio": 0},
        "mm_processor_kwargs": {"max_soft_tokens": 70},
    },
}
"""By family, arguments for the smallest vision encoder."""


@dataclasses.dataclass(frozen=True)
class Case:
    """An engine, and what it is compiled for.

    Attributes:
        model: MaxText's name of the published model whose layers it has.
        layers: its first layers only; None means all.
        topologies: libtpu's names.
        tensor_parallel, expert_parallel: as the engine's options.
        vision: with the vision tower.
        refused: by topology, a part of the compiler's message, where it is known to refuse.
    """

    model: str
    layers: int | None
    topologies: tuple[str, ...]
    tensor_parallel: int
    expert_parallel: bool = False
    vision: bool = False
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def hbm_bytes(self) -> int:
        """Memory that the engine is told of each device: that of the smallest it is compiled for."""
        return 17_200_000_000 if any(name.startswith("v5e") for name in self.topologies) else HBM

    def arguments(self) -> dict[str, Any]:
        """The engine's arguments."""
        return {
            **SMALL,
            **(IMAGES[self.model.partition("-")[0]] if self.vision else {}),
            "tensor_parallel_size": self.tensor_parallel,
            "enable_expert_parallel": self.expert_parallel,
            "model_loader_extra_config": {"model_name": self.model},
        }

    def write(self, run: Path) -> Path:
        """Its checkpoint: metadata of the published shapes, and no array data."""
        dims = metadata_only.published(self.model, layers=self.layers, vision=self.vision)
        return metadata_only.write(run, metadata_only.leaves(dims))


CASES: dict[str, Case] = {
    "26b TP 8": Case("gemma4-26b", 6, ("v5e:2x4", "v6e:2x4", "tpu7x:2x2x1"), 8),
    "26b TP 4": Case("gemma4-26b", 6, ("v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"), 4),
    "26b TP 1": Case("gemma4-26b", 6, ("v6e:1x1", "tpu7x:2x2x1"), 1),
    "26b EP 8": Case("gemma4-26b", 6, ("v5e:2x4", "v6e:2x4", "tpu7x:2x2x1"), 8, expert_parallel=True),
    "26b TP 16, 4 hosts": Case("gemma4-26b", 6, ("v6e:4x4",), 16),
    # A process for each: the compiler takes several GiB of host memory for the vision encoder.
    "26b with images, v5e": Case("gemma4-26b", 6, ("v5e:2x2",), 4, vision=True),
    "26b with images, v6e": Case("gemma4-26b", 6, ("v6e:2x2",), 4, vision=True),
    "26b with images, tpu7x": Case("gemma4-26b", 6, ("tpu7x:2x2x1",), 4, vision=True),
    "26b, all layers": Case("gemma4-26b", None, ("v6e:2x4",), 8),
    "31b TP 8": Case("gemma4-31b", 6, ("v5e:2x4", "v6e:2x4", "tpu7x:2x2x1"), 8),
    "31b TP 4": Case("gemma4-31b", 6, ("v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"), 4),
    # 16 KV heads on one device: the attention kernel of tpu-inference 0.32 takes more scratch than tpu7x has.
    "31b TP 1": Case(
        "gemma4-31b",
        6,
        ("v6e:1x1", "tpu7x:2x2x1"),
        1,
        refused={"tpu7x:2x2x1": "would exceed memory (size=67108864)"},
    ),
    "e2b, all layers": Case("gemma4-e2b", None, ("v5e:1x1", "v6e:1x1", "tpu7x:2x2x1"), 1),
    "e4b, all layers": Case("gemma4-e4b", None, ("v5e:2x2", "v6e:2x2"), 4),
    "e4b with images": Case("gemma4-e4b", None, ("v6e:1x1",), 1, vision=True),
    "gemma3-4b TP 8": Case("gemma3-4b", 12, ("v5e:2x4", "v6e:2x4", "tpu7x:2x2x1"), 8),
    "gemma3-4b TP 4": Case("gemma3-4b", 12, ("v5e:2x2", "v6e:2x2"), 4),
    "gemma3-4b with images": Case("gemma3-4b", 12, ("v6e:1x1",), 1, vision=True),
    "gemma3-4b, all layers": Case("gemma3-4b", None, ("v5e:1x1", "v6e:1x1", "tpu7x:2x2x1"), 1),
    "qwen3-8b TP 8": Case("qwen3-8b", 4, ("v5e:2x4", "v6e:2x4", "tpu7x:2x2x1"), 8),
    "qwen3-8b TP 4": Case("qwen3-8b", 4, ("v5e:2x2", "v6e:2x2"), 4),
    "qwen3-8b TP 1": Case("qwen3-8b", 4, ("v6e:1x1", "tpu7x:2x2x1"), 1),
    "qwen3-30b-a3b TP 8": Case("qwen3-30b-a3b", 4, ("v5e:2x4", "v6e:2x4", "tpu7x:2x2x1"), 8),
    "qwen3-30b-a3b TP 4": Case("qwen3-30b-a3b", 4, ("v5e:2x2", "v6e:2x2"), 4),
    "qwen3-30b-a3b TP 1": Case("qwen3-30b-a3b", 2, ("v6e:1x1", "tpu7x:2x2x1"), 1),
    "qwen3-30b-a3b EP 8": Case(
        "qwen3-30b-a3b", 4, ("v5e:2x4", "v6e:2x4", "tpu7x:2x2x1"), 8, expert_parallel=True
    ),
    # 28 attention heads: no 8 devices.
    "qwen2.5-7b TP 4": Case("qwen2.5-7b", 4, ("v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"), 4),
    "qwen2.5-7b TP 1": Case("qwen2.5-7b", 4, ("v6e:1x1", "tpu7x:2x2x1"), 1),
    "llama3.1-8b TP 8": Case("llama3.1-8b", 4, ("v5e:2x4", "v6e:2x4", "tpu7x:2x2x1"), 8),
    "llama3.1-8b TP 4": Case("llama3.1-8b", 4, ("v5e:2x2", "v6e:2x2"), 4),
    "llama3.1-8b TP 1": Case("llama3.1-8b", 4, ("v6e:1x1", "tpu7x:2x2x1"), 1),
    "llama3.1-405b TP 16, 4 hosts": Case("llama3.1-405b", 2, ("v6e:4x4",), 16),
    "mistral-7b TP 8": Case("mistral-7b", 4, ("v5e:2x4", "v6e:2x4", "tpu7x:2x2x1"), 8),
    "mistral-7b TP 1": Case("mistral-7b", 4, ("v6e:1x1",), 1),
    "mixtral-8x7b TP 8": Case("mixtral-8x7b", 4, ("v5e:2x4", "v6e:2x4", "tpu7x:2x2x1"), 8),
    "mixtral-8x7b TP 4": Case("mixtral-8x7b", 4, ("v5e:2x2", "v6e:2x2"), 4),
    # Experts of full width on a device: tpu-inference 0.32 chooses tiles that are larger than these chips' VMEM.
    "mixtral-8x7b TP 1": Case(
        "mixtral-8x7b",
        2,
        ("v6e:1x1", "tpu7x:2x2x1"),
        1,
        refused={"v6e:1x1": "Ran out of memory in memory space vmem"},
    ),
    "mixtral-8x7b EP 8": Case(
        "mixtral-8x7b",
        4,
        ("v5e:2x4", "v6e:2x4", "tpu7x:2x2x1"),
        8,
        expert_parallel=True,
        refused=dict.fromkeys(("v5e:2x4", "v6e:2x4"), "Ran out of memory in memory space vmem"),
    ),
    "gpt-oss-20b TP 8": Case("gpt-oss-20b", 4, ("v5e:2x4", "v6e:2x4", "tpu7x:2x2x1"), 8),
    "gpt-oss-20b TP 4": Case("gpt-oss-20b", 4, ("v5e:2x2", "v6e:2x2"), 4),
    "gpt-oss-20b TP 1": Case("gpt-oss-20b", 4, ("v6e:1x1", "tpu7x:2x2x1"), 1),
    # 2880 columns: the kernel that gathers tokens on SparseCores wants a multiple of 128.
    "gpt-oss-20b EP 8": Case(
        "gpt-oss-20b",
        4,
        ("v5e:2x4", "v6e:2x4", "tpu7x:2x2x1"),
        8,
        expert_parallel=True,
        refused=dict.fromkeys(("v6e:2x4", "tpu7x:2x2x1"), "indexer shape in scatter/gather"),
    ),
}

QUICK = ("26b TP 8", "qwen3-8b TP 4")
"""What CI compiles; everything else is compiled by `pytest -m tpu_compile`."""

ROWS: list[tuple[str, ...]] = []
"""Rows of the table in docs/compatibility.md; printed at the end of a run."""

COLUMNS = ("engine", "layers", "topology", "device", "seconds", "arguments MiB", "temporary MiB", "code MiB")


def run(
    model: Path | str,
    directory: Path,
    *,
    topologies: tuple[str, ...] = (),
    arguments: dict[str, Any],
    hbm_bytes: int = HBM,
    **job: Any,
) -> dict[str, Any]:
    """Starts an engine in a process and compiles its programs. See tpu_worker.py for the answer."""
    directory.mkdir(parents=True, exist_ok=True)
    content = {
        "model": str(model),
        "hbm_bytes": hbm_bytes,
        "arguments": arguments,
        "topologies": topologies,
        **job,
    }
    (directory / "job.json").write_text(json.dumps(content))
    answer = directory / "answer.json"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={arguments.get('tensor_parallel_size', 1)}",
        "TPU_SKIP_MDS_QUERY": "1",
        # libtpu guards a TPU against two processes; here there is none.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    environment.pop("MODEL_IMPL_TYPE", None)
    with (directory / "log.txt").open("w") as log:
        subprocess.run(
            [sys.executable, str(WORKER), str(directory / "job.json"), str(answer)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if not answer.exists():
        pytest.fail(f"the engine's process died: {(directory / 'log.txt').read_text()[-3000:]}")
    return json.loads(answer.read_text())


def note(name: str, answer: dict[str, Any]) -> None:
    """Keeps a row of the table for each topology."""
    layers = str(CASES[name].layers or "all")
    for topology, found in answer["topologies"].items():
        if "error" in found:
            ROWS.append((name, layers, topology, "", "", _shortened(found["error"]), "", ""))
            continue
        step = found["programs"][0]
        mib = [f"{step[key] / 2**20:.1f}" for key in ("temporary_bytes", "code_bytes")]
        arguments = (step["argument_bytes"] - step["kv_cache_bytes"]) / 2**20
        ROWS.append(
            (name, layers, topology, found["device_kind"], f"{step['seconds']:.0f}", f"{arguments:.0f}", *mib)
        )


def _shortened(error: str) -> str:
    """What the compiler says, without what was asked of it, in a cell of a table."""
    said = error.partition("cannot be compiled: ")[2].rpartition("RESOURCE_EXHAUSTED: ")[2] or error
    return said.partition(" while allocating")[0].replace("|", "/")[:100]


def table() -> list[str]:
    """The rows as Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in ROWS)]
