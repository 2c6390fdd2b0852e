"""Eval loss against each swept axis, as positions that the page and the PNG plots draw alike."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.report.comparison import Axis, Group, Report
from launcher.report.differences import SEED, value_label

MIN_TICK_GAP = 0.07  # of the axis' length; closer labels would touch


@dataclass(frozen=True)
class Best:
    """The best configuration at one value of an axis: mean eval loss over its seeds, half width of its 95 % interval."""

    position: float
    value: str
    mean: float
    half_width: float | None


@dataclass(frozen=True)
class AxisChart:
    """`points` are (run id, position, eval loss) of every finished run; `best` joins the best configuration at each value."""

    axis: Axis
    points: tuple[tuple[str, float, float], ...]
    best: tuple[Best, ...]
    ticks: tuple[tuple[float, str], ...]


def axis_charts(report: Report) -> list[AxisChart]:
    """A chart per swept axis. Seeds are the points of the other axes' charts, and an axis only where there is no other."""
    axes = [axis for axis in report.axes if axis.key != SEED] or list(report.axes)
    return [AxisChart(axis, _points(report, axis), _best(report, axis), _ticks(axis)) for axis in axes]


def _points(report: Report, axis: Axis) -> tuple[tuple[str, float, float], ...]:
    return tuple(
        (row.id, axis.positions[axis.index(row.axes[axis.key])], row.eval_loss)
        for row in report.rows
        if row.eval_loss is not None
    )


def _best(report: Report, axis: Axis) -> tuple[Best, ...]:
    """The group with the lowest mean at each value that has one."""
    best: dict[int, Group] = {}
    for group in report.groups:  # best first
        if axis.key in group.axes:
            best.setdefault(axis.index(group.axes[axis.key]), group)
    return tuple(
        Best(axis.positions[index], value_label(axis.values[index]), group.mean, group.half_width)
        for index, group in sorted(best.items())
    )


def _ticks(axis: Axis) -> tuple[tuple[float, str], ...]:
    """The labels that fit side by side, from the left."""
    ticks: list[tuple[float, str]] = []
    for position, label in zip(axis.positions, axis.labels, strict=True):
        if not ticks or position - ticks[-1][0] >= MIN_TICK_GAP:
            ticks.append((position, label))
    return tuple(ticks)
