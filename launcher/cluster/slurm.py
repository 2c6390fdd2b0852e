"""Submitting to Slurm through submitit: each array once, whatever happens to the answer or to the launcher.

An array's record is written before sbatch is called. Its name holds a token, so that a later look at the queue tells whether it is
there; and a task finds what to do by that record alone (`train.job.ArrayTask`).
"""

from __future__ import annotations

import contextlib
import getpass
import io
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from launcher.cluster.commands import CommandRefused, NoAnswer, answer_of, refusal, run_command
from launcher.cluster.names import job_names
from launcher.cluster.queue import read_accounting, read_queue
from launcher.cluster.requests import ArrayRequest, afterwards_parameters, halves, job_python, sbatch_parameters
from launcher.records import ClusterConfig
from train.rundir import ArrayDir, SweepDir
from train.storage import make_folder, read_json, write_json

USUAL_MAX_ARRAY_SIZE = 1001  # Slurm's default
SBATCH_SECONDS = 60.0
# While a requeued job is still being ended scancel tries again by itself, ten times, for up to 95 s.
SCANCEL_SECONDS = 150.0
IN_TRANSITION = "try again later"
RETRY_WAITS_SECONDS = (2, 5, 10, 20)
# The user may have no more jobs now. The rest goes in with the next command.
QUEUE_IS_FULL = ("MaxSubmit", "submit limit", "MaxJobCount", "job count limit")


@dataclass(frozen=True)
class Submitted:
    """What became of a plan's arrays: job ids by pack, packs that the queue has no room for and why, the code that the jobs run."""

    jobs: dict[str, str]
    left: tuple[str, ...]
    why: str | None
    code: Path


def max_array_size() -> int:
    """How many tasks an array may have here."""
    settings = answer_of("scontrol", "show", "config") or ""
    values = (line.partition("=")[2].strip() for line in settings.splitlines() if line.startswith("MaxArraySize"))
    return next((int(value) for value in values if value.isdigit()), USUAL_MAX_ARRAY_SIZE)


def submit_arrays(
    requests: list[ArrayRequest], sweep: SweepDir, code: Path, cluster: ClusterConfig, say: Callable[[str], None]
) -> Submitted:
    """Submit every array; where the queue takes no more at once, as many jobs of it as it takes.

    Raises:
        CommandRefused: sbatch says no for another reason. Arrays before that one are in the queue.
        NoAnswer: nobody knows whether the last array is in the queue; the next command will see.
    """
    jobs: dict[str, str] = {}
    waiting, left, why = list(requests), list[str](), None
    while waiting:
        request = waiting.pop(0)
        try:
            numbers = _submit_once(request, sweep.array(request.token), code, cluster, say)
            jobs |= dict(zip(request.packs, numbers, strict=True))
        except CommandRefused as exc:
            if not any(words in exc.said for words in QUEUE_IS_FULL):
                raise
            why = exc.said
            if len(request.packs) == 1:
                left += [pack for rest in (request, *waiting) for pack in rest.packs]
                break
            waiting = [*halves(request, job_names(sweep)), *waiting]
    return Submitted(jobs, tuple(left), why, code)


def _submit_once(
    request: ArrayRequest, array: ArrayDir, code: Path, cluster: ClusterConfig, say: Callable[[str], None]
) -> list[str]:
    """Submit an array, and after a lost answer look whether it is in the queue before it is sent again; its job ids."""
    _write_record(request, array, None)
    for wait in (*RETRY_WAITS_SECONDS, None):
        try:
            numbers = _send(request, array, code, cluster)
            break
        except CommandRefused:
            shutil.rmtree(array.path)
            raise
        except NoAnswer as exc:
            if wait is None:
                raise
            say(f"{exc}; looking whether {request.name} is in the queue")
            time.sleep(wait)
            numbers = find_array(request.name, len(request.packs))
            if numbers:
                break
    _write_record(request, array, numbers[0].partition("_")[0])
    return numbers


def find_array(name: str, tasks: int) -> list[str]:
    """The ids of the jobs with that name, whether they wait, run or ended lately; none if there are none.

    Raises:
        NoAnswer: squeue does not answer.
    """
    queue = read_queue([name])
    if not queue.answered:
        raise NoAnswer("squeue does not answer")
    views = queue.views or read_accounting([name], time.time() - 86_400)
    numbers = {view.number for view in views.values()}
    return task_ids(str(min(numbers)), tasks) if numbers else []


def task_ids(job: str, tasks: int) -> list[str]:
    """The ids of an array's tasks; submitit makes a plain job of an array of one."""
    return [job] if tasks == 1 else [f"{job}_{task}" for task in range(tasks)]


