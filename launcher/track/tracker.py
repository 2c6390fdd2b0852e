"""Where every run is now, read from files alone.

Truth order: ``result.json`` > lease and attempts > the job that was given the run > unknown. Unknown is never turned into failed.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from launcher.jobs import JobRecord, newest_job_per_run
from launcher.records import RunStatus, State
from train.lease import Lease, read_lease
from train.rundir import Record, RunDir, SweepDir, read_first_line, read_json, read_lines, tail_lines

STATE_AFTER = {
    "done": State.STOPPED,  # without a result it died in between, and goes on from its last checkpoint
    "preempted": State.STOPPED,
    "timeout": State.STOPPED,
    "node_fail": State.STOPPED,
    "storage": State.STOPPED,
    "cancelled": State.CANCELLED,
    "out_of_memory": State.FAILED,
    "diverged": State.FAILED,
    "bad_input": State.FAILED,
    "crash": State.FAILED,
}


def track(sweep: SweepDir, runs: Iterable[RunDir] | None = None) -> list[RunStatus]:
    """The status of `runs`, by default of every run of the sweep, r8 before r16. Reads only the ends of journals."""
    jobs = newest_job_per_run(sweep)
    listed = sorted(sweep.runs(), key=_natural_order) if runs is None else runs
    return [_status(run, jobs.get(run.path.name)) for run in listed]


def status_json(sweep: SweepDir, statuses: list[RunStatus]) -> dict[str, Any]:
    """The statuses as one JSON document."""
    return {"sweep": sweep.path.name, "runs": [asdict(status) for status in statuses]}


def _natural_order(run: RunDir) -> list[tuple[int, str]]:
    """Numbers in a name count as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", run.name)]


def _status(run: RunDir, job: JobRecord | None) -> RunStatus:
    lease, attempts = read_lease(run), read_lines(run.attempts)
    result = read_json(run.result)
    state, cause = _state(result, lease, attempts, job)
    if result is not None:
        return _done_status(run, result, attempts)
    if state in {State.PENDING, State.STOPPED} and run.cancel_request.exists():  # no job will take it up
        state = State.CANCELLED
    tail = tail_lines(run.journal)
    pace = tail_lines(run.pace)
    header = read_first_line(run.journal) or {}
    step, max_steps = (tail[-1]["step"] if tail else 0), header.get("max_steps")
    running = state is State.RUNNING
    return RunStatus(
        id=run.id,
        name=run.name,
        state=state,
        step=step,
        max_steps=max_steps,
        loss=next((line["loss"] for line in reversed(tail) if "loss" in line), None),
        tokens_per_second=pace[-1]["tokens_per_second"] if pace and running else None,
        seconds_left=_seconds_left(pace, lease, step, max_steps) if running else None,
        attempts=len(attempts) + _unwritten_attempts(lease, attempts),
        cause=cause,
        job=lease.job if lease else job.id if job else None,
        node=lease.host if lease else attempts[-1]["node"] if attempts else job.host if job else None,
    )


def _done_status(run: RunDir, result: Record, attempts: list[Record]) -> RunStatus:
    last = attempts[-1] if attempts else {}
    return RunStatus(
        id=run.id,
        name=run.name,
        state=State.DONE,
        step=result["steps"],
        max_steps=result["steps"],
        loss=result["train_loss"],
        tokens_per_second=result["tokens_per_second"],
        seconds_left=0.0,
        attempts=max(len(attempts), 1),
        cause="done",
        job=last.get("job"),
        node=last.get("node"),
    )


def _state(
    result: Record | None, lease: Lease | None, attempts: list[Record], job: JobRecord | None
) -> tuple[State, str | None]:
    """The state of a run, and the cause of its last end."""
    cause = attempts[-1]["cause"] if attempts else None
    if result is not None:
        return State.DONE, "done"
    if lease is not None:
        return _leased_state(lease, cause)
    if job is not None and job.alive and (not attempts or attempts[-1]["ended"] < job.submitted):
        return State.PENDING, cause
    if cause is None:
        return State.STOPPED, None
    if cause == "done" and job is not None and job.alive:  # its result is being written
        return State.RUNNING, None
    return STATE_AFTER.get(cause, State.UNKNOWN), cause


def _leased_state(lease: Lease, cause: str | None) -> tuple[State, str | None]:
    """Of a run that some process took: on this host we can see that it was killed, on others only that it is silent."""
    if lease.alive():
        return State.RUNNING, cause
    return (State.STOPPED, "node_fail") if lease.host == socket.gethostname() else (State.UNKNOWN, cause)


def _unwritten_attempts(lease: Lease | None, attempts: list[Record]) -> int:
    """1 if the attempt under way (or killed) has no line yet."""
    return int(lease is not None and all(line["attempt"] != lease.attempt for line in attempts))


def _seconds_left(pace: list[Record], lease: Lease | None, step: int, max_steps: int | None) -> float | None:
    """By the steps of the last half minute or so of this attempt, evaluations included; None before there are two."""
    recent = [line for line in pace if lease is not None and line["attempt"] == lease.attempt]
    if max_steps is None or len(recent) < 2 or recent[-1]["step"] <= recent[0]["step"]:
        return None
    seconds_per_step = (recent[-1]["time"] - recent[0]["time"]) / (recent[-1]["step"] - recent[0]["step"])
    return float(max(0.0, (max_steps - step) * seconds_per_step))
