"""What a run's files show over its steps: loss curves, thinned for the page, and sample answers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from launcher.report.comparison import Answers, Curve, Sample
from train.store.journal import SamplesLine, read_losses
from train.store.layout import RunDir
from train.store.line_file import read_first, read_last

MAX_POINTS = 400
# An evaluation's line holds a few prompts with their answers.
TAIL_BYTES = 1 << 18

# Steps and values.
Series = list[tuple[int, float]]


def read_curve(run: RunDir) -> Curve:
    """The curve of one run, finished or not.

    Raises:
        DamagedFile: a line of its journal is damaged.
    """
    lines = read_losses(run.journal)
    training: Series = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    evaluation: Series = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    steps, losses, steps_per_point = thin(training)
    eval_steps, eval_losses, _ = thin(evaluation)
    return Curve(run.id, steps, losses, eval_steps, eval_losses, steps_per_point)


def thin(series: Sequence[tuple[int, float]]) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """At most `MAX_POINTS` points, each the mean of neighbouring ones: steps, values, and how many points are in a mean.

    Means instead of every n-th point, so that no lucky step stands for its neighbours. 1,000 points become 334 means of 3.
    """
    # 0 for an empty series, which needs no buckets but a step width.
    size = math.ceil(len(series) / MAX_POINTS) or 1
    buckets = [series[start : start + size] for start in range(0, len(series), size)]
    steps = tuple(sum(step for step, _ in bucket) / len(bucket) for bucket in buckets)
    values = tuple(sum(value for _, value in bucket) / len(bucket) for bucket in buckets)
    return steps, values, size


def read_answers(run: RunDir) -> Answers | None:
    """The first and the last answers of one run, finished or not; None if it gave none."""
    first, last = read_first(run.samples, SamplesLine), read_last(run.samples, SamplesLine, TAIL_BYTES)
    if first is None or last is None:
        return None
    return Answers(run.id, last.step, _samples(first), _samples(last))


def _samples(line: SamplesLine) -> tuple[Sample, ...]:
    return tuple(Sample(s.prompt, s.expected, s.answer, s.whole) for s in line.samples)
