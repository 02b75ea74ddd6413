"""How the commands show their results to people: rich tables that stay readable at 80 columns."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vllm_maxtext_loader.checkpoint.statistics import ValueStatistics
from vllm_maxtext_loader.checkpoint.tree import Leaf
from vllm_maxtext_loader.conversion.config_check import VOCAB
from vllm_maxtext_loader.conversion.dims import VISION_LAYERS, ModelDims
from vllm_maxtext_loader.conversion.layout import describe
from vllm_maxtext_loader.conversion.plan import Plan
from vllm_maxtext_loader.errors import printable
from vllm_maxtext_loader.options import GIB
from vllm_maxtext_loader.tools.inspect import Inspection, container_of, count_chunks
from vllm_maxtext_loader.tools.verify import Report, Row, Status

_SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
_NARROWEST_NAME = 20
_INDENT = 2
_MISSING_SHOWN = 6


def show_inspection(console: Console, found: Inspection) -> None:
    """Prints what `vllm-maxtext inspect` found."""
    tree, plan = found.tree, found.plan
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")

    def fact(name: str, text: str, style: str = "") -> None:
        facts.add_row(name, Text(printable(text), style))

    fact("checkpoint", str(tree.location.items))
    if tree.location.step is not None:
        fact("step", str(tree.location.step))
    if plan is not None:
        fact("model", _model(found, plan))
        fact("", _dims(plan.dims), "dim")
        fact("layout", describe(plan.layout))
    fact("written by", tree.writer)
    storage = "OCDBT" if tree.ocdbt else "a directory per array"
    fact("storage", f"{storage}, zarr {3 if tree.zarr3 else 2}, compression {found.compression}")
    dtypes = ", ".join(f"{name} {size(total)}" for name, total in found.dtypes.items())
    fact("weights", f"{len(tree.leaves)} leaves, {size(tree.nbytes)} ({dtypes})")
    if plan is not None:
        fact("become", f"{len(plan.targets)} Hugging Face tensors")
    for reason, (arrays, total) in found.skipped.items():
        fact("skipped", f"{size(total)} {reason} ({arrays} {'array' if arrays == 1 else 'arrays'})")
    for name, text, style in _data(found):
        fact(name, text, style)
    for name, text in _steps(found):
        fact(name, text)
    for note in plan.notes if plan else ():
        fact("note", note)
    fact("loads", *_verdict(found))
    console.print(facts)
    console.print()
    _show_leaves(console, list(tree.leaves.values()))
    if found.values is not None:
        console.print()
        names = {leaf.key: leaf.name for leaf in tree.leaves.values()}
        _show_values(console, {names[key]: values for key, values in found.values.items()})


def _model(found: Inspection, plan: Plan) -> str:
    if found.candidates:
        return f"{plan.family.title}, one of {', '.join(preset.name for preset in found.candidates)}"
    if found.preset is None:
        return f"{plan.family.title} of dimensions that no published model has"
    name = f"{found.preset.name} ({found.preset.published[0]})"
    padding = plan.dims.sizes[VOCAB] - found.preset.dims.sizes[VOCAB]
    if found.asked is not None:
        return f"taken for {name}, as asked"
    return name + (f", vocabulary padded by {padding} rows" if padding > 0 else "")


def _dims(dims: ModelDims) -> str:
    layers, sizes = dims.layers, dims.sizes
    full = sum("sliding" not in layer.tags for layer in layers)
    parts = [
        f"{len(layers)} layers ({full} full attention)",
        f"hidden {sizes['hidden']}",
        f"{sizes['heads']} heads",
    ]
    for axis, what in (("head_dim", "head dim"), ("kv_heads", "KV heads"), ("mlp", "MLP")):
        values = [layer.sizes[axis] for layer in layers if axis in layer.sizes]
        parts += [f"{what} {_values(values)}"] if values else []
    if "experts" in sizes:
        parts.append(f"{sizes['experts']} experts of {sizes['expert_mlp']}")
    if shared := sum("kv_heads" not in layer.sizes for layer in layers):
        parts.append(f"{shared} layers share keys and values")
    if "ple" in sizes:
        parts.append(f"per-layer embeddings of {sizes['ple']}")
    parts.append(f"vocabulary {sizes[VOCAB]}")
    parts.append(f"vision tower of {sizes[VISION_LAYERS]} layers" if dims.has_vision else "text only")
    return ", ".join(parts)


def _values(values: Iterable[int]) -> str:
    return "/".join(map(str, dict.fromkeys(values)))


def _steps(found: Inspection) -> Iterable[tuple[str, str]]:
    steps = [step for step in found.steps if not step.passed_over]
    if committed := [step.name for step in steps if step.committed]:
        yield "steps", f"{', '.join(committed)} committed"
    for step in steps:
        if step.committed is False:
            yield "", f"{step.name} not committed: {step.detail}"
    if unknown := [step for step in steps if step.committed is None]:
        yield "", f"{len(unknown)} more, {unknown[0].detail}"
    if others := [step.name for step in found.steps if step.passed_over]:
        yield "", f"{', '.join(others)} passed over: not named as the steps are; to load one, give its path"


def _data(found: Inspection) -> Iterable[tuple[str, str, str]]:
    """What was looked at to say that it loads: the files of the chunks, or only metadata."""
    data = found.data
    if data.missing:
        chunks = sum(leaf.missing for leaf in data.missing)
        yield "data", f"{chunks:,} chunks of {len(data.missing)} leaves are MISSING", "bold red"
        for leaf in data.missing[:_MISSING_SHOWN]:
            yield "", f"{leaf.key}: {leaf.missing:,} of {leaf.chunks:,}; {leaf.first}", ""
        if len(data.missing) > _MISSING_SHOWN:
            yield "", f"and {len(data.missing) - _MISSING_SHOWN} more leaves (--json lists them)", ""
    elif found.values is not None:
        yield "data", "all chunks were read", ""
    elif data.checked:
        yield "data", f"no chunk is missing ({data.detail}); values were not read: --values reads all", ""
    else:
        yield (
            "data",
            f"metadata only: array data was not looked at ({data.detail}); --values reads all",
            "yellow",
        )


def _verdict(found: Inspection) -> tuple[str, str]:
    if found.error is not None:
        return f"no: {type(found.error).__name__}: {found.error}", "bold red"
    if found.data.missing:
        return "no: chunks are missing; copy the checkpoint again, or choose another step", "bold red"
    if found.needs_config:
        return (
            "yes, with the model's own configuration (--model HF_DIR and the checkpoint in "
            f"--model-loader-extra-config), or a model_name to take the rest from ({', '.join(_names(found))})"
        ), "yellow"
    return "yes", "green"


def _names(found: Inspection) -> list[str]:
    """Model names that can be given."""
    presets = found.candidates or (found.plan.family.presets if found.plan else ())
    return [preset.name for preset in presets]


def _show_leaves(console: Console, leaves: Sequence[Leaf]) -> None:
    """The leaves by container; containers with the same leaves (unscanned layers) are shown once."""
    containers: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        containers.setdefault(container_of(leaf)[0], []).append(leaf)
    alike: dict[object, list[str]] = {}
    for path, inside in containers.items():
        kind = (
            container_of(inside[0])[1],
            *((_below(leaf, path), leaf.shape, leaf.dtype, leaf.chunks) for leaf in inside),
        )
        alike.setdefault(kind, []).append(path)
    groups: list[tuple[str, list[tuple[str, ...]]]] = []
    for paths in alike.values():
        _, pattern, slot = container_of(containers[paths[0]][0])
        heading = paths[0]
        if slot is not None and len(paths) > 1:
            slots = [number for path in paths if (number := container_of(containers[path][0])[2]) is not None]
            heading = pattern.replace("*", f"{{{ranges(slots)}}}")
        total = sum(leaf.nbytes for path in paths for leaf in containers[path])
        heading += f"  {size(total)}" + (f" in {len(paths)} alike, of which each:" if len(paths) > 1 else "")
        groups.append((heading, [_cells(leaf, paths[0]) for leaf in containers[paths[0]]]))
    _show_groups(
        console, ("leaf", "shape", "dtype", "chunk", "chunks", "size"), groups, right=("chunks", "size")
    )


def _show_values(console: Console, values: Mapping[str, ValueStatistics]) -> None:
    """Statistics by leaf, those with a problem first and marked, and a summary."""
    columns = ("leaf", "min", "max", "mean", "zeros", "NaN", "inf")
    ordered = sorted(values.items(), key=lambda item: item[1].problem is None)
    rows = [
        (
            f"{'! ' if found.problem else ''}{printable(name)}",
            *(f"{number:.3g}" if number is not None else "-" for number in found.range_and_mean),
            _share(found.zeros, found.count),
            f"{found.nans:,}",
            f"{found.infinities:,}",
        )
        for name, found in ordered
    ]
    _show_groups(console, columns, [("", rows)], right=columns[1:])
    console.print()
    problems = [f"{printable(name)} ({found.problem})" for name, found in ordered if found.problem]
    summary = (
        f"{len(problems)} of {len(values)} leaves hold values that no trained model has: {', '.join(problems)}."
        if problems
        else f"All values of {len(values)} leaves are finite, and no leaf is all zero."
    )
    console.print(Text(summary, "bold red" if problems else "bold green"), soft_wrap=True)


def _share(part: int, whole: int) -> str:
    """A percentage that says 0 and 100 % only where it is exact."""
    if part in (0, whole):
        return "100 %" if part else "0"
    return f"{min(max(100 * part / whole, 0.01), 99.99):.2f} %"


def _below(leaf: Leaf, container: str) -> str:
    return leaf.name.removeprefix(f"{container}.")


def _cells(leaf: Leaf, container: str) -> tuple[str, ...]:
    chunks = count_chunks(leaf)
    if chunks == 1:
        chunk = "whole"
    else:
        pairs = zip(leaf.chunks, leaf.shape, strict=True)
        chunk = "×".join("·" if part >= whole else str(part) for part, whole in pairs)
    shape = "×".join(map(str, leaf.shape)) or "scalar"
    return (
        printable(_below(leaf, container)),
        shape,
        _SHORT[leaf.dtype.name],
        chunk,
        str(chunks),
        size(leaf.nbytes),
    )


def show_report(console: Console, report: Report, *, every_row: bool) -> None:
    """Prints what `vllm-maxtext verify` found: the tensors that differ (or all), and a summary."""
    columns = ("tensor", "status", "max diff", "max ulp", "differing")
    rows = report.rows if every_row else report.differences
    if rows:
        _show_groups(console, columns, [("", [_comparison(row) for row in rows])], right=columns[2:])
        console.print()
    left_out: dict[str, list[Row]] = {}
    for row in report.rows:
        if row.status is Status.NOT_COMPARED:
            left_out.setdefault(row.detail, []).append(row)
    for reason, members in left_out.items():
        example = f"{members[0].name}" + (" and so on" if len(members) > 1 else "")
        text = printable(f"not compared: {len(members)} ({reason}): {example}")
        console.print(Text(text, "dim"), soft_wrap=True)
    for note in report.notes:
        console.print(Text(printable(f"note: {note}")), soft_wrap=True)
    counts = collections.Counter(row.status for row in report.rows)
    parts = [f"{counts[status]} {status}" for status in Status if counts[status]]
    summary = (
        f"{'The same' if report.same else 'DIFFERENT'}: {', '.join(parts)} (of {len(report.rows)} tensors)."
    )
    console.print(Text(summary, "bold green" if report.same else "bold red"), soft_wrap=True)


def _comparison(row: Row) -> tuple[str, ...]:
    detail = row.detail if row.status.is_difference else ""
    name = "\n".join(map(printable, filter(None, (row.name, detail))))
    if row.status is Status.DIFFERS:
        return name, row.status, f"{row.max_abs:.3g}", str(row.max_ulp), f"{row.differing:,}"
    return (name, row.status, *(("0", "0", "0") if row.status is Status.SAME else ("", "", "")))


def _show_groups(
    console: Console,
    columns: tuple[str, ...],
    groups: Sequence[tuple[str, Sequence[tuple[str, ...]]]],
    right: Sequence[str],
) -> None:
    """Rows under headings, with the same column widths; the first column gives way where space is short."""
    everything = [columns, *(row for _, rows in groups for row in rows)]
    widths = [max(map(len, "\n".join(cells).split("\n"))) for cells in zip(*everything, strict=True)]
    indent = _INDENT if any(heading for heading, _ in groups) else 0
    room = console.width - sum(widths[1:]) - 2 * (len(columns) - 1)
    widths[0] = min(widths[0] + indent, max(_NARROWEST_NAME, room))

    def grid(rows: Iterable[tuple[str, ...]], style: str = "") -> Table:
        table = Table.grid(padding=(0, 2, 0, 0))
        for column, width in zip(columns, widths, strict=True):
            table.add_column(width=width, justify="right" if column in right else "left", overflow="fold")
        for first, *rest in rows:
            name = Padding(Text(first, style), (0, 0, 0, indent))
            table.add_row(name, *(Text(cell, style) for cell in rest))
        return table

    console.print(grid([columns], "bold underline"))
    for heading, rows in groups:
        if heading:
            console.print(Text(printable(heading), "bold", overflow="fold"))
        console.print(grid(rows))


def size(nbytes: int) -> str:
    """Bytes for people: GiB, or the largest unit that leaves a number of at least 1."""
    for unit, factor in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes} B"


def ranges(numbers: Iterable[int]) -> str:
    """0-4,6 for 0, 1, 2, 3, 4, 6, in any order."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)
