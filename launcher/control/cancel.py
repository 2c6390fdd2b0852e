"""Ask runs to stop through a file in their folders, which works wherever they train.

Jobs on Slurm that have no other run left are also stopped there: running ones get a signal, so that they look at once, and waiting
ones leave the queue.
"""

from __future__ import annotations

import time
from contextlib import suppress

from launcher.cluster.arrays import job_names
from launcher.cluster.slurm import cancel_jobs, cancel_named, warn_jobs
from launcher.errors import ClusterError
from launcher.records import RunStatus, State
from launcher.track.jobs import JobRecord, jobs_of, look_up, newest_job_per_run
from launcher.track.tracker import track
from train.errors import DamagedFile
from train.store.layout import RunDir, SweepDir
from train.store.record_file import write_record
from train.store.records import CancelRequest

STOPPABLE = {State.PENDING, State.RUNNING, State.UNKNOWN}
POLL_SECONDS = 0.5
SLURM_POLL_SECONDS = 2.0
_REQUEST_IS_WRITTEN = (
    "The runs find the request in their folders all the same: those that train save and end by themselves, and jobs that wait end as "
    "soon as they start. Run this again when Slurm answers, to take the jobs out of the queue."
)


def cancel_runs(runs: list[RunDir], wait_seconds: float = 15.0) -> list[RunStatus]:
    """Ask those of `runs` that train or wait to stop; their states once they have, or after `wait_seconds`.

    All runs are of one sweep.

    Raises:
        ClusterError: scancel refused or did not answer; the requests are on disk nevertheless.
    """
    if not runs:
        return []
    sweep = SweepDir(runs[0].path.parent)
    statuses = {status.id: status for status in track(sweep, runs)}
    asked = [run for run in runs if _can_be_stopped(statuses[run.id])]
    for run in asked:
        write_record(run.cancel_request, CancelRequest(time=time.time()))
    try:
        return _stop(sweep, asked, wait_seconds)
    except ClusterError as exc:
        raise ClusterError(f"{exc}. {_REQUEST_IS_WRITTEN}") from exc


def _can_be_stopped(status: RunStatus) -> bool:
    """Whether a process may train the run, now or later; of one with a damaged file that is known by its lease and its job."""
    return status.state in STOPPABLE and (status.under_way or not status.damaged)


def _stop(sweep: SweepDir, asked: list[RunDir], wait_seconds: float) -> list[RunStatus]:
    """Signal the jobs that have nothing else to train, then wait."""
    jobs = _slurm_jobs(sweep, asked)
    running = [job.id for job in _without_work(sweep, jobs) if job.id is not None and _is_running(job)]
    warn_jobs(running)
    # Without a run that will finish, the job that writes the report has nothing new to report.
    if jobs and not any(map(_is_wanted, sweep.runs())):
        # If its name cannot be told, the job stays.
        with suppress(DamagedFile):
            cancel_named(job_names(sweep).report)
    return _wait(sweep, asked, jobs, time.monotonic() + wait_seconds)


def _slurm_jobs(sweep: SweepDir, runs: list[RunDir]) -> list[JobRecord]:
    """The jobs on Slurm that these runs were given to, as Slurm sees them."""
    names = {run.path.name for run in runs}
    newest = newest_job_per_run(jobs_of(sweep))
    jobs = {job.pack.path: job for run, job in newest.items() if run in names and job.slurm is not None}
    return look_up(list(jobs.values()))


def _without_work(sweep: SweepDir, jobs: list[JobRecord]) -> list[JobRecord]:
    """Those of `jobs` that have no other run to train. The others stay."""
    return [job for job in jobs if not any(_is_wanted(RunDir(sweep.path / name)) for name in job.runs)]


def _is_running(job: JobRecord) -> bool:
    """Whether its processes can still be asked to save. Those of a COMPLETING job are being ended already."""
    return job.view is not None and job.view.state.state is State.RUNNING and job.view.raw_state != "COMPLETING"


def _is_wanted(run: RunDir) -> bool:
    return not run.result.exists() and not run.cancel_request.exists()


def _wait(sweep: SweepDir, runs: list[RunDir], jobs: list[JobRecord], until: float) -> list[RunStatus]:
    """Wait until all have stopped. Jobs that do not run leave the queue, also those that Slurm requeues meanwhile."""
    while True:
        waiting = [job for job in _without_work(sweep, jobs) if job.alive is not False and not _is_running(job)]
        cancel_jobs([job.id for job in waiting if job.id is not None])
        statuses = track(sweep, runs)
        if time.monotonic() > until or all(status.state not in STOPPABLE for status in statuses):
            return statuses
        time.sleep(SLURM_POLL_SECONDS if jobs else POLL_SECONDS)
        jobs = look_up(jobs)
