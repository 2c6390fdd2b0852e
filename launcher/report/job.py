"""The report of a sweep on Slurm: a small job that waits until all others have ended, and what is said where there is none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher.cluster.names import job_names
from launcher.cluster.queue import read_queue
from launcher.cluster.slurm import Submitted, array_number, submit_afterwards
from launcher.errors import ClusterError
from launcher.records import Plan, RunStatus, State, Sweep, verb_command
from launcher.submit.freeze import freeze_code
from launcher.track.jobs import arrays_in_queue
from train.store.layout import SweepDir
from train.store.storage import read_json, write_json


@dataclass(frozen=True)
class ReportJob:
    """What that job runs."""

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


def submit_report(plan: Plan, submitted: Submitted, say: Callable[[str], None]) -> None:
    """Let the report be written when these jobs, and those of earlier commands, have ended. Call it as the sweep's `sole_launcher`.

    Nothing is lost if Slurm refuses: `status` says so, and the next command tries again.
    """
    if not submitted.jobs:
        return
    pack = next(pack for pack in plan.packs if pack.id in submitted.jobs)
    earlier = plan.lanes.earlier if plan.lanes is not None else ()
    arrays = [*earlier, *map(array_number, submitted.jobs.values())]
    _submit(plan.sweep, arrays, submitted.code, _Place(pack.partition, pack.minutes, pack.gres), say)


def submit_missing_report(sweep: Sweep, say: Callable[[str], None]) -> None:
    """The same for jobs whose launcher was killed, or found the queue full, before it came to that."""
    if not _uncovered(sweep.dir):
        return
    with suppress(ClusterError):  # the next command tries again
        arrays = arrays_in_queue(sweep.dir)
        if arrays:
            newest = max((read_json(path) for path in _records(sweep.dir)), key=lambda record: record["submitted"])
            code = freeze_code(sweep.dir)
            place = _Place(newest["partition"], newest.get("minutes"), newest.get("gres"))
            _submit(sweep, list(arrays), code, place, say)


def report_note(sweep: SweepDir, statuses: Iterable[RunStatus]) -> str | None:
    """What to do for a report that will not come by itself, None if one comes, is there, or makes no sense yet."""
    if not _records(sweep):
        return None
    listed = list(statuses)
    write = f"`{verb_command('report', sweep)}`"
    if any(status.under_way for status in listed):
        again = "the command that started this sweep submits one"
        return (
            f"No job waits to write the report: {again}, and {write} writes it at once." if _uncovered(sweep) else None
        )
    if all(status.state is not State.DONE for status in listed) or _is_current(sweep):
        return None
    queue = read_queue([job_names(sweep).report])
    jobs = [view for view in queue.views.values() if not view.state.over]
    if not queue.answered or any(view.reason in {None, "Dependency"} for view in jobs):
        return None  # nobody knows, or it is about to be written
    if jobs:
        return f"The job that writes the report waits ({jobs[0].reason}): {write} writes it at once."
    return f"There is no report of all that is done: {write} writes it."


@dataclass(frozen=True)
class _Place:
    """Where an array of the sweep went: a partition, a time limit that it allows, and what a job asks for there."""

    partition: str
    minutes: int | None
    gres: str | None


def _submit(sweep: Sweep, arrays: Sequence[str], code: Path, place: _Place, say: Callable[[str], None]) -> None:
    """Submit the job, and note which arrays it waits for."""
    covered = [path.parent.name for path in _records(sweep.dir)]
    numbers = sorted(set(arrays))
    try:
        task = ReportJob(str(sweep.dir.path))
        job = submit_afterwards(
            task, sweep.dir, code, numbers, sweep.cluster, place.partition, place.minutes, place.gres
        )
    except ClusterError as exc:
        write = f"`{verb_command('report', sweep.dir)}`"
        say(f"No job will write the report ({exc}). The same command tries again later, and {write} writes it.")
        return
    write_json(sweep.dir.report_record, {"job": job, "arrays": covered, "submitted": time.time()})


def _records(sweep: SweepDir) -> list[Path]:
    """The records of all arrays that were, or were about to be, submitted."""
    return list(sweep.arrays.glob("*/array.json"))


def _uncovered(sweep: SweepDir) -> bool:
    """Whether there are arrays that no job of this kind waits for."""
    covered = (read_json(sweep.report_record) or {"arrays": []})["arrays"]
    return not {path.parent.name for path in _records(sweep)} <= set(covered)


def _is_current(sweep: SweepDir) -> bool:
    """Whether the report is younger than every result."""
    results = [run.result.stat().st_mtime for run in sweep.runs() if run.result.exists()]
    return sweep.report.exists() and sweep.report.stat().st_mtime >= max(results)
