"""The state of a run without a result, from its lease, its attempts and what Slurm says about its job.

Sources in the order in which they count: ``result.json`` (`tracker` looks there first), the lease and the attempts in the run's folder,
squeue, sacct. If none of them tells, the run is unknown, with the time since it was last seen. Unknown never becomes failed.
"""

from __future__ import annotations

import socket
import time

from launcher.records import State
from launcher.terminal.units import seconds
from launcher.track.jobs import JobRecord
from train.runtime.attempts import give_up_reason
from train.store.causes import TERMINAL, Cause, Next, consequence
from train.store.journal import AttemptLine
from train.store.layout import RunDir
from train.store.lease import Lease

STATE_AFTER = {
    # Its last attempt was done but left no result: it died in between, and continues from its last checkpoint.
    Next.NOTHING: State.STOPPED,
    Next.RETRY: State.STOPPED,
    Next.HOLD: State.CANCELLED,
    Next.GIVE_UP: State.FAILED,
}


def state_of(lease: Lease | None, attempts: list[AttemptLine], job: JobRecord | None) -> tuple[State, str | None]:
    """The state of a run without a result, and the cause of its last end.

    lease: who trains it, or who was killed while training it. attempts: those that have ended. job: the last that it was given to.
    """
    cause: str | None = attempts[-1].cause if attempts else None
    # Whether the last attempt that ended was one of this job, not of an earlier one.
    ended_in_job = job is not None and bool(attempts) and attempts[-1].ended >= job.submitted
    if job is not None and job.slurm is not None:
        return _state_on_slurm(lease, cause, ended_in_job, job)
    if lease is not None:
        return _leased_state(lease, cause)
    if job is not None and job.alive and not ended_in_job:
        return State.PENDING, cause
    if cause is None:
        return State.STOPPED, None
    if cause == Cause.DONE and job is not None and job.alive:
        # Its result is just being written.
        return State.RUNNING, None
    return _state_after(cause), cause


def is_gone(state: State, job: JobRecord | None) -> bool:
    """Whether it is certain that no job has the run, so that only how its job ended is unknown."""
    return state is State.UNKNOWN and job is not None and job.alive is False


def reason_of(
    run: RunDir, state: State, lease: Lease | None, attempts: list[AttemptLine], job: JobRecord | None
) -> str | None:
    """Why a run waits, is held, or is unknown."""
    view = job.view if job is not None else None
    if state is State.PENDING and view is not None:
        return view.reason
    if state is State.STOPPED:
        return give_up_reason(attempts)
    if state is State.UNKNOWN:
        times = [lease.heartbeat if lease else 0.0, job.submitted if job else 0.0, run.config.stat().st_mtime]
        times += [line.ended for line in attempts[-1:]]
        return f"not heard of for {seconds(time.time() - max(times))}"
    return None


def _state_on_slurm(
    lease: Lease | None, cause: str | None, ended_in_job: bool, job: JobRecord
) -> tuple[State, str | None]:
    """The state of a run whose job is on Slurm. A heartbeat outweighs the queue, unless the job has left the queue."""
    view = job.view
    # The job has ended with this run for good, although it may train others.
    is_over = ended_in_job and cause in TERMINAL
    if job.alive is None and view is None:
        # squeue does not answer, so only the files tell.
        if lease is not None:
            return _leased_state(lease, cause)
        return (_state_after(cause), cause) if is_over and cause is not None else (State.UNKNOWN, cause)
    if view is not None and not view.state.over and view.state.state is not State.UNKNOWN:
        # The job is in the queue.
        if lease is not None and lease.alive() and view.state.state is State.RUNNING:
            return State.RUNNING, cause
        if is_over and cause is not None and lease is None:
            return _state_after(cause), cause
        return view.state.state, cause
    # The job has left the queue. An attempt that recorded its end knows the cause best.
    if lease is None and ended_in_job and cause is not None:
        return _state_after(cause), cause
    if view is None:
        # Without an id it was never submitted; otherwise Slurm has forgotten it.
        return (State.STOPPED, cause) if job.id is None else (State.UNKNOWN, cause)
    return view.state.state, view.state.cause or cause


def _leased_state(lease: Lease, cause: str | None) -> tuple[State, str | None]:
    """The state of a run with a lease. On this host a dead process was killed; on another host it may only be silent."""
    if lease.alive():
        return State.RUNNING, cause
    return (State.STOPPED, Cause.NODE_FAIL) if lease.host == socket.gethostname() else (State.UNKNOWN, cause)


def _state_after(cause: str) -> State:
    """The state of a run that nobody trains, by its last end. What follows from a later version's cause is unknown."""
    follows = consequence(cause)
    return State.UNKNOWN if follows is None else STATE_AFTER[follows.next]
