"""Submitting to Slurm through submitit: each array once, whatever happens to the answer or to the launcher.

An array's record is written before sbatch is called. Its name holds a token, so that a later look at the queue tells whether it is
there; and a task finds what to do by that record alone (`train.job.ArrayTask`).
"""

from __future__ import annotations

import contextlib
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

from launcher.cluster.commands import CommandRefused, NoAnswer, answer_of, refusal, run_command, user_name
from launcher.cluster.names import job_names
from launcher.cluster.queue import read_accounting, read_queue
from launcher.cluster.requests import ArrayRequest, afterwards_parameters, job_python, sbatch_parameters, split
from launcher.errors import ClusterError
from launcher.records import ClusterConfig
from train.store.layout import ArrayDir, SweepDir
from train.store.storage import make_folder, read_json, write_json

USUAL_MAX_ARRAY_SIZE = 1001  # Slurm's default
SBATCH_SECONDS = 60.0
SCANCEL_SECONDS = 60.0
JOBS_PER_CALL = 200  # a command line has an end
RETRY_WAITS_SECONDS = (2, 5, 10, 20)
# The user may have no more jobs now. The rest goes in with the next command.
# Not "submit limit": the line that follows, the same for limits that no waiting mends, names all of them.
QUEUE_IS_FULL = ("MaxSubmit", "MaxJobCount")


@dataclass(frozen=True)
class Submitted:
    """What became of a plan's arrays: job ids by pack, packs that the queue has no room for and why, the code that the jobs run."""

    jobs: dict[str, str]
    left: tuple[str, ...]
    why: str | None
    code: Path


def max_array_size() -> int:
    """How many tasks an array may have here; a cluster without arrays (MaxArraySize=0) has plain jobs, which are arrays of one."""
    settings = answer_of("scontrol", "show", "config") or ""
    values = (line.partition("=")[2].strip() for line in settings.splitlines() if line.startswith("MaxArraySize"))
    return next((max(1, int(value)) for value in values if value.isdigit()), USUAL_MAX_ARRAY_SIZE)


def submit_arrays(
    requests: list[ArrayRequest], sweep: SweepDir, code: Path, cluster: ClusterConfig, say: Callable[[str], None]
) -> Submitted:
    """Submit every array; where the queue takes no more at once, as many jobs of it as it takes.

    Raises:
        CommandRefused: sbatch says no for another reason. Arrays before that one are in the queue.
        NoAnswer: nobody knows whether the last array is in the queue; the next command will see.
    """
    jobs: dict[str, str] = {}
    numbers: dict[str, str] = {}  # of arrays, by token
    waiting, left, why = list(requests), list[str](), None
    while waiting:
        request, *rest = waiting
        before = (*request.after, *(numbers[token] for token in request.follows))
        try:
            ids = _submit_once(request, sweep.array(request.token), before, code, cluster, say)
            jobs |= dict(zip(request.packs, ids, strict=True))
            numbers[request.token] = array_number(ids[0])
            waiting = rest
        except CommandRefused as exc:
            if not any(words in exc.said for words in QUEUE_IS_FULL):
                raise
            why = exc.said
            if len(request.packs) == 1:
                left = [pack for request in waiting for pack in request.packs]
                break
            waiting = split(waiting, job_names(sweep))
    return Submitted(jobs, tuple(left), why, code)


def _submit_once(
    request: ArrayRequest,
    array: ArrayDir,
    before: Sequence[str],
    code: Path,
    cluster: ClusterConfig,
    say: Callable[[str], None],
) -> list[str]:
    """Submit an array, and after a lost answer look whether it is in the queue before it is sent again; its job ids."""
    _write_record(request, array, None)
    for wait in (*RETRY_WAITS_SECONDS, None):
        try:
            numbers = _send(request, array, before, code, cluster)
            break
        except CommandRefused:
            shutil.rmtree(array.path)
            raise
        except NoAnswer as exc:
            if wait is None:
                raise
            say(f"{exc}; looking whether {request.name} is in the queue")
            time.sleep(wait)
            numbers = _look_for(request)
            if numbers:
                break
    _write_record(request, array, array_number(numbers[0]))
    return numbers


def _look_for(request: ArrayRequest) -> list[str]:
    """`find_array` for a controller that comes back soon: before it has said no, nothing may be sent again.

    Raises:
        NoAnswer: it does not.
    """
    for wait in RETRY_WAITS_SECONDS:
        with contextlib.suppress(NoAnswer):
            return find_array(request.name, len(request.packs))
        time.sleep(wait)
    return find_array(request.name, len(request.packs))


