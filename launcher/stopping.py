"""Ctrl-C: the first asks the jobs to save and stop, the second kills them.

A terminal's Ctrl-C reaches the jobs as well once their own handlers stand; until then they are deaf (see `cluster`). Asking by
signal makes sure that it arrives, wherever the launcher's SIGINT came from.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType

from launcher.cluster.local import LocalQueue

SAVE_SECONDS = 60.0  # the longest wait for jobs that were asked to stop


@dataclass
class Interrupts:
    """How often the user pressed Ctrl-C."""

    count: int = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count instead of raising KeyboardInterrupt in the middle of whatever the launcher does."""
        before = signal.signal(signal.SIGINT, self._count)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _count(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1


@dataclass
class Stopper:
    """Turns presses of Ctrl-C into signals to the jobs of a queue; every process is asked once and killed once."""

    queue: LocalQueue
    interrupts: Interrupts
    say: Callable[[str], None]
    _asked_at: float | None = None
    _sent: set[tuple[int, int]] = field(default_factory=set)

    def act(self) -> None:
        """Do what is due after so many presses. A job that holds no run yet is asked as soon as it does."""
        if self.interrupts.count == 0:
            return
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            self.queue.drop_waiting()
            self.say("stopping, saving a checkpoint… (Ctrl-C again kills the jobs)")
        number = signal.SIGINT if self.interrupts.count == 1 else signal.SIGKILL
        for job in self.queue.running:
            for pid in job.pids():
                self._send(pid, number)

    @property
    def gives_up(self) -> bool:
        """Whether the jobs have had their time to save."""
        return self._asked_at is not None and time.monotonic() - self._asked_at > SAVE_SECONDS

    def _send(self, pid: int, number: signal.Signals) -> None:
        if (pid, number) not in self._sent:
            self._sent.add((pid, number))
            with suppress(ProcessLookupError):
                os.kill(pid, number)
