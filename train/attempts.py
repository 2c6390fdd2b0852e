"""Attempts: a run folder is taken by one process, and every attempt leaves one line that says how it ended.

Causes: ``done preempted timeout node_fail out_of_memory diverged bad_input storage crash cancelled``. A process that was killed or
lost its node cannot write its line; the next attempt finds the dead lease and writes it (``node_fail``). Light on purpose.
"""

from __future__ import annotations

import os
import sys
import time

from train.errors import BadInput, LorapackError, StorageError
from train.lease import Lease, acquire, read_lease
from train.rundir import Record, RunDir, append_lines, last_line, read_lines
from train.signals import Stopped


def open_attempt(run: RunDir) -> Lease:
    """Take the run folder for this process, and account for a predecessor that died without a word.

    Raises:
        LeaseHeld: another live process trains the run.
    """
    attempts = read_lines(run.attempts)
    dead = read_lease(run)
    lost = dead is not None and not dead.alive() and all(line["attempt"] != dead.attempt for line in attempts)
    lease = acquire(run, job=job_id(), attempt=len(attempts) + 1 + lost)
    if lost and dead is not None:
        detail = f"process {dead.pid} on {dead.host} was killed or its node was lost"
        append_lines(
            run.attempts,
            [attempt_line(dead, "node_fail", detail, None, last_step(run), ended=dead.heartbeat, device="unknown")],
        )
    return lease


def attempt_line(
    lease: Lease,
    cause: str,
    detail: str | None,
    first_step: int | None,
    last_step: int,
    *,
    ended: float | None = None,
    device: str,
) -> Record:
    """The line of one ended attempt; times in Unix seconds, `first_step` None where nobody knows."""
    ended = time.time() if ended is None else ended
    return {
        "attempt": lease.attempt,
        "cause": cause,
        "detail": detail,
        "first_step": first_step,
        "last_step": last_step,
        "seconds": round(ended - lease.started, 3),
        "started": lease.started,
        "ended": ended,
        "node": lease.host,
        "device": device,
        "job": lease.job,
        "restart_count": restart_count(),
    }


def cause_of(error: Exception) -> tuple[str, str]:
    """The cause of an attempt that ended by `error`, and the detail for its line."""
    detail = str(error) if isinstance(error, Stopped | LorapackError) else f"{type(error).__name__}: {error}"
    if isinstance(error, Stopped):
        return "preempted", detail
    if isinstance(error, BadInput):
        return "bad_input", detail
    if isinstance(error, StorageError):
        return "storage", detail
    return ("out_of_memory" if _is_out_of_memory(error) else "crash"), detail


def device_in_use() -> str:
    """The GPU that this process computes on, or cpu; torch is not imported for the question."""
    torch = sys.modules.get("torch")
    return str(torch.cuda.get_device_name()) if torch is not None and torch.cuda.is_initialized() else "cpu"


def last_step(run: RunDir) -> int:
    """The last step that the journal speaks of."""
    line = last_line(run.journal)
    return 0 if line is None else int(line["step"])


def job_id() -> str:
    """The id of the job that this process belongs to, as its user knows it; a local job may run inside a Slurm allocation."""
    if "SUBMITIT_LOCAL_JOB_ID" in os.environ:
        return os.environ["SUBMITIT_LOCAL_JOB_ID"]
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        return f"{array}_{task}"
    return os.environ.get("SLURM_JOB_ID") or str(os.getpid())


def restart_count() -> int:
    """How often Slurm has requeued this job."""
    return 0 if "SUBMITIT_LOCAL_JOB_ID" in os.environ else int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def _is_out_of_memory(error: Exception) -> bool:
    """torch's words for it and Python's; torch is not imported for the question."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)
