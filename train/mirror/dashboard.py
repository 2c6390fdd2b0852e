"""A W&B workspace for one sweep: only its runs, with the plots for comparing them.

    python -m train.mirror.dashboard < REQUEST.json        what ``launcher dashboard`` runs

A process of its own, since W&B's client is slow to import and takes server and key from the environment. So the key stays in here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.errors import BadInput, DamagedFile, LorapackError
from train.mirror.reach import Reach, look_for_server
from train.mirror.request import MirroredRun, mirrored_runs
from train.mirror.rows import SAMPLES
from train.store.layout import SweepDir
from train.store.record_file import read_record, write_record
from train.store.records import DashboardRecord

if TYPE_CHECKING:
    import wandb_workspaces.workspaces as ws

SEED = "train.seed"
LOGARITHMIC = ("log2", "log10")
MOST_CURVES = 100
SAVE_SECONDS = 60
NEEDED = (
    "the dashboard needs the package wandb-workspaces; run pip install 'lorapack[dashboard]', then this command again."
)


@dataclass(frozen=True)
class SweptAxis:
    """A key in which the runs differ. `scale` is log2, log10, linear or category."""

    key: str
    scale: str


def make_dashboard(sweep: SweepDir, axes: list[SweptAxis]) -> str:
    """Build the sweep's workspace in the project that its runs are mirrored to; the workspace's address.

    A second call replaces the workspace.

    Raises:
        BadInput: wandb-workspaces is missing, nothing was trained yet, or W&B cannot be used from here.
        LorapackError: the server rejects the workspace, or does not answer.
    """
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise BadInput(NEEDED)
    packs = sorted(sweep.jobs.glob("*/pack.json"), key=lambda file: file.stat().st_mtime)
    if not packs:
        raise BadInput(f"{sweep.path.name} has trained nothing yet, so there is nothing to show; start it first.")
    run = _newest_run(packs)
    reach = look_for_server(run.tracking.key_file)
    if reach.trouble is not None:
        raise BadInput(
            f"W&B cannot be used from here: {reach.trouble}; run 'wandb login', or look at report.html, which needs no network."
        )
    _hand_over(reach)
    entity = run.entity or reach.entity
    assert entity is not None, "a key that a server knows has an owner"
    return _save(build(sweep.path.name, axes, entity, run.project), sweep, reach.server)


def _newest_run(packs: list[Path]) -> MirroredRun:
    """A run of the newest pack whose file can be read.

    Raises:
        DamagedFile: none can.
    """
    *earlier, newest = packs
    try:
        return mirrored_runs(newest)[0]
    except DamagedFile:
        if not earlier:
            raise
        return _newest_run(earlier)


def build(sweep: str, axes: list[SweptAxis], entity: str, project: str) -> ws.Workspace:
    """The workspace of the runs of `sweep` in `entity`/`project`. Nothing is sent."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    hyperparameters = [axis for axis in axes if axis.key != SEED] or axes
    return ws.Workspace(
        entity=entity,
        project=project,
        name=sweep,
        sections=[
            ws.Section(name="Loss", panels=_curves(hyperparameters), is_open=True),
            ws.Section(name="Eval loss against what was swept", panels=_results(hyperparameters), is_open=True),
            ws.Section(name="Sample answers", panels=[wr.WeavePanelSummaryTable(table_name=SAMPLES)], is_open=True),
            ws.Section(name="Speed, memory and cost", panels=_costs(), is_open=True),
        ],
        settings=ws.WorkspaceSettings(max_runs=MOST_CURVES),
        runset_settings=ws.RunsetSettings(
            filters=[ws.Metric("Group") == sweep],
            order=[ws.Ordering(ws.Summary("eval_loss"), ascending=True)],
            pinned_columns=["run:displayName", "summary:eval_loss", "summary:eval_exact_match"],
        ),
    )


def _curves(axes: list[SweptAxis]) -> list[Any]:
    """The losses over the steps: one curve per run, and for each axis the mean and the range of the runs with the same value."""
    import wandb_workspaces.reports.v2 as wr

    losses = {"train/loss": "training loss", "eval/loss": "eval loss"}
    single = [wr.LinePlot(title=title, x="Step", y=[metric], log_y=True) for metric, title in losses.items()]
    grouped = [
        wr.LinePlot(
            title=f"{title} by {axis.key}",
            x="Step",
            y=[metric],
            log_y=True,
            groupby=wr.Config(axis.key),
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
        )
        for axis in axes
        for metric, title in losses.items()
    ]
    return [*grouped, *single, wr.LinePlot(title="gradient norm", x="Step", y=["train/grad_norm"], log_y=True)]


