"""Attempts: a run folder is taken by one process, and every attempt leaves one line that says how it ended.

`train.store.causes` lists the causes. A process that was killed or lost its node cannot write its line; the next attempt finds
the dead lease and writes it: with the cause that the dead one noted when it was asked to stop (`train.runtime.signals`), that of
Slurm's accounting where it was killed for its memory, else ``node_fail``. Light: imports no torch.

When to give up (`give_up_reason`). A run is tried again as long as it gets anywhere, however often it is preempted. An attempt is
fruitless if the next one has to begin where it began (`saved_step` did not grow). Two fruitless attempts in a row that computed steps
and lost them hold the run. Attempts that never computed a step (preempted while the model loads, say) are cheap and often somebody
else's doing: of those that end at the same step a few are allowed, by the cause of the last. A job counts only its own attempts,
so that `resume` begins anew; the launcher counts all.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from train.errors import BadInput, DamagedFile, LorapackError, PeerLost, StorageError
from train.runtime.signals import Stopped
from train.runtime.slurm import killed_for_memory, this_job
from train.store.causes import STOPPED_AND_REQUEUED, Cause, consequence
from train.store.journal import AttemptLine, PaceLine, journal_tail
from train.store.layout import RunDir
from train.store.lease import Lease, acquire, read_lease
from train.store.line_file import append_records, read_last, read_records
from train.store.record_file import read_record
from train.store.records import StopNote

LOST_STEPS_PATIENCE = 2
# Details and causes that say that somebody wanted the run to stop.
USER_STOPS = {"SIGINT", Cause.CANCELLED}


def open_attempt(run: RunDir) -> Lease:
    """Take the run folder for this process, and account for a predecessor that died without a word.

    Raises:
        LeaseHeld: another live process trains the run.
    """
    attempts = read_records(run.attempts, AttemptLine)
    before = read_lease(run)
    job = this_job()
    lease = acquire(run, job=job_id(), attempt=_next_number(attempts, before), restarts=job.restarts if job else 0)
    if before is not None and all(line.attempt != before.attempt for line in attempts):
        why = _cause_of_loss(run, before)
        line = attempt_line(run, before, why, None, last_step(run), ended=before.heartbeat)
        append_records(run.attempts, [line])
    run.stop_note.unlink(missing_ok=True)
    return lease


def give_up_reason(attempts: Sequence[AttemptLine], job: str | None = None) -> str | None:
    """Why another attempt would be a waste, None if it would not: see the rule above.

    `attempts` in the order of their ends; `job` counts only that job's.
    """
    counted = [line for line in attempts if not USER_STOPS & {line.cause, line.detail}]
    fruitless = _fruitless_tail(counted, job)
    if not fruitless:
        return None
    last = fruitless[-1]
    if sum(line.trained for line in fruitless) >= LOST_STEPS_PATIENCE:
        return (
            f"two attempts in a row could save nothing beyond step {_saved_step(last)}, the last ended by {last.cause}"
        )
    came_there = len(fruitless) < len(counted) and job in (None, counted[-len(fruitless) - 1].job)
    ends = len(fruitless) + came_there
    follows = consequence(last.cause)
    if ends >= (follows.patience if follows else 2):
        return f"{ends} attempts in a row ended at step {_saved_step(last)}, the last by {last.cause}"
    return None


def _fruitless_tail(attempts: list[AttemptLine], job: str | None) -> list[AttemptLine]:
    """The attempts at the end that left the run where they found it."""
    tail: list[AttemptLine] = []
    begun = [0, *map(_saved_step, attempts)]
    for line, before in reversed([*zip(attempts, begun, strict=False)]):
        if _saved_step(line) > before or job not in (None, line.job):
            break
        tail.insert(0, line)
    return tail


def _saved_step(line: AttemptLine) -> int:
    """Where the attempt left the run; a diverged one lost its last checkpoints, so that it may be less than before."""
    return line.last_step if line.saved_step is None else line.saved_step


def _next_number(attempts: list[AttemptLine], before: Lease | None) -> int:
    """One more than every attempt that has a line, or will get one."""
    return max([line.attempt for line in attempts] + ([before.attempt] if before is not None else []), default=0) + 1


def _left_a_pace(run: RunDir, lease: Lease) -> bool:
    pace = read_last(run.pace, PaceLine)
    return pace is not None and pace.attempt == lease.attempt


def _stop_note(run: RunDir) -> StopNote | None:
    """What the process that held the run noted when it was asked to stop; a note that it could not finish counts for nothing."""
    try:
        return read_record(run.stop_note, StopNote)
    except DamagedFile:
        return None


def _cause_of_loss(run: RunDir, dead: Lease) -> tuple[Cause | str, str]:
    """Why a process left a lease behind and no line: by what it noted when it was asked to stop."""
    note = _stop_note(run)
    if note is not None and note.token == dead.token:
        return note.cause, f"{note.detail}; killed before it could save"
    if this_job() is not None and killed_for_memory(dead.job):
        return (
            Cause.OUT_OF_MEMORY,
            f"Slurm killed job {dead.job} for using more memory than it had asked for (cluster.ram_gib)",
        )
    if dead.alive():
        return Cause.NODE_FAIL, f"Slurm started the job again while process {dead.pid} on {dead.host} was still running"
    return Cause.NODE_FAIL, f"process {dead.pid} on {dead.host} was killed or its node was lost"


def attempt_line(
    run: RunDir,
    lease: Lease,
    why: tuple[Cause | str, str | None],
    first_step: int | None,
    last_step: int,
    ended: float | None = None,
) -> AttemptLine:
    """The line of one ended attempt; `why` is its cause and the detail, `first_step` None where nobody knows.

    The attempt is this process's own and ends now, or that of a process that is gone, which `ended` at that Unix time.
    `saved_step` is where the next attempt will begin; `trained` says whether this one computed any step.
    """
    device = device_in_use() if ended is None else "unknown"
    ended = time.time() if ended is None else ended
    return AttemptLine(
        attempt=lease.attempt,
        cause=why[0],
        detail=why[1],
        first_step=first_step,
        last_step=last_step,
        saved_step=max(run.checkpoint_steps(), default=0),
        trained=last_step > first_step if first_step is not None else _left_a_pace(run, lease),
        seconds=round(ended - lease.started, 3),
        started=lease.started,
        ended=ended,
        node=lease.host,
        device=device,
        job=lease.job,
        restart_count=lease.restarts,
    )


def cause_of(error: Exception) -> tuple[Cause, str]:
    """The cause of an attempt that ended by `error`, and the detail for its line."""
    if isinstance(error, Stopped):
        return error.cause()
    detail = str(error) if isinstance(error, LorapackError) else f"{type(error).__name__}: {error}"
    if isinstance(error, PeerLost):
        return error.cause, detail
    if isinstance(error, BadInput):
        return Cause.BAD_INPUT, detail
    if isinstance(error, StorageError):
        return Cause.STORAGE, detail
    return (Cause.OUT_OF_MEMORY if _is_out_of_memory(error) else Cause.CRASH), detail


def stop_cause(run: RunDir, cause: Cause, detail: str | None) -> tuple[Cause, str | None]:
    """The cause for one run of a job that was asked to stop: its user's wish outweighs what the job was told."""
    wished = cause in STOPPED_AND_REQUEUED | {Cause.CANCELLED} and run.cancel_request.exists()
    return (Cause.CANCELLED, "cancel was asked for") if wished else (cause, detail)


def device_in_use() -> str:
    """The GPU that this process computes on, or cpu; torch is not imported for the question."""
    torch = sys.modules.get("torch")
    return str(torch.cuda.get_device_name()) if torch is not None and torch.cuda.is_initialized() else "cpu"


def last_step(run: RunDir) -> int:
    """The last step that the journal speaks of."""
    lines = journal_tail(run.journal)
    return lines[-1]["step"] if lines else 0


def job_id() -> str:
    """The id of the job that this process belongs to, as its user knows it; a local job may run inside a Slurm allocation."""
    job = this_job()
    return job.id if job else os.environ.get("SUBMITIT_LOCAL_JOB_ID", str(os.getpid()))


def _is_out_of_memory(error: Exception) -> bool:
    """torch's words for it and Python's; torch is not imported for the question."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)
