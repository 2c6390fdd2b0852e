"""Run folders -> `Report`: which configuration won, by how much, at what cost; in the terminal, as JSON and as a page."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from launcher.plan.decision import decide
from launcher.report.axes import SEED, Values, flat, swept_axes
from launcher.report.comparison import FinishedRun, Report, UnfinishedRun, report_json
from launcher.report.curves import read_answers, read_curve
from launcher.report.html_page import render_page
from launcher.report.noise import caveats_of, group_by_seed, judge_noise
from launcher.report.table import print_report
from launcher.track.tracker import track
from train.errors import StorageError
from train.mirror.request import cost_usd
from train.store.layout import RunDir, SweepDir
from train.store.storage import Record, make_folder, read_first_line, read_json, write_bytes, write_text

__all__ = ["build_report", "print_report", "report_json", "write_report"]

# With the parser written in Python, reading 500 configurations takes 3 s.
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
FROM_ELSEWHERE = {"rank", "id", "name", "axes", "pack", "eval_rows", "cost_usd"}
MEASURED = [key for key in FinishedRun.__dataclass_fields__ if key not in FROM_ELSEWHERE]


def build_report(sweep_dir: SweepDir) -> Report:
    """Compare the runs of a sweep folder by what is on disk. Writes nothing."""
    runs = sweep_dir.runs()
    configs = read_configs(runs)
    axes = swept_axes(list(configs.values()))
    points = {run: {axis.key: config.get(axis.key) for axis in axes} for run, config in configs.items()}
    rows = _ranked(runs, points, _packs(sweep_dir))
    finished = {row.id for row in rows}
    unfinished = _unfinished(sweep_dir, [run for run in runs if run.id not in finished], points)
    folders = {run.id: run for run in runs}
    ranked = [run.id for run in rows] + [run.id for run in unfinished]
    groups = group_by_seed(rows)
    commands = _commands(sweep_dir)
    seeds = sorted({config.get(SEED, 0) for config in configs.values()})
    return Report(
        sweep=sweep_dir.path.name,
        commands=commands,
        axes=axes,
        rows=rows,
        groups=groups,
        noise=judge_noise(groups, sweep=sweep_dir.path.name, commands=commands, seeds=seeds),
        caveats=caveats_of(axes, rows, unfinished),
        unfinished=unfinished,
        curves=tuple(read_curve(folders[run_id]) for run_id in ranked),
        answers=tuple(answers for run_id in ranked if (answers := read_answers(folders[run_id])) is not None),
    )


def read_configs(runs: list[RunDir]) -> dict[str, Values]:
    """The flat configuration of every run, by id.

    Raises:
        StorageError: one is damaged.
    """
    return {run.id: flat(_config(run.config)) for run in runs}


def _config(path: Path) -> dict[str, Values]:
    try:
        config: dict[str, Values] = yaml.load(path.read_bytes(), YAML_LOADER)
    except yaml.YAMLError as exc:
        raise StorageError(f"{path} is damaged: it holds no YAML ({exc}). Restore it, or remove its folder.") from exc
    return config


def write_report(sweep_dir: SweepDir) -> Report:
    """Compare the runs and write ``report.html`` and ``plots/*.png``.

    Raises:
        StorageError: the disk is full, read-only or gone.
    """
    from launcher.report.plots import draw_plots  # matplotlib takes half a second, and only this verb needs it

    report = build_report(sweep_dir)
    write_text(sweep_dir.report, render_page(report))
    make_folder(sweep_dir.plots)
    for name, image in draw_plots(report).items():
        write_bytes(sweep_dir.plots / name, image)
    return report


def _ranked(runs: list[RunDir], points: dict[str, Values], packs: dict[str, Record]) -> tuple[FinishedRun, ...]:
    """The finished runs by eval loss, lowest first; equal ones by name. A run without an eval loss comes last."""
    results = [(run, result) for run in runs if (result := read_json(run.result)) is not None]

    def order(finished: tuple[RunDir, Record]) -> tuple[bool, float, str]:
        loss = finished[1].get("eval_loss")
        return (loss is None, loss or 0.0, finished[0].name)

    ranked = enumerate(sorted(results, key=order), start=1)
    return tuple(
        _row(rank, run, points[run.id], result, packs.get(run.path.name, {})) for rank, (run, result) in ranked
    )


def _row(rank: int, run: RunDir, axes: Values, result: Record, pack: Record) -> FinishedRun:
    """A finished run. `pack` describes the last pack that it trained in."""
    return FinishedRun(
        rank=rank,
        id=run.id,
        name=run.name,
        axes=axes,
        pack=pack.get("id"),
        eval_rows=(read_first_line(run.journal) or {}).get("eval_rows"),
        cost_usd=cost_usd(pack.get("forecast", {}), result),
        **{key: result.get(key) for key in MEASURED},
    )


def _unfinished(sweep_dir: SweepDir, runs: list[RunDir], points: dict[str, Values]) -> tuple[UnfinishedRun, ...]:
    """The runs without a result: their state now, and what a plan would say about them."""
    reasons = {run.id: decide(run, retry_failed=False).reason for run in runs}
    return tuple(
        UnfinishedRun(status.id, status.name, points[status.id], status.state.value, reasons[status.id], status.step)
        for status in track(sweep_dir, runs)
    )


def _packs(sweep_dir: SweepDir) -> dict[str, Record]:
    """Run folder -> the newest pack that it trained in."""
    files = sorted(sweep_dir.jobs.glob("*/pack.json"), key=lambda file: file.stat().st_mtime)
    packs = [read_json(file) for file in files]
    return {run: pack for pack in packs for run in pack["runs"]}


def _commands(sweep_dir: SweepDir) -> tuple[str, ...]:
    """The command lines of the accepted plans, oldest first, each once."""
    files = sorted((file for file in sweep_dir.plans.glob("*.json") if file.stem.isdigit()), key=_plan_number)
    plans = [json.loads(file.read_bytes()) for file in files]
    return tuple(dict.fromkeys(plan["command"] for plan in plans if plan.get("command")))


def _plan_number(file: Path) -> int:
    return int(file.stem)
