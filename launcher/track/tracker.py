"""Where every run is now: by its files, and by one look at Slurm's queue where jobs are there.

Truth order: ``result.json`` > lease and attempts > squeue > sacct > unknown, with its age. Unknown is never turned into failed.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from launcher.records import RunStatus, State
from launcher.terminal.units import seconds
from launcher.track.jobs import JobRecord, jobs_of, look_up, newest_job_per_run
from train.errors import DamagedFile
from train.runtime.activity import doing, read_activity
from train.runtime.attempts import give_up_reason
from train.store.causes import TERMINAL, Cause, Next, consequence
from train.store.journal import AttemptLine, PaceLine, journal_tail, read_header
from train.store.layout import RunDir, SweepDir
from train.store.lease import Lease, read_lease
from train.store.record_file import DamageLog, read_record, read_records, read_tail
from train.store.records import ActivityNote, ResultRecord

STATE_AFTER = {
    Next.NOTHING: State.STOPPED,  # without a result it died in between, and continues from its last checkpoint
    Next.RETRY: State.STOPPED,
    Next.HOLD: State.CANCELLED,
    Next.GIVE_UP: State.FAILED,
}


@dataclass(frozen=True)
class _Found:
    """What a run's folder holds, as far as it can be read; `damage` says what cannot."""

    result: ResultRecord | None
    lease: Lease | None
    attempts: list[AttemptLine]
    damage: str | None


def track(sweep: SweepDir, runs: Iterable[RunDir] | None = None) -> list[RunStatus]:
    """The status of `runs`, by default of every run of the sweep, r8 before r16. Reads only the ends of journals."""
    listed = list(sorted(sweep.runs(), key=_natural_order) if runs is None else runs)
    folders = {run.path.name: _look_into(run) for run in listed}
    jobs = newest_job_per_run(jobs_of(sweep))
    asked = {job.pack.path: job for name, job in jobs.items() if name in folders and folders[name].result is None}
    seen = {job.pack.path: job for job in look_up(list(asked.values()))}
    found = {name: seen.get(job.pack.path, job) for name, job in jobs.items()}
    notes = {pack: read_activity(job.pack) for pack, job in seen.items()}
    return [
        _status(run, folders[run.path.name], job, notes.get(job.pack.path) if job else None)
        for run, job in ((run, found.get(run.path.name)) for run in listed)
    ]


def _look_into(run: RunDir) -> _Found:
    """The folder of a run; a damaged file hides none of the others."""
    damage = DamageLog()
    attempts: list[AttemptLine] = damage.read(partial(read_records, run.attempts, AttemptLine), [])
    result = damage.read(partial(read_record, run.result, ResultRecord), None)
    lease = damage.read(partial(read_lease, run), None)
    return _Found(result, lease, attempts, " ".join(damage.messages) or None)


def status_json(sweep: SweepDir, statuses: list[RunStatus]) -> dict[str, Any]:
    """The statuses as one JSON document."""
    return {"sweep": sweep.path.name, "runs": [asdict(status) for status in statuses]}


