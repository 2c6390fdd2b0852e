"""What a job is doing just now, and how long it took to come to its first step.

Whatever works says in turn what it does and how much of that is done: assignments in memory, so a step costs nothing.
`ActivityPublisher` tells those who look into the pack's folder, from this host or another: a thread rewrites a small file at most
every `POST_SECONDS`, and only if something has changed, so it writes nothing during steps. Light: the launcher reads it.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from typing import TypedDict

from train.errors import DamagedFile, StorageError
from train.store.layout import PackDir
from train.store.lease import Lease, process_age
from train.store.periodic import PeriodicThread
from train.store.record_file import read_record
from train.store.records import ActivityNote
from train.store.storage import write_note

log = logging.getLogger("lorapack.runtime")

POST_SECONDS = 2.0
TRAINING = "training"

# What, how much of it is done, and of how much; 0 of 0 where nothing is counted.
Now = tuple[str, int, int]


class FirstStep(TypedDict):
    """How long it took from the start of the process to the first step, and doing what, in seconds."""

    seconds_to_first_step: float
    start_seconds: dict[str, float]


class Activity:
    """What one process of a job does, from the start of the process on.

    `age` is how many seconds ago the process started, where somebody knows better than the system.
    """

    def __init__(self, age: float | None = None) -> None:
        self._since = time.monotonic() - (process_age() if age is None else age)
        self._seconds: dict[str, float] = {}
        self.now: Now = ("importing", 0, 0)

    def begin(self, what: str, total: int = 0) -> None:
        """From now on the process does `what`, of which there are `total` pieces."""
        self._account()
        self.now = (what, 0, total)

    def advance(self, pieces: int = 1) -> None:
        """So many pieces more are done."""
        what, done, total = self.now
        self.now = (what, min(total, done + pieces), total)

    def first_step(self) -> FirstStep:
        """Say that the first step is done, and how long that took; the same for `RunDir.pace`, in seconds."""
        self._account()
        parts = {name: round(seconds, 3) for name, seconds in self._seconds.items()}
        parts["first_step"] = parts.pop(TRAINING, 0.0)
        total = sum(parts.values())
        words = (f"{name.replace('_', ' ')} {seconds:.1f} s" for name, seconds in parts.items())
        log.info(f"first step done {total:.1f} s after the process started: {', '.join(words)}")
        return {"seconds_to_first_step": round(total, 3), "start_seconds": parts}

    def _account(self) -> None:
        """Give the time since the last call to what was done in it."""
        now = time.monotonic()
        self._seconds[self.now[0]] = self._seconds.get(self.now[0], 0.0) + now - self._since
        self._since = now


class ActivityPublisher(PeriodicThread):
    """A thread that keeps `PackDir.activity` up to date for the process that holds `lease`, and removes it at the end."""

    def __init__(self, pack: PackDir, activity: Activity, lease: Lease) -> None:
        super().__init__("activity", POST_SECONDS)
        self._path = pack.activity
        self._activity = activity
        self._lease = lease
        self._published: Now | None = None

    def act(self) -> None:
        """Write what the process does, if that changed."""
        now = self._activity.now
        if now == self._published:
            return
        # Nothing depends on it; what does will say what is wrong.
        with suppress(StorageError, OSError):
            write_note(self._path, self._note(*now).model_dump())
            self._published = now

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _note(self, what: str, done: int, total: int) -> ActivityNote:
        who = self._lease
        return ActivityNote(host=who.host, pid=who.pid, pid_started=who.pid_started, doing=what, done=done, total=total)


def read_activity(pack: PackDir) -> ActivityNote | None:
    """What a job of the pack last said, None where there is nothing."""
    try:
        return read_record(pack.activity, ActivityNote)
    # It is not flushed, so a power cut can leave an empty file.
    except DamagedFile:
        return None


def doing(note: ActivityNote | None, lease: Lease | None) -> str | None:
    """``evaluating 12/64``: what the process with this lease does besides steps.

    None while it makes steps, where another process wrote the note, and where the lease's process is dead.
    """
    if note is None or lease is None or note.doing == TRAINING or not lease.alive():
        return None
    if (note.host, note.pid, note.pid_started) != (lease.host, lease.pid, lease.pid_started):
        return None
    return f"{note.doing} {note.done}/{note.total}" if note.total else note.doing
