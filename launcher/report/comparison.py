"""The values of a report: what the finished runs of a sweep measured, ranked, and how far the ranking can be trusted.

Nothing is read here. A new measure of a run is a field of `FinishedRun`, which is filled from the field of ``result.json`` of the
same name.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Literal

from launcher.records import State

AxisScale = Literal["log2", "log10", "linear", "category"]


@dataclass(frozen=True)
class Axis:
    """A key in which the runs differ. `values` are distinct and in order, each with a label and a position from 0 to 1."""

    key: str
    scale: AxisScale
    values: tuple[Any, ...]
    labels: tuple[str, ...]
    positions: tuple[float, ...]

    def index(self, value: Any) -> int:
        """Where `value` stands among the axis' values."""
        return self.values.index(value)


@dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Losses are nats per response token, speeds tokens per second of this run.
    seconds, peak_memory_gib: of the whole pack that it trained in. gpu_hours: its share of the pack's.
    cost_usd: what that share costs, if the partition has a price. eval_rows: the held-out rows over which loss and match are means.
    """

    rank: int
    id: str
    name: str
    axes: dict[str, Any]
    pack: str | None
    eval_loss: float | None
    eval_exact_match: float | None
    eval_rows: int | None
    base_eval_loss: float | None
    base_eval_exact_match: float | None
    best_eval_loss: float | None
    best_eval_step: int | None
    train_loss: float | None
    steps: int | None
    tokens: int | None
    tokens_per_second: float | None
    seconds: float | None
    gpu_hours: float | None
    cost_usd: float | None
    peak_memory_gib: float | None
    trainable_parameters: int | None
    total_parameters: int | None
    adapter_mb: float | None
    attempts: int | None
    device: str | None
    dtype: str | None
    path: str | None


@dataclass(frozen=True)
class UnfinishedRun:
    """A run without a result: listed, never ranked. `state` is a `records.State`, `reason` what a plan says about it."""

    id: str
    name: str
    axes: dict[str, Any]
    state: State
    reason: str
    step: int


@dataclass(frozen=True)
class Group:
    """The finished runs that differ only in their seed. `half_width` is that of the mean's 95 % interval."""

    axes: dict[str, Any]
    label: str
    runs: tuple[str, ...]
    mean: float
    deviation: float | None
    half_width: float | None


class LeadVerdict(StrEnum):
    """How the best configuration's lead compares with the noise between seeds.

    larger -> the lead is beyond the noise; within -> seeds alone could make it; unknown -> too few seeds, or runs, to tell.
    """

    LARGER = "larger"
    WITHIN = "within"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Noise:
    """Whether the best configuration's lead is larger than the noise between seeds, in numbers and in words.

    lead, low, high: the difference of mean eval losses with its 95 % interval. command: what to run to find out more.
    """

    verdict: LeadVerdict
    text: str
    lead: float | None = None
    low: float | None = None
    high: float | None = None
    command: str | None = None


@dataclass(frozen=True)
class Curve:
    """The losses of a run over its optimizer steps. Each point of `losses` is the mean of `steps_per_point` steps."""

    run: str
    steps: tuple[float, ...]
    losses: tuple[float, ...]
    eval_steps: tuple[float, ...]
    eval_losses: tuple[float, ...]
    steps_per_point: int


@dataclass(frozen=True)
class Sample:
    """A held-out prompt and an answer to it. `whole` is false if the answer was cut off."""

    prompt: str
    expected: str
    answer: str
    whole: bool


@dataclass(frozen=True)
class Answers:
    """Sample answers of a run to the same prompts: `base` before its first step, `tuned` after `step`."""

    run: str
    step: int
    base: tuple[Sample, ...]
    tuned: tuple[Sample, ...]


@dataclass(frozen=True)
class Report:
    """A sweep, compared.

    commands: what made the sweep, oldest first. rows: ranked, best first. groups: likewise, by their mean.
    caveats: sentences that limit the ranking. curves: in the order of `runs`. answers: of the runs that gave any.
    """

    sweep: str
    commands: tuple[str, ...]
    axes: tuple[Axis, ...]
    rows: tuple[FinishedRun, ...]
    groups: tuple[Group, ...]
    noise: Noise
    caveats: tuple[str, ...]
    unfinished: tuple[UnfinishedRun, ...]
    curves: tuple[Curve, ...]
    answers: tuple[Answers, ...]

    @property
    def runs(self) -> tuple[FinishedRun | UnfinishedRun, ...]:
        """Every run, ranked ones first."""
        return (*self.rows, *self.unfinished)

    @property
    def best(self) -> FinishedRun | None:
        """The run with the lowest eval loss."""
        return self.rows[0] if self.rows else None


def report_json(report: Report) -> dict[str, Any]:
    """The ranked rows with every axis, metric and cost, as one JSON document."""
    return {
        "sweep": report.sweep,
        "commands": list(report.commands),
        "axes": [axis.key for axis in report.axes],
        "best": None if report.best is None else report.best.id,
        "noise": asdict(report.noise),
        "caveats": list(report.caveats),
        "rows": [asdict(row) for row in report.rows],
        "groups": [asdict(group) for group in report.groups],
        "unfinished": [asdict(run) for run in report.unfinished],
    }
