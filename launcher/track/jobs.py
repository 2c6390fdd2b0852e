"""The jobs of a sweep, by its folder and by Slurm: which pack trains a run, under which id, and whether it can still start."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from launcher.cluster.commands import NoAnswer
from launcher.cluster.queue import JobKey, JobView, read_accounting, read_queue
from launcher.cluster.states import FAILED, OUT_OF_MEMORY
from launcher.plan_files import read_plans
from train.errors import DamagedFile
from train.store.layout import ArrayDir, PackDir, SweepDir
from train.store.lease import process_started, read_lease
from train.store.record_file import DamageLog, read_record
from train.store.records import ArrayRecord, LocalJobRecord, read_pack


@dataclass(frozen=True)
class SlurmTask:
    """A pack's place on Slurm: task `task` of the array called `name`. `view` is how Slurm sees it, None if it does not."""

    array: ArrayDir
    name: str
    task: int
    view: JobView | None = None


@dataclass(frozen=True)
class JobRecord:
    """One pack as submitted.

    id, host: None while it waits for its turn. submitted: Unix time.
    alive: whether the job trains or can still start; None if only Slurm can tell and was not asked, or did not answer.
    damage: which of the job's files is damaged, so that its fate is unknown.
    """

    pack: PackDir
    runs: tuple[str, ...]
    id: str | None
    host: str | None
    submitted: float
    alive: bool | None
    slurm: SlurmTask | None = None
    damage: str | None = None

    @property
    def view(self) -> JobView | None:
        """How Slurm sees the job, None if Slurm does not know it or was not asked."""
        return self.slurm.view if self.slurm is not None else None


def jobs_of(sweep: SweepDir) -> list[JobRecord]:
    """Every job of the sweep, the oldest first, by its folder alone. A job with a damaged file says so."""
    packs = [PackDir(path.parent) for path in sweep.jobs.glob("*/pack.json")]
    runs = _runs_of_packs(sweep, packs)
    launcher_alive = _launcher_alive(sweep)
    damaged_arrays = DamageLog()
    on_slurm = _array_tasks(sweep, damaged_arrays)
    lost = " ".join(damaged_arrays.messages) or None
    records = []
    for pack in packs:
        if pack.path.name in on_slurm:
            record = _on_slurm(pack, *on_slurm[pack.path.name])
        elif lost is not None and not pack.job.exists():
            # It was started neither here nor by an array that can be read, so it may be one of a damaged array's.
            record = JobRecord(pack, (), None, None, pack.pack.stat().st_mtime, None, damage=lost)
        else:
            record = _local(pack, launcher_alive)
        names, damage = runs[pack.path.name]
        records.append(replace(record, runs=names, damage=record.damage or damage))
    return sorted(records, key=lambda record: record.submitted)


def damaged_files(sweep: SweepDir) -> list[str]:
    """What is wrong with plans and with the files of jobs, including jobs whose runs are done."""
    damage = DamageLog()
    read_plans(sweep, damage)
    return list(dict.fromkeys([*damage.messages, *(job.damage for job in jobs_of(sweep) if job.damage is not None)]))


def newest_job_per_run(jobs: Iterable[JobRecord]) -> dict[str, JobRecord]:
    """The last job that each run was given to, by the name of the run's folder."""
    return {run: job for job in jobs for run in job.runs}


def look_up(jobs: Sequence[JobRecord]) -> list[JobRecord]:
    """The same jobs as Slurm sees them: one squeue for all, and one sacct if some have left the queue, or failed.

    squeue says FAILED also of a job that was killed for its memory; only accounting knows that from the job's steps.
    """
    tasks = [job.slurm for job in jobs if job.slurm is not None]
    if not tasks:
        return list(jobs)
    queue = read_queue({task.name for task in tasks})
    views = dict(queue.views)
    unclear = {
        job.slurm.name: job.submitted for job in jobs if job.slurm is not None and _is_unclear(_view_of(job, views))
    }
    if queue.answered and unclear:
        recorded = read_accounting(unclear, min(unclear.values()))
        killed = {
            key: view for key, view in recorded.items() if view.state == OUT_OF_MEMORY and _is_unclear(views.get(key))
        }
        # The queue is more current than accounting, except about jobs that were killed for their memory.
        views = recorded | views | killed
    return [_seen(job, views, queue.answered) for job in jobs]


def array_records(sweep: SweepDir) -> list[ArrayRecord]:
    """What was submitted to Slurm, without damaged records. Their runs are not trained again, because `jobs_of` reports the damage."""
    damage = DamageLog()
    files = sweep.arrays.glob("*/array.json")
    records = [damage.read(partial(read_record, path, ArrayRecord), None) for path in files]
    return [record for record in records if record is not None]


