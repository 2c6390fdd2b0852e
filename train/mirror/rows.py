"""Turns a run's journal and pace into rows of W&B's history: one per step, complete, each given once and in order.

A preempted job's next attempt truncates the journal to a checkpoint and writes the same lines again, bit for bit. So a row that was
given stays right. When the file is read again from its start, steps up to `RunRows.given` are skipped.

A step's row needs lines of up to three files, which are written one after the other:

    journal   {"step": 20, "loss": …}, then {"step": 20, "eval_loss": …} if an evaluation is due
    pace      {"step": 25, "tokens_per_second": …}: one line covers the steps since the one before, here 21 to 25
    samples   {"step": 20, "samples": […]}, before the evaluation's line in the journal

So step 20 is given once its evaluation is there, or a later step is, and once a pace line with step 20 or more is there.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from train.config import TrainConfig
from train.errors import DamagedFile
from train.store.journal import JournalLine, PaceLine, SampleAnswer, SamplesLine, parse_line
from train.store.layout import RunDir
from train.store.record_file import parse_record

# The journal's names -> W&B's, in which a slash makes a section. transformers' Trainer uses the same names.
JOURNAL_NAMES = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "loss_scale": "train/loss_scale",
    "tokens": "train/tokens",
    "epoch": "train/epoch",
    "eval_loss": "eval/loss",
    "eval_exact_match": "eval/exact_match",
}
# The table of sample answers.
SAMPLES = "eval/samples"
PACE_NAMES = {
    "tokens_per_second": "perf/tokens_per_second",
    "pack_tokens_per_second": "perf/pack_tokens_per_second",
    "peak_memory_gib": "perf/peak_vram_gib",
    # W&B's name for when a row was measured. Without it W&B takes the time at which the row arrives.
    "time": "_timestamp",
}


L = TypeVar("L")


@dataclass(frozen=True)
class Row:
    """A row of W&B's history: one step. `samples` are the answers of its evaluation, with the base's answer as ``base``."""

    step: int
    values: dict[str, Any]
    samples: tuple[dict[str, Any], ...] = ()


class GrowingFile(Generic[L]):
    """The complete lines of a growing JSON-lines file, each read by `parse`. Its writer may truncate or replace the file."""

    def __init__(self, path: Path, parse: Callable[[bytes, Path], L]) -> None:
        self._path = path
        self._parse = parse
        # Which file was read last, and how many bytes of it; no file has inode 0.
        self._inode = 0
        self._read_bytes = 0

    def new_lines(self) -> tuple[bool, list[L]]:
        """Whether the file was read from its start again, and the lines since the last call (or since the start).

        Raises:
            DamagedFile: a line is damaged.
        """
        try:
            with self._path.open("rb") as file:
                known = os.fstat(file.fileno())
                # Another file under this name, or one that is shorter than what was read of it.
                again = known.st_ino != self._inode or known.st_size < self._read_bytes
                file.seek(0 if again else self._read_bytes)
                content = file.read()
        except FileNotFoundError:
            return False, []
        # The last line may be written only in part; it is read next time.
        whole = content[: content.rfind(b"\n") + 1]
        try:
            lines = [self._parse(line, self._path) for line in whole.splitlines()]
        except DamagedFile:
            if again:
                raise
            # Between two calls the file was truncated and grew past where it was read: reading began inside a line. So read it again.
            self._inode = 0
            return self.new_lines()
        self._inode = known.st_ino
        self._read_bytes = (0 if again else self._read_bytes) + len(whole)
        return again, lines


class RunRows:
    """The rows of a run after step `given`.

    Attributes:
        given: the last step that was given.
        diverged: why the run diverged, None if it did not.
        header: the journal's first line.
    """

    def __init__(self, run: RunDir, config: TrainConfig, given: int) -> None:
        self.given = given
        self.diverged: str | None = None
        self.header: JournalLine = {"step": 0}
        self._eval_steps = config.eval_steps
        self._journal = GrowingFile(run.journal, parse_line)
        self._pace = GrowingFile(run.pace, _pace)
        self._sample_lines = GrowingFile(run.samples, _samples)
        self._samples = dict[int, list[SampleAnswer]]()
        self._pending: dict[int, dict[str, Any]] = {}
        self._paces: list[PaceLine] = []

    def take(self, *, ended: bool, final: bool) -> list[Row]:
        """Every row that is complete and was not given yet, in order.

        Args:
            ended: no process trains the run any more, so its last steps get no pace.
            final: the journal is complete, so its last step gets no evaluation.
        """
        # The journal first. What the trainer wrote to the other files before the journal's last line is there by then.
        self._read_journal()
        self._read_pace()
        self._samples |= {line.step: line.samples for line in self._sample_lines.new_lines()[1]}
        rows = []
        for step in sorted(self._pending):
            if not (final or self._evaluated(step)) or not (ended or self._pace_of(step) is not None):
                break
            rows.append(Row(step, self._values(step), self._samples_of(step)))
        for row in rows:
            del self._pending[row.step]
            self.given = row.step
        return rows

    def _read_journal(self) -> None:
        again, lines = self._journal.new_lines()
        if again:
            self._pending = {}
            self.diverged = None
        for line in lines:
            self.diverged = line.get("diverged", self.diverged)
            if "max_steps" in line:
                self.header = line
            elif "diverged" not in line and line["step"] > self.given:
                self._pending.setdefault(line["step"], {}).update(line)

    def _read_pace(self) -> None:
        _, lines = self._pace.new_lines()
        for line in lines:
            # Those lines are from an attempt that was rolled back to a checkpoint before `line.step`.
            while self._paces and self._paces[-1].step >= line.step:
                self._paces.pop()
            self._paces.append(line)

    def _evaluated(self, step: int) -> bool:
        """Whether the journal has everything of `step`. An evaluation's line follows that of its step, before any later step's."""
        due = step in (0, self.header.get("max_steps")) or (self._eval_steps > 0 and step % self._eval_steps == 0)
        return not due or "eval_loss" in self._pending[step] or max(self._pending) > step

    def _pace_of(self, step: int) -> dict[str, Any] | None:
        """The pace line that covers `step`, None if it is not written yet. Step 0, before training, needs none."""
        if step == 0:
            first = self._paces[0] if self._paces else None
            return {} if first is None else {"time": first.time - (first.seconds or 0.0)}
        # The first line at or after the step: with lines for 20, 25 and 30, step 21 is covered by 25, index 1.
        index = bisect_left(self._paces, step, key=lambda line: line.step)
        return self._paces[index].model_dump() if index < len(self._paces) else None

    def _values(self, step: int) -> dict[str, Any]:
        sources = ((self._pending[step], JOURNAL_NAMES), (self._pace_of(step) or {}, PACE_NAMES))
        named = {to: record.get(name) for record, names in sources for name, to in names.items()}
        return {name: value for name, value in named.items() if value is not None}

    def _samples_of(self, step: int) -> tuple[dict[str, Any], ...]:
        """The answers given at `step`, each with the base's answer to the same prompt, which step 0 recorded."""
        base = {sample.row: sample.answer for sample in self._samples.get(0, [])}
        return tuple(sample.model_dump() | {"base": base.get(sample.row)} for sample in self._samples.get(step, []))


def _pace(line: bytes, path: Path) -> PaceLine:
    return parse_record(line, PaceLine, path)


def _samples(line: bytes, path: Path) -> SamplesLine:
    return parse_record(line, SamplesLine, path)
