"""Tables in the terminal: a plan, the states of runs, the sweeps below a root."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from launcher.records import JobSlots, Pack, Plan, RunStatus, State, Verdict
from launcher.terminal.units import MISSING, count, number, seconds

# Of a table in the terminal; --json has all rows.
MOST_ROWS = 60

VERDICT_STYLE = {
    Verdict.NEW: "green",
    Verdict.RESUMABLE: "cyan",
    Verdict.RUNNING: "blue",
    Verdict.DONE: "dim",
    Verdict.FAILED: "red",
    Verdict.UNKNOWN: "magenta",
}
STATE_STYLE = {
    State.PENDING: "dim",
    State.RUNNING: "blue",
    State.STOPPED: "yellow",
    State.CANCELLED: "yellow",
    State.FAILED: "red",
    State.DONE: "green",
    State.UNKNOWN: "magenta",
}


def print_plan(plan: Plan, console: Console) -> None:
    """A line per run with its verdict, a line per pack with its forecast."""
    _print_title(f"{plan.sweep.name} in {plan.sweep.root}", console)
    table = _table("run", "verdict", "pack", "reason")
    for planned in plan.runs[:MOST_ROWS]:
        style = VERDICT_STYLE[planned.verdict]
        verdict = f"[{style}]{planned.verdict}[/]"
        table.add_row(escape(planned.run.name), verdict, planned.pack or MISSING, escape(planned.reason))
    console.print(table)
    _say_left_out(len(plan.runs), console)
    if plan.packs:
        console.print(_pack_table(plan))
    if plan.slots is not None:
        console.print(at_once(plan.slots, len(plan.packs)), highlight=False)


def at_once(slots: JobSlots, jobs: int) -> str:
    """How many of a plan's jobs run at once, and why."""
    limit = "cluster.max_parallel"
    taken = sum(count for _, count in slots.taken)
    if slots.waits:
        earlier = f"job{'s' * (len(slots.after) > 1)} {', '.join(slots.after)} of this sweep"
        return f"{limit}={slots.count}, and {earlier} may use {taken} of these: the new jobs wait until the earlier ones have ended."
    others = f", in addition to {taken} of this sweep in the queue" if taken else ""
    return f"At most {min(slots.count, jobs)} of these jobs run at once ({limit}){others}."


def print_statuses(statuses: list[RunStatus], title: str, console: Console) -> None:
    """A line per run: how far it is, how fast, and how it last ended. Empty columns are left out."""
    columns = ("run", "state", "doing", "step", "loss", "tokens/s", "left", "attempts", "last end", "job", "node")
    rows = [_status_cells(*pair) for pair in zip(statuses[:MOST_ROWS], labels(statuses), strict=False)]
    shown = [i for i in range(len(columns)) if any(row[i] != MISSING for row in rows)]
    _print_title(title, console)
    table = _table(*(columns[i] for i in shown))
    for row in rows:
        table.add_row(*(row[i] for i in shown))
    console.print(table)
    _say_left_out(len(statuses), console)
    _print_damage(statuses, console)
    console.print(tally(statuses))


def _print_damage(statuses: list[RunStatus], console: Console) -> None:
    """Which files are damaged, each once, with the runs that are unknown because of it."""
    names: dict[str, list[str]] = {}
    for status, label in zip(statuses, labels(statuses), strict=True):
        if status.damaged and status.reason is not None:
            names.setdefault(status.reason, []).append(label)
    for reason, runs in names.items():
        console.print(f"{', '.join(runs)}: {reason}", style="magenta", markup=False, highlight=False, soft_wrap=True)


def _status_cells(status: RunStatus, label: str) -> list[str]:
    return [
        escape(label),
        state_text(status.state),
        status.doing or MISSING,
        steps(status),
        number(status.loss, 4),
        number(status.tokens_per_second, 0),
        left(status),
        count(status.attempts),
        status.cause or MISSING,
        escape(status.job or MISSING),
        escape(status.node or MISSING),
    ]


def print_sweeps(rows: list[dict[str, Any]], root: str, console: Console) -> None:
    """A line per sweep: how far it is, when it was last submitted, how much disk it takes."""
    _print_title(f"sweeps in {root}", console)
    table = _table("sweep", "runs", "done", "last submitted", "size")
    for row in rows:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["submitted"]))
        table.add_row(escape(row["name"]), str(row["runs"]), str(row["done"]), when, f"{row['bytes'] / 1e6:,.1f} MB")
    console.print(table)


def labels(statuses: list[RunStatus]) -> list[str]:
    """What to call each run: its name, with the run id where another one has the same name."""
    uses = Counter(status.name for status in statuses)
    return [status.name if uses[status.name] == 1 else f"{status.name}-{status.id}" for status in statuses]


def tally(statuses: list[RunStatus]) -> str:
    """``3 done, 1 running``."""
    counts = Counter(status.state for status in statuses)
    return ", ".join(f"{counts[state]} {state_text(state)}" for state in State if counts[state])


def state_text(state: State) -> str:
    """The state in its color."""
    return f"[{STATE_STYLE[state]}]{state}[/]"


def steps(status: RunStatus) -> str:
    """``12/60``, or a dash if the number of steps is not known yet."""
    return f"{status.step}/{status.max_steps}" if status.max_steps else MISSING


def left(status: RunStatus) -> str:
    """The time left, of a run in training."""
    return MISSING if status.state is not State.RUNNING else seconds(status.seconds_left)


def _pack_table(plan: Plan) -> Table:
    """A line per pack. On Slurm it says which GPUs a job asks for, since a partition can have several types."""
    on_slurm = any(pack.gres for pack in plan.packs)
    place = ("partition", "GPUs") if on_slurm else ("partition",)
    table = _table("pack", *place, "runs", "memory GiB", "time", "GPU-hours", "path")
    for pack in plan.packs[:MOST_ROWS]:
        forecast = pack.forecast
        measures = (number(forecast.vram_gib, 1), seconds(forecast.seconds), number(forecast.gpu_hours, 2))
        where = (pack.partition, escape(pack.gres)) if on_slurm else (pack.partition,)
        table.add_row(pack.id, *where, str(len(pack.runs)), *measures, path_text(pack))
    return table


def path_text(pack: Pack) -> str:
    """``own``, ``padded, 3.1 times the time``; a model that is not fetched is checked later."""
    if pack.path is None:
        return "checked once fetched"
    return pack.path if pack.path == "own" else f"{pack.path}, {pack.slower:.1f} times the time"


def _print_title(title: str, console: Console) -> None:
    """A line above a table. The title of a rich table would be wrapped at the table's width, even in the middle of a path."""
    console.print(Text(title), style="bold", soft_wrap=True, highlight=False)


def _table(*columns: str) -> Table:
    table = Table(header_style="dim", box=None)
    numbers = {
        "step",
        "loss",
        "tokens/s",
        "left",
        "attempts",
        "runs",
        "done",
        "size",
        "memory GiB",
        "time",
        "GPU-hours",
    }
    for name in columns:
        table.add_column(name, justify="right" if name in numbers else "left", no_wrap=name != "reason")
    return table


def _say_left_out(rows: int, console: Console) -> None:
    if rows > MOST_ROWS:
        console.print(f"… and {rows - MOST_ROWS} more; --json shows all", style="dim")
