"""Stop signals: the handler sets a flag, and the training loop acts on it.

Slurm's warnings (USR1, USR2, TERM) and a user's Ctrl-C (INT) ask a job to stop. The handler only remembers the first of them. Code that
may take long calls `StopFlag.check` between micro-batches, rows and files.

The main thread may need seconds until its next check, for example in a large matrix product or a save. A thread
(`StopSignalListener`) hears the signal at once and notes its cause on the disk, for the case that the process is killed before it
ends:

    t =  0.0 s   Slurm sends SIGTERM; the flag is set, and every run gets a note ``preempted: SIGTERM``
    t =  0.3 s   the controller has answered; the note now says ``preempted: a job of higher priority takes its place``
    t =  1.1 s   the micro-batch ends, `check` raises `Stopped`, and all runs are saved
    t =  4.0 s   the attempts' lines are written, with the cause of the note
    t = 30.0 s   Slurm kills what is left; the next attempt would take the cause from the note
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
    """Raised by `StopFlag.check`, outside of the handler, at points at which nothing is half done."""

    def __init__(self, signal_name: str, explain: Explain) -> None:
        super().__init__(signal_name)
        self._explain = explain

    def cause(self) -> tuple[Cause, str]:
        """The cause of the attempt's end, and its detail. Asking the cluster for it may take seconds, so save first."""
        return self._explain(str(self))


class StopFlag:
    """Whether the job was asked to stop, and by which signal. `explain` turns the signal's name into cause and detail."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.explain: Explain = lambda name: (Cause.PREEMPTED, name)

    def install(self) -> StopFlag:
        """Replace submitit's handlers by this flag's. Call it in the main thread, before anything heavy is imported."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        return self

    def check(self) -> None:
        """Raise `Stopped` if the job was asked to stop."""
        if self.signal_name is not None:
            raise Stopped(self.signal_name, self.explain)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        # The first one counts: Slurm sends SIGUSR2 before the time limit and SIGTERM at the limit, and the cause is the former.
        self.signal_name = self.signal_name or signal.Signals(number).name


# The longest that the end of an attempt waits to learn its cause: one command to the controller, and a little.
ANSWER_SECONDS = 12.0


class StopSignalListener:
    """Notes the first stop signal in every leased run, with its cause by `explain`.

    Enter it in the main thread, after `StopFlag.install`.
    """

    def __init__(self, leases: Sequence[tuple[RunDir, Lease]], explain: Explain) -> None:
        self._leases = leases
        self._explain = explain
        self._cause: tuple[Cause, str] | None = None
        self._heard = threading.Event()
        self._known = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="stop-signals", daemon=True)

    def __enter__(self) -> StopSignalListener:
        # Python's handlers run in the main thread, between two of its bytecodes. But the C handler writes the signal's number to this
        # pipe at once, even while the main thread computes.
        self._read_end, self._write_end = os.pipe()
        # The C handler must never wait for a reader.
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
        # The signal came before this object listened.
        return self._explain(signal_name)

    def _listen(self) -> None:
        """Wait for the first stop signal, or for the end of the job, which closes the pipe."""
        while numbers := os.read(self._read_end, 64):
            stops = [signal.Signals(number) for number in numbers if number in STOP_SIGNALS]
            if stops:
                self._heard.set()
                # First a note without the cluster's answer, which may take longer than the process has left.
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
