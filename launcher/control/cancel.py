"""Ask runs to stop through a file in their folders, which works wherever they train; Slurm is told of jobs that wait for nothing."""

from __future__ import annotations

import time

from launcher.cluster.arrays import job_names
from launcher.cluster.slurm import cancel_jobs, cancel_named, warn_jobs
from launcher.errors import ClusterError
from launcher.records import RunStatus, State
from launcher.track.jobs import JobRecord, jobs_of, look_up, newest_job_per_run
from launcher.track.tracker import track
from train.store.layout import RunDir, SweepDir
from train.store.storage import write_json

STOPPABLE = {State.PENDING, State.RUNNING, State.UNKNOWN}
POLL_SECONDS, SLURM_POLL_SECONDS = 0.5, 2.0
_ASKED_ALL_THE_SAME = (
    "What trains is asked through its folder, and saves and ends by itself; what waits would end as soon as it starts. Run this again "
    "when Slurm answers, and it leaves the queue."
)


def cancel_runs(runs: list[RunDir], wait_seconds: float = 15.0) -> list[RunStatus]:
    """Ask those of `runs` that train or wait to stop; their states once they have, or after `wait_seconds`.

    All runs are of one sweep.

    Raises:
        ClusterError: Slurm did not take the order; the request is on disk all the same.
    """
    if not runs:
        return []
    sweep = SweepDir(runs[0].path.parent)
    states = {status.id: status.state for status in track(sweep, runs)}
    asked = [run for run in runs if states[run.id] in STOPPABLE]
    for run in asked:
        write_json(run.cancel_request, {"time": time.time()})
    try:
        return _stop(sweep, asked, wait_seconds)
    except ClusterError as exc:
        raise ClusterError(f"{exc}. {_ASKED_ALL_THE_SAME}") from exc


def _stop(sweep: SweepDir, asked: list[RunDir], wait_seconds: float) -> list[RunStatus]:
    """Tell Slurm, and wait."""
    jobs = _slurm_jobs(sweep, asked)
    running = [job.id for job in _without_work(sweep, jobs) if job.id is not None and _is_running(job)]
    warn_jobs(running)
    if jobs and not any(map(_goes_on, sweep.runs())):
        cancel_named(job_names(sweep).report)
    return _wait(sweep, asked, jobs, time.monotonic() + wait_seconds)


def _slurm_jobs(sweep: SweepDir, runs: list[RunDir]) -> list[JobRecord]:
    """The jobs on Slurm that these runs were given to, as Slurm sees them."""
    names = {run.path.name for run in runs}
    newest = newest_job_per_run(jobs_of(sweep))
    jobs = {job.pack.path: job for run, job in newest.items() if run in names and job.slurm is not None}
    return look_up(list(jobs.values()))


def _without_work(sweep: SweepDir, jobs: list[JobRecord]) -> list[JobRecord]:
    """Those of `jobs` that have no other run to train; the others go on."""
    return [job for job in jobs if not any(_goes_on(RunDir(sweep.path / name)) for name in job.runs)]


def _is_running(job: JobRecord) -> bool:
    """Whether its processes can be told to save; those of a job that is COMPLETING are being ended already."""
    view = job.slurm.view if job.slurm is not None else None
    return view is not None and view.state.state is State.RUNNING and view.raw_state != "COMPLETING"


def _goes_on(run: RunDir) -> bool:
    return not run.result.exists() and not run.cancel_request.exists()


def _wait(sweep: SweepDir, runs: list[RunDir], jobs: list[JobRecord], until: float) -> list[RunStatus]:
    """Look on until all have stopped, and take out of the queue what does not run, also what Slurm has put back there meanwhile."""
    while True:
        waiting = [job for job in _without_work(sweep, jobs) if job.alive is not False and not _is_running(job)]
        cancel_jobs([job.id for job in waiting if job.id is not None])
        statuses = track(sweep, runs)
        if time.monotonic() > until or all(status.state not in STOPPABLE for status in statuses):
            return statuses
        time.sleep(SLURM_POLL_SECONDS if jobs else POLL_SECONDS)
        jobs = look_up(jobs)
