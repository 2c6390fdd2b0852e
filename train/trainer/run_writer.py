"""The files of one run, as the process that holds its lease writes them.

Every file appears in an order that makes a kill at any moment harmless:

    while it trains    journal and samples -> checkpoint, which notes how long both were
    at its end         adapter -> attempt -> result -> lease given back -> checkpoints removed

A run that is killed before its result exists is resumed from its last checkpoint, and writes the rest again. A run that has its result
is done, whatever is left of its checkpoints.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

from train.config import RunConfig
from train.errors import StorageError
from train.lora.parameters import AdapterTensors
from train.lora.peft_files import write_adapter
from train.lora.peft_forms import StockPeft
from train.lora.targets import Target
from train.runtime.attempts import attempt_line, stop_cause
from train.store.causes import Cause
from train.store.journal import (
    AttemptLine,
    JournalHeader,
    JournalLine,
    PaceLine,
    SamplesLine,
    append_journal,
    read_journal,
)
from train.store.layout import RunDir
from train.store.lease import Lease, owns, release
from train.store.line_file import append_records, read_records
from train.store.record_file import LineRecord, write_record
from train.store.records import ResultRecord
from train.store.storage import storage_errors, write_folder
from train.trainer.base import Environment
from train.trainer.checkpoint import Checkpoint, Progress, save_checkpoint

# `train_loss` of the result is the mean over this share of the last steps.
RESULT_LOSS_SHARE = 0.1


class RunTotals(TypedDict):
    """The numbers of `ResultRecord` that the session counts."""

    steps: int
    best_eval_loss: float | None
    best_eval_step: int | None
    tokens: int
    seconds: float
    gpu_hours: float
    tokens_per_second: float


class RunWriter:
    """Writes the folder `dir` of a run during the attempt that `lease` stands for.

    `peft` says how the adapter's configuration is written. A method raises `StorageError` or `OSError` if the folder refuses the write
    (full, deleted, out of reach).
    """

    def __init__(self, run: RunDir, lease: Lease, peft: StockPeft) -> None:
        self.dir = run
        self.lease = lease
        self._peft = peft

    def begin(self, header: JournalHeader) -> None:
        """Start the journal from nothing."""
        # A run without any sound checkpoint may have files from attempts that were killed early.
        with storage_errors(self.dir.journal):
            self.dir.journal.unlink(missing_ok=True)
            self.dir.samples.unlink(missing_ok=True)
        append_journal(self.dir.journal, [header])

    def rewind(self, progress: Progress) -> JournalLine | None:
        """Cut off what was written after a checkpoint; the line of the run's divergence, if it had diverged by then.

        For example: the checkpoint of step 40 was saved when the journal had 6,120 bytes. The job was killed at step 57, with 8,700
        bytes. The journal is cut back to 6,120 bytes, and steps 41 to 57 are computed and written again, to the same bytes.
        """
        with storage_errors(self.dir.journal):
            # Checkpoints first: one of a later step counts on journal lines that are cut off next.
            for newer in [step for step in self.dir.checkpoint_steps() if step > progress.step]:
                shutil.rmtree(self.dir.checkpoint(newer))
            os.truncate(self.dir.journal, progress.journal_bytes)
            # `truncate` would fill a shorter file with zeros.
            if _size(self.dir.samples) > progress.samples_bytes:
                os.truncate(self.dir.samples, progress.samples_bytes)
        if progress.alive:
            return None
        return next(line for line in reversed(read_journal(self.dir.journal)) if "diverged" in line)

    def append(self, lines: Sequence[LineRecord]) -> None:
        """Append lines to the journal."""
        append_journal(self.dir.journal, lines)

    def append_samples(self, line: SamplesLine) -> None:
        """Append the answers of one evaluation."""
        append_records(self.dir.samples, [line])

    def append_pace(self, line: PaceLine) -> None:
        """Append how fast the run trains."""
        append_records(self.dir.pace, [line])

    def sizes(self) -> tuple[int, int]:
        """The lengths of journal and samples now, in bytes."""
        return self.dir.journal.stat().st_size, _size(self.dir.samples)

    def save(self, checkpoint: Checkpoint) -> None:
        """Save a checkpoint."""
        save_checkpoint(self.dir, checkpoint)

    def complete(
        self,
        adapter: AdapterTensors,
        targets: Mapping[str, Target],
        config: RunConfig,
        first_step: int,
        totals: RunTotals,
        environment: Environment,
    ) -> None:
        """Write the adapter and, last, the result; then give the folder back.

        Raises:
            BadInput, LorapackError: PEFT would not load the adapter as it was trained (`StockPeft.config`). The checkpoints stay.
        """
        peft_config = self._peft.config(config.lora, targets, adapter)
        with write_folder(self.dir.adapter) as folder, storage_errors(folder):
            write_adapter(folder, peft_config, adapter)
        # Before the result, which counts the attempts.
        self._append_attempt(Cause.DONE, None, first_step, totals["steps"])
        write_record(self.dir.result, self._result(totals, environment))
        release(self.dir, self.lease)
        # Last: until the result exists, a job that is killed needs them.
        with storage_errors(self.dir.checkpoints):
            shutil.rmtree(self.dir.checkpoints)

    def end_diverged(self, reason: str | None, first_step: int, diverged_step: int) -> None:
        """End a run that diverged. `resume` has to start before the divergence, so checkpoints from there on are removed."""
        # Diverged at step 57, with checkpoints of 40 and 60 (its pack trained on): that of 60 goes.
        with storage_errors(self.dir.checkpoints):
            for step in [step for step in self.dir.checkpoint_steps() if step >= diverged_step]:
                shutil.rmtree(self.dir.checkpoint(step))
        self._append_attempt(Cause.DIVERGED, reason, first_step, diverged_step)
        release(self.dir, self.lease)

    def end(self, cause: Cause, detail: str | None, first_step: int, last_step: int) -> None:
        """Write the attempt's line and give the folder back, unless another process owns it by now."""
        # Another process may have taken this one for dead. Then it has written this attempt's line already.
        if owns(self.dir, self.lease):
            self._append_attempt(*stop_cause(self.dir, cause, detail), first_step, last_step)
            release(self.dir, self.lease)

    def end_lost(self, error: Exception, first_step: int, last_step: int) -> None:
        """End a run whose folder refused a write. It never raises: what refused that write may refuse these too."""
        with suppress(StorageError, OSError):
            self._append_attempt(Cause.STORAGE, str(error), first_step, last_step)
        with suppress(OSError):
            release(self.dir, self.lease)

    def _append_attempt(self, cause: Cause, detail: str | None, first_step: int, last_step: int) -> None:
        line = attempt_line(self.dir, self.lease, (cause, detail), first_step, last_step)
        append_records(self.dir.attempts, [line])

    def _result(self, totals: RunTotals, environment: Environment) -> ResultRecord:
        """What the run measured: from its journal, which spans all attempts, and from what this process counted on."""
        lines = read_journal(self.dir.journal)
        losses = [line["loss"] for line in lines if "loss" in line]
        evaluations = [line for line in lines if "eval_loss" in line]
        # Of 25 steps the last 3, of 4 steps the last one.
        tail = losses[-max(1, math.ceil(len(losses) * RESULT_LOSS_SHARE)) :]
        return ResultRecord(
            run_id=self.dir.id,
            name=self.dir.name,
            train_loss=sum(tail) / len(tail),
            eval_loss=evaluations[-1]["eval_loss"],
            eval_exact_match=evaluations[-1]["eval_exact_match"],
            base_eval_loss=evaluations[0]["eval_loss"],
            base_eval_exact_match=evaluations[0]["eval_exact_match"],
            trainable_parameters=lines[0]["trainable_parameters"],
            total_parameters=lines[0]["total_parameters"],
            adapter_mb=sum(file.stat().st_size for file in self.dir.adapter.iterdir()) / 1e6,
            attempts=len(read_records(self.dir.attempts, AttemptLine)),
            **totals,
            **environment,
        )


