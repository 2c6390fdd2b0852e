"""One run while it trains: its journal, its place in time, its checkpoints and its end.

A session owns everything in the run folder that is written during training, and keeps the order that makes a kill at any moment
harmless: journal, then checkpoint, then adapter, then result.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec

from train.config import RunConfig
from train.data.token_table import TokenizedData
from train.errors import StorageError
from train.lora.parameters import AdapterTensors
from train.lora.peft_files import write_adapter
from train.lora.targets import Target
from train.runtime.attempts import attempt_line, stop_cause
from train.store.causes import Cause
from train.store.journal import (
    AttemptLine,
    DivergenceLine,
    EvaluationLine,
    JournalHeader,
    PaceLine,
    SampleAnswer,
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
from train.trainer.checkpoint import Checkpoint, OptimizerNumbers, Progress, save_checkpoint
from train.trainer.evaluation import Evaluation
from train.trainer.optim import learning_rate_schedule

log = logging.getLogger("lorapack.trainer")

P = ParamSpec("P")

# `train_loss` of the result is the mean over this share of the last steps.
RESULT_LOSS_SHARE = 0.1


def guard_storage(write: Callable[Concatenate[RunSession, P], None]) -> Callable[Concatenate[RunSession, P], None]:
    """A write to the run's folder that never raises: a run whose folder refuses one is lost and writes nothing more."""

    @wraps(write)
    def guarded(session: RunSession, /, *args: P.args, **kwargs: P.kwargs) -> None:
        if session.storage_error is not None:
            return
        try:
            write(session, *args, **kwargs)
        except (StorageError, OSError) as exc:
            session.mark_lost(exc)

    return guarded


