"""Draws the pictures of the documentation: terminal output as SVG, in docs/images.

    python docs/pictures.py              # what `vllm-maxtext inspect` prints about a checkpoint in tests/fixtures
    python docs/pictures.py --load       # and the summary line of a load, from the demo in examples/offline.py

The plot of time and memory over size is drawn by the benchmark: `python benchmarks/load.py --plot FILE.svg`.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from vllm_maxtext_loader.checkpoint.storage.path import Location
from vllm_maxtext_loader.cli.render import show_inspection
from vllm_maxtext_loader.tools.inspect import inspect_checkpoint

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
CHECKPOINT = "tests/fixtures/dense_v2/checkpoints"
COLUMNS = 100
SUMMARY = re.compile(r"Loaded .+ step \d+: .+")


def recording_console() -> Console:
    """A console of a fixed width that shows nothing and keeps what is printed."""
    return Console(
        record=True,
        file=io.StringIO(),
        width=COLUMNS,
        color_system="truecolor",
        force_terminal=True,
        highlight=False,
        markup=False,
        emoji=False,
    )


def to_svg(console: Console, title: str) -> str:
    """What the console recorded, without Rich's web font: a picture must load nothing from the network."""
    return re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title=title), flags=re.DOTALL)


def inspect_svg() -> str:
    """What `vllm-maxtext inspect` prints about a fixture, its path relative to the repository."""
    found = inspect_checkpoint(ROOT / CHECKPOINT)
    location = found.tree.location
    items = Path(location.items.url).relative_to(ROOT)
    shown = dataclasses.replace(location, items=Location(str(items)))
    console = recording_console()
    show_inspection(console, dataclasses.replace(found, tree=dataclasses.replace(found.tree, location=shown)))
    return to_svg(console, f"vllm-maxtext inspect {CHECKPOINT}")


def summary_svg() -> str:
    """The summary line of the demo's load, its path relative to the repository. Starts the engine."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "offline.py"), "--max-tokens", "1"],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    match = SUMMARY.search(done.stdout + done.stderr)
    if match is None:
        raise SystemExit(f"no summary line in the demo's output:\n{done.stderr[-2000:]}")
    console = recording_console()
    console.print(Text(match[0].replace(f"{ROOT}/", "")))
    return to_svg(console, "python examples/offline.py")


def main() -> None:
    """Parses the command line and writes the pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load", action="store_true", help="draw the summary line too; starts the engine")
    args = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / "inspect.svg").write_text(inspect_svg())
    if args.load:
        (IMAGES / "summary.svg").write_text(summary_svg())


if __name__ == "__main__":
    main()
