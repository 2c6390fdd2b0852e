"""From the device to the journals: steps are collected without waiting for the GPU and written together every second or so.

The numbers of a step set out for the host when the step is recorded; whoever writes them waits for their arrival alone, while the
GPU works on the next step.
"""

from __future__ import annotations

import math
import resource
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from train.runtime.activity import Activity
from train.store.journal import PaceLine, StepLine
from train.trainer.optim import StepOutcome
from train.trainer.session import RunSession


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step of a pack, by run index; `losses` [runs] and `outcome` are still on the device."""

    steps: dict[int, int]
    learning_rates: Sequence[float]
    tokens: dict[int, int]
    losses: torch.Tensor
    outcome: StepOutcome


class StepRecorder:
    """Holds the steps that no journal has yet. Only `flush` waits for the device.

    `began` says whether anything was written yet; the first time `activity` learns that a step is done. Speeds count the tokens of
    every step between two writings, of the one that is held back too: it was computed in that time.
    """

    def __init__(self, device: torch.device, with_loss_scale: bool, activity: Activity) -> None:
        self._device = device
        self._with_loss_scale = with_loss_scale
        self._activity = activity
        self.began = False
        self._pending: list[tuple[StepRecord, _Fetched]] = []
        self._started = self._flushed = self._paced = time.monotonic()
        # Tokens since the last pace, by run index.
        self._computed: Counter[int] = Counter()
        # Tokens per second at the last pace, by run index.
        self._speeds: dict[int, float] = {}

    def add(self, record: StepRecord) -> None:
        """Remember a step."""
        self._pending.append((record, _Fetched(record)))
        self._computed.update(record.tokens)

    @property
    def seconds_since_flush(self) -> float:
        """How long the journals have been waiting."""
        return time.monotonic() - self._flushed

    def flush(self, sessions: Sequence[RunSession], keep: int = 0) -> None:
        """Write what is pending to the journals, but for the newest `keep` steps; runs that diverged meanwhile learn it here."""
        at = max(0, len(self._pending) - keep)
        due = self._pending[:at]
        self._pending = self._pending[at:]
        if due:
            pending = [record for record, _ in due]
            numbers = [fetched.numbers() for _, fetched in due]
            for session in sessions:
                self._write(session, pending, numbers)
            self._note_pace(sessions, pending)
        self._flushed = time.monotonic()
        # Nothing waits to be measured: the next pace counts from here.
        if not self._computed:
            self._paced = self._flushed

    def _write(self, session: RunSession, pending: list[StepRecord], numbers: list[_HostNumbers]) -> None:
        run = session.run_index
        lines: list[StepLine] = []
        for record, host in zip(pending, numbers, strict=True):
            if not host.alive[run]:
                session.note(lines)
                session.note_divergence(record.steps[run], _why_diverged(host.losses[run], host.grad_norms[run]))
                return
            lines.append(self._line(session, record, host))
        session.note(lines)

    def _line(self, session: RunSession, record: StepRecord, host: _HostNumbers) -> StepLine:
        run = session.run_index
        steps_per_epoch = session.config.train.steps_per_epoch(len(session.data.train))
        grad_norm = host.grad_norms[run]
        line = StepLine(
            step=record.steps[run],
            epoch=round(record.steps[run] / steps_per_epoch, 6),
            loss=host.losses[run],
            # It is not finite after an overflow under the loss scale.
            grad_norm=grad_norm if math.isfinite(grad_norm) else None,
            learning_rate=record.learning_rates[run],
            tokens=record.tokens[run],
        )
        return line.model_copy(update={"loss_scale": host.loss_scales[run]}) if self._with_loss_scale else line

    def _note_pace(self, sessions: Sequence[RunSession], pending: list[StepRecord]) -> None:
        now = time.monotonic()
        self._measure_speeds(now)
        at, pack_speed, memory = time.time(), sum(self._speeds.values()), peak_memory_gib(self._device)
        start: dict[str, Any] = {}
        if not self.began:
            self.began = True
            start |= self._activity.first_step()
        for session in sessions:
            line = PaceLine(
                step=pending[-1].steps[session.run_index],
                attempt=session.lease.attempt,
                time=at,
                tokens_per_second=self._speeds[session.run_index],
                seconds=now - self._started,
                pack_tokens_per_second=pack_speed,
                peak_memory_gib=memory,
                **start,
            )
            session.note_pace(line)

    def _measure_speeds(self, now: float) -> None:
        """Tokens per second since the last time; where only the step that was held back then is written, what was measured then."""
        if self._computed:
            elapsed = max(now - self._paced, 1e-9)
            self._speeds = {run: tokens / elapsed for run, tokens in self._computed.items()}
            self._computed.clear()


@dataclass(frozen=True)
class _HostNumbers:
    """A step's device values, by run index."""

    losses: list[float]
    grad_norms: list[float]
    alive: list[bool]
    loss_scales: list[float]


class _Fetched:
    """A step's device values on their way to the host."""

    def __init__(self, record: StepRecord) -> None:
        outcome = record.outcome
        values = (record.losses, outcome.grad_norm, outcome.alive, outcome.loss_scale)
        there = torch.stack([value.to(record.losses.dtype) for value in values])
        self._here = there
        self._arrived: torch.cuda.Event | None = None
        if there.device.type == "cuda":
            self._here = torch.empty(there.shape, dtype=there.dtype, pin_memory=True).copy_(there, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def numbers(self) -> _HostNumbers:
        """Wait for them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        losses, grad_norms, alive, loss_scales = self._here.tolist()
        return _HostNumbers(losses, grad_norms, [value > 0 for value in alive], loss_scales)


def peak_memory_gib(device: torch.device) -> float:
    """The most memory in use so far: tensors on a GPU, the whole process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**30
    # Linux counts KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _why_diverged(loss: float, grad_norm: float) -> str:
    return f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {grad_norm}"
