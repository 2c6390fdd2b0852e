"""The lines of a run's growing files: journal, pace, samples and attempts.

A journal holds a header, a line per step and per evaluation, and at most one divergence, its last line:

    {"step":0,"max_steps":12,"train_rows":90,"eval_rows":10,"trainable_parameters":4096,"total_parameters":135000000}
    {"step":0,"eval_loss":2.31,"eval_exact_match":0.0}
    {"step":1,"epoch":0.088889,"loss":2.3,"grad_norm":0.8,"learning_rate":0.001,"tokens":812}
    {"step":2,"diverged":"the loss is nan"}

Lines are written by the models here. They are read by the thousand, so as plain dictionaries (`JournalLine`) that pydantic checks
without building an object per line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Required

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from train.store.causes import Cause
from train.store.line_file import first_line, tail_lines, whole_lines
from train.store.record_file import LineRecord, RecordPart, parse_as, parse_record, read_content
from train.store.storage import append_lines


class JournalHeader(LineRecord):
    """The journal's first line: what will be trained, on how much. Version 0.1.0 wrote all of it."""

    step: int
    max_steps: int
    train_rows: int | None = None
    eval_rows: int | None = None
    trainable_parameters: int | None = None
    total_parameters: int | None = None


class StepLine(LineRecord):
    """An optimizer step: mean loss in nats per response token; `grad_norm` is null where it overflowed under the loss scale."""

    step: int
    epoch: float
    loss: float
    grad_norm: float | None
    learning_rate: float
    tokens: int
    loss_scale: float | None = None


class EvaluationLine(LineRecord):
    """An evaluation over the held-out rows after `step` steps."""

    step: int
    eval_loss: float
    eval_exact_match: float | None


class DivergenceLine(LineRecord):
    """The last line of a run whose loss or gradient was not finite."""

    step: int
    diverged: str


class JournalLine(TypedDict, total=False):
    """Any line of a journal, as it is read; its keys show which kind it is."""

    format: int
    step: Required[int]
    max_steps: int
    train_rows: int | None
    eval_rows: int | None
    trainable_parameters: int | None
    total_parameters: int | None
    epoch: float
    loss: float
    grad_norm: float | None
    learning_rate: float
    tokens: int
    loss_scale: float | None
    eval_loss: float
    eval_exact_match: float | None
    diverged: str


class LossLine(TypedDict, total=False):
    """The part of a journal's line that a loss curve needs; reading the rest would take four times as long."""

    step: Required[int]
    loss: float
    eval_loss: float


class PaceLine(LineRecord):
    """How fast the run trained until `time` (Unix seconds); the first line of an attempt also says what its start took."""

    step: int
    attempt: int
    time: float
    tokens_per_second: float
    seconds: float | None = None
    pack_tokens_per_second: float | None = None
    peak_memory_gib: float | None = None
    seconds_to_first_step: float | None = None
    start_seconds: dict[str, float] | None = None


class SampleAnswer(RecordPart):
    """A held-out prompt, by its row in the table, and an answer; `whole` is false where the answer was cut off."""

    row: int
    prompt: str
    expected: str
    answer: str
    whole: bool


class SamplesLine(LineRecord):
    """The answers of one evaluation."""

    step: int
    samples: list[SampleAnswer]


class AttemptLine(LineRecord):
    """One ended attempt; times in Unix seconds; `first_step` is null if it is unknown.

    `saved_step` is where the next attempt begins; `trained` says whether this one computed any step. A `cause` that is not a `Cause`
    was written by a later version.
    """

    attempt: int
    cause: Annotated[Cause | str, Field(union_mode="left_to_right")]
    detail: str | None
    first_step: int | None
    last_step: int
    saved_step: int | None = None
    trained: bool = False
    seconds: float
    started: float
    ended: float
    node: str
    device: str
    job: str
    restart_count: int = 0


_LINE = TypeAdapter(JournalLine)
_LINES = TypeAdapter(list[JournalLine])
_LOSSES = TypeAdapter(list[LossLine])


def append_journal(path: Path, lines: Sequence[LineRecord]) -> None:
    """Append lines to a journal. Unlike `append_records` it adds no format: a journal holds what was computed and nothing else.

    Raises:
        StorageError: the disk is full, read-only or gone.
    """
    append_lines(path, [line.model_dump(exclude_unset=True) for line in lines])


def read_journal(path: Path) -> list[JournalLine]:
    """Every whole line of a journal; none if there is no file.

    Raises:
        DamagedFile: a line does not belong to a journal.
    """
    return parse_as(_LINES, _as_list(path), path)


def read_losses(path: Path) -> list[LossLine]:
    """`read_journal` for its losses alone, which is faster: it matters at 500 runs of 1,000 steps.

    Raises:
        DamagedFile: a line does not belong to a journal.
    """
    return parse_as(_LOSSES, _as_list(path), path)


def read_header(path: Path) -> JournalHeader | None:
    """A journal's first line; None if there is none.

    Raises:
        DamagedFile: it is not a header.
    """
    line = first_line(path)
    return None if line is None else parse_record(line, JournalHeader, path, "line 1: ")


def journal_tail(path: Path) -> list[JournalLine]:
    """The last lines of a journal, without reading the rest.

    Raises:
        DamagedFile: one does not belong to a journal.
    """
    return [parse_line(line, path) for line in tail_lines(path)]


def parse_line(line: bytes, path: Path) -> JournalLine:
    """One line of the journal `path`.

    Raises:
        DamagedFile: it does not belong to a journal.
    """
    return parse_as(_LINE, line, path)


def _as_list(path: Path) -> bytes:
    """The whole lines of a file as one JSON list: pydantic parses one document much faster than a thousand."""
    return b"[" + b",".join(whole_lines(read_content(path) or b"", path)) + b"]"
