"""The entry point: light, idempotent, and without effect on other load formats."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys

import pytest

from vllm_maxtext_loader.plugin import LOAD_FORMAT

LIGHT = """
import json, os, sys, time
before = set(sys.modules)
started = time.perf_counter()
from vllm_maxtext_loader.plugin import register
register(); register()
heavy = [name for name in ("jax", "orbax", "tensorstore", "gcsfs", "torch", "vllm", "tpu_inference") if name in sys.modules]
print(json.dumps({"heavy": heavy, "seconds": time.perf_counter() - started}))
"""


def test_entry_point_is_declared() -> None:
    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name=LOAD_FORMAT)
    assert entry.value == "vllm_maxtext_loader.plugin:register"
    assert callable(entry.load())


def test_register_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["heavy"] == []


def test_versions_that_were_not_tried_are_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    from vllm_maxtext_loader import engine
    from vllm_maxtext_loader.errors import EngineError

    engine.check_vllm_version()
    monkeypatch.setattr(engine, "SUPPORTED_VLLM", "0.31")
    with pytest.raises(EngineError, match=r"0\.32\.0 is installed; .* works with 0\.31\.x"):
        engine.check_vllm_version()


def test_other_load_formats_keep_their_engine_arguments() -> None:
    """A wrapped EngineArgs hands other formats to vLLM's own method, untouched."""
    pytest.importorskip("vllm")
    from vllm_maxtext_loader.engine import wrap_engine_args

    calls: list[str] = []

    class Arguments:
        load_format = "auto"
        model = "gs://bucket/model"

        def create_engine_config(self) -> str:
            calls.append("engine")
            return "theirs"

        def create_model_config(self) -> str:
            calls.append("model")
            return "theirs"

    wrap_engine_args(Arguments)  # type: ignore[arg-type]
    arguments = Arguments()
    before = dict(vars(arguments))
    assert (arguments.create_engine_config(), arguments.create_model_config()) == ("theirs", "theirs")
    assert calls == ["engine", "model"]
    assert vars(arguments) == before
