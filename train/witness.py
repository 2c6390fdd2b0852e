"""Hears that the job is asked to stop the moment it happens, finds out why, and writes it down.

Python runs a signal's handler only between two instructions of the main thread, which may be deep in a kernel or a save for
longer than the cluster waits before it kills. A thread that reads the signal's number from a pipe (`signal.set_wakeup_fd`) does
not wait for it: whoever takes the run up after a kill finds the cause in the run folder. Light on purpose.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence

from train.errors import StorageError
from train.lease import Lease
from train.rundir import RunDir
from train.signals import STOP_SIGNALS, Explain
from train.storage import write_json

ANSWER_SECONDS = 12.0  # the longest that the end of an attempt waits to learn its cause


class Witness:
    """Notes the first stop signal in every leased run, with its cause by `explain`. Use it in the main thread, handlers set."""

    def __init__(self, leases: Sequence[tuple[RunDir, Lease]], explain: Explain) -> None:
        self._leases, self._explain = leases, explain
        self._cause: tuple[str, str] | None = None
        self._heard, self._known = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._listen, name="witness", daemon=True)

    def __enter__(self) -> Witness:
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

    def cause(self, signal_name: str) -> tuple[str, str]:
        """Why the job was asked to stop by that signal: the cause of the attempt's end, and its detail."""
        if self._heard.is_set() and self._known.wait(ANSWER_SECONDS) and self._cause is not None:
            return self._cause
        return self._explain(signal_name)  # it came before this object listened

    def _listen(self) -> None:
        """Wait for the first stop signal, or for the end of the job, which closes the pipe."""
        while numbers := os.read(self._read_end, 64):
            stops = [signal.Signals(number) for number in numbers if number in STOP_SIGNALS]
            if stops:
                self._heard.set()
                self._note(stops[0].name, "preempted", stops[0].name)  # asking may take longer than we have
                self._cause = self._explain(stops[0].name)
                self._note(stops[0].name, *self._cause)
                self._known.set()
                return

    def _note(self, name: str, cause: str, detail: str) -> None:
        for run, lease in self._leases:
            note = {"token": lease.token, "signal": name, "cause": cause, "detail": detail, "time": time.time()}
            try:
                write_json(run.stop_note, note)
            except StorageError as exc:
                print(exc, flush=True)
