"""One run while it trains: how far it is, what is due next, and how it ends.

A session counts and decides; its `RunWriter` writes the run's files. Every process of a job has the same sessions and counts the same
numbers, but only the main process has writers that write.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Concatenate, ParamSpec

from train.config import RunConfig
from train.data.token_table import TokenizedData
from train.errors import StorageError
from train.lora.parameters import AdapterTensors
from train.lora.targets import Target
from train.store.causes import Cause
from train.store.journal import DivergenceLine, EvaluationLine, JournalHeader, PaceLine, SampleAnswer, SamplesLine
from train.store.record_file import LineRecord
from train.trainer.base import Environment
from train.trainer.checkpoint import Checkpoint, OptimizerNumbers, Progress
from train.trainer.evaluation import Evaluation
from train.trainer.optim import learning_rate_schedule
from train.trainer.run_writer import RunTotals, RunWriter

log = logging.getLogger("lorapack.trainer")

P = ParamSpec("P")


def guard_storage(write: Callable[Concatenate[RunSession, P], None]) -> Callable[Concatenate[RunSession, P], None]:
    """A write to the run's folder that never raises: if the folder refuses it, the run is lost and writes nothing more."""

    @wraps(write)
    def guarded(session: RunSession, /, *args: P.args, **kwargs: P.kwargs) -> None:
        # After a refused write the files may have a gap, so nothing may be added to them.
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
        writer: of the run's files; it writes nothing in processes other than the main one.
        dir, lease: the run's folder, and the right to it.
        run_index: the run's row in the tensors of the pack.
        learning_rate: of each optimizer step, from 0.
        step, tokens: optimizer steps done and real tokens seen.
        seconds, gpu_seconds: spent training by all attempts; the latter is this run's share of its packs.
        evaluated_step, saved_step: where the run was last evaluated and saved.
        diverged: the reason, once its loss or gradient was not finite.
        storage_error: of its folder, once that could not be written (full, deleted, out of reach).
    """

    def __init__(self, config: RunConfig, data: TokenizedData, targets: dict[str, Target], writer: RunWriter) -> None:
        self.config = config
        self.data = data
        self.targets = targets
        self.writer = writer
        self.dir = writer.dir
        self.lease = writer.lease
        self.run_index = -1
        self.total_steps = config.train.total_steps(len(data.train))
        self.learning_rate = learning_rate_schedule(config.train, self.total_steps)
        self.step = 0
        self.first_step = 0
        self.tokens = 0
        self.seconds = 0.0
        self.gpu_seconds = 0.0
        self.evaluated_step: int | None = None
        self.saved_step: int | None = None
        self.best_eval_loss: float | None = None
        self.best_eval_step: int | None = None
        self.diverged: str | None = None
        self.diverged_step = 0
        self.storage_error: Exception | None = None

    # What is due

    @property
    def evaluation_due(self) -> bool:
        """Before the first step, every `train.eval_steps` and after the last; once each."""
        # 0 leaves out the evaluations between the first and the last.
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
        """Whether the run has steps left that still count."""
        return not self.finished and self.diverged is None and self.storage_error is None

    # Beginning

    @guard_storage
    def begin(self, header: JournalHeader) -> None:
        """Start the run's journal from nothing."""
        self.writer.begin(header)

    @guard_storage
    def rewind(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint: journal and samples of later steps will be written again, so they are cut off."""
        # Before the files: a run that is lost here ends at the step of its checkpoint.
        self._restore(checkpoint.progress)
        divergence = self.writer.rewind(checkpoint.progress)
        if divergence is not None:
            self.diverged = divergence["diverged"]
            self.diverged_step = divergence["step"]

    def _restore(self, progress: Progress) -> None:
        self.step = progress.step
        self.saved_step = progress.step
        self.first_step = progress.step
        self.tokens = progress.tokens
        self.seconds = progress.seconds
        self.gpu_seconds = progress.gpu_seconds
        self.evaluated_step = progress.evaluated_step
        self.best_eval_loss = progress.best_eval_loss
        self.best_eval_step = progress.best_eval_step
        self.diverged = None if progress.alive else "before this attempt"

    # Training

    @guard_storage
    def note(self, lines: Sequence[LineRecord]) -> None:
        """Write step lines to the journal; a run that diverged writes no more."""
        if lines and self.diverged is None:
            self.writer.append(lines)

    def note_evaluation(self, evaluation: Evaluation, samples: list[SampleAnswer]) -> None:
        """Write an evaluation at the present step to the journal, and its sample answers, if any, to the samples."""
        self.evaluated_step = self.step
        if self.diverged is not None or self.storage_error is not None:
            return
        if not math.isfinite(evaluation.loss):
            self.note_divergence(self.step, f"the evaluation loss is {evaluation.loss}")
            return
        # Samples first: a reader that finds the evaluation in the journal finds its samples too.
        if samples:
            self.note_samples(SamplesLine(step=self.step, samples=samples))
        self.note([EvaluationLine(step=self.step, eval_loss=evaluation.loss, eval_exact_match=evaluation.exact_match)])
        if self.best_eval_loss is None or evaluation.loss < self.best_eval_loss:
            self.best_eval_loss = evaluation.loss
            self.best_eval_step = self.step

    @guard_storage
    def note_samples(self, line: SamplesLine) -> None:
        """Write the answers of one evaluation."""
        self.writer.append_samples(line)

    @guard_storage
    def note_divergence(self, step: int, reason: str) -> None:
        """Write the last line of a run that diverged."""
        # Its pack may train the others on for long. Each of those steps finds the run diverged again.
        if self.diverged is not None:
            return
        # The line first: once `diverged` is set, `note` writes no more.
        self.note([DivergenceLine(step=step, diverged=reason)])
        self.diverged = reason
        self.diverged_step = step

    @guard_storage
    def note_pace(self, line: PaceLine) -> None:
        """Write how fast the run trains."""
        self.writer.append_pace(line)

    # Saving

    def progress(self, optimizer_numbers: OptimizerNumbers) -> Progress:
        """The run's numbers for a checkpoint, with the lengths of journal and samples now."""
        journal_bytes, samples_bytes = self._written_bytes()
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

    def _written_bytes(self) -> tuple[int, int]:
        """The lengths of journal and samples now; zeros for a lost run, whose checkpoint is never saved."""
        try:
            if self.storage_error is None:
                return self.writer.sizes()
        except OSError as exc:
            self.mark_lost(exc)
        return 0, 0

    @guard_storage
    def save(self, state: Checkpoint) -> None:
        """Make everything up to the present step durable."""
        self.writer.save(state)
        self.saved_step = self.step

    # Ending

    @guard_storage
    def complete(self, adapter: AdapterTensors, environment: Environment) -> None:
        """Write the adapter and, last, the result; then the run is done and its folder free."""
        totals = RunTotals(
            steps=self.step,
            best_eval_loss=self.best_eval_loss,
            best_eval_step=self.best_eval_step,
            tokens=self.tokens,
            seconds=self.seconds,
            gpu_hours=self.gpu_seconds / 3600,
            # A run may end in its first tick of the clock.
            tokens_per_second=self.tokens / max(self.seconds, 1e-9),
        )
        self.writer.complete(adapter, self.targets, self.config, self.first_step, totals, environment)

    @guard_storage
    def end_diverged(self) -> None:
        """End a run that diverged; `resume` starts before the divergence."""
        self.writer.end_diverged(self.diverged, self.first_step, self.diverged_step)

    @guard_storage
    def end(self, cause: Cause, detail: str | None) -> None:
        """Write the attempt's line and give the run folder back, unless another process owns it by now."""
        self.writer.end(cause, detail, self.first_step, self.step)

    def mark_lost(self, error: Exception) -> None:
        """End a run whose folder cannot be written. It keeps its row in the pack, so that the others' numbers stay bit for bit."""
        # First: whatever is tried below, no guarded write follows.
        self.storage_error = error
        log.error(f"{self.dir.path.name} ends: storage: {error}")
        self.writer.end_lost(error, self.first_step, self.step)
