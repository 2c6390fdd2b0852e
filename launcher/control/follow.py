"""Show a sweep's jobs until they end: `follow` for a queue on this machine, `watch` for jobs on Slurm.

`follow` also drives the queue: it starts the next jobs, echoes their output, explains failures, and passes on Ctrl-C (`Stopper`).
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape

from launcher.cluster.local import LocalJob, LocalQueue
from launcher.records import RunStatus, State
from launcher.terminal.interrupts import Interrupts
from launcher.terminal.progress import open_progress
from launcher.track.logs import LogTailer, last_stderr
from launcher.track.tracker import track
from train.runtime.backoff import backoff
from train.store.causes import Cause
from train.store.journal import AttemptLine
from train.store.layout import PackDir, RunDir, SweepDir
from train.store.line_file import read_last
from train.store.records import runs_of_pack

TICK_SECONDS = 0.5
# The longest wait for jobs that were asked to stop.
SAVE_SECONDS = 60.0
# Between questions to a Slurm controller, which serves many users.
FIRST_PAUSE_SECONDS = 3.0
LONGEST_PAUSE_SECONDS = 30.0

# Explanations for ends that the run itself could not record.
SILENT_ENDS: dict[str | None, str] = {
    None: "its job ended before the run began",
    Cause.NODE_FAIL: "its process was killed (out of memory?); the same command continues from its checkpoint",
}
# The other causes come with a sentence of their own.
EXPLAINED_BY_STDERR = {None, Cause.CRASH, Cause.OUT_OF_MEMORY}


def follow(queue: LocalQueue, sweep: SweepDir, console: Console, interrupts: Interrupts) -> None:
    """Drive the queue and show its jobs until all have ended, or until the user has stopped them."""
    cache = StatusCache(queue, sweep)
    tailer = LogTailer()
    stopper = Stopper(queue, interrupts, console)
    with open_progress(console) as progress:
        while queue.busy and not stopper.gives_up:
            ended = queue.advance()
            for job in queue.running + ended:
                _echo(tailer.new_lines(job.pack), console)
            progress.show(cache.update(queue.running + ended))
            for job in ended:
                _explain_failure(job, sweep, console)
            stopper.act()
            time.sleep(TICK_SECONDS if queue.busy else 0)
    for job in queue.running:
        console.print(f"job {job.id} is still saving and will end by itself; 'python -m launcher status' shows it.")


def watch(sweep: SweepDir, console: Console, interrupts: Interrupts) -> None:
    """Show the runs of the sweep until none trains or waits any more, or until the user presses Ctrl-C."""
    with open_progress(console) as progress:
        for pause in backoff(FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, factor=1.1):
            statuses = track(sweep)
            progress.show(statuses)
            if not any(status.under_way for status in statuses):
                return
            wake_at = time.monotonic() + pause
            while time.monotonic() < wake_at and not interrupts.count:
                time.sleep(TICK_SECONDS)
            if interrupts.count:
                return


class StatusCache:
    """The last known status of every run in the queue. Only the runs of running jobs are read again."""

    def __init__(self, queue: LocalQueue, sweep: SweepDir) -> None:
        self._sweep = sweep
        packs = [*(job.pack for job in queue.running), *queue.waiting]
        self._statuses = self._read([run for pack in packs for run in runs_of_pack(pack)])

    def update(self, jobs: list[LocalJob]) -> list[RunStatus]:
        """Read the runs of `jobs`; the statuses of all runs."""
        self._statuses |= self._read([run for job in jobs for run in job.runs()])
        return list(self._statuses.values())

    def _read(self, runs: list[RunDir]) -> dict[str, RunStatus]:
        return {status.id: status for status in track(self._sweep, runs)}


@dataclass
class Stopper:
    """Turns presses of Ctrl-C into signals to the jobs of a queue. Every process is asked once and killed once."""

    queue: LocalQueue
    interrupts: Interrupts
    console: Console
    _asked_at: float | None = None
    _sent: set[tuple[int, int]] = field(default_factory=set)

    def act(self) -> None:
        """Send the signal that the number of presses asks for. A job that holds no run yet is asked as soon as it holds one."""
        if self.interrupts.count == 0:
            return
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            self.queue.drop_waiting()
            self.console.print("stopping, saving a checkpoint… (Ctrl-C again kills the jobs)")
        number = signal.SIGINT if self.interrupts.count == 1 else signal.SIGKILL
        for job in self.queue.running:
            for pid in job.pids():
                self._send(pid, number)

    @property
    def gives_up(self) -> bool:
        """Whether the jobs have had their time to save."""
        return self._asked_at is not None and time.monotonic() - self._asked_at > SAVE_SECONDS

    def _send(self, pid: int, number: signal.Signals) -> None:
        if (pid, number) not in self._sent:
            self._sent.add((pid, number))
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def _echo(lines: list[str], console: Console) -> None:
    """Print what a job printed."""
    for line in lines:
        console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


def _explain_failure(job: LocalJob, sweep: SweepDir, console: Console) -> None:
    """Why runs of an ended job failed: a sentence per cause, the last lines of stderr if they say more, and the log."""
    names: dict[tuple[str | None, str], list[str]] = {}
    for run, status in zip(job.runs(), track(sweep, job.runs()), strict=True):
        if _went_wrong(status):
            names.setdefault((status.cause, _why(run, status)), []).append(run.name)
    for (_, why), runs in names.items():
        console.print(f"[red]{escape(', '.join(runs))} failed[/]: {escape(why)}", soft_wrap=True)
    if names:
        _show_log(job.pack, console, with_end=any(cause in EXPLAINED_BY_STDERR for cause, _ in names))


def _went_wrong(status: RunStatus) -> bool:
    """Whether a run of an ended job failed, was killed, or never began."""
    return status.state is State.FAILED or (status.state is State.STOPPED and status.cause in SILENT_ENDS)


def _why(run: RunDir, status: RunStatus) -> str:
    if not run.path.exists():
        return "its folder is gone"
    if status.cause in SILENT_ENDS:
        return SILENT_ENDS[status.cause]
    last = read_last(run.attempts, AttemptLine)
    detail = last.detail if last is not None else None
    return f"{status.cause}: {detail}" if detail else str(status.cause)


def _show_log(pack: PackDir, console: Console, *, with_end: bool) -> None:
    lines, log = last_stderr(pack)
    if log is None:
        return
    _echo([f"  {line}" for line in lines] if with_end else [], console)
    console.print(f"its log is {log}", markup=False, highlight=False, soft_wrap=True)
