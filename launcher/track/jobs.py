"""What the sweep folder says of its jobs, and Slurm: which pack trains a run, under which id, and whether it can still start."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.cluster.commands import NoAnswer
from launcher.cluster.queue import JobKey, JobView, read_accounting, read_queue
from launcher.cluster.states import FAILED, OUT_OF_MEMORY
from train.store.layout import ArrayDir, PackDir, SweepDir
from train.store.lease import process_started, read_lease
from train.store.storage import read_json


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
    """

    pack: PackDir
    runs: tuple[str, ...]
    id: str | None
    host: str | None
    submitted: float
    alive: bool | None
    slurm: SlurmTask | None = None


def jobs_of(sweep: SweepDir) -> list[JobRecord]:
    """Every job of the sweep, the oldest first, by its folder alone."""
    launcher = read_lease(sweep)
    launcher_alive = launcher is not None and launcher.alive()
    on_slurm = {str(job.pack.pack): job for job in _slurm_jobs(sweep)}
    records = (
        on_slurm.get(str(path)) or _record(PackDir(path.parent), launcher_alive)
        for path in sweep.jobs.glob("*/pack.json")
    )
    return sorted(records, key=lambda record: record.submitted)


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


def arrays_in_queue(sweep: SweepDir) -> dict[str, int]:
    """How many jobs of each array that the sweep has in Slurm's queue may run at once, by the array's number.

    Raises:
        NoAnswer: squeue does not answer.
    """
    records = [read_json(path) for path in sweep.arrays.glob("*/array.json")]
    parallel = {record["name"]: record.get("parallel", len(record["packs"])) for record in records}
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


def _slurm_jobs(sweep: SweepDir) -> Iterable[JobRecord]:
    """The jobs of every array that was, or was about to be, submitted."""
    for path in sweep.arrays.glob("*/array.json"):
        array, record = ArrayDir(path.parent), read_json(path)
        for place, pack_file in enumerate(record["packs"]):
            pack = sweep.pack(Path(pack_file).parent.name)
            number = record["job"] if len(record["packs"]) == 1 else f"{record['job']}_{place}"
            yield JobRecord(
                pack,
                tuple(read_json(pack.pack)["runs"]),
                number if record["job"] else None,
                None,
                record["submitted"],
                None,
                SlurmTask(array, record["name"], place),
            )


def _record(pack: PackDir, launcher_alive: bool) -> JobRecord:
    runs = tuple(read_json(pack.pack)["runs"])
    job = read_json(pack.job)
    if job is None:  # in the queue of a launcher, and lost if that is gone
        return JobRecord(pack, runs, None, None, pack.pack.stat().st_mtime, launcher_alive)
    gone = job["host"] == socket.gethostname() and process_started(job["pid"]) != job["pid_started"]
    return JobRecord(pack, runs, job["job"], job["host"], job["submitted"], not gone)
