"""The ranked comparison in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launcher.report.comparison import Report, Row
from launcher.report.differences import axes_label, value_label
from launcher.units import count, number, percent, seconds

TOP_ROWS = 50


def print_report(report: Report, console: Console) -> None:
    """Print the best finished runs, best first, those without a result, and whether the lead means anything."""
    if report.rows:
        console.print(_ranking(report))
    if len(report.rows) > TOP_ROWS:
        console.print(f"… and {len(report.rows) - TOP_ROWS} more in report.html", style="dim")
    for run in report.unfinished[:TOP_ROWS]:
        console.print(f"[yellow]{escape(run.state):>10}[/]  {escape(run.name)}  [dim]{escape(run.reason)}[/]")
    if len(report.unfinished) > TOP_ROWS:
        console.print(f"… and {len(report.unfinished) - TOP_ROWS} more without a result", style="dim")
    _print_verdict(report, console)


def _ranking(report: Report) -> Table:
    """The table of finished runs; the best one is marked."""
    table = Table(title=escape(report.sweep), title_justify="left", title_style="bold", header_style="dim", box=None)
    table.add_column("")
    table.add_column("run")
    keys = [axis.key for axis in report.axes]
    for title in (*map(_short, keys), "eval loss", "exact match", "tokens/s", "time", "GiB", "trainable", "MB"):
        table.add_column(escape(title), justify="right")
    for row in report.rows[:TOP_ROWS]:
        cells = [escape(value_label(row.axes[key])) for key in keys]
        mark = "★" if row.rank == 1 else str(row.rank)
        table.add_row(mark, escape(row.name), *cells, *_measures(row), style="bold green" if row.rank == 1 else None)
    return table


def _short(key: str) -> str:
    return key.rpartition(".")[2]


def _measures(row: Row) -> list[str]:
    """The cells of one run behind its axes."""
    return [
        number(row.eval_loss, 4),
        percent(row.eval_exact_match),
        number(row.tokens_per_second, 0),
        seconds(row.seconds),
        number(row.peak_memory_gib, 2),
        count(row.trainable_parameters),
        number(row.adapter_mb, 1),
    ]


def _print_verdict(report: Report, console: Console) -> None:
    """The best run and how far its lead can be trusted."""
    if report.best is not None:
        console.print(f"\n[bold green]Best run[/]: {escape(_best_text(report.best))}", highlight=False)
    console.print(escape(report.noise.text), highlight=False)
    if report.noise.command is not None:
        console.print("To find out:", style="dim")
        console.print(f"  {report.noise.command}", markup=False, highlight=False, soft_wrap=True)


def _best_text(best: Row) -> str:
    """Name, values and gain of the best run."""
    label = f" ({axes_label(best.axes)})" if best.axes else ""
    gains = f"eval loss {number(best.base_eval_loss, 4)} -> {number(best.eval_loss, 4)}"
    matches = f"exact match {percent(best.base_eval_exact_match)} -> {percent(best.eval_exact_match)}"
    return f"{best.name}{label}: {gains}, {matches} of held-out rows, base model -> tuned"
