"""The report of a sweep on Slurm: a small job that waits until all others have ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launcher.cluster.slurm import Submitted, submit_afterwards
from launcher.errors import ClusterError
from launcher.records import Plan
from train.rundir import SweepDir


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
    """Let the report be written when these jobs have ended. Nothing is lost if Slurm refuses: `report` writes it as well."""
    if not submitted.jobs:
        return
    sweep = plan.sweep
    pack = next(pack for pack in plan.packs if pack.id in submitted.jobs)
    task = ReportJob(str(sweep.dir.path))
    try:
        submit_afterwards(task, sweep.dir, submitted, sweep.cluster, pack.partition, pack.minutes)
    except ClusterError as exc:
        say(f"No job will write the report ({exc}); 'python -m launcher report {sweep.name}' does.")
