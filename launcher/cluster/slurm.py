"""Submit to Slurm and cancel there: each array once, whatever happens to sbatch's answer or to the launcher.

An array's record is written before sbatch is called. The array's name holds a token, so a later look at the queue tells whether the
array is there. A task finds out what to do from the record alone (`train.job.ArrayTask`).
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.cluster.arrays import ArrayRequest, job_names, split
from launcher.cluster.commands import CommandRefused, NoAnswer, answer_of, run_command, user_name
from launcher.cluster.queue import read_accounting, read_queue
from launcher.cluster.requests import Placement, afterwards_parameters, sbatch_parameters
from launcher.cluster.sbatch import sbatch
from launcher.config import ClusterConfig
from launcher.errors import ClusterError
from train.runtime.backoff import backoff
from train.store.layout import ArrayDir, SweepDir
from train.store.record_file import read_existing, write_record
from train.store.records import ArrayRecord
from train.store.storage import make_folder

log = logging.getLogger("lorapack.launcher")

# Slurm's default.
USUAL_MAX_ARRAY_SIZE = 1001
SCANCEL_SECONDS = 60.0
# The length of a command line is limited.
JOBS_PER_CALL = 200
RETRY_WAITS_SECONDS = tuple(backoff(2, 20, total=30))
# How far back accounting is searched for an array whose answer was lost.
LOOK_BACK_SECONDS = 86_400
# What sbatch says when the user may have no more jobs now; the rest is submitted with the next command.
# "submit limit" is not in the list: sbatch prints it also for limits that waiting does not lift.
QUEUE_IS_FULL = ("MaxSubmit", "MaxJobCount")


@dataclass(frozen=True)
class Submitted:
    """What became of a plan's arrays.

    jobs: job ids by pack. left, why: the packs that the queue had no room for, and what Slurm said. code: what the jobs run.
    """

    jobs: dict[str, str]
    left: tuple[str, ...]
    why: str | None
    code: Path


class ArraySubmitter:
    """Submits the arrays of one sweep."""

    def __init__(self, sweep: SweepDir, code: Path, cluster: ClusterConfig) -> None:
        self._sweep = sweep
        self._code = code
        self._cluster = cluster

    def submit(self, requests: Sequence[ArrayRequest]) -> Submitted:
        """Submit every array. An array that the queue has no room for is halved until some of its jobs go in.

        Raises:
            CommandRefused: sbatch refuses for another reason. Earlier arrays are in the queue.
            NoAnswer: it is unknown whether the last array is in the queue; the next command will find out.
        """
        jobs: dict[str, str] = {}
        number_of: dict[str, str] = {}
        waiting = list(requests)
        left: list[str] = []
        why: str | None = None
        while waiting:
            request, *rest = waiting
            before = (*request.after, *(number_of[token] for token in request.follows))
            try:
                ids = self._submit_once(request, before)
            except CommandRefused as exc:
                if not any(phrase in exc.said for phrase in QUEUE_IS_FULL):
                    raise
                why = exc.said
                if len(request.packs) == 1:
                    left = [pack for request in waiting for pack in request.packs]
                    break
                waiting = split(waiting, job_names(self._sweep))
                continue
            jobs |= dict(zip(request.packs, ids, strict=True))
            number_of[request.token] = array_number(ids[0])
            waiting = rest
        return Submitted(jobs, tuple(left), why, self._code)

    def _submit_once(self, request: ArrayRequest, before: Sequence[str]) -> list[str]:
        """Submit an array; its job ids. After a lost answer, look for it in the queue before sending it again."""
        array = self._sweep.array(request.token)
        _write_record(request, array, None)
        for wait in (*RETRY_WAITS_SECONDS, None):
            try:
                ids = self._send(request, array, before)
                break
            except CommandRefused:
                # sbatch said no, so the record describes an array that does not exist.
                shutil.rmtree(array.path)
                raise
            except NoAnswer as exc:
                if wait is None:
                    raise
                log.warning(f"{exc}; checking whether {request.name} is in the queue")
                time.sleep(wait)
                ids = _look_for(request)
                if ids:
                    break
        _write_record(request, array, array_number(ids[0]))
        return ids

    def _send(self, request: ArrayRequest, array: ArrayDir, before: Sequence[str]) -> list[str]:
        """Call sbatch for an array; the ids of its jobs.

        Raises:
            CommandRefused, NoAnswer: see `launcher.cluster.commands`.
        """
        from submitit.core.utils import DelayedSubmission

        from train.job import ArrayTask

        task = ArrayTask(str(array.record))
        DelayedSubmission(task).dump(array.callable)
        parameters = sbatch_parameters(request, self._cluster, array, before)
        return sbatch([task] * len(request.packs), array.submitit, self._code, self._cluster, parameters)


@dataclass(frozen=True)
class Afterwards:
    """A small job that runs once the arrays with the numbers `after` have ended, successfully or not."""

    task: Callable[[], str]
    after: tuple[str, ...]
    placement: Placement


def submit_afterwards(job: Afterwards, sweep: SweepDir, code: Path, cluster: ClusterConfig) -> str:
    """Submit `job`, which needs no GPU; its id.

    Some clusters refuse jobs without a GPU on their GPU partitions. Only then a GPU is asked for, if ``placement.gres`` names one.

    Raises:
        CommandRefused, NoAnswer: see `launcher.cluster.commands`.
    """
    name = job_names(sweep).report
    folder = make_folder(sweep.report_job)
    placement = job.placement

    def send(gres: str | None) -> str:
        asked = Placement(placement.partition, placement.minutes, gres)
        (number,) = sbatch([job.task], folder, code, cluster, afterwards_parameters(name, cluster, asked, job.after))
        return number

    try:
        return send(None)
    except CommandRefused:
        if not placement.gres:
            raise
        return send(placement.gres)


def max_array_size() -> int:
    """How many tasks an array may have here.

    A cluster without arrays (MaxArraySize=0) has plain jobs only, which count as arrays of one.
    """
    settings = answer_of("scontrol", "show", "config") or ""
    values = (line.partition("=")[2].strip() for line in settings.splitlines() if line.startswith("MaxArraySize"))
    return next((max(1, int(value)) for value in values if value.isdigit()), USUAL_MAX_ARRAY_SIZE)


def array_number(job: str) -> str:
    """The number that all tasks of an array share: ``123`` of ``123_4``."""
    return job.partition("_")[0]


def find_array(name: str, tasks: int) -> list[str]:
    """The ids of the jobs with that name, whether they wait, run or have ended lately; empty if there are none.

    Raises:
        NoAnswer: squeue does not answer.
    """
    queue = read_queue([name])
    if not queue.answered:
        raise NoAnswer("squeue does not answer")
    views = queue.views or read_accounting([name], time.time() - LOOK_BACK_SECONDS)
    numbers = {view.number for view in views.values()}
    return task_ids(str(min(numbers)), tasks) if numbers else []


def task_ids(job: str, tasks: int) -> list[str]:
    """The ids of an array's tasks. An array of one is a plain job for submitit."""
    return [job] if tasks == 1 else [f"{job}_{task}" for task in range(tasks)]


