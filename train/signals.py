"""The handler sets a flag; the loop acts.

Slurm's warnings (USR1, USR2, TERM) and a user's Ctrl-C (INT) ask a job to stop. The handler only
remembers the first of them; whoever works polls `StopFlag.check` between micro-batches, rows and files.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)

Explain = Callable[[str], tuple[str, str]]


class Stopped(Exception):
    """Raised by `StopFlag.check`, outside of the handler, where a job can end without saving anything."""

    def __init__(self, signal_name: str, explain: Explain) -> None:
        super().__init__(signal_name)
        self._explain = explain

    def cause(self) -> tuple[str, str]:
        """The cause of the attempt's end, and its detail; asking the cluster for it may take seconds, so save first."""
        return self._explain(str(self))


class StopFlag:
    """Whether the job was asked to stop, and by which signal. `explain` turns the signal's name into cause and detail."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.explain: Explain = lambda name: ("preempted", name)

    def install(self) -> StopFlag:
        """Set the handlers, instead of those that submitit set; call it before anything heavy is imported, in the main thread."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        return self

    def check(self) -> None:
        """Raise `Stopped` if the job was asked to stop."""
        if self.signal_name is not None:
            raise Stopped(self.signal_name, self.explain)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name
