"""One call of sbatch, made by submitit: with a time limit, private files, and nothing of the user's environment that contradicts it."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from launcher.cluster.commands import NoAnswer, refusal
from launcher.cluster.requests import job_python
from launcher.config import ClusterConfig

SBATCH_SECONDS = 60.0


def sbatch(
    tasks: Sequence[Callable[[], str]], folder: Path, code: Path, cluster: ClusterConfig, parameters: dict[str, Any]
) -> list[str]:
    """Submit `tasks`, as an array if there are several; the ids of the jobs.

    folder: where submitit keeps its pickles and the jobs' logs. code: the frozen code that the jobs import.

    Raises:
        CommandRefused: sbatch refuses.
        NoAnswer: it is unknown whether the jobs are in the queue.
    """
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError

    executor = SlurmExecutor(folder, python=job_python(code, cluster.container))
    executor.update_parameters(**parameters)
    jobs: list[Any] = []
    try:
        quiet = contextlib.redirect_stderr(io.StringIO())
        with _private_files(), _plain_environment(cluster), _deadline(SBATCH_SECONDS), quiet, executor.batch():
            jobs += [executor.submit(task) for task in tasks]
    except FailedJobError as exc:
        raise refusal("sbatch", str(exc)) from exc
    return [str(job.job_id) for job in jobs]


class _DeadlinePassed(Exception):
    """Interrupts submitit, which would wait for sbatch forever."""


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """End what takes longer. When an exception is raised, submitit kills the command that it waits for.

    Raises:
        NoAnswer: the time is over.
    """

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise _DeadlinePassed

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except Exception as exc:
        # submitit may wrap the exception in one of its own.
        if isinstance(exc, _DeadlinePassed) or isinstance(exc.__cause__, _DeadlinePassed):
            raise NoAnswer(f"sbatch did not answer in {seconds:.0f} s") from exc
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _private_files() -> Iterator[None]:
    """Files that are written in this block, also by the jobs that it submits, can be read by their owner only."""
    umask = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(umask)


@contextlib.contextmanager
def _plain_environment(cluster: ClusterConfig) -> Iterator[None]:
    """Remove the variables that would contradict what a job asks for.

    SBATCH_* variables outweigh the options in a script. Those of the user stay for options that `cluster` leaves open. Inside an
    interactive job, SLURM_* and SRUN_* variables describe its own allocation, so they go too.
    """
    # wckey is never set by us, so SBATCH_WCKEY stays.
    options = {"ACCOUNT": cluster.account, "QOS": cluster.qos, "RESERVATION": cluster.reservation}
    options |= {"CONSTRAINT": cluster.constraint, "WCKEY": None}
    left_open = {f"SBATCH_{option}" for option, value in options.items() if value is None}
    prefixes = ("SBATCH_", "SLURM_", "SRUN_") if "SLURM_JOB_ID" in os.environ else ("SBATCH_",)
    # SLURM_CONF says where Slurm's configuration is; without it sbatch may not find the cluster.
    names = [name for name in os.environ if name.startswith(prefixes) and name not in {"SLURM_CONF", *left_open}]
    removed = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(removed)
