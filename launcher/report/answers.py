"""Sample answers from run folders: what the base said before training, and what the tuned model says now."""

from __future__ import annotations

from launcher.report.comparison import Answers, Sample
from train.rundir import RunDir
from train.storage import Record, read_first_line, tail_lines

TAIL_BYTES = 1 << 18  # an evaluation's line holds a few prompts with their answers


def read_answers(run: RunDir) -> Answers | None:
    """The first and the last answers of one run, finished or not; None where it gave none."""
    first, last = read_first_line(run.samples), tail_lines(run.samples, TAIL_BYTES)
    if first is None or not last:
        return None
    return Answers(run.id, last[-1]["step"], _samples(first), _samples(last[-1]))


def _samples(line: Record) -> tuple[Sample, ...]:
    return tuple(Sample(s["prompt"], s["expected"], s["answer"], s["whole"]) for s in line["samples"])
