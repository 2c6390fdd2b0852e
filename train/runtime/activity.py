"""What a job is doing now, and how long it took until its first step.

Each part of the job notes what it does and how much of that is done. These are assignments in memory, so a step costs nothing.
`ActivityPublisher` makes it visible in the pack's folder, on this host and others: a thread rewrites a small file at most every
`POST_SECONDS`, and only if something has changed, so it writes nothing during steps. Light: the launcher reads it.
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

# What, how much of it is done, and of how much; 0 of 0 if nothing is counted. For example ("evaluating", 12, 64).
Now = tuple[str, int, int]


class FirstStep(TypedDict):
    """Seconds from the start of the process to the first step: in total, and by activity."""

    seconds_to_first_step: float
    start_seconds: dict[str, float]


class Activity:
    """What one process of a job does, from the start of the process on.

    `age` is how many seconds ago the process started; None asks the system.
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
        """So many more pieces are done."""
        # Several processes may count more pieces than there are: each adds its share for all of them.
        what, done, total = self.now
        self.now = (what, min(total, done + pieces), total)

    def first_step(self) -> FirstStep:
        """Log that the first step is done, and how long that took; returns the same for `RunDir.pace`."""
        self._account()
        # {"importing": 11.8, "loading": 0.4, "evaluating": 0.1, "training": 0.3}: what was called training is the first step.
        parts = {name: round(seconds, 3) for name, seconds in self._seconds.items()}
        parts["first_step"] = parts.pop(TRAINING, 0.0)
        total = sum(parts.values())
        words = (f"{name.replace('_', ' ')} {seconds:.1f} s" for name, seconds in parts.items())
        log.info(f"first step done {total:.1f} s after the process started: {', '.join(words)}")
        return {"seconds_to_first_step": round(total, 3), "start_seconds": parts}

    def _account(self) -> None:
        """Add the time since the last call to the activity that took it."""
        now = time.monotonic()
        self._seconds[self.now[0]] = self._seconds.get(self.now[0], 0.0) + now - self._since
        self._since = now


class ActivityPublisher(PeriodicThread):
    """A thread that keeps `PackDir.activity` up to date for the process with `lease`, and removes the file at the end."""

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
        # Nothing depends on this file. A full disk is reported by the writes that matter.
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
    """What a job of the pack noted last; None if there is no note."""
    try:
        return read_record(pack.activity, ActivityNote)
    # It is not flushed, so a power cut can leave an empty file.
    except DamagedFile:
        return None


def doing(note: ActivityNote | None, lease: Lease | None) -> str | None:
    """``evaluating 12/64``: what the process with this lease does other than steps.

    None while it makes steps, if another process wrote the note, and if the lease's process is dead.
    """
    if note is None or lease is None or note.doing == TRAINING or not lease.alive():
        return None
    # A process that was killed leaves its note behind, and the next attempt has not written its own yet.
    if (note.host, note.pid, note.pid_started) != (lease.host, lease.pid, lease.pid_started):
        return None
    return f"{note.doing} {note.done}/{note.total}" if note.total else note.doing
