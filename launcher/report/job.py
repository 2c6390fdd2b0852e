"""The report of a sweep on Slurm: a small job that waits until all others have ended, and what `status` says if there is none."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher.cluster.arrays import job_names
from launcher.cluster.queue import read_queue
from launcher.cluster.requests import Placement
from launcher.cluster.slurm import Afterwards, Submitted, array_number, submit_afterwards
from launcher.errors import ClusterError
from launcher.records import Plan, RunStatus, State, Sweep, verb_command
from launcher.submit.freeze import freeze_code
from launcher.track.jobs import array_records, arrays_in_queue
from train.errors import DamagedFile
from train.store.layout import SweepDir
from train.store.record_file import read_record, write_record
from train.store.records import ReportJobRecord

log = logging.getLogger("lorapack.launcher")


@dataclass(frozen=True)
class ReportJob:
    """What that job runs. It is pickled into the job, so its module and its fields stay as they are."""

    sweep_dir: str

    def __call__(self) -> str:
        """Write the report, if any run has finished."""
        from launcher.report.writer import write_report
        from train.errors import LorapackError

        try:
            write_report(SweepDir(Path(self.sweep_dir)))
        except LorapackError as exc:
            return str(exc)
        return "written"


def submit_report(plan: Plan, submitted: Submitted) -> None:
    """Submit the job that writes the report when these jobs, and those of earlier commands, have ended.

    Call it as the sweep's `sole_launcher`. If Slurm refuses, `status` says so, and the next command tries again.
    """
    if not submitted.jobs:
        return
    pack = next(pack for pack in plan.packs if pack.id in submitted.jobs)
    earlier = plan.slots.earlier if plan.slots is not None else ()
    arrays = [*earlier, *map(array_number, submitted.jobs.values())]
    placement = Placement(pack.partition, pack.minutes, pack.gres)
    _submit(plan.sweep, arrays, submitted.code, placement)


def submit_missing_report(sweep: Sweep) -> None:
    """The same for jobs whose launcher was killed, or found the queue full, before it submitted this one."""
    if not _has_uncovered_arrays(sweep.dir):
        return
    # If Slurm does not answer, the next command tries again.
    with suppress(ClusterError):
        arrays = arrays_in_queue(sweep.dir)
        if arrays:
            newest = max(array_records(sweep.dir), key=lambda record: record.submitted)
            placement = Placement(newest.partition, newest.minutes, newest.gres)
            _submit(sweep, list(arrays), freeze_code(sweep.dir), placement)


def report_note(sweep: SweepDir, statuses: Iterable[RunStatus]) -> str | None:
    """What to do about a missing report; None if one will be written, is there, or makes no sense yet."""
    if not _records(sweep):
        return None
    try:
        return _note(sweep, list(statuses))
    except DamagedFile as exc:
        return f"Nobody can tell whether a job will write the report: {exc}"


def _note(sweep: SweepDir, listed: list[RunStatus]) -> str | None:
    """`report_note` for a sweep on Slurm.

    Raises:
        DamagedFile: the first plan, or the record of the report's job, cannot be read.
    """
    write = f"`{verb_command('report', sweep)}`"
    if any(status.under_way for status in listed):
        if not _has_uncovered_arrays(sweep):
            return None
        again = "the command that started this sweep submits one"
        return f"No job waits to write the report: {again}, and {write} writes it at once."
    if all(status.state is not State.DONE for status in listed) or _is_current(sweep):
        return None
    queue = read_queue([job_names(sweep).report])
    jobs = [view for view in queue.views.values() if not view.state.over]
    # Without an answer it is unknown whether a job waits. Without a reason, or with "Dependency", the job is about to run.
    if not queue.answered or any(view.reason in {None, "Dependency"} for view in jobs):
        return None
    if jobs:
        return f"The job that writes the report waits ({jobs[0].reason}): {write} writes it at once."
    return f"The finished runs have no current report: {write} writes it."


def _submit(sweep: Sweep, arrays: Sequence[str], code: Path, placement: Placement) -> None:
    """Submit the job, and record which arrays it waits for."""
    covered = [path.parent.name for path in _records(sweep.dir)]
    job = Afterwards(ReportJob(str(sweep.dir.path)), tuple(sorted(set(arrays))), placement)
    try:
        job_id = submit_afterwards(job, sweep.dir, code, sweep.cluster)
    except ClusterError as exc:
        write = f"`{verb_command('report', sweep.dir)}`"
        log.warning(f"No job will write the report ({exc}). The same command tries again later, and {write} writes it.")
        return
    write_record(sweep.dir.report_record, ReportJobRecord(job=job_id, arrays=covered, submitted=time.time()))


def _records(sweep: SweepDir) -> list[Path]:
    """The records of all arrays that were, or were about to be, submitted."""
    return list(sweep.arrays.glob("*/array.json"))


def _has_uncovered_arrays(sweep: SweepDir) -> bool:
    """Whether there are arrays that no report job waits for."""
    job = read_record(sweep.report_record, ReportJobRecord)
    covered = set(job.arrays) if job is not None else set()
    return not {path.parent.name for path in _records(sweep)} <= covered


def _is_current(sweep: SweepDir) -> bool:
    """Whether the report is newer than every result."""
    results = [run.result.stat().st_mtime for run in sweep.runs() if run.result.exists()]
    return sweep.report.exists() and sweep.report.stat().st_mtime >= max(results)
