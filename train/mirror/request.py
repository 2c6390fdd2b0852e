"""What the mirror is asked to show: which runs, in which W&B project, with which facts beside their numbers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from train.config import TrackingConfig, parse_section, read_run_config
from train.store.causes import Next, consequence
from train.store.layout import RunDir, SweepDir
from train.store.lease import read_lease
from train.store.storage import Record, last_line, read_json, read_lines

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
EXIT_CODES = {
    Shown.DONE: 0,
    Shown.FAILED: 1,
    Shown.CANCELLED: 255,
}  # W&B shows 255 as killed; the others have not ended


@dataclass(frozen=True)
class MirroredRun:
    """A run and what its pack knows of it. `axes` maps swept keys to the run's values."""

    dir: RunDir
    axes: dict[str, Any]
    forecast: Record
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


def runs_of_pack(pack_file: Path) -> list[MirroredRun]:
    """The runs of a pack. Packs that were written before there was tracking have none of its facts."""
    pack = read_json(pack_file)
    sweep, axes = Path(pack["sweep_dir"]), pack.get("axes", {})
    tracking = parse_section(TrackingConfig, pack.get("tracking", {"mode": "off"}), "tracking")
    return [
        MirroredRun(RunDir(sweep / name), axes.get(name, {}), pack.get("forecast", {}), tracking)
        for name in pack["runs"]
    ]


def shown(run: RunDir) -> Shown:
    """How the run stands. One that waits for its user to free a disk is shown as failed, since nothing continues by itself."""
    if run.result.exists():
        return Shown.DONE
    lease = read_lease(run)
    if lease is not None:
        return Shown.RUNNING if lease.alive() else Shown.PAUSED
    attempt = last_line(run.attempts)
    if attempt is None:
        return Shown.PAUSED
    follows = consequence(attempt["cause"])
    if follows is None or (follows.next is Next.RETRY and not follows.by_itself):
        return Shown.FAILED
    return SHOWN_AFTER[follows.next]


def tags(run: MirroredRun) -> list[str]:
    """A tag per swept axis with its value, within W&B's 64 characters."""
    return [f"{key.rpartition('.')[2]}={_short(value)}"[:64] for key, value in run.axes.items()]


def config(run: MirroredRun) -> Record:
    """The resolved configuration by section, the forecast of its pack, and the swept axes."""
    values: Record = read_run_config(run.dir.config).model_dump()
    return values | {"forecast": run.forecast, "axes": run.axes, "run_id": run.dir.id}


def summary(run: MirroredRun, header: Record, diverged: str | None) -> Record:
    """What is known of the whole run: the result's numbers where there is one."""
    result: Record = read_json(run.dir.result) or {}
    facts: Record = {
        "attempts": len(read_lines(run.dir.attempts)),
        "trainable_parameters": header.get("trainable_parameters"),
        "total_parameters": header.get("total_parameters"),
        "diverged": diverged,
        **{key: value for key, value in result.items() if isinstance(value, int | float | str)},
        "peak_vram_gib": result.get("peak_memory_gib"),
        "cost_usd": cost_usd(run.forecast, result),
    }
    return {key: value for key, value in facts.items() if value is not None}


def cost_usd(forecast: Record, result: Record) -> float | None:
    """GPU-hours at the price that the forecast was made with; None where the cluster names none."""
    usd, hours = forecast.get("usd"), forecast.get("gpu_hours")
    return result["gpu_hours"] * usd / hours if usd is not None and hours and "gpu_hours" in result else None


def _short(value: object) -> str:
    return "-".join(map(str, value)) if isinstance(value, list) else str(value)