def _results(axes: list[SweptAxis]) -> list[Any]:
    """The final losses: against each axis, and against all axes at once."""
    import wandb_workspaces.reports.v2 as wr

    loss = wr.SummaryMetric("eval_loss")
    columns = [
        wr.ParallelCoordinatesPlotColumn(wr.Config(axis.key), display_name=axis.key, log=axis.scale in LOGARITHMIC)
        for axis in axes
    ]
    measured = [
        wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric("trainable_parameters"), log=True),
        wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric("eval_exact_match")),
        wr.ParallelCoordinatesPlotColumn(loss, inverted=True),
    ]
    against = [
        wr.BarPlot(
            title=f"eval loss by {axis.key}", metrics=[loss], groupby=wr.Config(axis.key), groupby_aggfunc="mean"
        )
        if axis.scale == "category"
        else wr.ScatterPlot(
            title=f"eval loss by {axis.key}", x=wr.Config(axis.key), y=loss, log_x=axis.scale in LOGARITHMIC
        )
        for axis in axes
    ]
    return [*against, wr.ParallelCoordinatesPlot(title="Parallel coordinates", columns=[*columns, *measured])]


def _costs() -> list[Any]:
    """What the runs cost: speed, memory, GPU-hours, dollars, adapter size."""
    import wandb_workspaces.reports.v2 as wr

    over_time = {"tokens per second": "perf/tokens_per_second", "peak memory (GiB)": "perf/peak_vram_gib"}
    sums = {"GPU-hours": "gpu_hours", "cost (USD)": "cost_usd", "adapter (MB)": "adapter_mb"}
    return [
        *(wr.LinePlot(title=title, x="Step", y=[metric]) for title, metric in over_time.items()),
        *(wr.BarPlot(title=title, metrics=[wr.SummaryMetric(name)]) for title, name in sums.items()),
    ]


def _hand_over(reach: Reach) -> None:
    """Make W&B's client, which reads the environment, use the server that answered."""
    # The client of the program that started this process, if that uses W&B itself.
    os.environ.pop("WANDB_SERVICE", None)
    os.environ |= {"WANDB_BASE_URL": reach.server, "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
    if reach.key is not None:
        os.environ["WANDB_API_KEY"] = reach.key


def _save(workspace: ws.Workspace, sweep: SweepDir, server: str) -> str:
    """Send the workspace. It replaces the one that this sweep already has in the same project."""
    project = {"server": server, "entity": workspace.entity, "project": workspace.project}
    saved = read_record(sweep.dashboard, DashboardRecord)
    # A workspace with a known id is overwritten; without one W&B creates another of the same name.
    if saved is not None and (saved.server, saved.entity, saved.project) == tuple(project.values()):
        workspace._internal_name = saved.name
        workspace._internal_id = saved.id
    with _deadline(server):
        workspace.save()
    address: str = workspace.url
    names = {"name": workspace._internal_name, "id": workspace._internal_id, "address": address}
    write_record(sweep.dashboard, DashboardRecord(**project, **names))
    return address


@contextmanager
def _deadline(server: str) -> Iterator[None]:
    """Give up after `SAVE_SECONDS`, since W&B's client never does, and turn its errors into one of this project's.

    Raises:
        LorapackError: the server rejects the request, or does not answer.
    """

    def give_up(*_: object) -> None:
        raise TimeoutError(f"no answer within {SAVE_SECONDS} s")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SAVE_SECONDS)
    try:
        yield
    except Exception as exc:
        # The client raises all kinds of errors.
        why = " ".join(f"{type(exc).__name__}: {exc}".split())
        raise LorapackError(
            f"The dashboard could not be saved at {server} ({why}); try again, or look at report.html."
        ) from exc
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def main() -> None:
    """Read the request from standard input: the sweep's folder, and its axes with their scales."""
    request = json.load(sys.stdin)
    axes = [SweptAxis(axis["key"], axis["scale"]) for axis in request["axes"]]
    address = make_dashboard(SweepDir(Path(request["sweep_dir"])), axes)
    print(json.dumps({"sweep": Path(request["sweep_dir"]).name, "address": address}) if request["json"] else address)


if __name__ == "__main__":
    try:
        main()
    except LorapackError as exc:
        print(f"error: {exc}", file=sys.stderr)
        sys.exit(exc.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
