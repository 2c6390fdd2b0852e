"""What the sweep folder says of its jobs, and Slurm: which pack trains a run, under which id, and whether it can still start."""

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
    """A pack's place on Slurm: task `task` of the array called `name`. `view` is what Slurm says of it, None if nothing."""

    array: ArrayDir
    name: str
    task: int
    view: JobView | None = None


@dataclass(frozen=True)
class JobRecord:
    """One pack as submitted. `id` and `host` are None while it waits for its turn; `submitted` is Unix time.

    `alive` says whether the job trains or can still start; None where only Slurm can tell and was not asked, or did not answer.
    `damage` says which of the job's files is damaged, so that nobody can tell what became of it.
    """

    pack: PackDir
    runs: tuple[str, ...]
    id: str | None
    host: str | None
    submitted: float
    alive: bool | None
    slurm: SlurmTask | None = None
    damage: str | None = None


def jobs_of(sweep: SweepDir) -> list[JobRecord]:
    """Every job of the sweep, the oldest first, by its folder alone. A job with a damaged file says so."""
    packs = [PackDir(path.parent) for path in sweep.jobs.glob("*/pack.json")]
    runs = _runs_of_packs(sweep, packs)
    launcher_alive = _launcher_alive(sweep)
    damaged_arrays = DamageLog()
    on_slurm = _places_on_slurm(sweep, damaged_arrays)
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
    """What is wrong with plans, and with the files of jobs, also of those whose runs are done."""
    damage = DamageLog()
    read_plans(sweep, damage)
    return list(dict.fromkeys([*damage.messages, *(job.damage for job in jobs_of(sweep) if job.damage is not None)]))


def newest_job_per_run(jobs: Iterable[JobRecord]) -> dict[str, JobRecord]:
    """The last job that each run was given to, by the name of the run's folder."""
    return {run: job for job in jobs for run in job.runs}


def look_up(jobs: Sequence[JobRecord]) -> list[JobRecord]:
    """The same jobs with what Slurm says of them: one squeue for all, and one sacct if some are no longer in the queue, or failed.

    What the queue calls failed, the books may know to have been killed for its memory.
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
        books = read_accounting(unclear, min(unclear.values()))
        killed = {
            key: view for key, view in books.items() if view.state == OUT_OF_MEMORY and _is_unclear(views.get(key))
        }
        views = books | views | killed
    return [_seen(job, views, queue.answered) for job in jobs]


def array_records(sweep: SweepDir) -> list[ArrayRecord]:
    """What was submitted to Slurm; a damaged record is left out, whose runs `jobs_of` keeps from being trained again."""
    damage = DamageLog()
    files = sweep.arrays.glob("*/array.json")
    records = [damage.read(partial(read_record, path, ArrayRecord), None) for path in files]
    return [record for record in records if record is not None]


def arrays_in_queue(sweep: SweepDir) -> dict[str, int]:
    """How many jobs of each array that the sweep has in Slurm's queue may run at once, by the array's number.

    Raises:
        NoAnswer: squeue does not answer.
    """
    parallel = {record.name: record.at_once for record in array_records(sweep)}
    queue = read_queue(parallel)
    if not queue.answered:
        raise NoAnswer("squeue does not answer, so nobody can tell which jobs of this sweep are in the queue.")
    waiting = Counter((name, view.number) for (name, _), view in queue.views.items() if not view.state.over)
    return {str(number): min(jobs, parallel[name]) for (name, number), jobs in sorted(waiting.items())}


def _is_unclear(view: JobView | None) -> bool:
    return view is None or view.state == FAILED


def _view_of(job: JobRecord, views: dict[JobKey, JobView]) -> JobView | None:
    """What Slurm says of a job: by its id, and while sbatch's answer is lost by its name, of which the oldest counts."""
    if job.slurm is None:
        return None
    if job.id is not None:
        return views.get((job.slurm.name, job.id))
    name, place = job.slurm.name, job.slurm.task
    named = (view for (other, _), view in views.items() if other == name and view.place == place)
    return min(named, key=lambda view: view.number, default=None)


def _seen(job: JobRecord, views: dict[JobKey, JobView], answered: bool) -> JobRecord:
    """A job with its view. What is neither in the queue nor in the books of a Slurm that answers is gone."""
    if job.slurm is None:
        return job
    view = _view_of(job, views)
    alive = (not view.state.over if view is not None else False) if answered else None
    slurm = replace(job.slurm, view=view)
    if view is None:
        return replace(job, slurm=slurm, alive=alive)
    return replace(job, slurm=slurm, alive=alive, id=view.id, host=view.node)


def _places_on_slurm(sweep: SweepDir, damage: DamageLog) -> dict[str, tuple[ArrayDir, ArrayRecord, int]]:
    """For each pack that an array trains: the array, and the pack's place in it, by the name of the pack's folder."""
    places = {}
    for path in sweep.arrays.glob("*/array.json"):
        record = damage.read(partial(read_record, path, ArrayRecord), None)
        for place, pack_file in enumerate(record.packs if record is not None else ()):
            assert record is not None
            places[Path(pack_file).parent.name] = (ArrayDir(path.parent), record, place)
    return places


def _on_slurm(pack: PackDir, array: ArrayDir, record: ArrayRecord, place: int) -> JobRecord:
    number = record.job if len(record.packs) == 1 or record.job is None else f"{record.job}_{place}"
    return JobRecord(pack, (), number, None, record.submitted, None, SlurmTask(array, record.name, place))


def _local(pack: PackDir, launcher_alive: bool) -> JobRecord:
    submitted = pack.pack.stat().st_mtime
    try:
        job = read_record(pack.job, LocalJobRecord)
    except DamagedFile as exc:
        return JobRecord(pack, (), None, None, submitted, None, damage=str(exc))
    if job is None:  # in the queue of a launcher, and lost if that is gone
        return JobRecord(pack, (), None, None, submitted, launcher_alive)
    gone = job.host == socket.gethostname() and process_started(job.pid) != job.pid_started
    return JobRecord(pack, (), job.job, job.host, job.submitted, not gone)


def _launcher_alive(sweep: SweepDir) -> bool:
    """Whether a launcher works on the sweep, as far as anybody can tell."""
    try:
        launcher = read_lease(sweep)
    except DamagedFile:
        return False
    return launcher is not None and launcher.alive()


def _runs_of_packs(sweep: SweepDir, packs: list[PackDir]) -> dict[str, tuple[tuple[str, ...], str | None]]:
    """The names of the run folders of each pack, by the pack's id; of a damaged one as the plans have it, and what is wrong."""
    found: dict[str, tuple[tuple[str, ...], str | None]] = {}
    for pack in packs:
        try:
            found[pack.path.name] = tuple(read_pack(pack).runs), None
        except DamagedFile as exc:
            planned = (run for plan in read_plans(sweep, DamageLog()) for run in plan.runs)
            found[pack.path.name] = tuple(run.folder for run in planned if run.pack == pack.path.name), str(exc)
    return found
