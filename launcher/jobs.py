"""What the sweep folder says of its jobs: which pack trains a run, under which job id, and whether that job can still start."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from train.lease import process_started, read_lease
from train.rundir import PackDir, RunDir, SweepDir, read_json


@dataclass(frozen=True)
class JobRecord:
    """One pack as submitted. `id` and `host` are None while it waits for its turn; `submitted` is Unix time."""

    pack: PackDir
    runs: tuple[str, ...]
    id: str | None
    host: str | None
    submitted: float
    alive: bool


def jobs_of(sweep: SweepDir) -> list[JobRecord]:
    """Every job of the sweep, the oldest first."""
    launcher = read_lease(sweep)
    launcher_alive = launcher is not None and launcher.alive()
    records = (_record(PackDir(path.parent), launcher_alive) for path in sweep.jobs.glob("*/pack.json"))
    return sorted(records, key=lambda record: record.submitted)


def newest_job_per_run(sweep: SweepDir) -> dict[str, JobRecord]:
    """The last job that each run was given to, by the name of the run's folder."""
    return {run: job for job in jobs_of(sweep) for run in job.runs}


def runs_of_pack(pack: PackDir) -> list[RunDir]:
    """The folders of the runs that a pack trains."""
    facts = read_json(pack.pack)
    return [RunDir(pack.path.parent.parent / name) for name in facts["runs"]]


def _record(pack: PackDir, launcher_alive: bool) -> JobRecord:
    runs = tuple(read_json(pack.pack)["runs"])
    job = read_json(pack.job)
    if job is None:  # in the queue of a launcher, and lost if that is gone
        return JobRecord(pack, runs, None, None, pack.pack.stat().st_mtime, launcher_alive)
    gone = job["host"] == socket.gethostname() and process_started(job["pid"]) != job["pid_started"]
    return JobRecord(pack, runs, job["job"], job["host"], job["submitted"], not gone)
