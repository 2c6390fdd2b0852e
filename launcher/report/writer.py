"""Run folders -> `Report`: which configuration won, by how much, and at what cost."""

from __future__ import annotations

from functools import partial

from launcher.plan.decision import decide
from launcher.plan_files import read_plans
from launcher.report.axes import SEED, Values, flat, swept_axes
from launcher.report.comparison import Curve, FinishedRun, Report, UnfinishedRun, report_json
from launcher.report.curves import read_answers, read_curve
from launcher.report.html_page import render_page
from launcher.report.noise import caveats_of, group_by_seed, judge_noise
from launcher.report.table import print_report
from launcher.track.tracker import track
from train.config import read_values
from train.mirror.request import cost_usd
from train.store.journal import read_header
from train.store.layout import RunDir, SweepDir
from train.store.record_file import DamageLog, read_record
from train.store.records import PackRecord, ResultRecord
from train.store.storage import make_folder, write_bytes, write_text

__all__ = ["build_report", "print_report", "report_json", "write_report"]

FROM_ELSEWHERE = {"rank", "id", "name", "axes", "pack", "eval_rows", "cost_usd"}
MEASURED = [key for key in FinishedRun.__dataclass_fields__ if key not in FROM_ELSEWHERE]


def build_report(sweep_dir: SweepDir) -> Report:
    """Compare the runs of a sweep folder by what is on disk. Writes nothing."""
    damage = DamageLog()
    configs = read_configs(sweep_dir.runs(), damage)
    runs = [run for run in sweep_dir.runs() if run.id in configs]
    axes = swept_axes(list(configs.values()))
    points = {run: {axis.key: config.get(axis.key) for axis in axes} for run, config in configs.items()}
    rows = _ranked(runs, points, _packs(sweep_dir, damage), damage)
    finished = {row.id for row in rows}
    unfinished = _unfinished(sweep_dir, [run for run in runs if run.id not in finished], points)
    folders = {run.id: run for run in runs}
    ranked = [run.id for run in rows] + [run.id for run in unfinished]
    groups = group_by_seed(rows)
    commands = _commands(sweep_dir, damage)
    seeds = sorted({config.get(SEED, 0) for config in configs.values()})
    curves = tuple(_curve(folders[run_id], damage) for run_id in ranked)
    answers = tuple(damage.read(partial(read_answers, folders[run_id]), None) for run_id in ranked)
    return Report(
        sweep=sweep_dir.path.name,
        commands=commands,
        axes=axes,
        rows=rows,
        groups=groups,
        noise=judge_noise(groups, sweep=sweep_dir.path.name, commands=commands, seeds=seeds),
        caveats=(*caveats_of(axes, rows, unfinished), *damage.messages),
        unfinished=unfinished,
        curves=curves,
        answers=tuple(answer for answer in answers if answer is not None),
    )


def read_configs(runs: list[RunDir], damage: DamageLog) -> dict[str, Values]:
    """The flat configuration of every run, by id, without damaged ones."""
    configs = {run.id: damage.read(partial(read_values, run.config), None) for run in runs}
    return {run_id: flat(config) for run_id, config in configs.items() if config is not None}


def _curve(run: RunDir, damage: DamageLog) -> Curve:
    """The curve of a run, without points if its journal is damaged."""
    return damage.read(partial(read_curve, run), Curve(run.id, (), (), (), (), 1))


def write_report(sweep_dir: SweepDir) -> Report:
    """Compare the runs and write ``report.html`` and ``plots/*.png``.

    Raises:
        StorageError: the disk is full, read-only or gone.
    """
    # Importing matplotlib takes half a second, and only this verb needs it.
    from launcher.report.plots import draw_plots

    report = build_report(sweep_dir)
    write_text(sweep_dir.report, render_page(report))
    make_folder(sweep_dir.plots)
    for name, image in draw_plots(report).items():
        write_bytes(sweep_dir.plots / name, image)
    return report


def _ranked(
    runs: list[RunDir], points: dict[str, Values], packs: dict[str, PackRecord], damage: DamageLog
) -> tuple[FinishedRun, ...]:
    """The finished runs by eval loss, lowest first; equal ones by name. A run without an eval loss comes last."""
    read = [(run, damage.read(partial(read_record, run.result, ResultRecord), None)) for run in runs]
    results = [(run, result) for run, result in read if result is not None]

    def order(finished: tuple[RunDir, ResultRecord]) -> tuple[bool, float, str]:
        loss = finished[1].eval_loss
        return (loss is None, loss or 0.0, finished[0].name)

    ranked = enumerate(sorted(results, key=order), start=1)
    return tuple(
        _row(rank, run, points[run.id], result, packs.get(run.path.name), damage) for rank, (run, result) in ranked
    )


def _row(
    rank: int, run: RunDir, axes: Values, result: ResultRecord, pack: PackRecord | None, damage: DamageLog
) -> FinishedRun:
    """A finished run. `pack` describes the last pack that it trained in, if that is known."""
    header = damage.read(partial(read_header, run.journal), None)
    return FinishedRun(
        rank=rank,
        id=run.id,
        name=run.name,
        axes=axes,
        pack=None if pack is None else pack.id,
        eval_rows=None if header is None else header.eval_rows,
        cost_usd=None if pack is None else cost_usd(pack.forecast, result),
        **{key: getattr(result, key) for key in MEASURED},
    )


def _unfinished(sweep_dir: SweepDir, runs: list[RunDir], points: dict[str, Values]) -> tuple[UnfinishedRun, ...]:
    """The runs without a result: their state now, and what a plan would say about them."""
    reasons = {run.id: decide(run, retry_failed=False).reason for run in runs}
    return tuple(
        UnfinishedRun(status.id, status.name, points[status.id], status.state, reasons[status.id], status.step)
        for status in track(sweep_dir, runs)
    )


def _packs(sweep_dir: SweepDir, damage: DamageLog) -> dict[str, PackRecord]:
    """Run folder -> the newest pack that it trained in."""
    files = sorted(sweep_dir.jobs.glob("*/pack.json"), key=lambda file: file.stat().st_mtime)
    packs = [damage.read(partial(read_record, file, PackRecord), None) for file in files]
    return {run: pack for pack in packs if pack is not None for run in pack.runs}


def _commands(sweep_dir: SweepDir, damage: DamageLog) -> tuple[str, ...]:
    """The command lines of the accepted plans, oldest first, each once."""
    return tuple(dict.fromkeys(plan.command for plan in read_plans(sweep_dir, damage)))
