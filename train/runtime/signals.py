"""The handler sets a flag; the loop acts.

Slurm's warnings (USR1, USR2, TERM) and a user's Ctrl-C (INT) ask a job to stop. The handler only
remembers the first of them; whoever works polls `StopFlag.check` between micro-batches, rows and files.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType

from train.errors import StorageError
from train.store.causes import Cause
from train.store.layout import RunDir
from train.store.lease import Lease
from train.store.record_file import write_record
from train.store.records import StopNote

log = logging.getLogger("lorapack.runtime")

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)

Explain = Callable[[str], tuple[Cause, str]]


class Stopped(Exception):
    """Raised by `StopFlag.check`, outside of the handler, where a job can end without saving anything."""

    def __init__(self, signal_name: str, explain: Explain) -> None:
        super().__init__(signal_name)
        self._explain = explain

    def cause(self) -> tuple[Cause, str]:
        """The cause of the attempt's end, and its detail; asking the cluster for it may take seconds, so save first."""
        return self._explain(str(self))


class StopFlag:
    """Whether the job was asked to stop, and by which signal. `explain` turns the signal's name into cause and detail."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.explain: Explain = lambda name: (Cause.PREEMPTED, name)

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


# The longest that the end of an attempt waits to learn its cause.
ANSWER_SECONDS = 12.0


class StopSignalListener:
    """Notes the first stop signal in every leased run, with its cause by `explain`. Use it in the main thread, handlers set."""

    def __init__(self, leases: Sequence[tuple[RunDir, Lease]], explain: Explain) -> None:
        self._leases = leases
        self._explain = explain
        self._cause: tuple[Cause, str] | None = None
        self._heard = threading.Event()
        self._known = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="stop-signals", daemon=True)

    def __enter__(self) -> StopSignalListener:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        signal.set_wakeup_fd(-1)
        os.close(self._write_end)
        self._thread.join(ANSWER_SECONDS)
        os.close(self._read_end)

    def cause(self, signal_name: str) -> tuple[Cause, str]:
        """Why the job was asked to stop by that signal: the cause of the attempt's end, and its detail."""
        if self._heard.is_set() and self._known.wait(ANSWER_SECONDS) and self._cause is not None:
            return self._cause
        # It came before this object listened.
        return self._explain(signal_name)

    def _listen(self) -> None:
        """Wait for the first stop signal, or for the end of the job, which closes the pipe."""
        while numbers := os.read(self._read_end, 64):
            stops = [signal.Signals(number) for number in numbers if number in STOP_SIGNALS]
            if stops:
                self._heard.set()
                # Asking for the cause may take longer than the process has left.
                self._note(stops[0].name, Cause.PREEMPTED, stops[0].name)
                self._cause = self._explain(stops[0].name)
                self._note(stops[0].name, *self._cause)
                self._known.set()
                return

    def _note(self, name: str, cause: Cause, detail: str) -> None:
        for run, lease in self._leases:
            note = StopNote(token=lease.token, signal=name, cause=cause, detail=detail, time=time.time())
            try:
                write_record(run.stop_note, note)
            except StorageError as exc:
                log.warning(exc)
