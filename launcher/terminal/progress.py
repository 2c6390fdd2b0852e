"""Live progress of runs in training: a bar per run on a terminal, a plain line per run now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launcher.records import RunStatus, State
from launcher.terminal.tables import STATE_STYLE, left, steps, tally
from launcher.terminal.units import number

LINE_SECONDS = 10.0
# The columns after the bar.
JUSTIFIED: tuple[JustifyMethod, ...] = ("right", "right", "left", "right", "right")
OVER = {State.DONE, State.FAILED, State.CANCELLED, State.STOPPED}


class TerminalProgress:
    """Bars that redraw in place. Runs that train come first, so that a small window shows them."""

    def __init__(self, console: Console) -> None:
        # Without auto_refresh there is no thread: nothing may print while `launcher.cluster.local` starts a job, which has to swap
        # the standard streams for a moment.
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, statuses: list[RunStatus]) -> None:
        """Draw the present states."""
        self._live.update(progress_table(statuses), refresh=True)


class PlainProgress:
    """Lines for logs and pipes: one per run every `LINE_SECONDS`, and one when a run ends."""

    def __init__(self, console: Console, line_seconds: float = LINE_SECONDS) -> None:
        self._console = console
        self._line_seconds = line_seconds
        self._printed_at = float("-inf")
        self._over: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        return

    def show(self, statuses: list[RunStatus]) -> None:
        """Print what is due."""
        over = [status for status in statuses if status.state in OVER and status.id not in self._over]
        self._over |= {status.id for status in over}
        running: list[RunStatus] = []
        if time.monotonic() - self._printed_at >= self._line_seconds:
            self._printed_at = time.monotonic()
            running = [status for status in statuses if status.state is State.RUNNING]
        for status in over + running:
            self._console.print(progress_line(status), highlight=False, soft_wrap=True)


Progress = TerminalProgress | PlainProgress


def open_progress(console: Console) -> Progress:
    """The view that suits where `console` prints."""
    return TerminalProgress(console) if console.is_terminal else PlainProgress(console)


def progress_table(statuses: list[RunStatus]) -> RenderableType:
    """A row per run that is not waiting, and a line that counts them all.

    Colored cells are `Text`, not markup: printing a line without markup draws the table again, and then without markup too.
    """
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(min_width=10, max_width=30)
    for justify in JUSTIFIED:
        table.add_column(justify=justify, no_wrap=True)
    order = {State.RUNNING: 0, State.FAILED: 1}
    started = [status for status in statuses if status.state is not State.PENDING or len(statuses) == 1]
    for status in sorted(started, key=lambda status: order.get(status.state, 2)):
        table.add_row(*_cells(status))
    return Group(table, Text.from_markup(tally(statuses)))


def progress_line(status: RunStatus) -> str:
    """``r8  running  12/60  loss 1.2345  321 tokens/s  41 s left``, or ``r8  evaluating 3/64  12/60  loss 1.2345``."""
    parts = [escape(status.name), status.doing or status.state.value]
    parts += [steps(status), f"loss {number(status.loss, 4)}"]
    if status.state is State.RUNNING and status.doing is None:
        parts += [f"{number(status.tokens_per_second, 0)} tokens/s", f"{left(status)} left"]
    return "  ".join(parts)


def _cells(status: RunStatus) -> list[RenderableType]:
    bar = ProgressBar(total=status.max_steps or 1, completed=status.step, width=None)
    loss = f"loss {number(status.loss, 4)}"
    speed = f"{number(status.tokens_per_second, 0)} tok/s"
    # A narrow window cuts off the last columns.
    state = Text(status.doing or str(status.state), style=STATE_STYLE[status.state])
    return [Text(status.name), bar, steps(status), loss, state, left(status), speed]
