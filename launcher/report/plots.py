"""The report's plots as PNG, for slides and papers. Importing this takes as long as matplotlib does."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from launcher.report.axes import SEED, AxisChart, axes_label, axis_charts
from launcher.report.comparison import Curve, FinishedRun, Report

PIXELS_PER_INCH = 160
LEGEND_ROWS = 12
# The best runs; more lines than this are unreadable.
DRAWN_CURVES = 60
# Okabe and Ito's palette without its yellow and black, which color-blind people can tell apart on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def draw_plots(report: Report) -> dict[str, bytes]:
    """File name -> PNG: the loss curves, and eval loss against each swept axis."""
    charts = [chart for chart in axis_charts(report) if chart.points]
    against = {f"eval_loss_{_file_part(chart.axis.key)}.png": _eval_loss(report, chart) for chart in charts}
    return {"loss_curves.png": _loss_curves(report)} | against


def _loss_curves(report: Report) -> bytes:
    """Training and evaluation loss of the best runs over their steps."""
    figure = _figure(11.0)
    training, evaluation = figure.subplots(1, 2)
    drawn = list(zip(report.runs, report.curves, strict=True))[:DRAWN_CURVES]
    for index, (run, curve) in enumerate(drawn):
        color = _color(report, run.axes, index)
        label = _plain(axes_label(run.axes)) if index < LEGEND_ROWS else None
        training.plot(curve.steps, curve.losses, color=color, lw=1.3, label=label)
        evaluation.plot(curve.eval_steps, curve.eval_losses, color=color, lw=1.6, marker="o", ms=3)
    ranked = [curve for run, curve in drawn if isinstance(run, FinishedRun)]
    _cut_above(training, [loss for curve in ranked for loss in curve.losses])
    _cut_above(evaluation, [loss for curve in ranked for loss in curve.eval_losses])
    _name_axes(training, _training_title(report.curves, len(drawn)), "optimizer step", "training loss")
    _name_axes(evaluation, "Evaluation", "optimizer step", "eval loss")
    if drawn:
        training.legend(frameon=False, fontsize=8)
    return _png(figure)


def _cut_above(plot: Axes, losses: list[float]) -> None:
    """End the plot at twice the highest of `losses`, those of finished runs. A diverging run would flatten all others into one line."""
    if losses and 0 < 2 * max(losses) < plot.get_ylim()[1]:
        plot.set_ylim(top=2 * max(losses))


def _eval_loss(report: Report, chart: AxisChart) -> bytes:
    """Every run as a point; the best configuration at each value as a line with its interval over seeds."""
    figure = _figure(6.4)
    plot = figure.subplots()
    plot.scatter(
        [point[1] for point in chart.points], [point[2] for point in chart.points], s=22, color="#8a94a6", alpha=0.7
    )
    plot.errorbar(
        [best.position for best in chart.best],
        [best.mean for best in chart.best],
        yerr=[best.half_width or 0.0 for best in chart.best],
        color=PALETTE[0],
        marker="o",
        capsize=4,
        lw=2,
        ls=":" if chart.axis.scale == "category" else "-",
    )
    plot.set_xticks([position for position, _ in chart.ticks], [label for _, label in chart.ticks])
    plot.set_xlim(-0.06, 1.06)
    has_seeds = any(best.half_width is not None for best in chart.best)
    title = f"{report.sweep}: best per value" + (", mean and 95 % interval over seeds" if has_seeds else "")
    _name_axes(plot, title, chart.axis.key, "final eval loss")
    return _png(figure)


def _color(report: Report, axes: dict[str, Any], index: int) -> Any:
    """By the value of the first axis: a ramp for numbers, a palette for categories; by rank if nothing is swept."""
    first = next((axis for axis in report.axes if axis.key != SEED), None)
    if first is None:
        return PALETTE[index % len(PALETTE)]
    place = first.index(axes[first.key])
    if first.scale == "category":
        return PALETTE[place % len(PALETTE)]
    # The last part of viridis is too bright on white.
    return matplotlib.colormaps["viridis"](0.85 * first.positions[place])


def _training_title(curves: tuple[Curve, ...], drawn: int) -> str:
    """What is drawn, and what a point stands for."""
    per_point = max((curve.steps_per_point for curve in curves), default=1)
    which = "Training" if drawn == len(curves) else f"Training, best {drawn} of {len(curves)} runs"
    return which if per_point == 1 else f"{which}; a point is the mean of {per_point} steps"


def _figure(width_inches: float) -> Figure:
    """An empty figure without a window."""
    figure = Figure(figsize=(width_inches, 4.0), dpi=PIXELS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _name_axes(plot: Axes, title: str, x_label: str, y_label: str) -> None:
    """Title, axis labels and the look that all plots share."""
    plot.set_title(_plain(title), fontsize=10, fontweight="bold", loc="left")
    plot.set_xlabel(_plain(x_label))
    plot.set_ylabel(y_label)
    plot.grid(alpha=0.25)
    plot.spines[["top", "right"]].set_visible(False)


def _plain(text: str) -> str:
    """`text` with matplotlib's math mark-up switched off."""
    return text.replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    """The figure's PNG, without matplotlib's version in it, so that equal reports give equal files."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _file_part(key: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", key)
