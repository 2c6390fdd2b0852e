"""Journal and pace -> the rows of W&B: one per step, complete, each given once and in order.

A job that was preempted cuts its journal back to a checkpoint and says the same lines again, to the bit. So a row that was given
stays right, and reading anew only skips it.
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

# The journal's names -> W&B's, where a slash makes a section. transformers' Trainer calls them so too.
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
SAMPLES = "eval/samples"  # the table of sample answers
PACE_NAMES = {
    "tokens_per_second": "perf/tokens_per_second",
    "pack_tokens_per_second": "perf/pack_tokens_per_second",
    "peak_memory_gib": "perf/peak_vram_gib",
    "time": "_timestamp",  # W&B's name for when a row was measured; it would take the time of its arrival
}


L = TypeVar("L")


@dataclass(frozen=True)
class Row:
    """What W&B gets for one step. `samples` are the answers of its evaluation, with the base's answer as ``base``."""

    step: int
    values: dict[str, Any]
    samples: tuple[dict[str, Any], ...] = ()


class GrowingFile(Generic[L]):
    """The whole lines of a JSON-lines file that grows, and that its writer may cut back or begin again, each read by `parse`."""

    def __init__(self, path: Path, parse: Callable[[bytes, Path], L]) -> None:
        self._path, self._parse = path, parse
        self._inode = self._read_bytes = 0

    def new_lines(self) -> tuple[bool, list[L]]:
        """Whether the file is read from its start again, and the lines since the last call.

        Raises:
            DamagedFile: a line is damaged.
        """
        try:
            with self._path.open("rb") as file:
                known = os.fstat(file.fileno())
                again = known.st_ino != self._inode or known.st_size < self._read_bytes
                file.seek(0 if again else self._read_bytes)
                content = file.read()
        except FileNotFoundError:
            return False, []
        whole = content[: content.rfind(b"\n") + 1]
        try:
            lines = [self._parse(line, self._path) for line in whole.splitlines()]
        except DamagedFile:
            if again:
                raise
            self._inode = 0  # cut back and grown past our place between two looks, to other bytes
            return self.new_lines()
        self._inode, self._read_bytes = known.st_ino, (0 if again else self._read_bytes) + len(whole)
        return again, lines


class RunRows:
    """The rows of a run after step `given`.

    Attributes:
        given: the last step that was given.
        diverged: the run's last word, if it diverged.
    """

    def __init__(self, run: RunDir, config: TrainConfig, given: int) -> None:
        self.given = given
        self.diverged: str | None = None
        self.header: JournalLine = {"step": 0}
        self._eval_steps = config.eval_steps
        self._journal, self._pace = GrowingFile(run.journal, parse_line), GrowingFile(run.pace, _pace)
        self._sample_lines, self._samples = GrowingFile(run.samples, _samples), dict[int, list[SampleAnswer]]()
        self._pending: dict[int, dict[str, Any]] = {}
        self._paces: list[PaceLine] = []

    def take(self, *, ended: bool, final: bool) -> list[Row]:
        """Every row that is complete now and was not given yet.

        Args:
            ended: nobody trains the run, so no pace will come for its last steps.
            final: the journal is complete: nobody will evaluate its last step.
        """
        self._read_journal()
        self._read_pace()  # after the journal: what the trainer wrote before the journal's last line is there by now
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
            self._pending, self.diverged = {}, None
        for line in lines:
            self.diverged = line.get("diverged", self.diverged)
            if "max_steps" in line:
                self.header = line
            elif "diverged" not in line and line["step"] > self.given:
                self._pending.setdefault(line["step"], {}).update(line)

    def _read_pace(self) -> None:
        _, lines = self._pace.new_lines()
        for line in lines:
            while self._paces and self._paces[-1].step >= line.step:  # said by an attempt that was rolled back
                self._paces.pop()
            self._paces.append(line)

    def _evaluated(self, step: int) -> bool:
        """Whether nothing more will be said of `step`: evaluations follow their step's line."""
        due = step in (0, self.header.get("max_steps")) or (self._eval_steps > 0 and step % self._eval_steps == 0)
        return not due or "eval_loss" in self._pending[step] or max(self._pending) > step

    def _pace_of(self, step: int) -> dict[str, Any] | None:
        """The line that covers `step`; what comes before the first step waits for none."""
        place = bisect_left(self._paces, step, key=lambda line: line.step)
        if step == 0:
            first = self._paces[0] if self._paces else None
            return {} if first is None else {"time": first.time - (first.seconds or 0.0)}
        return self._paces[place].model_dump() if place < len(self._paces) else None

    def _values(self, step: int) -> dict[str, Any]:
        sources = ((self._pending[step], JOURNAL_NAMES), (self._pace_of(step) or {}, PACE_NAMES))
        named = {to: record.get(name) for record, names in sources for name, to in names.items()}
        return {name: value for name, value in named.items() if value is not None}

    def _samples_of(self, step: int) -> tuple[dict[str, Any], ...]:
        """The answers given at `step`, each beside the one that the base gave."""
        base = {sample.row: sample.answer for sample in self._samples.get(0, [])}
        return tuple(sample.model_dump() | {"base": base.get(sample.row)} for sample in self._samples.get(step, []))


def _pace(line: bytes, path: Path) -> PaceLine:
    return parse_record(line, PaceLine, path)


def _samples(line: bytes, path: Path) -> SamplesLine:
    return parse_record(line, SamplesLine, path)
