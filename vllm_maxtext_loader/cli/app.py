"""`vllm-maxtext`: look into, check and export MaxText checkpoints from the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import importlib.metadata
import inspect as inspection
import io
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from vllm_maxtext_loader.cli.fit import fit
from vllm_maxtext_loader.cli.reload import follow, reload
from vllm_maxtext_loader.cli.runtime import (
    DIFFERENT,
    byte_progress,
    console,
    exit_codes,
    print_json,
    progress,
    sigterm_raises,
)
from vllm_maxtext_loader.errors import printable

app = typer.Typer(
    name="vllm-maxtext",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CKPT",
        help="Local path or gs:// URL of an items directory, of a step, or of a run's checkpoint directory.",
    ),
]
StepOption = Annotated[
    int | None,
    typer.Option("--step", min=0, help="Step of a run's checkpoint directory. Default: newest committed."),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model-name",
        help="MaxText's name of a published model (gemma4-26b, qwen3-8b, …) that gives what shapes do not tell "
        "(sliding window, rope, top-k). Default: the one with the checkpoint's dimensions.",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Most bytes of Hugging Face tensors held at a time, where their directory is in a bucket: 8GiB. Default: "
        "half of the free memory.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, to stdout.")]


class Dtype(enum.StrEnum):
    """Values of `--dtype`."""

    STORED = "stored"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vllm-maxtext {importlib.metadata.version('vllm-maxtext-loader')}")
        raise typer.Exit


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Registers a command; its docstring is the help, lines joined to paragraphs unless they are indented."""
    assert function.__doc__ is not None
    paragraphs = inspection.cleandoc(function.__doc__).split("\n\n")
    flowing = [text if "\n  " in text else text.replace("\n", " ") for text in paragraphs]
    return app.command(help="\n\n".join(flowing))(function)


@app.callback(
    epilog="Exit codes: 0 good, 1 the check found differences, 2 unusable input or usage, 70 a fault of "
    "vllm-maxtext-loader, 130 interrupted. VLLM_MAXTEXT_DEBUG=1 prints the traceback of an error."
)
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Look into, check and export MaxText checkpoints, and bring new steps into running servers.

    None of it is needed to serve: vllm serve CKPT --load-format maxtext reads the checkpoint itself.
    """


@_command
def inspect(
    checkpoint: Checkpoint,
    step: StepOption = None,
    model_name: ModelName = None,
    values: Annotated[
        bool,
        typer.Option(
            "--values",
            help="Also read all array data, once: minimum, maximum, mean, zeros, NaN and infinities per leaf.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what is in a checkpoint and whether it would load.

    Without --values only metadata is read, and the names and sizes of the data files: a second or two,
    whatever the size of the model. "Loads" then means that every chunk is there, not that it holds numbers.
    Where there are too many files to list (more than 10,000 in a bucket), the output says so. With --values a
    missing or damaged chunk is an error, and a NaN, an infinity or a leaf of zeros is exit code 1.

    [bold]Examples[/bold]
      vllm-maxtext inspect gs://bucket/run/checkpoints
      vllm-maxtext inspect /ckpt/run/checkpoints --step 1000
      vllm-maxtext inspect CKPT --json | jq .loads
      vllm-maxtext inspect CKPT --values

    [bold]Exit codes[/bold]
       0  it would load
       1  chunks are missing; with --values: a value is not finite, or a
          leaf is all zero
       2  it would not load, or there is no checkpoint
      70  a fault of vllm-maxtext-loader, not of the input

    [bold]Keys of --json[/bold]
      checkpoint, requested  paths; step: int or null
      loads, needs_config    bool; the latter: only with a configuration
                             or a model name
      error                  null, or {type, message}: why it would not load
      data_files             {checked, detail, missing: {key, missing,
                             chunks, first} each}
      values_ok              bool; null without --values
      model                  {family, name, published, candidates, dims}
      layout                 {description, title, scan_axis, blocks, layers}
      wrapper                what wrote it
      storage                {ocdbt, zarr, compression}
      dtypes                 {dtype: bytes}
      bytes, skipped_bytes   decoded
      tensors                number of Hugging Face tensors it makes
      leaves                 {key, name, container, shape, dtype, chunk,
                             chunks, bytes, values} each
      leaves[].values        null without --values, and for leaves that a load
                             does not read; else {count, min, max, mean,
                             zero_share, nan, inf}, of the finite values
      skipped                {reason, arrays, bytes} each
      steps                  {step, name, committed, passed_over, detail} each
      notes                  sentences
      model.dims, layout and tensors are null where the model is not understood.
    """
    with exit_codes():
        from vllm_maxtext_loader.tools.inspect import inspect_checkpoint, read_values

        found = inspect_checkpoint(checkpoint, step=step, model_name=model_name)
        if values and found.plan is not None and found.error is None:
            with progress(found.plan.nbytes, "Reading") as on_region:
                read = read_values(found.plan, found.tree, on_region)
            found = dataclasses.replace(found, values=read)
        if as_json:
            print_json(found.to_json())
        else:
            from vllm_maxtext_loader.cli.render import show_inspection

            show_inspection(console(), found)
        if found.error is not None:
            raise found.error
        if found.data.missing or found.values_ok is False:
            raise typer.Exit(DIFFERENT)