def task_logs(array: ArrayDir, task: int) -> list[Path]:
    """The logs of one task, stdout first.

    submitit calls them ``<job>_<task>_0_log.out``, and ``<job>_0_log.out`` for a plain job.
    """
    tasks = len(read_existing(array.record, ArrayRecord).packs)
    pattern = "*_0_log.out" if tasks == 1 else f"*_{task}_0_log.out"
    return [file for out in array.submitit.glob(pattern) for file in (out, out.with_suffix(".err")) if file.exists()]


def cancel_jobs(numbers: Sequence[str]) -> None:
    """Take these jobs out of the queue, also those that Slurm is requeueing right now. Jobs that have ended are left alone.

    Raises:
        ClusterError: scancel refused or did not answer.
    """
    for start in range(0, len(numbers), JOBS_PER_CALL):
        run_command("scancel", *numbers[start : start + JOBS_PER_CALL], timeout=SCANCEL_SECONDS)


def warn_jobs(numbers: Sequence[str]) -> None:
    """Send SIGTERM to the processes of these running jobs, so that each saves and ends by itself.

    If one of the jobs has ended meanwhile, scancel signals the others and then fails: without a message, or after 95 s of retries
    if Slurm is requeueing that job. A lost warning costs only time, because jobs look for cancel requests in their run folders.
    """
    for start in range(0, len(numbers), JOBS_PER_CALL):
        with contextlib.suppress(ClusterError):
            run_command("scancel", "--signal=TERM", *numbers[start : start + JOBS_PER_CALL])


def cancel_named(name: str) -> None:
    """Take this user's jobs of that name out of the queue, if there are any.

    Raises:
        ClusterError: scancel refused or did not answer.
    """
    run_command("scancel", f"--user={user_name()}", f"--name={name}", timeout=SCANCEL_SECONDS)


def _look_for(request: ArrayRequest) -> list[str]:
    """`find_array`, repeated until the controller answers. Until it has said that the array is missing, nothing is sent again.

    Raises:
        NoAnswer: the controller stays silent.
    """
    for wait in RETRY_WAITS_SECONDS:
        with contextlib.suppress(NoAnswer):
            return find_array(request.name, len(request.packs))
        time.sleep(wait)
    return find_array(request.name, len(request.packs))


def _write_record(request: ArrayRequest, array: ArrayDir, job: str | None) -> None:
    make_folder(array.submitit)
    sweep = SweepDir(array.path.parent.parent)
    record = ArrayRecord(
        name=request.name,
        partition=request.partition,
        gres=request.gres,
        minutes=request.minutes,
        parallel=request.parallel,
        packs=[str(sweep.pack(pack).pack) for pack in request.packs],
        submitted=time.time() if job is None else read_existing(array.record, ArrayRecord).submitted,
        job=job,
    )
    write_record(array.record, record)
