"""Parses `vllm serve` command lines with vLLM's own parser; run as a program, because importing the parser takes seconds.

Reads a JSON list of argument lists from stdin, and exits with the parser's message at the first that it refuses.
"""

from __future__ import annotations

import json
import sys

from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser


def main() -> None:
    """Parses each list; prints how many there were."""
    commands: list[list[str]] = json.load(sys.stdin)
    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    for arguments in commands:
        parsed = parser.parse_args(arguments)
        if parsed.load_format != "maxtext":
            parser.error(f"load format {parsed.load_format!r} in {arguments}")
    print(len(commands))


if __name__ == "__main__":
    main()