def task_logs(array: ArrayDir, task: int) -> list[Path]:
    """The logs of one task, as submitit names them: ``<job>_<task>_0_log.out``, for a plain job ``<job>_0_log.out``; stdout first."""
    tasks = len(read_json(array.record)["packs"])
    pattern = "*_0_log.out" if tasks == 1 else f"*_{task}_0_log.out"
    return [file for out in array.submitit.glob(pattern) for file in (out, out.with_suffix(".err")) if file.exists()]


def _write_record(request: ArrayRequest, array: ArrayDir, job: str | None) -> None:
    make_folder(array.submitit)
    sweep = SweepDir(array.path.parent.parent)
    record = {
        "name": request.name,
        "partition": request.partition,
        "packs": [str(sweep.pack(pack).pack) for pack in request.packs],
        "submitted": time.time() if job is None else read_json(array.record)["submitted"],
        "job": job,
    }
    write_json(array.record, record)


def submit_afterwards(
    task: Callable[[], str],
    sweep: SweepDir,
    submitted: Submitted,
    cluster: ClusterConfig,
    partition: str,
    allowed_minutes: int | None,
) -> str:
    """Submit a small job that runs `task` once all of `submitted` have ended, however they did; its id.

    allowed_minutes: a time limit that the partition is known to allow, None if it has none.

    Raises:
        CommandRefused, NoAnswer: see `commands`.
    """
    numbers = sorted({job.partition("_")[0] for job in submitted.jobs.values()})
    parameters = afterwards_parameters(job_names(sweep), cluster, partition, allowed_minutes, numbers)
    (number,) = _sbatch([task], make_folder(sweep.report_job), submitted.code, cluster, parameters)
    return number


def _send(request: ArrayRequest, array: ArrayDir, code: Path, cluster: ClusterConfig) -> list[str]:
    """Submit an array; the ids of its jobs.

    Raises:
        CommandRefused, NoAnswer: see `commands`.
    """
    from submitit.core.utils import DelayedSubmission

    from train.job import ArrayTask

    task = ArrayTask(str(array.record))
    DelayedSubmission(task).dump(array.callable)
    parameters = sbatch_parameters(request, cluster, array)
    return _sbatch([task] * len(request.packs), array.submitit, code, cluster, parameters)


def _sbatch(
    tasks: Sequence[Callable[[], str]], folder: Path, code: Path, cluster: ClusterConfig, parameters: dict[str, Any]
) -> list[str]:
    """One sbatch by submitit, an array where there are several tasks; the ids of the jobs."""
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError

    executor = SlurmExecutor(folder, python=job_python(code, cluster.container))
    executor.update_parameters(**parameters)
    jobs: list[Any] = []
    try:
        with _private_files(), _deadline(SBATCH_SECONDS), contextlib.redirect_stderr(io.StringIO()), executor.batch():
            jobs += [executor.submit(task) for task in tasks]
    except FailedJobError as exc:
        raise refusal("sbatch", str(exc)) from exc
    return [str(job.job_id) for job in jobs]


class _TooLate(Exception):
    """Interrupts submitit, which waits for sbatch without an end."""


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """End what takes longer. submitit kills the command that it waits for when an exception comes.

    Raises:
        NoAnswer: the time is over.
    """

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise _TooLate

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except Exception as exc:
        if isinstance(exc, _TooLate) or isinstance(exc.__cause__, _TooLate):
            raise NoAnswer(f"sbatch did not answer in {seconds:.0f} s") from exc
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _private_files() -> Iterator[None]:
    """What is written in here, also by the jobs that are submitted in here, only its owner can read."""
    umask = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(umask)


def cancel_jobs(numbers: list[str], *, warn: bool = False) -> None:
    """scancel these jobs; `warn` only sends SIGTERM to their processes, so that each saves and ends by itself.

    A job that Slurm is just queueing again stays there: it finds the request to cancel in its run folders and ends at once.

    Raises:
        ClusterError: Slurm did not take the order.
    """
    how = ("--signal=TERM",) if warn else ()
    for start in range(0, len(numbers), 200):
        try:
            run_command("scancel", *how, *numbers[start : start + 200], timeout=SCANCEL_SECONDS)
        except CommandRefused as exc:
            if IN_TRANSITION not in exc.said:
                raise


def cancel_named(name: str) -> None:
    """Take this user's jobs of that name out of the queue, if there are any.

    Raises:
        ClusterError: Slurm did not take the order.
    """
    run_command("scancel", f"--user={getpass.getuser()}", f"--name={name}", timeout=SCANCEL_SECONDS)