class RunSession:
    """A run during one attempt.

    Attributes:
        run_index: the run's row in the tensors of the pack.
        learning_rate: of each optimizer step, from 0.
        step, tokens: optimizer steps done and real tokens seen.
        seconds, gpu_seconds: spent training by all attempts; the latter is this run's share of its packs.
        evaluated_step, saved_step: where the run was last evaluated and saved.
        diverged: why, once its loss or gradient was not finite.
        storage_error: of its folder, once that could not be written (full, deleted, out of reach).
    """

    def __init__(
        self, run: RunDir, config: RunConfig, data: TokenizedData, targets: dict[str, Target], lease: Lease
    ) -> None:
        self.dir = run
        self.config = config
        self.data = data
        self.targets = targets
        self.lease = lease
        self.run_index = -1
        self.total_steps = config.train.total_steps(len(data.train))
        self.learning_rate = learning_rate_schedule(config.train, self.total_steps)
        self.step = self.tokens = 0
        self.seconds = self.gpu_seconds = 0.0
        self.evaluated_step: int | None = None
        self.saved_step: int | None = None
        self.best_eval_loss: float | None = None
        self.best_eval_step: int | None = None
        self.diverged: str | None = None
        self.storage_error: Exception | None = None
        self.diverged_step = 0
        self.first_step = 0

    @property
    def evaluation_due(self) -> bool:
        """Before the first step, every `train.eval_steps` and after the last; once each."""
        every = self.config.train.eval_steps
        due = self.step in (0, self.total_steps) or (every > 0 and self.step % every == 0)
        return due and self.evaluated_step != self.step

    @property
    def finished(self) -> bool:
        """Whether every step is done."""
        return self.step >= self.total_steps

    @property
    def save_due(self) -> bool:
        """At the start (a disk that refuses is found before training), every `train.save_steps`, and after the last step."""
        due = self.step == 0 or self.finished or self.step % self.config.train.save_steps == 0
        return due and self.saved_step != self.step and self.storage_error is None

    @property
    def learning(self) -> bool:
        """Whether there is anything left for it to do."""
        return not self.finished and self.diverged is None and self.storage_error is None

    @guard_storage
    def begin(self, header: JournalHeader) -> None:
        """Start the run's journal from nothing."""
        with storage_errors(self.dir.journal):
            self.dir.journal.unlink(missing_ok=True)
            self.dir.samples.unlink(missing_ok=True)
        append_journal(self.dir.journal, [header])

    @guard_storage
    def rewind(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint: journal and samples of later steps will be written again, so they are cut off."""
        progress = checkpoint.progress
        self.restore_counters(progress)
        with storage_errors(self.dir.journal):
            for newer in [step for step in self.dir.checkpoint_steps() if step > progress.step]:
                # Its part of the journal is cut off next.
                shutil.rmtree(self.dir.checkpoint(newer))
            os.truncate(self.dir.journal, progress.journal_bytes)
            if _size(self.dir.samples) > progress.samples_bytes:
                os.truncate(self.dir.samples, progress.samples_bytes)
        if self.diverged is not None:
            last = next(line for line in reversed(read_journal(self.dir.journal)) if "diverged" in line)
            self.diverged = last["diverged"]
            self.diverged_step = last["step"]

    def restore_counters(self, progress: Progress) -> None:
        """Count on from a checkpoint."""
        self.step = self.saved_step = self.first_step = progress.step
        self.tokens = progress.tokens
        self.seconds = progress.seconds
        self.gpu_seconds = progress.gpu_seconds
        self.evaluated_step = progress.evaluated_step
        self.best_eval_loss = progress.best_eval_loss
        self.best_eval_step = progress.best_eval_step
        self.diverged = None if progress.alive else "before this attempt"

    @guard_storage
    def note(self, lines: Sequence[LineRecord]) -> None:
        """Write step lines to the journal; a run that diverged writes no more."""
        if lines and self.diverged is None:
            append_journal(self.dir.journal, lines)

    def note_evaluation(self, evaluation: Evaluation, samples: list[SampleAnswer]) -> None:
        """Write an evaluation at the present step to the journal, and the answers given there, if any, to the samples."""
        self.evaluated_step = self.step
        if self.diverged is not None or self.storage_error is not None:
            return
        if not math.isfinite(evaluation.loss):
            self.note_divergence(self.step, f"the evaluation loss is {evaluation.loss}")
            return
        # Samples first, so that whoever follows the journal finds them.
        if samples:
            self.note_samples(SamplesLine(step=self.step, samples=samples))
        self.note([EvaluationLine(step=self.step, eval_loss=evaluation.loss, eval_exact_match=evaluation.exact_match)])
        if self.best_eval_loss is None or evaluation.loss < self.best_eval_loss:
            self.best_eval_loss = evaluation.loss
            self.best_eval_step = self.step

    @guard_storage
    def note_samples(self, line: SamplesLine) -> None:
        """Write the answers of one evaluation."""
        append_records(self.dir.samples, [line])

    @guard_storage
    def note_divergence(self, step: int, reason: str) -> None:
        """Write the last line of a run that diverged; it diverged once, however long its pack still trains the others."""
        if self.diverged is not None:
            return
        self.note([DivergenceLine(step=step, diverged=reason)])
        self.diverged = reason
        self.diverged_step = step

    @guard_storage
    def note_pace(self, line: PaceLine) -> None:
        """Write how fast it goes."""
        append_records(self.dir.pace, [line])

    def written_bytes(self) -> tuple[int, int]:
        """How long journal and samples are now; a lost run has none."""
        try:
            if self.storage_error is None:
                return self.dir.journal.stat().st_size, _size(self.dir.samples)
        except OSError as exc:
            self.mark_lost(exc)
        return 0, 0

    def progress(self, optimizer_numbers: OptimizerNumbers) -> Progress:
        """Where the run stands, with its journal up to here; a lost run has none."""
        journal_bytes, samples_bytes = self.written_bytes()
        return Progress(
            step=self.step,
            journal_bytes=journal_bytes,
            samples_bytes=samples_bytes,
            tokens=self.tokens,
            seconds=self.seconds,
            gpu_seconds=self.gpu_seconds,
            evaluated_step=self.evaluated_step,
            best_eval_loss=self.best_eval_loss,
            best_eval_step=self.best_eval_step,
            **optimizer_numbers,
        )

    @guard_storage
    def save(self, state: Checkpoint) -> None:
        """Make everything up to the present step durable."""
        save_checkpoint(self.dir, state)
        self.saved_step = self.step

    @guard_storage
    def complete(self, adapter: AdapterTensors, environment: Environment) -> None:
        """Write the adapter and, last, the result; then the run is done and its folder free."""
        with write_folder(self.dir.adapter) as folder, storage_errors(folder):
            write_adapter(folder, self.config.lora, self.config.model, adapter)
        self._note_attempt(Cause.DONE, None, self.step)
        write_record(self.dir.result, self._result(environment))
        release(self.dir, self.lease)
        with storage_errors(self.dir.checkpoints):
            shutil.rmtree(self.dir.checkpoints)

    @guard_storage
    def end_diverged(self) -> None:
        """End a run that diverged; `resume` has to start before the divergence, so later checkpoints are removed."""
        with storage_errors(self.dir.checkpoints):
            for step in [step for step in self.dir.checkpoint_steps() if step >= self.diverged_step]:
                shutil.rmtree(self.dir.checkpoint(step))
        self._note_attempt(Cause.DIVERGED, self.diverged, self.diverged_step)
        release(self.dir, self.lease)

    @guard_storage
    def end(self, cause: Cause, detail: str | None) -> None:
        """Write the attempt's line and give the run folder back, unless another process owns it by now."""
        if owns(self.dir, self.lease):
            self._note_attempt(*stop_cause(self.dir, cause, detail), self.step)
            release(self.dir, self.lease)

    def mark_lost(self, error: Exception) -> None:
        """Give up a folder that cannot be written. The run keeps its row in the pack, so that the others' numbers stay bit for bit."""
        self.storage_error = error
        log.error(f"{self.dir.path.name} ends: storage: {error}")
        # What refused the last write may refuse this one.
        with suppress(StorageError, OSError):
            self._note_attempt(Cause.STORAGE, str(error), self.step)
        with suppress(OSError):
            release(self.dir, self.lease)

    def _note_attempt(self, cause: Cause, detail: str | None, last_step: int) -> None:
        line = attempt_line(self.dir, self.lease, (cause, detail), self.first_step, last_step)
        append_records(self.dir.attempts, [line])

    def _result(self, environment: Environment) -> ResultRecord:
        lines = read_journal(self.dir.journal)
        losses = [line["loss"] for line in lines if "loss" in line]
        evaluations = [line for line in lines if "eval_loss" in line]
        tail = losses[-max(1, math.ceil(len(losses) * RESULT_LOSS_SHARE)) :]
        return ResultRecord(
            run_id=self.dir.id,
            name=self.dir.name,
            steps=self.step,
            train_loss=sum(tail) / len(tail),
            eval_loss=evaluations[-1]["eval_loss"],
            eval_exact_match=evaluations[-1]["eval_exact_match"],
            best_eval_loss=self.best_eval_loss,
            best_eval_step=self.best_eval_step,
            base_eval_loss=evaluations[0]["eval_loss"],
            base_eval_exact_match=evaluations[0]["eval_exact_match"],
            tokens=self.tokens,
            seconds=self.seconds,
            gpu_hours=self.gpu_seconds / 3600,
            tokens_per_second=self.tokens / max(self.seconds, 1e-9),
            trainable_parameters=lines[0]["trainable_parameters"],
            total_parameters=lines[0]["total_parameters"],
            adapter_mb=sum(file.stat().st_size for file in self.dir.adapter.iterdir()) / 1e6,
            attempts=len(read_records(self.dir.attempts, AttemptLine)),
            **environment,
        )


def _size(path: Path) -> int:
    """The length of a file in bytes; a missing one has none."""
    return path.stat().st_size if path.exists() else 0


class WorkerSession(RunSession):
    """`RunSession` of a process that does not write. What it would read comes from the main process (`train.trainer.process_group`)."""

    def begin(self, header: JournalHeader) -> None:
        """Nothing to count."""

    def rewind(self, checkpoint: Checkpoint) -> None:
        """Count from where the main process's checkpoint stands."""
        self.restore_counters(checkpoint.progress)

    def note(self, lines: Sequence[LineRecord]) -> None:
        """The main process writes the journal."""

    def note_pace(self, line: PaceLine) -> None:
        """The main process writes the pace."""

    def written_bytes(self) -> tuple[int, int]:
        """Numbers for checkpoints that are never saved."""
        return 0, 0

    def save(self, state: Checkpoint) -> None:  # noqa: ARG002
        """The main process saves."""
        self.saved_step = self.step

    def complete(self, adapter: AdapterTensors, environment: Environment) -> None:
        """The main process writes adapter and result."""

    def end_diverged(self) -> None:
        """The main process ends the run."""

    def end(self, cause: Cause, detail: str | None) -> None:
        """The main process ends the run."""