@_command
def verify(
    checkpoint: Checkpoint,
    hf_dir: Annotated[
        str,
        typer.Argument(metavar="HF_DIR", help="Hugging Face directory (safetensors), local or gs:// URL."),
    ],
    step: StepOption = None,
    memory: Memory = None,
    every_row: Annotated[
        bool, typer.Option("--all", help="Show every tensor, not only those that differ.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare a checkpoint with a Hugging Face directory, tensor by tensor.

    Memory stays bounded, whatever the size. Values are compared in the coarser of the two dtypes. Embedding
    values are the same where they are equal, or where multiplying by sqrt(hidden size) gives what MaxText
    stores. Vision and audio towers that only one side has are listed, not counted as differences. A
    config.json in HF_DIR must fit the checkpoint. Of an HF_DIR in a bucket, tensors that share leaves of the
    checkpoint are held together; where they are larger than --memory, the leaves are read several times.

    [bold]Examples[/bold]
      vllm-maxtext verify gs://bucket/gemma4/0/items ./gemma-4-26B-A4B-it
      vllm-maxtext verify CKPT gs://bucket/tuned
      vllm-maxtext verify CKPT HF_DIR --json | jq '.tensors[].name'

    [bold]Exit codes[/bold]
       0  the same
       1  differences
       2  unusable input
      70  a fault of vllm-maxtext-loader, not of the input

    [bold]Keys of --json[/bold]
      checkpoint, hf_dir  paths
      same                bool
      counts              {status: number of tensors}
      notes               sentences
      tensors             those that differ, or all with --all; each {name,
                          status, detail, shape {checkpoint, hf},
                          dtype {checkpoint, hf}, compared_as, values,
                          differing, max_abs, max_ulp, rescaled}
      Statuses: same, differs, other shape, not comparable, not in HF_DIR,
      not in checkpoint, not compared. max_abs is null where it is no number.
    """
    with exit_codes():
        from vllm_maxtext_loader.api import open_checkpoint
        from vllm_maxtext_loader.huggingface.directory import read_hf_directory
        from vllm_maxtext_loader.tools.verify import verify as compare

        limit = _size(memory, "--memory")
        hf = read_hf_directory(hf_dir)
        opened = open_checkpoint(checkpoint, step=step)
        with byte_progress("Comparing") as on_progress:
            report = compare(opened, hf, memory_bytes=limit, on_progress=on_progress)
        if as_json:
            print_json(report.to_json(every_row=every_row))
        else:
            from vllm_maxtext_loader.cli.render import show_report

            show_report(console(), report, every_row=every_row)
    if not report.same:
        raise typer.Exit(DIFFERENT)


@_command
def export(
    checkpoint: Checkpoint,
    out_dir: Annotated[
        str,
        typer.Argument(
            metavar="OUT_DIR", help="Directory to make, local or gs:// URL; must not exist, or be empty."
        ),
    ],
    step: StepOption = None,
    model_name: ModelName = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="HF_DIR|FILE",
            help="Local Hugging Face directory or config.json of the model. Default: read off the shapes.",
        ),
    ] = None,
    dtype: Annotated[
        Dtype,
        typer.Option(metavar="DTYPE", help="bfloat16, float16, float32, or stored: as MaxText saved it."),
    ] = Dtype.STORED,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Most bytes of one file: 5GB, 512MB, 2GiB.")
    ] = "5GB",
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Local directory whose tokenizer and processor files are copied."),
    ] = None,
    shards: Annotated[
        str | None,
        typer.Option(
            metavar="i/n",
            help="Write only the files of the i-th of n machines. Give every machine the same other options.",
        ),
    ] = None,
    memory: Memory = None,
) -> None:
    """Write a checkpoint as a Hugging Face directory that transformers and vLLM load.

    On a disk it needs as much room as the model has bytes, and little memory. OUT_DIR appears when everything in it is
    complete; until then the files are in a hidden directory next to it, which is removed when the export fails or is
    interrupted.

    In a bucket, files are streamed, and nothing is written to a disk. Tensors that share leaves of the checkpoint are
    held together; where they are larger than --memory, the leaves are read several times. The index is written last.
    The objects of an export that fails or is interrupted are deleted. The account needs storage.objects.create,
    delete, get and list.

    With --shards, n machines write the files of one OUT_DIR, on a disk that they share or in a bucket. File names do not
    depend on n. The machine that finds all files complete writes config.json and the index. A machine that failed is
    started again; what it has completed stays.

    [bold]Examples[/bold]
      vllm-maxtext export gs://bucket/run/checkpoints ./tuned --dtype bfloat16
      vllm-maxtext export CKPT ./tuned --config HF_DIR --tokenizer HF_DIR
      vllm-maxtext export CKPT gs://bucket/tuned --step 1000 --shards 1/4

    [bold]Exit codes[/bold]
       0  written
       2  unusable input, or no space
      70  a fault of vllm-maxtext-loader, not of the input
    """
    with exit_codes():
        from vllm_maxtext_loader.api import open_checkpoint
        from vllm_maxtext_loader.cli.render import size
        from vllm_maxtext_loader.tools.export import export as write
        from vllm_maxtext_loader.tools.export_layout import Share

        limit, held = _size(max_shard_size, "--max-shard-size"), _size(memory, "--memory")
        assert limit is not None
        try:
            share = None if shards is None else Share.parse(shards)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--shards") from error
        with sigterm_raises(), byte_progress("Exporting") as on_progress:
            opened = open_checkpoint(checkpoint, step=step, model_name=model_name)
            done = write(
                opened,
                out_dir,
                dtype=dtype.value,
                max_shard_bytes=limit,
                config=config,
                tokenizer=tokenizer,
                share=share,
                memory_bytes=held,
                on_progress=on_progress,
            )
        for note in done.notes:
            typer.echo(f"note: {printable(note)}", err=True)
        files = f"{done.shards} file{'' if done.shards == 1 else 's'}"
        typer.echo(f"Wrote {done.tensors} tensors, {size(done.nbytes)}, in {files} to {done.path}")
        if done.missing:
            typer.echo(
                f"Not complete yet: other machines have {len(done.missing)} files to write, first {done.missing[0]}."
            )


def _size(text: str | None, option: str) -> int | None:
    """Bytes of an option such as "5GB"; None where it was not given."""
    from vllm_maxtext_loader.tools.export import parse_size

    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


@_command
def checksum(
    checkpoint: Checkpoint,
    step: StepOption = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Local file that is written when all data was read, or not at all. Default: stdout.",
        ),
    ] = None,
) -> None:
    """Take checksums of a checkpoint's array data, which Orbax does not store, and print them as JSON.

    Every leaf of the model is read once. A load that is given the file compares what it reads with it, at no
    extra read: --model-loader-extra-config '{"checksums": "FILE"}'.

    [bold]Examples[/bold]
      vllm-maxtext checksum gs://bucket/run/checkpoints --step 1000 -o 1000.crc
      vllm-maxtext checksum CKPT > FILE

    [bold]Exit codes[/bold]
       0  done
       2  unusable input, or FILE cannot be written
      70  a fault of vllm-maxtext-loader, not of the input
    """
    with exit_codes():
        from vllm_maxtext_loader.api import open_checkpoint
        from vllm_maxtext_loader.atomic import atomic_file
        from vllm_maxtext_loader.checkpoint import checksums

        target = contextlib.nullcontext(sys.stdout) if output is None else atomic_file(output)
        with sigterm_raises(), target as stream:
            opened = open_checkpoint(checkpoint, step=step)
            with progress(opened.plan.nbytes, "Reading") as on_region:
                sums = checksums.compute(opened, on_region)
            stream.write(checksums.dumps(sums, str(opened.location.items)))


_command(fit)
_command(reload)
_command(follow)


def main() -> None:
    """Entry point."""
    # Without torch, transformers says so on stderr when it is imported; no command here needs a model class.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for stream in (sys.stdout, sys.stderr):
        # Do not fail on terminals that cannot encode "×".
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app()
