"""Read a submitted sweep back from its folder: frozen configurations and the newest accepted plan, without Hydra."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from launcher.config import ClusterConfig
from launcher.plan_files import read_plans
from launcher.records import PlanRecord, Run, Sweep
from train.config import TrackingConfig, read_run_config
from train.errors import BadInput, StorageError
from train.section import parse_section
from train.store.layout import RunDir, SweepDir
from train.store.permissions import refuse_shared
from train.store.record_file import DamageLog


def frozen_sweep(sweep: SweepDir) -> Sweep:
    """Every run of the folder in the order of its plans, with the cache and cluster settings of its newest plan.

    Damaged plans, and runs whose configuration is damaged, are left out and named in `Sweep.left_out`.

    Raises:
        BadInput: no plan was ever accepted there, or others can write there.
        StorageError: every plan is damaged.
    """
    refuse_shared(sweep)
    damage = DamageLog()
    plans = _accepted_plans(sweep, damage)
    newest = plans[-1]
    axes = {run.id: run.overrides for plan in plans for run in plan.runs}
    places = {run_id: place for place, run_id in enumerate(axes)}
    folders = sorted(sweep.runs(), key=lambda run: places.get(run.id, len(places)))
    runs = [damage.read(partial(_frozen_run, folder, axes), None) for folder in folders]
    return Sweep(
        name=sweep.path.name,
        root=sweep.path.parent,
        cache=Path(newest.cache),
        runs=tuple(run for run in runs if run is not None),
        cluster=parse_section(ClusterConfig, newest.cluster, "cluster"),
        tracking=parse_section(TrackingConfig, newest.tracking, "tracking"),
        command=newest.command,
        left_out=damage.messages,
    )


def frozen_cache(sweep: SweepDir) -> Path:
    """The cache that the sweep trained from.

    Raises:
        BadInput: no plan was ever accepted there.
    """
    return Path(_accepted_plans(sweep, DamageLog())[-1].cache)


def _accepted_plans(sweep: SweepDir, damage: DamageLog) -> list[PlanRecord]:
    """The plans that can be read, at least one."""
    plans = read_plans(sweep, damage)
    if not plans and damage.messages:
        raise StorageError(f"No plan of {sweep.path.name} can be read. {' '.join(damage.messages)}")
    if not plans:
        raise BadInput(
            f"{sweep.path} holds no accepted plan, so nothing was ever trained there; start the sweep again."
        )
    return plans


def _frozen_run(run: RunDir, axes: dict[str, dict[str, Any]]) -> Run:
    config = read_run_config(run.config)
    return Run(config, run.id, run.name, axes.get(run.id, {}))
