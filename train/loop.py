"""The training loop of a pack.

    while runs are left:  evaluate what is due -> save what is due -> finish what is done -> one optimizer step of every run

The runs march in step: whenever the set of runs changes, all of them are saved, so that a job killed at any moment repeats the
very batches it would have computed. Signals only set a flag, which is looked at between micro-batches.
"""

from __future__ import annotations

import math
import resource
import time
from dataclasses import dataclass

import numpy as np
import torch

from train.base import PackedBase
from train.batches import IGNORED_LABEL, MicroBatch, Sequence, cut, rows_of_step, sequences_of
from train.checkpoint import Checkpoint, optimizer_numbers, run_tensors
from train.dropout import step_key
from train.loss import sums_per_run, target_losses
from train.optim import StepOutcome, scheduled_learning_rate
from train.rundir import Record
from train.seats import Seats, take_seats
from train.session import Evaluation, RunSession
from train.signals import StopFlag, Stopped

FLUSH_SECONDS = 1.0


@dataclass(frozen=True)
class _Step:
    """One optimizer step, not yet in the journal: by row of the pack, the last two still on the device."""

    steps: dict[int, int]
    learning_rates: list[float]
    tokens: dict[int, int]
    losses: torch.Tensor
    outcome: StepOutcome


class PackLoop:
    """Trains the runs of a pack to their ends, or until it is asked to stop."""

    def __init__(
        self,
        base: PackedBase,
        seats: Seats,
        sessions: list[RunSession],
        stop: StopFlag,
        micro_batch_tokens: int,
        facts: Record,
    ) -> None:
        self.base, self.sessions, self.stop = base, sessions, stop
        self.micro_batch_tokens, self.facts = micro_batch_tokens, facts
        self._sit(seats)
        self._unwritten: list[_Step] = []
        self._clock = time.monotonic()
        self._flushed = self._pace_noted = self._started = self._clock

    def run(self) -> None:
        """Train until no run is left.

        Raises:
            Stopped: the job was asked to stop; every run is saved as far as it came.
        """
        try:
            while self.sessions:
                self._evaluate_due()
                self._save_due()
                self._end_what_is_over()
                if self.sessions:
                    self._train_step()
        except Stopped:
            self._flush()
            self._save_all()
            raise

    def _sit(self, seats: Seats) -> None:
        self.adapters, self.optimizer, self.pack_size = seats.adapters, seats.optimizer, len(self.sessions)
        self.base.attach(self.adapters)

    # The chapters of the loop

    def _evaluate_due(self) -> None:
        due = [s for s in self.sessions if s.evaluation_due]
        if not due:
            return
        self._flush()
        untrained = [s for s in due if s.step == 0]
        for session, evaluation in self._evaluate_base(untrained) + self._evaluate([s for s in due if s.step > 0]):
            session.note_evaluation(evaluation)
        self._tick()

    def _save_due(self) -> None:
        if any(s.save_due for s in self.sessions):
            self._flush()
            self._save_all()

    def _end_what_is_over(self) -> None:
        """Finish runs that are done, and let go of those that diverged once nobody trains beside them.

        Until then a diverged run keeps its seat without learning: the shapes of the pack, and so the last bits of the others'
        numbers, stay what they were.
        """
        over = [s for s in self.sessions if s.finished]
        learning = [s for s in self.sessions if not s.finished and s.diverged is None]
        leaving = over if learning else list(self.sessions)
        for session in leaving:
            if session.diverged is None:
                session.complete(self.adapters.tensors(session.row), self._result_facts())
            else:
                session.end("diverged", session.diverged)
        self._leave(leaving)

    def _leave(self, leaving: list[RunSession]) -> None:
        """Close the ranks: the runs that stay sit as they would in a pack of their own."""
        if not leaving:
            return
        staying = [s for s in self.sessions if s not in leaving]
        states = [self._state(session) for session in staying]
        self.sessions[:] = staying
        if staying:
            self._sit(take_seats(self.base, staying, states))

    def _train_step(self) -> None:
        """One optimizer step of every run in training, in as many micro-batches as memory asks for."""
        batches = {s.row: self._sequences(s) for s in self.sessions}
        try:
            losses = self._accumulate(batches)
        except Stopped:
            self.adapters.gradient.zero_()
            raise
        self._apply(losses, {row: sum(len(s.tokens) for s in batch) for row, batch in batches.items()})
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._flush()
            self._let_go_of_cancelled()

    # One optimizer step

    def _sequences(self, session: RunSession) -> list[Sequence]:
        rows = rows_of_step(session.config.train, len(session.data.train), session.step)
        return sequences_of(session.row, session.data.train, rows)

    def _accumulate(self, batches: dict[int, list[Sequence]]) -> torch.Tensor:
        """Forward and backward of every run's mean loss; the losses [runs]."""
        share = torch.zeros(self.pack_size, dtype=self.adapters.theta.dtype)
        for row, batch in batches.items():
            share[row] = 1 / sum(count_targets(sequence) for sequence in batch)
        share = share.to(self.base.device)
        losses = torch.zeros_like(share)
        for sequences in cut([s for batch in batches.values() for s in batch], self.micro_batch_tokens):
            self.stop.check()
            batch = MicroBatch(sequences, self.pack_size, self.base.device)
            hidden = self.base.hidden_states(batch, self._dropout_keys)[batch.learnt]
            weights = (share * self.optimizer.loss_scale)[batch.run_of_target]
            found = target_losses(hidden.detach(), self.base.head, batch.targets, weights)
            hidden.backward(found.gradient)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            losses += sums_per_run(found.losses, batch) * share
        return losses

    @property
    def _dropout_keys(self) -> torch.Tensor | None:
        """Random keys [runs] of the present step, None where no run drops anything."""
        if not any(s.config.lora.lora_dropout for s in self.sessions):
            return None
        keys = torch.zeros(self.pack_size, dtype=torch.int32)
        for session in self.sessions:
            keys[session.row] = step_key(session.config.train.seed, session.step)
        return keys.to(self.base.device)

    def _apply(self, losses: torch.Tensor, tokens: dict[int, int]) -> None:
        """Move every run's weights and count its step."""
        rates = [0.0] * self.pack_size
        for session in self.sessions:
            rates[session.row] = scheduled_learning_rate(session.config.train, session.step, session.total_steps)
        outcome = self.optimizer.step(rates, [row in tokens for row in range(self.pack_size)], losses)
        for session in self.sessions:
            session.step += 1
            session.tokens += tokens[session.row]
        steps = {s.row: s.step for s in self.sessions}
        self._unwritten.append(_Step(steps, rates, tokens, losses, outcome))
        self._tick()

    # Evaluation

    def _evaluate_base(self, sessions: list[RunSession]) -> list[tuple[RunSession, Evaluation]]:
        """Evaluate untrained runs: their B is zero, so one pass of the bare base serves all that share held-out rows."""
        representatives = {id(s.data.eval): s for s in reversed(sessions)}
        self.base.attach(None)
        try:
            found = {id(s.data.eval): evaluation for s, evaluation in self._evaluate(list(representatives.values()))}
        finally:
            self.base.attach(self.adapters)
        return [(session, found[id(session.data.eval)]) for session in sessions]

    @torch.no_grad()
    def _evaluate(self, sessions: list[RunSession]) -> list[tuple[RunSession, Evaluation]]:
        """Teacher-forced loss and exact match over the held-out rows.

        A row counts as answered exactly if each of its learnt tokens is the arg-max given the right ones before it, which is
        when greedy decoding gives the whole answer.
        """
        sequences = [q for s in sessions for q in sequences_of(s.row, s.data.eval, np.arange(len(s.data.eval)))]
        losses = torch.zeros(self.pack_size, dtype=torch.float64)
        exact = torch.zeros(self.pack_size, dtype=torch.int64)
        for chunk in cut(sequences, self.micro_batch_tokens):
            self.stop.check()
            batch = MicroBatch(chunk, self.pack_size, self.base.device)
            found = target_losses(self.base.hidden_states(batch)[batch.learnt], self.base.head, batch.targets, None)
            losses += sums_per_run(found.losses, batch).cpu()
            answered = batch.by_sequence.pad(found.correct).all(dim=1)
            exact += torch.bincount(batch.run_of_sequence[answered], minlength=self.pack_size).cpu()
        return [(s, self._evaluation(s, float(losses[s.row]), int(exact[s.row]))) for s in sessions]

    def _evaluation(self, session: RunSession, loss_sum: float, exact_rows: int) -> Evaluation:
        table = session.data.eval
        targets = int((table.labels != IGNORED_LABEL).sum())
        return Evaluation(loss_sum / targets, exact_rows / len(table))

    # What is written

    def _flush(self) -> None:
        """Bring the steps since the last time from the device to the journals; the only place that waits for it."""
        self._flushed = time.monotonic()
        if not self._unwritten:
            return
        steps, self._unwritten = self._unwritten, []
        losses = torch.stack([step.losses for step in steps]).tolist()
        norms = torch.stack([step.outcome.grad_norm for step in steps]).tolist()
        alive = torch.stack([step.outcome.alive for step in steps]).tolist()
        scales = torch.stack([step.outcome.loss_scale for step in steps]).tolist()
        for session in self.sessions:
            row = session.row
            lines: list[Record] = []
            for i, step in enumerate(steps):
                if not alive[i][row]:
                    session.note(lines)
                    session.note_divergence(step.steps[row], _why_diverged(losses[i][row], norms[i][row]))
                    break
                lines.append(self._line(session, step, losses[i][row], norms[i][row], scales[i][row]))
            else:
                session.note(lines)
        self._note_pace(steps)

    def _line(self, session: RunSession, step: _Step, loss: float, grad_norm: float, loss_scale: float) -> Record:
        row = session.row
        steps_per_epoch = session.config.train.steps_per_epoch(len(session.data.train))
        line: Record = {
            "step": step.steps[row],
            "epoch": round(step.steps[row] / steps_per_epoch, 6),
            "loss": loss,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "learning_rate": step.learning_rates[row],
            "tokens": step.tokens[row],
        }
        return line | {"loss_scale": loss_scale} if self.optimizer.scale_losses else line

    def _note_pace(self, steps: list[_Step]) -> None:
        now = time.monotonic()
        elapsed = max(now - self._pace_noted, 1e-9)
        self._pace_noted = now
        pack_tokens = sum(sum(step.tokens.values()) for step in steps)
        for session in self.sessions:
            tokens = sum(step.tokens[session.row] for step in steps)
            session.note_pace(
                {
                    "step": session.step,
                    "time": time.time(),
                    "seconds": now - self._started,
                    "tokens_per_second": tokens / elapsed,
                    "pack_tokens_per_second": pack_tokens / elapsed,
                    "peak_memory_gib": peak_memory_gib(self.base.device),
                }
            )

    def _save_all(self) -> None:
        for session in self.sessions:
            session.save(self._state(session))

    def _state(self, session: RunSession) -> Checkpoint:
        """A copy of everything that the run needs to go on."""
        progress = session.progress(optimizer_numbers(session.row, self.optimizer))
        return Checkpoint(progress, run_tensors(session.row, self.adapters, self.optimizer))

    def _let_go_of_cancelled(self) -> None:
        cancelled = [s for s in self.sessions if s.dir.cancel_request.exists()]
        if cancelled:
            self._save_all()
        for session in cancelled:
            session.end("cancelled", "cancel was asked for")
        self._leave(cancelled)

    def _result_facts(self) -> Record:
        return self.facts | {"peak_memory_gib": peak_memory_gib(self.base.device)}

    def _tick(self) -> None:
        """Give every run in training the seconds since the last time."""
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        for session in self.sessions:
            session.seconds += seconds
            session.gpu_seconds += seconds / len(self.sessions) if self.base.device.type == "cuda" else 0.0


def count_targets(sequence: Sequence) -> int:
    """How many tokens of a sequence are to be predicted."""
    return int((sequence.labels[1:] != IGNORED_LABEL).sum())


def peak_memory_gib(device: torch.device) -> float:
    """The most memory in use so far: tensors on a GPU, the whole process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _why_diverged(loss: float, grad_norm: float) -> str:
    return f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {grad_norm}"