def array_number(job: str) -> str:
    """The number that all tasks of an array share."""
    return job.partition("_")[0]


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
        "gres": request.gres,
        "minutes": request.minutes,
        "parallel": request.parallel,
        "packs": [str(sweep.pack(pack).pack) for pack in request.packs],
        "submitted": time.time() if job is None else read_json(array.record)["submitted"],
        "job": job,
    }
    write_json(array.record, record)


def submit_afterwards(
    task: Callable[[], str],
    sweep: SweepDir,
    code: Path,
    numbers: Sequence[str],
    cluster: ClusterConfig,
    partition: str,
    allowed_minutes: int | None,
    gres: str | None,
) -> str:
    """Submit a small job that runs `task` from `code` once all arrays with these numbers have ended, however they did; its id.

    allowed_minutes: a time limit that the partition is known to allow, None if it has none.
    gres: one of the partition's GPUs, asked for where the job is refused without one: some clusters keep their GPUs so from others.

    Raises:
        CommandRefused, NoAnswer: see `commands`.
    """
    names, folder = job_names(sweep), make_folder(sweep.report_job)

    def send(wanted: str | None) -> str:
        parameters = afterwards_parameters(names, cluster, partition, allowed_minutes, numbers, wanted)
        (number,) = _sbatch([task], folder, code, cluster, parameters)
        return number

    try:
        return send(None)
    except CommandRefused:
        if not gres:
            raise
        return send(gres)


def _send(
    request: ArrayRequest, array: ArrayDir, before: Sequence[str], code: Path, cluster: ClusterConfig
) -> list[str]:
    """Submit an array; the ids of its jobs.

    Raises:
        CommandRefused, NoAnswer: see `commands`.
    """
    from submitit.core.utils import DelayedSubmission

    from train.job import ArrayTask

    task = ArrayTask(str(array.record))
    DelayedSubmission(task).dump(array.callable)
    parameters = sbatch_parameters(request, cluster, array, before)
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
        quiet = contextlib.redirect_stderr(io.StringIO())
        with _private_files(), _plain_environment(cluster), _deadline(SBATCH_SECONDS), quiet, executor.batch():
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


@contextlib.contextmanager
def _plain_environment(cluster: ClusterConfig) -> Iterator[None]:
    """Without the variables that would contradict what a job asks for: the user's own for sbatch, which outweigh what its script
    says, but for those that `cluster` leaves open; and inside of an interactive job what its allocation says."""
    said = {"ACCOUNT": cluster.account, "QOS": cluster.qos, "RESERVATION": cluster.reservation}
    said |= {"CONSTRAINT": cluster.constraint, "WCKEY": None}
    left_open = {f"SBATCH_{word}" for word, value in said.items() if value is None}
    overruling = ("SBATCH_", "SLURM_", "SRUN_") if "SLURM_JOB_ID" in os.environ else ("SBATCH_",)
    names = [name for name in os.environ if name.startswith(overruling) and name not in {"SLURM_CONF", *left_open}]
    taken = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(taken)


def cancel_jobs(numbers: Sequence[str]) -> None:
    """Take these jobs out of the queue, also those that Slurm is just putting back there; what has ended needs nothing.

    Raises:
        ClusterError: Slurm did not take the order.
    """
    for start in range(0, len(numbers), JOBS_PER_CALL):
        run_command("scancel", *numbers[start : start + JOBS_PER_CALL], timeout=SCANCEL_SECONDS)


def warn_jobs(numbers: Sequence[str]) -> None:
    """Send SIGTERM to the processes of these running jobs, so that each saves and ends by itself.

    Where one has ended meanwhile scancel fails after it has signalled the others: without a word, or, if Slurm is requeueing it, when
    it has tried again for 95 s. A warning that does not arrive costs time alone: jobs look for requests to cancel in their run folders.
    """
    for start in range(0, len(numbers), JOBS_PER_CALL):
        with contextlib.suppress(ClusterError):
            run_command("scancel", "--signal=TERM", *numbers[start : start + JOBS_PER_CALL])


def cancel_named(name: str) -> None:
    """Take this user's jobs of that name out of the queue, if there are any.

    Raises:
        ClusterError: Slurm did not take the order.
    """
    run_command("scancel", f"--user={user_name()}", f"--name={name}", timeout=SCANCEL_SECONDS)
