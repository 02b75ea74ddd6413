"""The command itself: exit codes, what goes to stdout and what to stderr, help."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from support.checkpoints import Tree, cases
from vllm_maxtext_loader.cli import app

Twin = Callable[[str], Path]

_MAIN = "from vllm_maxtext_loader.cli import main; main()"


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _subprocess(*arguments: object, code: str = _MAIN) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONUTF8": "1", "COLUMNS": "80"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.fixture
def moe() -> Path:
    return cases()["moe_v2"].items


def test_help_teaches() -> None:
    for command in ("inspect", "verify", "export"):
        assert command in _run("--help").stdout
        shown = _run(command, "--help").stdout
        assert "Examples" in shown
        assert f"vllm-maxtext {command}" in shown
        assert "Exit codes" in shown
    assert "max_ulp" in _run("verify", "--help").stdout
    assert "needs_config" in _run("inspect", "--help").stdout


def test_keys_of_json_are_in_the_help(moe: Path) -> None:
    shown = _run("inspect", "--help").stdout
    found = json.loads(_run("inspect", moe, "--json").stdout)
    keys = {
        *found,
        *found["model"],
        *found["layout"],
        *found["leaves"][0],
        *found["skipped"][0],
        *found["steps"][0],
    }
    assert not [key for key in keys if key not in shown]


def test_version() -> None:
    result = _run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("vllm-maxtext ")


@pytest.mark.parametrize("arguments", [(), ("inspect",), ("nonsense",), ("inspect", "x", "--step", "-1")])
def test_wrong_usage_is_two(arguments: tuple[str, ...]) -> None:
    assert _run(*arguments).exit_code == 2


def test_unusable_input_is_one_message(tmp_path: Path, moe: Path) -> None:
    for arguments in (
        ("inspect", tmp_path / "absent"),
        ("inspect", moe, "--step", "7"),
        ("verify", tmp_path / "absent", tmp_path),
        ("verify", moe, tmp_path / "absent"),
        ("export", moe, tmp_path / "out"),
    ):
        result = _run(*arguments)
        assert result.exit_code == 2, arguments
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert "Traceback" not in result.stderr
    assert _run("export", moe, tmp_path / "out", "--max-shard-size", "many").exit_code == 2
    assert _run("export", moe, tmp_path / "out", "--dtype", "int8").exit_code == 2


def test_inspect_of_what_would_not_load(edited: Callable[..., Path]) -> None:
    items = edited("moe_v2", lambda params: params["decoder"].pop("decoder_norm") and None)
    result = _run("inspect", items, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["type"] == "MissingLeafError"
    assert result.stderr.startswith("error: ")


def test_verify_exit_codes(moe: Path, twin: Twin, tmp_path: Path) -> None:
    same = _run("verify", moe, twin("moe_v2"))
    assert same.exit_code == 0
    assert "The same: 264 same" in same.stdout
    assert "layers.0" not in same.stdout
    assert "layers.0" in _run("verify", moe, twin("moe_v2"), "--all").stdout
    other = shutil.copytree(twin("moe_v2"), tmp_path / "hf")
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-1] ^= 0x40
    (other / "model.safetensors").write_bytes(content)
    found = _run("verify", moe, other, "--json")
    assert found.exit_code == 1
    report = json.loads(found.stdout)
    assert report["same"] is False
    assert len(report["tensors"]) == report["counts"]["differs"] == 1
    assert len(json.loads(_run("verify", moe, other, "--json", "--all").stdout)["tensors"]) == 264
    shown = _run("verify", moe, other)
    assert shown.exit_code == 1
    assert "DIFFERENT" in shown.stdout
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_experts": 4}))
    contradiction = _run("verify", moe, other)
    assert contradiction.exit_code == 2
    assert "num_experts" in contradiction.stderr
    assert contradiction.stdout == ""


def test_export_then_verify(moe: Path, tmp_path: Path) -> None:
    config = cases()["moe_v2"].twin_config
    done = _run(
        "export", moe, tmp_path / "out", "--config", config, "--max-shard-size", "1MB", "--dtype", "bfloat16"
    )
    assert done.exit_code == 0
    assert "Wrote 264 tensors" in done.stdout
    assert done.stderr == ""
    assert _run("verify", moe, tmp_path / "out").exit_code == 0
    again = _run("export", moe, tmp_path / "out", "--config", config)
    assert again.exit_code == 2
    assert "nothing is overwritten" in again.stderr


def test_inspect_as_a_process(moe: Path) -> None:
    """Only JSON on stdout, and none of the imports that take seconds."""
    code = (
        "import sys, atexit\n"
        "heavy = ('torch', 'transformers', 'vllm', 'jax', 'orbax')\n"
        "atexit.register(lambda: print(*(name for name in heavy if name in sys.modules), file=sys.stderr))\n"
        + _MAIN
    )
    result = _subprocess("inspect", moe, "--json", code=code)
    assert result.returncode == 0
    assert json.loads(result.stdout)["tensors"] == 264
    assert result.stderr == "\n"
    shown = _subprocess("inspect", moe)
    assert shown.returncode == 0
    assert max(map(len, shown.stdout.splitlines())) <= 80


def test_reader_that_has_seen_enough(moe: Path) -> None:
    for arguments in (["inspect", moe], ["inspect", moe, "--json"]):
        process = subprocess.Popen(
            [sys.executable, "-c", _MAIN, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        process.stderr.close()
        assert process.wait(60) == 141


def test_fault_of_ours_is_seventy(moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("a line\nand ESC \x1b[2J")

    monkeypatch.setattr("vllm_maxtext_loader.inspect_checkpoint.inspect_checkpoint", broken)
    result = _run("inspect", moe)
    assert result.exit_code == 70
    (line,) = result.stderr.splitlines()
    assert line.startswith("internal error: KeyError: ")
    assert "fault of vllm-maxtext-loader, not of your input" in line
    assert "VLLM_MAXTEXT_DEBUG=1" in line
    assert line.isprintable()
    monkeypatch.setenv("VLLM_MAXTEXT_DEBUG", "1")
    assert "Traceback" in _run("inspect", moe).stderr


def test_export_of_unpublished_dimensions_is_unusable_input(moe: Path, tmp_path: Path) -> None:
    result = _run("export", moe, tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_checksum_writes_a_whole_file_or_none(moe: Path, tmp_path: Path) -> None:
    target = tmp_path / "sums.json"
    assert _run("checksum", moe, "--output", target).exit_code == 0
    assert target.read_text() == _run("checksum", moe).stdout
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()
    before = target.read_text()
    (damaged := tmp_path / "damaged").symlink_to(_without_data(moe, tmp_path / "copy"))
    assert _run("checksum", damaged, "-o", target).exit_code == 2
    assert target.read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "damaged", "sums.json"]
    missing = _run("checksum", moe, "--output", tmp_path / "no" / "sums.json")
    assert missing.exit_code == 2
    assert "cannot be written" in missing.stderr


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _without_data(items: Path, target: Path) -> Path:
    """A copy of an item whose largest data file is gone: metadata is whole."""
    shutil.copytree(items, target)
    max(
        (path for path in target.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size
    ).unlink()
    return target


def test_values_of_missing_data_are_unusable_input(moe: Path, tmp_path: Path) -> None:
    items = _without_data(moe, tmp_path / "items")
    assert _run("inspect", items, "--model-name", "gemma4-26b").exit_code in (0, 2)
    result = _run("inspect", items, "--values")
    assert result.exit_code == 2
    assert "cannot read leaf" in result.stderr


def _spoil(params: Tree) -> None:
    decoder = params["decoder"]
    decoder["decoder_norm"]["scale"] = np.zeros_like(decoder["decoder_norm"]["scale"])
    query = decoder["scanned_blocks"]["local_layers"]["self_attention"]["query"]
    query["kernel"] = np.array(query["kernel"])
    query["kernel"].reshape(-1)[[5, 77]] = np.nan, np.inf


def test_values_that_no_trained_model_has_are_found(moe: Path, edited: Callable[..., Path]) -> None:
    good = _run("inspect", moe, "--values", "--json")
    assert good.exit_code == 0
    found = json.loads(good.stdout)
    assert found["values_ok"] is True
    items = edited("moe_v2", _spoil)
    spoiled = _run("inspect", items, "--values", "--json")
    assert spoiled.exit_code == 1
    before = {leaf["name"]: leaf["values"] for leaf in found["leaves"]}
    after = {leaf["name"]: leaf["values"] for leaf in json.loads(spoiled.stdout)["leaves"]}
    changed = {name for name in before if before[name] != after[name]}
    kernel, norm = (
        "decoder.scanned_blocks.local_layers.self_attention.query.kernel",
        "decoder.decoder_norm.scale",
    )
    assert changed == {kernel, norm}
    assert (after[kernel]["nan"], after[kernel]["inf"]) == (1, 1)
    assert after[norm] == {**after[norm], "min": 0, "max": 0, "mean": 0, "zero_share": 1, "nan": 0, "inf": 0}
    shown = _run("inspect", items, "--values")
    assert shown.exit_code == 1
    assert f"2 of {len(before)} leaves" in " ".join(shown.stdout.split())


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", 5]
)
def test_index_may_name_files_of_its_directory_only(moe: Path, tmp_path: Path, name: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    result = _run("verify", moe, tmp_path)
    assert result.exit_code == 2
    assert "model.safetensors.index.json" in result.stderr
    assert result.stderr.strip().isprintable()