class NullRunWriter(RunWriter):
    """Writes nothing: in every process but the main one of a job, which writes for all."""

    def begin(self, header: JournalHeader) -> None:
        """Nothing."""

    def rewind(self, progress: Progress) -> JournalLine | None:  # noqa: ARG002
        """Nothing; the main process reports a divergence."""
        return None

    def append(self, lines: Sequence[LineRecord]) -> None:
        """Nothing."""

    def append_samples(self, line: SamplesLine) -> None:
        """Nothing."""

    def append_pace(self, line: PaceLine) -> None:
        """Nothing."""

    def sizes(self) -> tuple[int, int]:
        """Zeros, for checkpoints that are never saved."""
        return 0, 0

    def save(self, checkpoint: Checkpoint) -> None:
        """Nothing."""

    def complete(
        self,
        adapter: AdapterTensors,
        targets: Mapping[str, Target],
        config: RunConfig,
        first_step: int,
        totals: RunTotals,
        environment: Environment,
    ) -> None:
        """Nothing."""

    def end_diverged(self, reason: str | None, first_step: int, diverged_step: int) -> None:
        """Nothing."""

    def end(self, cause: Cause, detail: str | None, first_step: int, last_step: int) -> None:
        """Nothing."""


def _size(path: Path) -> int:
    """The length of a file in bytes; 0 if it does not exist."""
    return path.stat().st_size if path.exists() else 0