def arrays_in_queue(sweep: SweepDir) -> dict[str, int]:
    """The slots that the sweep's arrays in Slurm's queue hold, by the number of each array.

    An array with ``%4`` of which 10 tasks are left holds 4 slots; with 2 tasks left, 2.

    Raises:
        NoAnswer: squeue does not answer.
    """
    parallel = {record.name: record.at_once for record in array_records(sweep)}
    queue = read_queue(parallel)
    if not queue.answered:
        raise NoAnswer("squeue does not answer, so it is unknown which jobs of this sweep are in the queue.")
    waiting = Counter((name, view.number) for (name, _), view in queue.views.items() if not view.state.over)
    return {str(number): min(jobs, parallel[name]) for (name, number), jobs in sorted(waiting.items())}


def _is_unclear(view: JobView | None) -> bool:
    return view is None or view.state == FAILED


def _view_of(job: JobRecord, views: dict[JobKey, JobView]) -> JobView | None:
    """How Slurm sees a job: by its id, or by its name if sbatch's answer was lost. Of several with that name the oldest counts."""
    if job.slurm is None:
        return None
    if job.id is not None:
        return views.get((job.slurm.name, job.id))
    task = job.slurm
    named = (view for (name, _), view in views.items() if name == task.name and view.task_index == task.task)
    return min(named, key=lambda view: view.number, default=None)


def _seen(job: JobRecord, views: dict[JobKey, JobView], answered: bool) -> JobRecord:
    """A job with its view. If Slurm answers and neither squeue nor sacct knows the job, it is gone."""
    if job.slurm is None:
        return job
    view = _view_of(job, views)
    alive = (not view.state.over if view is not None else False) if answered else None
    slurm = replace(job.slurm, view=view)
    if view is None:
        return replace(job, slurm=slurm, alive=alive)
    return replace(job, slurm=slurm, alive=alive, id=view.id, host=view.node)


def _array_tasks(sweep: SweepDir, damage: DamageLog) -> dict[str, tuple[ArrayDir, ArrayRecord, int]]:
    """For each pack that an array trains: the array, its record and the index of the task, by the name of the pack's folder."""
    tasks = {}
    for path in sweep.arrays.glob("*/array.json"):
        record = damage.read(partial(read_record, path, ArrayRecord), None)
        for task_index, pack_file in enumerate(record.packs if record is not None else ()):
            assert record is not None
            tasks[Path(pack_file).parent.name] = (ArrayDir(path.parent), record, task_index)
    return tasks


def _on_slurm(pack: PackDir, array: ArrayDir, record: ArrayRecord, task_index: int) -> JobRecord:
    number = record.job if len(record.packs) == 1 or record.job is None else f"{record.job}_{task_index}"
    return JobRecord(pack, (), number, None, record.submitted, None, SlurmTask(array, record.name, task_index))


def _local(pack: PackDir, launcher_alive: bool) -> JobRecord:
    submitted = pack.pack.stat().st_mtime
    try:
        job = read_record(pack.job, LocalJobRecord)
    except DamagedFile as exc:
        return JobRecord(pack, (), None, None, submitted, None, damage=str(exc))
    if job is None:
        # It waits in a launcher's own queue, and is lost if that launcher is gone.
        return JobRecord(pack, (), None, None, submitted, launcher_alive)
    gone = job.host == socket.gethostname() and process_started(job.pid) != job.pid_started
    return JobRecord(pack, (), job.job, job.host, job.submitted, not gone)


def _launcher_alive(sweep: SweepDir) -> bool:
    """Whether a launcher works on the sweep; False if its lease is damaged."""
    try:
        launcher = read_lease(sweep)
    except DamagedFile:
        return False
    return launcher is not None and launcher.alive()


def _runs_of_packs(sweep: SweepDir, packs: list[PackDir]) -> dict[str, tuple[tuple[str, ...], str | None]]:
    """The names of the run folders of each pack, by the pack's id. For a damaged pack they come from the plans, with what is wrong."""
    runs: dict[str, tuple[tuple[str, ...], str | None]] = {}
    for pack in packs:
        try:
            runs[pack.path.name] = tuple(read_pack(pack).runs), None
        except DamagedFile as exc:
            planned = (run for plan in read_plans(sweep, DamageLog()) for run in plan.runs)
            runs[pack.path.name] = tuple(run.folder for run in planned if run.pack == pack.path.name), str(exc)
    return runs
