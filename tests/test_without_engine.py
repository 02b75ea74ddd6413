"""The commands in an environment that has neither vLLM nor torch nor JAX, as after a plain `pip install`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from support.checkpoints import FIXTURES, cases
from support.weight_server import serving

HIDDEN = ("torch", "vllm", "jax", "jaxlib", "tpu_inference", "torchax")

# Hides packages from every finder: whoever asks for them, or whether they are there, sees what a plain install has.
_CODE = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HIDDEN!r}:
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for name in {HIDDEN!r}:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(name)

from vllm_maxtext_loader.cli.app import main

main()
"""


def _run(*arguments: object) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERS_")}
    result = subprocess.run(
        [sys.executable, "-c", _CODE, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONUTF8": "1"},
        timeout=300,
    )
    # No advice of transformers that PyTorch is missing, either.
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def test_all_commands(twin: Callable[[str], Path], tmp_path: Path) -> None:
    moe = cases()["moe_v2"].items
    assert json.loads(_run("inspect", moe, "--json"))["tensors"] == 264
    assert json.loads(_run("inspect", moe, "--values", "--json"))["values_ok"] is True
    assert json.loads(_run("verify", moe, twin("moe_v2"), "--json"))["same"] is True
    assert json.loads(_run("checksum", moe))["leaves"]
    exported = _run("export", moe, tmp_path / "text", "--model-name", "gemma4-26b", "--max-shard-size", "1MB")
    assert "Wrote 264 tensors" in exported
    assert json.loads(_run("verify", moe, tmp_path / "text", "--json"))["same"] is True


def test_a_model_with_a_vision_tower(twin: Callable[[str], Path], tmp_path: Path) -> None:
    items = cases()["moe_mm"].items
    assert "Wrote" in _run("export", items, tmp_path / "out", "--config", twin("moe_mm"))
    assert json.loads(_run("verify", items, tmp_path / "out", "--json"))["same"] is True


def test_reload(tmp_path: Path) -> None:
    for step in ("0", "100"):
        shutil.copytree(FIXTURES / "moe_v2/checkpoints/0", tmp_path / step)
    with serving(str(tmp_path / "0" / "items")) as server:
        assert "serves step 100" in _run("reload", tmp_path, "--url", server.url)
        server.assert_serves(100)
