"""The training loop of a pack.

    while runs are left:  evaluate what is due -> save what is due -> end what is over -> one optimizer step of every run

The runs march in step: whenever the set of runs changes, all of them are saved, so that a job killed at any moment repeats the
very batches it would have computed. Signals only set a flag, which is looked at between micro-batches.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from train.data.micro_batch import to_device
from train.data.sampling import TokenSequence, examples_of_step, sequences_of
from train.data.token_table import TokenTable
from train.nn.dropout import step_key
from train.nn.gradients import choose_gradients
from train.nn.packed_model import PackedModel
from train.runtime.activity import TRAINING
from train.runtime.signals import Stopped
from train.store.causes import Cause
from train.trainer.base import Environment, environment_info
from train.trainer.checkpoint import Checkpoint
from train.trainer.context import JobContext
from train.trainer.evaluation import evaluate, evaluate_untrained
from train.trainer.pack_state import PackState, build_pack_state, optimizer_numbers, run_tensors
from train.trainer.recorder import StepRecord, StepRecorder, peak_memory_gib
from train.trainer.samples import Sampler
from train.trainer.session import RunSession

FLUSH_SECONDS = 1.0
# Between looks for requests to cancel, which cost a network file system a call per run.
POLL_SECONDS = 1.0


class PackLoop:
    """Trains the runs of a pack to their ends, or until it is asked to stop.

    Args:
        base: the frozen model.
        state: adapters and optimizer; row i is `sessions[i]`.
        sessions: the runs, where they shall begin.
        micro_batch_tokens: the most tokens of all runs together that go through the base at once.
        sampler: asks the runs for sample answers at every evaluation; None leaves that out.
        job: what the parts of the job share.
    """

    def __init__(
        self,
        base: PackedModel,
        state: PackState,
        sessions: Sequence[RunSession],
        micro_batch_tokens: int,
        sampler: Sampler | None,
        job: JobContext,
    ) -> None:
        self.base = base
        self.sessions = list(sessions)
        self.micro_batch_tokens = micro_batch_tokens
        self.sampler = sampler
        self.job = job
        self.activity = job.activity
        self.group = job.group
        self.recorder = StepRecorder(base.device, state.optimizer.scale_losses, job.activity)
        self._clock = time.monotonic()
        self._looked_for_cancels = 0.0
        self._install(state)

    def run(self) -> None:
        """Train until no run is left.

        Raises:
            Stopped: the job was asked to stop; every run is saved as far as it came.
        """
        try:
            while self.sessions:
                self._evaluate_due()
                self._save_due()
                self._end_over()
                self._end_cancelled()
                if self.sessions:
                    self._train_step()
        except Stopped:
            self.recorder.flush(self.sessions)
            self._save_all()
            raise

    # The chapters of the loop

    def _evaluate_due(self) -> None:
        due = [s for s in self.sessions if s.evaluation_due]
        if not due:
            return
        self.recorder.flush(self.sessions)
        untrained, trained = [s for s in due if s.step == 0], [s for s in due if s.step > 0]
        self.base.attach(None)
        common = (self.pack_size, self.micro_batch_tokens, self.job)
        found = evaluate_untrained(self.base, _tables(untrained), *common)
        answers = self.sampler.ask_untrained(self.base, untrained, self.pack_size) if self.sampler else {}
        self.base.attach(self.adapters)
        found |= evaluate(self.base, _tables(trained), *common)
        answers |= self.sampler.ask(self.base, trained, self.pack_size) if self.sampler else {}
        for session in self.sessions:
            if session.run_index in found:
                session.note_evaluation(found[session.run_index], answers.get(session.run_index, []))
            if session.diverged is not None:
                self.optimizer.alive[session.run_index] = False
        # Nothing is pending: the next pace counts from here.
        self.recorder.flush(self.sessions)
        self._tick()

    def _save_due(self) -> None:
        if any(s.save_due for s in self.sessions):
            self.recorder.flush(self.sessions)
            self._save_all()

    def _end_over(self) -> None:
        """Finish runs that are done, and end those that diverged or were lost once no other run learns any more.

        Until then they keep their rows: the shapes of the pack, and so the last bits of the others' numbers, stay what they were.
        """
        any_learns = any(s.learning for s in self.sessions)
        over = self._agreed([s.finished or not any_learns for s in self.sessions])
        for session in over:
            if session.diverged is None and session.storage_error is None:
                memory = peak_memory_gib(self.base.device)
                environment: Environment = {**environment_info(self.base), "peak_memory_gib": memory}
                session.complete(self.adapters.tensors(session.run_index), environment)
            else:
                session.end_diverged()
        self._repack(over)

    def _train_step(self) -> None:
        """One optimizer step of every run in training, in as many micro-batches as memory asks for."""
        self.activity.begin(TRAINING)
        batches = {s.run_index: self._sequences(s) for s in self.sessions}
        try:
            losses = self._accumulate(batches)
        except Stopped:
            self.adapters.gradient.zero_()
            raise
        self._apply(losses, {run: sum(len(s.tokens) for s in batch) for run, batch in batches.items()})
        if not self.recorder.began:
            self.recorder.flush(self.sessions)
        elif self.recorder.seconds_since_flush > FLUSH_SECONDS:
            self.recorder.flush(self.sessions, keep=1)

    # One optimizer step

    def _sequences(self, session: RunSession) -> list[TokenSequence]:
        examples = examples_of_step(session.config.train, len(session.data.train), session.step)
        return sequences_of(session.run_index, session.data.train, examples)

    def _accumulate(self, batches: dict[int, list[TokenSequence]]) -> torch.Tensor:
        """Forward and backward of every run's mean loss; the losses [runs]."""
        # The last entry belongs to the filler tokens.
        share = torch.zeros(self.pack_size + 1, dtype=torch.float64)
        for run, sequences in batches.items():
            share[run] = 1 / sum(sequence.num_targets for sequence in sequences)
        share = to_device(share, self.base.device)
        weights = share.to(self.adapters.theta.dtype)
        weights[:-1] *= self.optimizer.loss_scale
        dropout_keys = self._dropout_keys()
        self.adapters.refresh()
        sums = torch.zeros_like(share[:-1])
        sequences = [s for of_run in batches.values() for s in of_run]
        for chunk in self.group.micro_batches(sequences, self.micro_batch_tokens, self.job.stop):
            sums += self.gradients.add(chunk, weights, dropout_keys)
        self.group.all_reduce(self.adapters.gradient, sums)
        return (sums * share[:-1]).to(self.adapters.theta.dtype)

    def _dropout_keys(self) -> torch.Tensor | None:
        """Random keys [runs] of the present step, None where no run drops anything."""
        if not any(s.config.lora.lora_dropout for s in self.sessions):
            return None
        keys = [step_key(session.config.train.seed, session.step) for session in self.sessions]
        return to_device(torch.tensor(keys, dtype=torch.int32), self.base.device)

    def _apply(self, losses: torch.Tensor, tokens: dict[int, int]) -> None:
        """Move every run's weights and count its step."""
        rates = [s.learning_rate(s.step) for s in self.sessions]
        outcome = self.optimizer.step(rates, losses)
        for session in self.sessions:
            session.step += 1
            session.tokens += tokens[session.run_index]
        steps = {session.run_index: session.step for session in self.sessions}
        self.recorder.add(StepRecord(steps, rates, tokens, losses, outcome))
        self._tick()

    # The runs of the pack and their states

    def _install(self, state: PackState) -> None:
        self.adapters = state.adapters
        self.optimizer = state.optimizer
        self.pack_size = len(self.sessions)
        self.base.attach(self.adapters)
        self.gradients = choose_gradients(self.base, self.pack_size)

    def _repack(self, leaving: list[RunSession]) -> None:
        """Build a new pack of the runs that stay, as if they had always been alone in it."""
        if not leaving:
            return
        staying = [s for s in self.sessions if s not in leaving]
        states = [self._state(session) for session in staying]
        self.sessions = staying
        if staying:
            self._install(build_pack_state(self.base, staying, states))

    def _end_cancelled(self) -> None:
        cancelled = self._agreed(self._asked_to_cancel())
        if cancelled:
            self.recorder.flush(self.sessions)
            self._save_all()
        for session in cancelled:
            session.end(Cause.CANCELLED, "cancel was asked for")
        self._repack(cancelled)

    def _agreed(self, flags: list[bool]) -> list[RunSession]:
        """The sessions whose flags are set in the main process."""
        return [s for s, flag in zip(self.sessions, self.group.broadcast_flags(flags), strict=True) if flag]

    def _asked_to_cancel(self) -> list[bool]:
        """For each run whether somebody asked to cancel it, as far as it was time to look."""
        if not self.group.is_main or time.monotonic() - self._looked_for_cancels < POLL_SECONDS:
            return [False] * len(self.sessions)
        self._looked_for_cancels = time.monotonic()
        return [session.dir.cancel_request.exists() for session in self.sessions]

    def _save_all(self) -> None:
        self.activity.begin("saving", len(self.sessions))
        for session in self.sessions:
            session.save(self._state(session))
            self.activity.advance()

    def _state(self, session: RunSession) -> Checkpoint:
        """A copy of everything that the run needs to continue."""
        progress = session.progress(optimizer_numbers(session.run_index, self.optimizer))
        tensors = run_tensors(session.run_index, self.adapters, self.optimizer) if session.step else {}
        return Checkpoint(progress, tensors)

    def _tick(self) -> None:
        """Give every run in training the seconds since the last time."""
        now = time.monotonic()
        seconds = now - self._clock
        self._clock = now
        for session in self.sessions:
            session.seconds += seconds
            on_gpus = self.group.size if self.base.device.type == "cuda" else 0
            session.gpu_seconds += seconds * on_gpus / len(self.sessions)


def _tables(sessions: list[RunSession]) -> dict[int, TokenTable]:
    """The held-out rows of each session, by run index."""
    return {session.run_index: session.data.eval for session in sessions}
