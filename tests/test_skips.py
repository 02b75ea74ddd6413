"""A skipped test fails CI (`--no-skips`), so that a package or a fixture cannot get lost unnoticed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")


@pytest.mark.parametrize(("options", "code"), [([], 0), (["--no-skips"], 1)])
@pytest.mark.parametrize(
    "test",
    [
        "import pytest\ndef test(): pytest.importorskip('no_such_package')",
        "import pytest\npytest.importorskip('no_such_package')",
    ],
    ids=["test", "module"],
)
def test_skip(test: str, options: list[str], code: int, tmp_path: Path) -> None:
    shutil.copy(CONFTEST, tmp_path)
    (tmp_path / "test_passes.py").write_text("def test(): pass")
    (tmp_path / "test_skipped.py").write_text(test)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {CONFTEST.parent}\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 passed, 1 skipped" in done.stdout
    assert done.returncode == code
