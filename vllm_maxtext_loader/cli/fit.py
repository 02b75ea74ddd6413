"""`vllm-maxtext fit`: which TPU slices a checkpoint fits, and the command that serves it there."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_maxtext_loader.cli.runtime import DIFFERENT, console, exit_codes, print_json
from vllm_maxtext_loader.errors import printable
from vllm_maxtext_loader.options import GIB
from vllm_maxtext_loader.tools import serve_defaults

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_maxtext_loader.api import Checkpoint
    from vllm_maxtext_loader.tools.fit import Fitter, Row


def fit(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CKPT",
            help="Local path or gs:// URL of an items directory, of a step, or of a run's checkpoint "
            "directory.",
        ),
    ],
    topology: Annotated[
        list[str] | None,
        typer.Option(
            "--topology",
            metavar="SLICE",
            help="A slice (v6e-8) or a topology (v6e:2x4); may be given several times. Default: v5e-4, "
            "v5e-8, v6e-1, v6e-4, v6e-8 and tpu7x-4. The number is of chips (of v5p: of cores).",
        ),
    ] = None,
    tensor_parallel_size: Annotated[
        int | None,
        typer.Option("--tensor-parallel-size", min=1, help="Default: all devices of the slice."),
    ] = None,
    enable_expert_parallel: Annotated[
        bool, typer.Option("--enable-expert-parallel", help="Spread experts whole.")
    ] = False,
    max_model_len: Annotated[
        int | None,
        typer.Option("--max-model-len", min=1, help="Tokens of the longest request. Default: the model's."),
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option("--max-num-seqs", min=1, help="Requests at once. Default: vllm serve's.")
    ] = None,
    gpu_memory_utilization: Annotated[
        float,
        typer.Option("--gpu-memory-utilization", help="Share of the memory for weights and KV cache."),
    ] = serve_defaults.UTILIZATION,
    kv_cache_dtype: Annotated[
        str, typer.Option("--kv-cache-dtype", metavar="DTYPE", help="auto, bfloat16 or fp8.")
    ] = "auto",
    compile_programs: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Also compile the engine's programs with the TPU's own compiler: about a minute per row.",
        ),
    ] = False,
    step: Annotated[
        int | None,
        typer.Option(
            "--step", min=0, help="Step of a run's checkpoint directory. Default: newest committed."
        ),
    ] = None,
    model_name: Annotated[
        str | None,
        typer.Option("--model-name", help="The published model that gives what shapes do not tell."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the rows as JSON, and nothing else.")
    ] = False,
) -> None:
    """Say which TPU slices a checkpoint fits, with how much context, and the command that serves it.

    Reads metadata only. Needs the extra tpu (vllm-tpu), and no TPU. The default is arithmetic; --compile asks
    the TPU's own compiler, which comes with vllm-tpu, and counts the programs.

    [bold]Examples[/bold]
      vllm-maxtext fit gs://bucket/run/checkpoints
      vllm-maxtext fit CKPT --topology v6e-4 --topology v6e-8 --max-model-len 32768
      vllm-maxtext fit CKPT --topology v5e-8 --enable-expert-parallel --compile
      vllm-maxtext fit CKPT --json | jq '.[] | select(.fits)'

    [bold]Exit codes[/bold]
       0  it fits a slice that was looked at
       1  it fits none of them
       2  unusable input
      70  a fault of vllm-maxtext-loader, not of the input

    [bold]Keys of a row of --json[/bold] (all bytes are of one chip)
      topology, chips        the slice
      tensor_parallel_size, expert_parallel
      hbm_bytes              its memory
      weight_bytes           weights with padding and rotary tables
      padding_bytes          of these, padding
      program_bytes          code and temporaries; null without --compile
      kv_bytes_per_token     of the KV cache, in the longest request
      kv_tokens              tokens that it holds
      max_model_len          length to serve with: the one asked for, or the
                             longest that fits
      max_num_seqs           requests of that length at once
      fits                   whether an engine started as asked would start
      reason                 why it would not
    """
    with exit_codes():
        from vllm_maxtext_loader.api import open_checkpoint
        from vllm_maxtext_loader.tools import slices
        from vllm_maxtext_loader.tools.fit import Fitter, Request

        request = Request(
            tensor_parallel_size=tensor_parallel_size,
            expert_parallel=enable_expert_parallel,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_dtype=kv_cache_dtype,
        )
        opened = open_checkpoint(checkpoint, step=step, model_name=model_name)
        fitter = Fitter(opened, checkpoint, request, step)
        rows = [fitter.row(name) for name in topology or slices.COMMON]
        if compile_programs:
            rows = _compiled(fitter, opened, rows)
        if as_json:
            print_json([row.to_json() for row in rows])
        else:
            _show(console(), rows)
        # Where no length was asked for, a shorter one is as good.
        if not any(row.fits or (max_model_len is None and row.max_model_len) for row in rows):
            raise typer.Exit(DIFFERENT)


def _compiled(fitter: Fitter, opened: Checkpoint, rows: list[Row]) -> list[Row]:
    """The rows with the compiler's numbers; those that fit no request are left as they are."""
    from tqdm import tqdm

    from vllm_maxtext_loader.tools import slices
    from vllm_maxtext_loader.tpu.measure import measure

    done: list[Row] = []
    for row in tqdm(rows, desc="Compiling", unit="slice", file=sys.stderr, disable=None):
        if not row.max_model_len:
            done.append(row)
            continue
        chosen = slices.parse(row.topology)
        measured = measure(
            str(opened.location.items.url),
            chosen.topology,
            hbm_bytes=chosen.hbm_bytes // chosen.devices_per_chip,
            model_name=opened.model_name,
            arguments=fitter.engine_arguments(row),
        )
        done.append(fitter.with_programs(row, measured))
    return done


def _show(target: Console, rows: list[Row]) -> None:
    """Prints the table, and for each slice the reason and the command."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("slice", no_wrap=True)
    for name in (
        "TP",
        "HBM",
        "weights",
        "padding",
        "rotary",
        "programs",
        "KV cache",
        "tokens",
        "longest",
        "at once",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fits")
    for row in rows:
        left = row.kv_tokens * row.kv_bytes_per_token
        programs = "" if row.program_bytes is None else _gib(row.program_bytes)
        parallel = f"{row.tensor_parallel_size}{' EP' if row.expert_parallel else ''}"
        sizes = (row.hbm_bytes, row.weight_bytes, row.padding_bytes, row.rotary_bytes)
        counts = (row.kv_tokens, row.max_model_len, row.max_num_seqs)
        table.add_row(
            row.topology,
            parallel,
            *map(_gib, sizes),
            programs,
            _gib(left),
            *(f"{count:,}" for count in counts),
            Text("yes", "green") if row.fits else Text("no", "red"),
        )
    target.print(table)
    target.print(
        "GiB of each chip; tokens of KV cache; longest request; requests of that length at once.", style="dim"
    )
    for row in rows:
        target.print()
        target.print(Text(row.topology, "bold"), Text(printable(row.reason)))
        target.print(Text(f"  {printable(row.line or 'no slice of this kind')}"), soft_wrap=True)


def _gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.1f}"