def _natural_order(run: RunDir) -> list[tuple[int, str]]:
    """Numbers in a name count as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", run.name)]


def _status(run: RunDir, found: _Found, job: JobRecord | None, note: ActivityNote | None) -> RunStatus:
    """The status of one run; `note` is what its job last said of itself."""
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
    """The status of a run of which a file is damaged: what the others say, and nothing that could be wrong."""
    lease, last = found.lease, found.attempts[-1] if found.attempts else None
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
    state, cause = _state(lease, attempts, job)
    if (
        state in {State.PENDING, State.STOPPED} or _gone(state, job)
    ) and run.cancel_request.exists():  # no job will take it up
        state = State.CANCELLED
    tail = journal_tail(run.journal)
    pace = read_tail(run.pace, PaceLine)
    header = read_header(run.journal)
    step, max_steps = (tail[-1]["step"] if tail else 0), (header.max_steps if header else None)
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
        reason=_reason(run, state, lease, attempts, job),
        doing=doing(note, lease) if running else None,
        gone=_gone(state, job),
    )


def _gone(state: State, job: JobRecord | None) -> bool:
    """Whether all that is unknown of a run is how its job ended."""
    return state is State.UNKNOWN and job is not None and job.alive is False


def _reason(
    run: RunDir, state: State, lease: Lease | None, attempts: list[AttemptLine], job: JobRecord | None
) -> str | None:
    """Why a run waits, is held, or is unknown."""
    view = job.slurm.view if job is not None and job.slurm is not None else None
    if state is State.PENDING and view is not None:
        return view.reason
    if state is State.STOPPED:
        return give_up_reason(attempts)
    if state is State.UNKNOWN:
        times = [lease.heartbeat if lease else 0.0, job.submitted if job else 0.0, run.config.stat().st_mtime]
        times += [line.ended for line in attempts[-1:]]
        return f"not heard of for {seconds(time.time() - max(times))}"
    return None


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


def _state(lease: Lease | None, attempts: list[AttemptLine], job: JobRecord | None) -> tuple[State, str | None]:
    """The state of a run without a result, and the cause of its last end."""
    cause: str | None = attempts[-1].cause if attempts else None
    ended_in_job = job is not None and bool(attempts) and attempts[-1].ended >= job.submitted
    if job is not None and job.slurm is not None:
        return _slurm_state(lease, cause, ended_in_job, job)
    if lease is not None:
        return _leased_state(lease, cause)
    if job is not None and job.alive and not ended_in_job:
        return State.PENDING, cause
    if cause is None:
        return State.STOPPED, None
    if cause == Cause.DONE and job is not None and job.alive:  # its result is being written
        return State.RUNNING, None
    return _state_after(cause), cause


def _state_after(cause: str) -> State:
    """The state of a run that nobody trains, by its last end; a later version's cause tells nothing here."""
    follows = consequence(cause)
    return State.UNKNOWN if follows is None else STATE_AFTER[follows.next]


def _slurm_state(
    lease: Lease | None, cause: str | None, ended_in_job: bool, job: JobRecord
) -> tuple[State, str | None]:
    """The state of a run whose job is on Slurm. A heartbeat tells more than the queue, unless the job has left the queue."""
    view = job.slurm.view if job.slurm is not None else None
    if job.alive is None and view is None:  # squeue does not answer
        if lease is not None:
            return _leased_state(lease, cause)
        return (_state_after(cause), cause) if ended_in_job and cause in TERMINAL else (State.UNKNOWN, cause)
    if view is not None and not view.state.over and view.state.state is not State.UNKNOWN:
        if lease is not None and lease.alive() and view.state.state is State.RUNNING:
            return State.RUNNING, cause
        return (
            (_state_after(cause), cause)
            if ended_in_job and cause in TERMINAL and lease is None
            else (view.state.state, cause)
        )
    if lease is None and ended_in_job and cause is not None:
        return _state_after(cause), cause
    if view is None:
        return (State.STOPPED, cause) if job.id is None else (State.UNKNOWN, cause)
    return view.state.state, view.state.cause or cause


def _leased_state(lease: Lease, cause: str | None) -> tuple[State, str | None]:
    """Of a run that some process took: on this host we can see that it was killed, on others only that it is silent."""
    if lease.alive():
        return State.RUNNING, cause
    return (State.STOPPED, Cause.NODE_FAIL) if lease.host == socket.gethostname() else (State.UNKNOWN, cause)


def _unwritten_attempts(lease: Lease | None, attempts: list[AttemptLine]) -> int:
    """1 if the attempt under way (or killed) has no line yet."""
    return int(lease is not None and all(line.attempt != lease.attempt for line in attempts))


def _seconds_left(pace: list[PaceLine], lease: Lease | None, step: int, max_steps: int | None) -> float | None:
    """By the steps of the last half minute or so of this attempt, evaluations included; None before there are two."""
    recent = [line for line in pace if lease is not None and line.attempt == lease.attempt]
    if max_steps is None or len(recent) < 2 or recent[-1].step <= recent[0].step:
        return None
    seconds_per_step = (recent[-1].time - recent[0].time) / (recent[-1].step - recent[0].step)
    return float(max(0.0, (max_steps - step) * seconds_per_step))
