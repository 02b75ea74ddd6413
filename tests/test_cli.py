"""The command itself: exit codes, what goes to stdout and what to stderr, help."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from support.checkpoints import Tree, cases
from vllm_maxtext_loader.cli.app import app

Twin = Callable[[str], Path]

_MAIN = "from vllm_maxtext_loader.cli.app import main; main()"


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
    for command in ("inspect", "verify", "export", "checksum"):
        assert command in _run("--help").stdout
        shown = _run(command, "--help").stdout
        assert "Examples" in shown
        assert f"vllm-maxtext {command}" in shown
        assert "Exit codes" in shown
        assert "70  a fault of vllm-maxtext-loader" in shown
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


def _broken(*_: object, **__: object) -> None:
    raise KeyError("first\nsecond\x1b[31m")


def test_an_unexpected_exception_is_seventy(
    monkeypatch: pytest.MonkeyPatch, moe: Path, tmp_path: Path
) -> None:
    """Never 1, which says that a check found differences; one line, with a way to the traceback."""
    monkeypatch.setattr("vllm_maxtext_loader.api.open_checkpoint", _broken)
    monkeypatch.setattr("vllm_maxtext_loader.tools.inspect.inspect_checkpoint", _broken)
    monkeypatch.setattr("vllm_maxtext_loader.huggingface.directory.read_hf_directory", _broken)
    for arguments in (
        ("inspect", moe),
        ("verify", moe, tmp_path),
        ("export", moe, tmp_path / "out"),
        ("checksum", moe),
    ):
        result = _run(*arguments)
        assert result.exit_code == 70
        assert result.stdout == ""
        assert result.stderr.startswith("internal error: KeyError: ")
        assert "fault of vllm-maxtext-loader" in result.stderr
        assert "VLLM_MAXTEXT_DEBUG=1" in result.stderr
        assert result.stderr.rstrip("\n").isprintable()
    monkeypatch.setenv("VLLM_MAXTEXT_DEBUG", "1")
    result = _run("inspect", moe)
    assert result.exit_code == 70
    assert "Traceback" in result.stderr
    assert "in _broken" in result.stderr


def test_export_without_transformers_gemma_is_one_message(moe: Path, tmp_path: Path) -> None:
    """An installed transformers that is too old is named; it is neither a traceback nor a difference."""
    code = "import sys, types\nsys.modules['transformers'] = types.ModuleType('transformers')\n" + _MAIN
    result = _subprocess("export", moe, tmp_path / "out", "--model-name", "gemma4-26b", code=code)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "transformers does not have Gemma 4" in result.stderr
    assert result.stderr.count("\n") == 1


def test_what_a_terminal_would_obey_is_escaped(tmp_path: Path) -> None:
    result = _run("inspect", tmp_path / "a\x1b[2Jb\nc")
    assert result.exit_code == 2
    assert result.stderr.rstrip("\n").isprintable()
    assert "a\\x1b[2Jb\\nc" in result.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_output_is_unusable(moe: Path) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", _MAIN, "inspect", str(moe), "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    assert result.returncode == 2
    assert result.stderr == "error: the output cannot be written: No space left on device.\n"


def _checksums(moe: Path) -> str:
    return _run("checksum", moe).stdout


def test_checksum_file_is_what_stdout_gets(moe: Path, tmp_path: Path) -> None:
    expected = _checksums(moe)
    old_mask = os.umask(0o027)
    try:
        for path in (tmp_path / "new.crc", tmp_path / "there.crc"):
            if path.stem == "there":
                path.write_text("old")
            result = _run("checksum", moe, "--output", path)
            assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
            assert path.read_text() == expected
        assert (tmp_path / "new.crc").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(old_mask)
    (tmp_path / "link.crc").symlink_to("there.crc")
    (tmp_path / "there.crc").write_text("old")
    assert _run("checksum", moe, "-o", tmp_path / "link.crc").exit_code == 0
    assert (tmp_path / "link.crc").is_symlink()
    assert (tmp_path / "there.crc").read_text() == expected
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link.crc", "new.crc", "there.crc"]


def test_checksum_refuses_its_target_before_reading(
    monkeypatch: pytest.MonkeyPatch, moe: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("vllm_maxtext_loader.api.open_checkpoint", _broken)
    (tmp_path / "directory").mkdir()
    for path, says in (
        (tmp_path / "absent" / "x.crc", "No such file or directory"),
        (tmp_path / "directory", "not a regular file"),
        ("/dev/null", "not a regular file"),
        ("gs://bucket/x.crc", "must be a local file"),
    ):
        result = _run("checksum", moe, "-o", path)
        assert result.exit_code == 2, result.stderr
        assert str(path) in result.stderr
        assert says in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["directory"]
    assert not list((tmp_path / "directory").iterdir())


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
)
def test_stopped_checksum_leaves_the_old_file(number: int, code: int, moe: Path, tmp_path: Path) -> None:
    (tmp_path / "x.crc").write_text("old")
    stop = (
        # As in a terminal: where tests run in the background, SIGINT and SIGHUP may be ignored, and that is inherited.
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "import os, vllm_maxtext_loader.checkpoint.checksums as checksums\n"
        f"checksums.compute = lambda *_: os.kill(os.getpid(), {int(number)})\n"
    )
    result = _subprocess("checksum", moe, "-o", tmp_path / "x.crc", code=stop + _MAIN)
    assert result.returncode == code
    assert "Traceback" not in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["x.crc"]
    assert (tmp_path / "x.crc").read_text() == "old"


def test_inspect_values_exit_codes(edited: Callable[..., Path], moe: Path) -> None:
    good = _run("inspect", moe, "--values")
    assert good.exit_code == 0
    assert "All values of 47 leaves are finite" in good.stdout

    def diverge(params: Tree) -> None:
        params["decoder"]["decoder_norm"]["scale"][3] = np.nan

    items = edited("moe_v2", diverge)
    assert _run("inspect", items).exit_code == 0
    bad = _run("inspect", items, "--values")
    assert bad.exit_code == 1
    assert "1 of 47 leaves" in bad.stdout
    found = json.loads(_run("inspect", items, "--values", "--json").stdout)
    assert found["values_ok"] is False
    (norm,) = (leaf for leaf in found["leaves"] if leaf["name"] == "decoder.decoder_norm.scale")
    assert norm["values"]["nan"] == 1
    shown = _run("inspect", "--help").stdout
    assert not [key for key in ("values_ok", *norm["values"]) if key not in shown]


def test_inspect_values_reads_the_data_files(edited: Callable[..., Path]) -> None:
    items = edited("moe_v2", lambda params: None, ocdbt=False, zarr3=False)
    for file in (items / "params.params.decoder.decoder_norm.scale").iterdir():
        if file.name[0].isdigit():
            file.unlink()
    result = _run("inspect", items)
    assert result.exit_code == 1
    assert "decoder_norm.scale" in result.stdout
    result = _run("inspect", items, "--values")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "decoder_norm.scale" in result.stderr
