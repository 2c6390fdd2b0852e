"""What the mirror shows: which runs, in which W&B project, with which configuration, tags, state and summary."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from train.config import TrackingConfig, read_run_config
from train.section import parse_section
from train.store.causes import Next, consequence
from train.store.journal import AttemptLine, JournalLine
from train.store.layout import RunDir, SweepDir
from train.store.lease import read_lease
from train.store.line_file import read_last, read_records
from train.store.record_file import read_existing, read_record
from train.store.records import ForecastRecord, PackRecord, ResultRecord

DEFAULT_PROJECT = "lorapack"


class Shown(StrEnum):
    """How W&B shows a run: in training, waiting to continue, or ended."""

    RUNNING = "running"
    PAUSED = "paused"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


SHOWN_AFTER = {
    Next.NOTHING: Shown.DONE,
    Next.RETRY: Shown.PAUSED,
    Next.HOLD: Shown.CANCELLED,
    Next.GIVE_UP: Shown.FAILED,
}
# Of the states in which a run has ended; W&B shows 255 as killed.
EXIT_CODES = {
    Shown.DONE: 0,
    Shown.FAILED: 1,
    Shown.CANCELLED: 255,
}


@dataclass(frozen=True)
class MirroredRun:
    """A run and what its pack knows of it. `axes` maps swept keys to the run's values."""

    dir: RunDir
    axes: dict[str, Any]
    forecast: ForecastRecord
    tracking: TrackingConfig

    @property
    def sweep(self) -> SweepDir:
        """The sweep's folder; its name is the W&B group."""
        return SweepDir(self.dir.path.parent)

    @property
    def project(self) -> str:
        """The W&B project."""
        return self.tracking.project or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT

    @property
    def entity(self) -> str | None:
        """The W&B user or team; None is the key's own."""
        return self.tracking.entity or os.environ.get("WANDB_ENTITY")


def mirrored_runs(pack_file: Path) -> list[MirroredRun]:
    """The runs of a pack. A pack that was written before there was tracking has no axes, no forecast, and tracking off.

    Raises:
        DamagedFile: the pack's file is missing or damaged.
    """
    pack = read_existing(pack_file, PackRecord)
    tracking = parse_section(TrackingConfig, pack.tracking, "tracking")
    return [MirroredRun(run, pack.axes.get(run.path.name, {}), pack.forecast, tracking) for run in pack.run_dirs()]


def shown(run: RunDir) -> Shown:
    """The run's state. A run that waits for its user to free a disk is shown as failed, since it does not continue by itself."""
    if run.result.exists():
        return Shown.DONE
    lease = read_lease(run)
    if lease is not None:
        return Shown.RUNNING if lease.alive() else Shown.PAUSED
    attempt = read_last(run.attempts, AttemptLine)
    if attempt is None:
        return Shown.PAUSED
    follows = consequence(attempt.cause)
    if follows is None or (follows.next is Next.RETRY and not follows.by_itself):
        return Shown.FAILED
    return SHOWN_AFTER[follows.next]


def tags(run: MirroredRun) -> list[str]:
    """A tag per swept axis with its value, within W&B's 64 characters."""
    return [f"{key.rpartition('.')[2]}={_short(value)}"[:64] for key, value in run.axes.items()]


def config(run: MirroredRun) -> dict[str, Any]:
    """The resolved configuration by section, the forecast of its pack, and the swept axes."""
    values = read_run_config(run.dir.config).model_dump()
    forecast = run.forecast.model_dump(exclude_unset=True)
    return values | {"forecast": forecast, "axes": run.axes, "run_id": run.dir.id}


def summary(run: MirroredRun, header: JournalLine, diverged: str | None) -> dict[str, Any]:
    """What is known of the whole run, with the result's numbers if it has one."""
    result = read_record(run.dir.result, ResultRecord)
    measured = {} if result is None else result.model_dump(exclude={"format"}, exclude_unset=True)
    known = {
        "attempts": len(read_records(run.dir.attempts, AttemptLine)),
        "trainable_parameters": header.get("trainable_parameters"),
        "total_parameters": header.get("total_parameters"),
        "diverged": diverged,
        **{key: value for key, value in measured.items() if isinstance(value, int | float | str)},
        "peak_vram_gib": measured.get("peak_memory_gib"),
        "cost_usd": None if result is None else cost_usd(run.forecast, result),
    }
    return {key: value for key, value in known.items() if value is not None}


def cost_usd(forecast: ForecastRecord, result: ResultRecord) -> float | None:
    """The price of the run's GPU-hours, at the forecast's price per hour; None if the cluster has no price."""
    if forecast.usd is None or not forecast.gpu_hours or result.gpu_hours is None:
        return None
    return result.gpu_hours * forecast.usd / forecast.gpu_hours


def _short(value: object) -> str:
    return "-".join(map(str, value)) if isinstance(value, list) else str(value)
