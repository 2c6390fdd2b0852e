"""Read a submitted sweep back from its folder: frozen configurations and the newest accepted plan, without Hydra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.records import ClusterConfig, Run, Sweep
from launcher.submit.submission import plan_numbers
from train.config import TrackingConfig, parse_section, read_run_config
from train.errors import BadInput
from train.store.layout import RunDir, SweepDir
from train.store.permissions import refuse_shared
from train.store.storage import read_json


def frozen_sweep(sweep: SweepDir) -> Sweep:
    """Every run of the folder in the order of its plans, with the cache and cluster settings of its newest plan.

    Raises:
        BadInput: no plan was ever accepted there, or others can write there.
    """
    refuse_shared(sweep)
    plans = _accepted_plans(sweep)
    newest = plans[-1]
    axes = {run["id"]: run["overrides"] for plan in plans for run in plan["runs"]}
    places = {run_id: place for place, run_id in enumerate(axes)}
    runs = sorted(sweep.runs(), key=lambda run: places.get(run.id, len(places)))
    return Sweep(
        name=sweep.path.name,
        root=sweep.path.parent,
        cache=Path(newest["cache"]),
        runs=tuple(_frozen_run(run, axes) for run in runs),
        cluster=parse_section(ClusterConfig, newest["cluster"], "cluster"),
        tracking=parse_section(TrackingConfig, newest["tracking"], "tracking"),
        command=newest["command"],
    )


def frozen_cache(sweep: SweepDir) -> Path:
    """The cache that the sweep trained from.

    Raises:
        BadInput: no plan was ever accepted there.
    """
    return Path(_accepted_plans(sweep)[-1]["cache"])


def _accepted_plans(sweep: SweepDir) -> list[dict[str, Any]]:
    plans = [read_json(sweep.plans / f"{number}.json") for number in plan_numbers(sweep)]
    if not plans:
        raise BadInput(
            f"{sweep.path} holds no accepted plan, so nothing was ever trained there; start the sweep again."
        )
    return plans


def _frozen_run(run: RunDir, axes: dict[str, dict[str, Any]]) -> Run:
    config = read_run_config(run.config)
    return Run(config, run.id, run.name, axes.get(run.id, {}))
