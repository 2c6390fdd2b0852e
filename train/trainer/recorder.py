"""From the device to the journals: steps are collected without waiting for the GPU, and written together about once a second.

The host runs ahead of the GPU: it queues the work of a step, and the copy of the step's numbers to the host behind it. Writing a step
waits for its copy. So the loop keeps the newest step back when it writes:

    the host has queued steps 5, 6, 7, 8; the GPU works on step 8
    flush(keep=1) writes 5, 6 and 7, whose copies have arrived, so it does not wait
    flush()       also writes 8: it waits until the GPU has finished, and the GPU then waits for the host to queue step 9

A run that diverged is noticed when its step is written. On the device it was stopped in that very step (`PackedAdamW`), so the delay
costs computation but changes no number.
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
    """Holds the steps that are not in a journal yet. Only `flush` waits for the device.

    `began` says whether anything was written yet; the first writing also notes in `activity` that a step is done. A speed counts the
    tokens of every step recorded between two writings, including the one that is kept back: most of it was computed in that time.
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
        """Record a step, and queue the copy of its numbers to the host."""
        self._pending.append((record, _Fetched(record)))
        self._computed.update(record.tokens)

    @property
    def seconds_since_flush(self) -> float:
        """How long ago the journals were last written."""
        return time.monotonic() - self._flushed

    def flush(self, sessions: Sequence[RunSession], keep: int = 0) -> None:
        """Write the recorded steps to the journals, except the newest `keep`; a run that diverged in one of them is marked here."""
        # 4 pending and keep=1: 3 are due. 1 pending and keep=1: none is.
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
        # No tokens are counted, so what follows until the next step (an evaluation, a save) does not count as training time.
        if not self._computed:
            self._paced = self._flushed

    def _write(self, session: RunSession, pending: list[StepRecord], numbers: list[_HostNumbers]) -> None:
        """Write the steps of one run: up to its divergence, if it diverged in one of them."""
        run = session.run_index
        lines: list[StepLine] = []
        for record, host in zip(pending, numbers, strict=True):
            # The step of the divergence gets no line of its own: the divergence line has its number.
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
        written_at = time.time()
        pack_speed = sum(self._speeds.values())
        memory = peak_memory_gib(self._device)
        start: dict[str, Any] = {}
        if not self.began:
            self.began = True
            start |= self._activity.first_step()
        for session in sessions:
            line = PaceLine(
                step=pending[-1].steps[session.run_index],
                attempt=session.lease.attempt,
                time=written_at,
                tokens_per_second=self._speeds[session.run_index],
                seconds=now - self._started,
                pack_tokens_per_second=pack_speed,
                peak_memory_gib=memory,
                **start,
            )
            session.note_pace(line)

    def _measure_speeds(self, now: float) -> None:
        """Tokens per second of each run since the last pace.

        Nothing was recorded since then if only the step that was kept back is written now. Its tokens were counted, so the speeds of
        the last pace still hold.
        """
        # 3 steps of 800 tokens in 1.2 s: 2,000 tokens per second.
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
    """A step's device values while they are copied to the host."""

    def __init__(self, record: StepRecord) -> None:
        outcome = record.outcome
        values = (record.losses, outcome.grad_norm, outcome.alive, outcome.loss_scale)
        # [4, runs], so that one copy takes all of them.
        on_device = torch.stack([value.to(record.losses.dtype) for value in values])
        self._on_host = on_device
        self._copied: torch.cuda.Event | None = None
        if on_device.device.type == "cuda":
            # A copy does not block the host only if its target is pinned memory.
            pinned = torch.empty(on_device.shape, dtype=on_device.dtype, pin_memory=True)
            self._on_host = pinned.copy_(on_device, non_blocking=True)
            # The event is behind the copy in the stream, but before the next step: waiting for it does not wait for that step.
            self._copied = torch.cuda.Event()
            self._copied.record()

    def numbers(self) -> _HostNumbers:
        """Wait for the copy."""
        if self._copied is not None:
            self._copied.synchronize()
        losses, grad_norms, alive, loss_scales = self._on_host.tolist()
        return _HostNumbers(losses, grad_norms, [value > 0 for value in alive], loss_scales)


def peak_memory_gib(device: torch.device) -> float:
    """The most memory in use so far, in GiB: tensors on a GPU, the whole process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**30
    # Linux counts KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _why_diverged(loss: float, grad_norm: float) -> str:
    return f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {grad_norm}"
