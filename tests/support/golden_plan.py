"""The plan of a checkpoint as text: what is read, in which order, and what becomes of it.

    python tests/support/golden_plan.py --write      # after an intended change

The file tests/golden/plans.txt.gz holds the plan of every fixture. A change of the code that is meant to change nothing
leaves it as it is.
"""

from __future__ import annotations

import argparse
import gzip
from collections.abc import Iterator
from pathlib import Path

from vllm_maxtext_loader import open_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden" / "plans.txt.gz"


def plan_lines(name: str, items: Path) -> Iterator[str]:
    """The plan of one fixture: its leaves in reading order with what each becomes, then its tensors.

    Args:
        name: of the fixture.
        items: its item directory.
    """
    plan = open_checkpoint(items).plan
    yield f"# {name}: {plan.layout.title}, scan axis {plan.layout.scan_axis}, {plan.layout.num_layers} layers"
    for entry in plan.leaves:
        yield f"{entry.leaf.key} {list(entry.leaf.shape)} {entry.leaf.dtype} scan axes {list(entry.scan_axes)}"
        for copy_op in entry.copies:
            yield f"  {list(copy_op.index)} layer {copy_op.layer} -> {copy_op.target}"
    for target in plan.targets.values():
        yield f"{target.name} {list(target.shape)} {target.dtype} from {', '.join(target.leaves)}"


def read_golden() -> dict[str, list[str]]:
    """The recorded plans, by fixture."""
    plans: dict[str, list[str]] = {}
    for line in gzip.decompress(GOLDEN.read_bytes()).decode().splitlines():
        if line.startswith("# "):
            plans[line[2:].partition(":")[0]] = lines = []
        lines.append(line)
    return plans


def main() -> None:
    """Records the plans of all fixtures."""
    from support.checkpoints import cases

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", required=True, help="replace the recorded plans")
    parser.parse_args()
    text = "\n".join(line for name, case in cases().items() for line in plan_lines(name, case.items)) + "\n"
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


if __name__ == "__main__":
    main()
