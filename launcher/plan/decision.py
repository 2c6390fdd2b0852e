"""What to do with a run: decided by its folder, and by Slurm if its last job went there."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.errors import ClusterError
from launcher.records import Verdict
from launcher.track.jobs import JobRecord
from train.errors import DamagedFile
from train.runtime.attempts import give_up_reason
from train.store.causes import NON_RETRYABLE, TERMINAL, Cause
from train.store.journal import AttemptLine
from train.store.layout import RunDir
from train.store.lease import Lease, read_lease
from train.store.line_file import read_records
from train.store.record_file import read_record
from train.store.records import ResultRecord

_CANNOT_TELL = (
    "Slurm's squeue does not answer, so it is unknown whether {name} is still in the queue; nothing was submitted. "
    "Run the command again when it does."
)


@dataclass(frozen=True)
class RunDecision:
    """A verdict, its reason, and the optimizer step after which the run would continue.

    most_runs: the largest pack for a run that ran out of memory, half the size of the one that was too large.
    """

    verdict: Verdict
    reason: str
    step: int = 0
    most_runs: int | None = None


def decide(run: RunDir | None, *, retry_failed: bool, job: JobRecord | None = None) -> RunDecision:
    """The decision on a run with this folder, None if it has none yet. `job` is the last one that it was given to.

    The order matters: a result outweighs everything, a living process outweighs Slurm, and Slurm's queue outweighs how earlier
    attempts ended.

    Raises:
        ClusterError: only Slurm could tell whether the run is still in its queue, and it does not answer.
    """
    if run is None:
        return RunDecision(Verdict.NEW, "never trained")
    try:
        return _decide(run, retry_failed=retry_failed, job=job)
    except DamagedFile as exc:
        return RunDecision(Verdict.UNKNOWN, str(exc))


def _decide(run: RunDir, *, retry_failed: bool, job: JobRecord | None) -> RunDecision:
    """`decide` for a run that has a folder.

    Raises:
        DamagedFile: one of its files is damaged.
        ClusterError: as `decide`.
    """
    result = read_record(run.result, ResultRecord)
    if result is not None:
        return RunDecision(Verdict.DONE, _done_reason(result))
    lease = read_lease(run)
    if lease is not None and lease.alive() and not _is_over(lease, job):
        return RunDecision(Verdict.RUNNING, f"process {lease.pid} on {lease.host} trains it (attempt {lease.attempt})")
    if job is not None and job.damage is not None:
        # Which job has the run cannot be read, so it may still train.
        return RunDecision(Verdict.UNKNOWN, job.damage)
    attempts = read_records(run.attempts, AttemptLine)
    # Without a lease, a job on Slurm may still start. `alive` is None if squeue does not answer.
    if job is not None and job.slurm is not None and not _is_done_with(attempts, job):
        if job.alive is None:
            raise ClusterError(_CANNOT_TELL.format(name=run.path.name))
        if job.alive:
            return RunDecision(Verdict.RUNNING, _in_the_queue(job))
    # Nothing trains the run, and nothing will: it continues, or has failed.
    killed = _killed_for_memory(lease, attempts, job) if lease is not None else None
    failure = killed or _failure(attempts)
    if failure is None:
        return _unfinished(run, attempts)
    if not retry_failed:
        return RunDecision(Verdict.FAILED, f"{failure}; 'python -m launcher resume' tries it again")
    again = _unfinished(run, attempts)
    # A pack of 8 runs that did not fit becomes packs of at most 4.
    out_of_memory = killed or (attempts and attempts[-1].cause == Cause.OUT_OF_MEMORY)
    most_runs = max(1, len(job.runs) // 2) if out_of_memory and job is not None else None
    return RunDecision(again.verdict, f"tried again: {failure}", again.step, most_runs)


def _is_over(lease: Lease, job: JobRecord | None) -> bool:
    """Whether Slurm says that the job that holds this lease has ended.

    A killed process looks alive until its next heartbeat is overdue, so Slurm may know sooner. If the process lives on after all, on
    a node that Slurm has lost, the next job waits for the lease. If Slurm does not know the job, it may be another cluster's.
    """
    view = job.view if job is not None else None
    return view is not None and view.state.over and lease.job == view.id


def _is_done_with(attempts: list[AttemptLine], job: JobRecord) -> bool:
    """Whether the job is done with this run for good. It may still train others."""
    return bool(attempts) and attempts[-1].ended >= job.submitted and attempts[-1].cause in TERMINAL


def _in_the_queue(job: JobRecord) -> str:
    view = job.view
    if view is None:
        return f"job {job.id} has it"
    return f"job {view.id} is {view.raw_state.lower()}" + (f" ({view.reason})" if view.reason else "")


def _done_reason(result: ResultRecord) -> str:
    loss = "" if result.eval_loss is None else f", eval loss {result.eval_loss:.4f}"
    return f"finished {result.steps} steps{loss}"


def _failure(attempts: list[AttemptLine]) -> str | None:
    """Why another attempt would end like the previous ones, None if it would not."""
    if not attempts:
        return None
    last = attempts[-1]
    if last.cause in NON_RETRYABLE:
        detail = f": {last.detail}" if last.detail else ""
        return f"ended with {last.cause} at step {last.last_step}{detail}"
    return give_up_reason(attempts)


def _killed_for_memory(lease: Lease, attempts: list[AttemptLine], job: JobRecord | None) -> str | None:
    """The failure of a process that Slurm killed for its memory, so that it could not record its end itself."""
    view = job.view if job is not None else None
    unwritten = all(line.attempt != lease.attempt for line in attempts)
    if view is None or not unwritten or view.state.cause is not Cause.OUT_OF_MEMORY:
        return None
    return f"Slurm killed job {view.id} for using more memory than it had asked for (cluster.ram_gib)"


def _unfinished(run: RunDir, attempts: list[AttemptLine]) -> RunDecision:
    """Continue from the newest checkpoint, or start."""
    steps = run.checkpoint_steps()
    if steps and steps[-1] > 0:
        return RunDecision(Verdict.RESUMABLE, f"from step {steps[-1]}{_after(attempts)}", steps[-1])
    return RunDecision(Verdict.NEW, f"nothing saved yet{_after(attempts)}")


def _after(attempts: list[AttemptLine]) -> str:
    return f", after {attempts[-1].cause}" if attempts else ""
