"""The axes of a sweep: in which keys its runs differ, whatever commands made them, and the chart of eval loss against each.

Charts are positions, so that the page and the PNG plots draw the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launcher.report.comparison import Axis, AxisScale, Group, Report
from train.config import HOW_KEYS

# A flat configuration: full key -> value.
Values = dict[str, Any]

SEED = "train.seed"
# A fingerprint repeats what its source says. Keys that affect only speed or spacing do not distinguish runs.
NO_AXES = {"model.fingerprint", "data.fingerprint"} | {f"train.{key}" for key in HOW_KEYS["train"]}
# If the names differ already, these keys add nothing.
SHOWN_BY_NAME = {"model": ("source", "revision", "trust_remote_code"), "data": ("source", "eval_source", "revision")}
# From this ratio of the largest value to the smallest on, a logarithmic axis reads better.
LOG_SPAN = 8
# Of the axis' length; closer labels would touch.
MIN_TICK_GAP = 0.07


def flat(config: dict[str, Values]) -> Values:
    """``{"lora": {"r": 8}}`` is ``{"lora.r": 8}``; values that are dictionaries themselves stay whole."""
    return {f"{section}.{key}": value for section, values in config.items() for key, value in values.items()}


def swept_axes(configs: Sequence[Values]) -> tuple[Axis, ...]:
    """The keys in which flat `configs` differ, in the order of the configuration, seeds last."""
    keys = list(dict.fromkeys(key for config in configs for key in config))
    differing = [key for key in keys if key not in NO_AXES and len(_distinct(configs, key)) > 1]
    redundant = {
        f"{section}.{key}" for section, keys in SHOWN_BY_NAME.items() if f"{section}.name" in differing for key in keys
    }
    chosen = [key for key in differing if key not in redundant]
    return tuple(_axis(key, _distinct(configs, key)) for key in sorted(chosen, key=lambda key: key == SEED))


def value_label(value: Any) -> str:
    """A value as people write it: ``q_proj+v_proj``, ``0.0003``, ``null``."""
    if isinstance(value, list):
        return "+".join(value_label(item) for item in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def axes_label(axes: Values) -> str:
    """The values of several axes in one line, with the last part of each key: ``r=16, lora_alpha=32``."""
    return ", ".join(f"{key.rpartition('.')[2]}={value_label(value)}" for key, value in axes.items()) or "this run"


def _distinct(configs: Sequence[Values], key: str) -> list[Any]:
    """The different values of `key`, in order of appearance. Lists and dictionaries compare by content."""
    return list({_identity(value): value for value in (config.get(key) for config in configs)}.values())


def _identity(value: Any) -> str:
    """A text that is the same for equal values, such as 32 and 32.0."""
    is_whole = isinstance(value, float) and value.is_integer()
    return json.dumps(int(value) if is_whole else value)


def _axis(key: str, values: list[Any]) -> Axis:
    """The axis with its values in order, placed from 0 to 1."""
    scale = _scale(values)
    ordered = values if scale == "category" else sorted(values)
    labels = tuple(value_label(value) for value in ordered)
    return Axis(key, scale, tuple(ordered), labels, _positions(scale, ordered))


def _scale(values: list[Any]) -> AxisScale:
    """Numbers that span a wide range are spaced by their logarithm, powers of two by the one to base 2."""
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return "category"
    if min(values) <= 0 or max(values) / min(values) < LOG_SPAN:
        return "linear"
    return "log2" if all(math.log2(value).is_integer() for value in values) else "log10"


def _positions(scale: AxisScale, values: list[Any]) -> tuple[float, ...]:
    """Where each of the ordered `values` stands between 0 and 1: ranks 8, 16, 64 at 0, 1/3 and 1 on a log2 axis."""
    if scale == "category":
        # In the middle of slots of equal width.
        return tuple((index + 0.5) / len(values) for index in range(len(values)))
    numbers = [float(value) if scale == "linear" else math.log(value) for value in values]
    return tuple((number - numbers[0]) / (numbers[-1] - numbers[0]) for number in numbers)


@dataclass(frozen=True)
class Best:
    """The best configuration at one value of an axis.

    mean: of the eval loss over its seeds. half_width: of the mean's 95 % interval, None with one seed.
    """

    position: float
    value: str
    mean: float
    half_width: float | None


@dataclass(frozen=True)
class AxisChart:
    """Eval loss against one axis.

    points: run id, position and eval loss of every finished run. best: the best configuration at each value, joined by a line.
    ticks: positions and labels.
    """

    axis: Axis
    points: tuple[tuple[str, float, float], ...]
    best: tuple[Best, ...]
    ticks: tuple[tuple[float, str], ...]


def axis_charts(report: Report) -> list[AxisChart]:
    """A chart per swept axis. The seed is an axis only if it is the only one; otherwise seeds are points of the other charts."""
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
    # Groups are sorted best first, so the first one at a value stays.
    for group in report.groups:
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
