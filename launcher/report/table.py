"""The ranked comparison in the terminal. A new column is a line in `MEASURES`, with the field of `FinishedRun` that it shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from launcher.report.axes import axes_label, value_label
from launcher.report.comparison import FinishedRun, Report
from launcher.terminal.units import count, number, percent, seconds

TOP_ROWS = 50
# What `_where` tells.
WHERE = ("device", "dtype", "path")
# Characters at most, of a run's name and of a swept value.
NAME_WIDTH = 20


class Measure(NamedTuple):
    """A column to the right of the axes: a field of `FinishedRun`, and how it is written."""

    title: str
    key: str
    text: Callable[[Any], str]


MEASURES = (
    Measure("eval loss", "eval_loss", partial(number, digits=4)),
    Measure("exact match", "eval_exact_match", percent),
    Measure("tokens/s", "tokens_per_second", partial(number, digits=0)),
    Measure("time", "seconds", seconds),
    Measure("GPU-hours", "gpu_hours", partial(number, digits=2)),
    Measure("USD", "cost_usd", partial(number, digits=2)),
    Measure("GiB", "peak_memory_gib", partial(number, digits=2)),
    Measure("trainable", "trainable_parameters", count),
    Measure("MB", "adapter_mb", partial(number, digits=1)),
)
# Left out if no run has any.
GPU_ONLY = {"gpu_hours", "cost_usd"}
# Left out on a narrow terminal, in this order.
FIRST_LEFT_OUT = [
    "adapter_mb",
    "trainable_parameters",
    "tokens_per_second",
    "gpu_hours",
    "peak_memory_gib",
    "seconds",
    "cost_usd",
]


def print_report(report: Report, console: Console) -> None:
    """Print the best finished runs, best first, those without a result, and whether the lead means anything."""
    if report.rows:
        _print_ranking(report, console)
    if len(report.rows) > TOP_ROWS:
        console.print(f"… and {len(report.rows) - TOP_ROWS} more in report.html", style="dim")
    for run in report.unfinished[:TOP_ROWS]:
        console.print(f"[yellow]{escape(run.state):>10}[/]  {escape(run.name)}  [dim]{escape(run.reason)}[/]")
    if len(report.unfinished) > TOP_ROWS:
        console.print(f"… and {len(report.unfinished) - TOP_ROWS} more without a result", style="dim")
    _print_verdict(report, console)


def _print_ranking(report: Report, console: Console) -> None:
    """Print the table of finished runs, with as many measures as fit the terminal."""
    measures = [m for m in MEASURES if m.key not in GPU_ONLY or any(getattr(row, m.key) for row in report.rows)]
    left_out = 0
    for key in FIRST_LEFT_OUT:
        if _width(report, measures, console) <= console.width:
            break
        left_out += sum(measure.key == key for measure in measures)
        measures = [measure for measure in measures if measure.key != key]
    console.print(_ranking(report, measures))
    console.print(escape(_where(report.rows)), style="dim", highlight=False)
    if left_out:
        console.print(f"columns that do not fit here: {left_out} (report.html and --json have all)", style="dim")


def _width(report: Report, measures: Sequence[Measure], console: Console) -> int:
    """How many characters wide the whole table is."""
    return Measurement.get(console, console.options.update(width=10_000), _ranking(report, measures)).maximum


def _ranking(report: Report, measures: Sequence[Measure]) -> Table:
    """The table of finished runs; the best one is marked."""
    table = Table(title=escape(report.sweep), title_justify="left", title_style="bold", header_style="dim", box=None)
    table.add_column("")
    table.add_column("run", no_wrap=True, max_width=NAME_WIDTH)
    keys = [axis.key for axis in report.axes]
    for title in map(_short, keys):
        table.add_column(escape(title), justify="right", no_wrap=True, max_width=NAME_WIDTH)
    for measure in measures:
        table.add_column(measure.title, justify="right", no_wrap=True)
    for row in report.rows[:TOP_ROWS]:
        cells = [escape(value_label(row.axes[key])) for key in keys]
        mark = "★" if row.rank == 1 else str(row.rank)
        cells += [measure.text(getattr(row, measure.key)) for measure in measures]
        table.add_row(mark, escape(row.name), *cells, style="bold green" if row.rank == 1 else None)
    return table


def _where(rows: Sequence[FinishedRun]) -> str:
    """On which devices, in which precision and by which paths runs were computed: ``computed on cpu in float32 by the path own``."""
    device, dtype, path = (" and ".join(sorted({getattr(row, key) or "?" for row in rows})) for key in WHERE)
    return f"computed on {device} in {dtype} by the path {path}"


def _short(key: str) -> str:
    return key.rpartition(".")[2]


def _print_verdict(report: Report, console: Console) -> None:
    """The best run and how far its lead can be trusted."""
    if report.best is not None:
        console.print(f"\n[bold green]Best run[/]: {escape(_best_text(report.best))}", highlight=False)
    for sentence in (report.noise.text, *report.caveats):
        console.print(escape(sentence), highlight=False)
    if report.noise.command is not None:
        console.print("To find out:", style="dim")
        console.print(f"  {report.noise.command}", markup=False, highlight=False, soft_wrap=True)


def _best_text(best: FinishedRun) -> str:
    """Name, values and gain of the best run."""
    label = f" ({axes_label(best.axes)})" if best.axes else ""
    gains = f"eval loss {number(best.base_eval_loss, 4)} -> {number(best.eval_loss, 4)}"
    matches = f"exact match {percent(best.base_eval_exact_match)} -> {percent(best.eval_exact_match)}"
    rows = f"{count(best.eval_rows)} held-out rows" if best.eval_rows else "held-out rows"
    return f"{best.name}{label}: {gains}, {matches} of {rows}, base model -> tuned"
