"""Where every run is now: by its files, and by one look at Slurm's queue if jobs went there.

How the state of a run without a result follows from them is in `run_state`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from launcher.records import RunStatus, State
from launcher.track.jobs import JobRecord, jobs_of, look_up, newest_job_per_run
from launcher.track.run_state import is_gone, reason_of, state_of
from train.errors import DamagedFile
from train.runtime.activity import doing, read_activity
from train.store.causes import Cause
from train.store.journal import AttemptLine, PaceLine, journal_tail, read_header
from train.store.layout import RunDir, SweepDir
from train.store.lease import Lease, read_lease
from train.store.line_file import read_records, read_tail
from train.store.record_file import DamageLog, read_record
from train.store.records import ActivityNote, ResultRecord


@dataclass(frozen=True)
class _Found:
    """What a run's folder holds, as far as it can be read. `damage` says what cannot."""

    result: ResultRecord | None
    lease: Lease | None
    attempts: list[AttemptLine]
    damage: str | None


def track(sweep: SweepDir, runs: Iterable[RunDir] | None = None) -> list[RunStatus]:
    """The status of `runs`, by default of every run of the sweep, r8 before r16. Reads only the ends of journals."""
    listed = list(sorted(sweep.runs(), key=_natural_order) if runs is None else runs)
    folders = {run.path.name: _look_into(run) for run in listed}
    jobs = newest_job_per_run(jobs_of(sweep))
    # Slurm is asked only about jobs with an unfinished run among the listed ones, once per job.
    asked = {job.pack.path: job for name, job in jobs.items() if name in folders and folders[name].result is None}
    seen = {job.pack.path: job for job in look_up(list(asked.values()))}
    job_of = {name: seen.get(job.pack.path, job) for name, job in jobs.items()}
    notes = {pack: read_activity(job.pack) for pack, job in seen.items()}
    return [
        _status(run, folders[run.path.name], job, notes.get(job.pack.path) if job else None)
        for run, job in ((run, job_of.get(run.path.name)) for run in listed)
    ]


def _look_into(run: RunDir) -> _Found:
    """Read a run's folder. A damaged file does not hide the others."""
    damage = DamageLog()
    attempts: list[AttemptLine] = damage.read(partial(read_records, run.attempts, AttemptLine), [])
    result = damage.read(partial(read_record, run.result, ResultRecord), None)
    lease = damage.read(partial(read_lease, run), None)
    return _Found(result, lease, attempts, " ".join(damage.messages) or None)


def status_json(sweep: SweepDir, statuses: list[RunStatus]) -> dict[str, Any]:
    """The statuses as one JSON document."""
    return {"sweep": sweep.path.name, "runs": [asdict(status) for status in statuses]}


def _natural_order(run: RunDir) -> list[tuple[int, str]]:
    """A key that sorts r8 before r16: ``[(-1, "r"), (8, ""), (-1, "")]``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", run.name)]


def _status(run: RunDir, found: _Found, job: JobRecord | None, note: ActivityNote | None) -> RunStatus:
    """The status of one run. `note` is what its job last wrote about itself."""
    if found.damage is not None:
        return _damaged_status(run, found, job, found.damage)
    if found.result is not None:
        return _done_status(run, found.result, found.attempts)
    try:
        if job is not None and job.damage is not None and (found.lease is None or not found.lease.alive()):
            return _damaged_status(run, found, job, job.damage)
        return _open_status(run, found.lease, found.attempts, job, note)
    except DamagedFile as exc:
        return _damaged_status(run, found, job, str(exc))


def _damaged_status(run: RunDir, found: _Found, job: JobRecord | None, damage: str) -> RunStatus:
    """The status of a run with a damaged file: what the other files say for certain."""
    lease = found.lease
    last = found.attempts[-1] if found.attempts else None
    training = lease is not None and lease.alive()
    return RunStatus(
        id=run.id,
        name=run.name,
        state=State.RUNNING if training else State.UNKNOWN,
        step=0 if found.result is None else found.result.steps,
        max_steps=None if found.result is None else found.result.steps,
        loss=None if found.result is None else found.result.train_loss,
        tokens_per_second=None,
        seconds_left=None,
        attempts=len(found.attempts) + _unwritten_attempts(lease, found.attempts),
        cause=None if last is None else last.cause,
        job=lease.job if lease else job.id if job else None,
        node=lease.host if lease else last.node if last else None,
        reason=damage,
        gone=not training and (found.result is not None or job is None or job.alive is False),
        damaged=True,
    )


def _open_status(
    run: RunDir,
    lease: Lease | None,
    attempts: list[AttemptLine],
    job: JobRecord | None,
    note: ActivityNote | None,
) -> RunStatus:
    """The status of a run without a result.

    Raises:
        DamagedFile: its journal or pace is damaged.
    """
    state, cause = state_of(lease, attempts, job)
    # No job will train it any more: one that starts finds the request first.
    if run.cancel_request.exists() and (state in {State.PENDING, State.STOPPED} or is_gone(state, job)):
        state = State.CANCELLED
    tail = journal_tail(run.journal)
    pace = read_tail(run.pace, PaceLine)
    header = read_header(run.journal)
    step = tail[-1]["step"] if tail else 0
    max_steps = header.max_steps if header else None
    running = state is State.RUNNING
    return RunStatus(
        id=run.id,
        name=run.name,
        state=state,
        step=step,
        max_steps=max_steps,
        loss=next((line["loss"] for line in reversed(tail) if "loss" in line), None),
        tokens_per_second=pace[-1].tokens_per_second if pace and running else None,
        seconds_left=_seconds_left(pace, lease, step, max_steps) if running else None,
        attempts=len(attempts) + _unwritten_attempts(lease, attempts),
        cause=cause,
        job=lease.job if lease else job.id if job else None,
        node=lease.host if lease else attempts[-1].node if attempts else job.host if job else None,
        reason=reason_of(run, state, lease, attempts, job),
        doing=doing(note, lease) if running else None,
        gone=is_gone(state, job),
    )


def _done_status(run: RunDir, result: ResultRecord, attempts: list[AttemptLine]) -> RunStatus:
    last = attempts[-1] if attempts else None
    return RunStatus(
        id=run.id,
        name=run.name,
        state=State.DONE,
        step=result.steps,
        max_steps=result.steps,
        loss=result.train_loss,
        tokens_per_second=result.tokens_per_second,
        seconds_left=0.0,
        attempts=max(len(attempts), 1),
        cause=Cause.DONE,
        job=None if last is None else last.job,
        node=None if last is None else last.node,
    )


def _unwritten_attempts(lease: Lease | None, attempts: list[AttemptLine]) -> int:
    """1 if the current attempt, or a killed one, has no line yet."""
    return int(lease is not None and all(line.attempt != lease.attempt for line in attempts))


def _seconds_left(pace: list[PaceLine], lease: Lease | None, step: int, max_steps: int | None) -> float | None:
    """By the pace of the last half minute or so of this attempt, including evaluations; None before there are two pace lines.

    From step 100 at 10 s to step 160 at 40 s a step takes 0.5 s, so at step 160 of 200 there are 20 s left.
    """
    recent = [line for line in pace if lease is not None and line.attempt == lease.attempt]
    if max_steps is None or len(recent) < 2 or recent[-1].step <= recent[0].step:
        return None
    seconds_per_step = (recent[-1].time - recent[0].time) / (recent[-1].step - recent[0].step)
    return float(max(0.0, (max_steps - step) * seconds_per_step))
