"""Attempts: a run folder is taken by one process, and every attempt leaves one line that says how it ended.

`train.store.causes` lists the causes. A process that was killed or lost its node cannot write its line. The next attempt finds the dead
lease and writes the line. Its cause is the one that the dead process noted when it was asked to stop (`train.runtime.signals`),
``out_of_memory`` if Slurm's accounting says so, and ``node_fail`` otherwise. Light: imports no torch.

When to give up (`give_up_reason`): a run is tried again as long as it advances, however often it is preempted. An attempt is fruitless
if the next one has to begin where it began (`saved_step` did not grow).

- Two fruitless attempts in a row that computed steps and lost them hold the run.
- Attempts that computed no step (preempted while the model loads, say) are cheap and often not the run's fault. Of those that end at
  the same step as many are allowed as the cause of the last one has `patience`.

A job counts only its own attempts, so that `resume` starts counting from 0; the launcher counts all. An example:

    attempt  begins at  saved_step  cause
    1        0          40          preempted   it advanced
    2        40         40          preempted   fruitless; it came to step 57 and saved nothing
    3        40         40          timeout     fruitless; it came to step 52: the second that lost steps, so the run is held
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
# Causes and details of attempts that the user ended on purpose. They say nothing about the run, so they are not counted.
USER_STOPS = {"SIGINT", Cause.CANCELLED}


def open_attempt(run: RunDir) -> Lease:
    """Take the run folder for this process, and write the line of a predecessor that died before it could.

    Raises:
        LeaseHeld: another live process trains the run.
    """
    # Read before `acquire`, which replaces the dead lease and with it what it says of its process.
    attempts = read_records(run.attempts, AttemptLine)
    before = read_lease(run)
    job = this_job()
    lease = acquire(run, job=job_id(), attempt=_next_number(attempts, before), restarts=job.restarts if job else 0)
    # A predecessor may also have died after its line, before it gave the lease back.
    if before is not None and all(line.attempt != before.attempt for line in attempts):
        why = _cause_of_loss(run, before)
        # The last heartbeat is the last time at which the dead process is known to have lived.
        line = attempt_line(run, before, why, None, last_step(run), ended=before.heartbeat)
        append_records(run.attempts, [line])
    run.stop_note.unlink(missing_ok=True)
    return lease


def give_up_reason(attempts: Sequence[AttemptLine], job: str | None = None) -> str | None:
    """Why another attempt would be a waste; None if it would not. See the rule above.

    `attempts` in the order of their ends; `job` counts only that job's.
    """
    counted = [line for line in attempts if not USER_STOPS & {line.cause, line.detail}]
    fruitless = _fruitless_tail(counted, job)
    if not fruitless:
        return None
    last = fruitless[-1]
    # `trained` adds up as 0 and 1.
    if sum(line.trained for line in fruitless) >= LOST_STEPS_PATIENCE:
        return (
            f"two attempts in a row could save nothing beyond step {_saved_step(last)}, the last ended by {last.cause}"
        )
    # The attempt before these ended at the same step too: it advanced to there. In the table above that is attempt 1, so attempts 1 and
    # 2 make 2 ends at step 40.
    advanced_to_there = len(fruitless) < len(counted) and job in (None, counted[-len(fruitless) - 1].job)
    ends = len(fruitless) + advanced_to_there
    follows = consequence(last.cause)
    if ends >= (follows.patience if follows else 2):
        return f"{ends} attempts in a row ended at step {_saved_step(last)}, the last by {last.cause}"
    return None


def _fruitless_tail(attempts: list[AttemptLine], job: str | None) -> list[AttemptLine]:
    """The attempts at the end that left the run where they found it."""
    tail: list[AttemptLine] = []
    # Attempt i began where attempt i - 1 had saved. Saved steps 40, 40, 40 give 0, 40, 40, (40), so the last two are fruitless.
    begun = [0, *map(_saved_step, attempts)]
    for line, before in reversed([*zip(attempts, begun, strict=False)]):
        if _saved_step(line) > before or job not in (None, line.job):
            break
        tail.insert(0, line)
    return tail


def _saved_step(line: AttemptLine) -> int:
    """Where the attempt left the run. A diverged one lost its last checkpoints, so this may be less than before."""
    return line.last_step if line.saved_step is None else line.saved_step


def _next_number(attempts: list[AttemptLine], before: Lease | None) -> int:
    """One more than every attempt that has a line, or will get one."""
    return max([line.attempt for line in attempts] + ([before.attempt] if before is not None else []), default=0) + 1


def _left_a_pace(run: RunDir, lease: Lease) -> bool:
    pace = read_last(run.pace, PaceLine)
    return pace is not None and pace.attempt == lease.attempt


def _stop_note(run: RunDir) -> StopNote | None:
    """What the process that held the run noted when it was asked to stop; None if there is no note or it is incomplete."""
    try:
        return read_record(run.stop_note, StopNote)
    except DamagedFile:
        return None


def _cause_of_loss(run: RunDir, dead: Lease) -> tuple[Cause | str, str]:
    """Why a process left a lease behind and no line."""
    note = _stop_note(run)
    # A note of an earlier attempt has another token.
    if note is not None and note.token == dead.token:
        return note.cause, f"{note.detail}; killed before it could save"
    # The kernel kills without a signal that a process could note. Only Slurm's accounting knows.
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
    """The line of one ended attempt; `why` is its cause and the detail, `first_step` is None if it is unknown.

    The attempt is this process's own and ends now, or it is that of a dead process, which `ended` at that Unix time.
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
    """The cause for one run of a job that was asked to stop: ``cancelled`` if its user cancelled the run, whatever stopped the job."""
    cancelled = cause in STOPPED_AND_REQUEUED | {Cause.CANCELLED} and run.cancel_request.exists()
    return (Cause.CANCELLED, "cancel was asked for") if cancelled else (cause, detail)


def device_in_use() -> str:
    """The GPU that this process computes on, or cpu. It does not import torch: without torch nothing is computed."""
    torch = sys.modules.get("torch")
    return str(torch.cuda.get_device_name()) if torch is not None and torch.cuda.is_initialized() else "cpu"


def last_step(run: RunDir) -> int:
    """The step of the journal's last line; 0 if there is none."""
    lines = journal_tail(run.journal)
    return lines[-1]["step"] if lines else 0


def job_id() -> str:
    """The id of this process's job, as its user knows it. A local job may run inside a Slurm allocation, whose id it does not take."""
    job = this_job()
    return job.id if job else os.environ.get("SUBMITIT_LOCAL_JOB_ID", str(os.getpid()))


def _is_out_of_memory(error: Exception) -> bool:
    """Whether torch or Python ran out of memory; by name, so that torch is not imported for the question."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    # torch's allocator for the CPU raises a plain RuntimeError with these words.
    return named or "can't allocate memory" in str(error)
