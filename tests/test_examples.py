"""The demo of README.md, as a user runs it: a front end that starts its EngineCore as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parent.parent


def test_demo_generates_tokens() -> None:
    environment = {
        name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "offline.py"), "--max-tokens", "4"],
        env={**environment, "JAX_PLATFORMS": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    said = [line for line in done.stdout.splitlines() if " -> [" in line]
    assert len(said) == 2, done.stderr[-3000:]
    assert (done.stdout + done.stderr).count("JAX runs on the CPU") == 1
