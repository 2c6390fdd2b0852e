"""The accepted plans of a sweep folder: ``plans/1.json``, ``plans/2.json``, …"""

from __future__ import annotations

from launcher.records import PlanRecord
from train.store.layout import SweepDir
from train.store.record_file import DamageLog, read_existing


def plan_numbers(sweep: SweepDir) -> list[int]:
    """The numbers of the accepted plans, ascending."""
    return sorted(int(path.stem) for path in sweep.plans.glob("*.json") if path.stem.isdigit())


def read_plans(sweep: SweepDir, damage: DamageLog) -> list[PlanRecord]:
    """The accepted plans, oldest first, without damaged ones."""
    files = [sweep.plans / f"{number}.json" for number in plan_numbers(sweep)]
    plans = [damage.read(lambda file=file: read_existing(file, PlanRecord), None) for file in files]  # type: ignore[misc]
    return [plan for plan in plans if plan is not None]
