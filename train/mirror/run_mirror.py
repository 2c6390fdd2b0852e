"""One run on its way to W&B: opened when it has something to show, fed while it grows, closed as it ended."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import wandb

from train.config import read_run_config
from train.mirror.client import Client, sample_table
from train.mirror.memory import (
    NOTHING,
    Online,
    discard_torn_folders,
    mark_if_sent,
    recall_offline,
    recall_online,
    remember,
    went_online,
)
from train.mirror.request import EXIT_CODES, MirroredRun, Shown, shown, summary
from train.mirror.rows import SAMPLES, Row, RunRows
from train.runtime.attempts import job_id
from train.store.journal import AttemptLine
from train.store.layout import RunDir
from train.store.lease import Heartbeat, acquire, release
from train.store.record_file import read_records

TRIES = 3  # to see the server have every row


@dataclass(frozen=True)
class MirrorLease:
    """The right to mirror a run in one of the two ways, which one process at a time has; a `train.store.lease.Leased`."""

    run: RunDir
    way: str

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.run.path

    @property
    def lease(self) -> Path:
        """The lease file."""
        return self.run.mirror_lease(self.way)


class RunMirror(ABC):
    """A run that this process may come to mirror; nothing is opened before `advance` finds a row.

    Attributes:
        sent: how many rows this process has sent.
        opened: whether there was anything to say to W&B.
    """

    way: str

    def __init__(self, run: MirroredRun, client: Client) -> None:
        self.run, self._client = run, client
        self._train = read_run_config(run.dir.config).train
        self._rows = RunRows(run.dir, self._train, self._known_step())
        self._held = ExitStack()
        self._owned = False
        self._session: wandb.Run | None = None
        self.sent = 0
        self.opened = False

    def advance(self) -> None:
        """Send what is complete.

        Raises:
            LeaseHeld: another process mirrors the run.
        """
        rows = self._take()
        if rows and self._session is None:
            self._begin()
            rows = self._take()
        self._log(rows)

    def close(self) -> None:
        """Send the rest, tell W&B how the run stands, and let go of it.

        Raises:
            LeaseHeld, TimeoutError: another process mirrors the run; W&B did not take everything in time.
        """
        with self._held:
            self.advance()
            end = shown(self.run.dir)
            if self._session is None and self._lacks(end):
                self._begin()
                self._log(self._take())
            if self._session is not None:
                self._close(end)

    # The two ways to W&B differ in these

    @abstractmethod
    def _known_step(self) -> int:
        """The last step that needs no sending, as far as this disk knows."""

    @abstractmethod
    def _open(self) -> wandb.Run:
        """Open the run in W&B, and let `_rows` begin with the first that it lacks."""

    def _lacks(self, _end: Shown) -> bool:
        """Whether W&B has every row, but does not know that the run stands at `_end`."""
        return False

    @abstractmethod
    def _close(self, end: Shown) -> None:
        """Close the open run."""

    # What they share

    def _begin(self) -> None:
        if not self._owned:
            owned = MirrorLease(self.run.dir, self.way)
            lease = acquire(owned, job=job_id(), attempt=0)
            self._held.callback(release, owned, lease)
            self._held.enter_context(Heartbeat([(owned, lease)]))
            self._owned = True
        self._session = self._open()
        self.opened = True

    def _take(self) -> list[Row]:
        end = shown(self.run.dir)
        return self._rows.take(
            ended=end is not Shown.RUNNING, final=end is Shown.DONE or self._rows.diverged is not None
        )

    def _log(self, rows: list[Row]) -> None:
        for row in rows:
            values = row.values | ({SAMPLES: sample_table(self._opened, row)} if row.samples else {})
            self._opened.log(values, step=row.step, commit=True)
        self.sent += len(rows)

    def _finish(self, end: Shown) -> None:
        """Finish the session; a run that will go on is no crash."""
        session, self._session = self._opened, None
        session.summary.update(summary(self.run, self._rows.header, self._rows.diverged))
        if end not in EXIT_CODES:  # one that is silent from now on would be shown as crashed
            session.mark_preempting()
        session.finish(exit_code=EXIT_CODES.get(end, 1))

    @property
    def _opened(self) -> wandb.Run:
        assert self._session is not None, "rows are sent to an open run"
        return self._session


class OnlineMirror(RunMirror):
    """To a server, which says itself how far it has the run. `verify` looks again at the end also where the run will go on."""

    way = "online"

    def __init__(self, run: MirroredRun, client: Client, *, verify: bool = False) -> None:
        self._destination, self._verify = client.destination(run), verify
        super().__init__(run, client)

    def _known_step(self) -> int:
        memory = recall_online(self.run.dir)
        return memory.confirmed if memory is not None and memory.destination == self._destination else NOTHING

    def _open(self, *, tells_end: bool = False) -> wandb.Run:
        session = self._client.open(self.run, tells_end=tells_end)
        confirmed = session.starting_step - 1
        went_online(self.run, self._destination, confirmed)
        self._rows = RunRows(self.run.dir, self._train, confirmed)
        return session

    def _lacks(self, end: Shown) -> bool:
        memory = recall_online(self.run.dir)
        told = memory.told if memory is not None and memory.destination == self._destination else None
        return end in EXIT_CODES and self._told(end) != told and self.run.dir.journal.exists()

    def _close(self, end: Shown) -> None:
        """Finish, then look at what the server has: a finish that fails on the way says nothing."""
        self._finish(end)
        if end not in EXIT_CODES and not self._verify:
            return
        for _ in range(TRIES):
            self._session = self._open(tells_end=end in EXIT_CODES)
            missing = self._take()
            self._log(missing)
            self._finish(end)
            if not missing:
                told = self._told(end) if end in EXIT_CODES else None
                remember(self.run.dir, Online(destination=self._destination, confirmed=self._rows.given, told=told))
                return
        raise TimeoutError(f"{self.run.dir.path.name}: W&B still lacks rows after {TRIES} tries")

    def _told(self, end: Shown) -> str:
        return f"{end} after {len(read_records(self.run.dir.attempts, AttemptLine))} attempts"


class OfflineMirror(RunMirror):
    """To a folder of W&B's own format per attempt, for ``wandb leet`` and ``wandb sync``."""

    way = "offline"

    def _known_step(self) -> int:
        return recall_offline(self.run.dir).written

    def _open(self) -> wandb.Run:
        memory = discard_torn_folders(self.run)
        self._rows = RunRows(self.run.dir, self._train, memory.written)
        session = self._client.open(self.run, tells_end=True)
        mark_if_sent(self.run.dir, self._client.folder(session))
        return session

    def _close(self, end: Shown) -> None:
        folder = self._client.folder(self._opened)
        self._finish(end)
        memory = recall_offline(self.run.dir)
        remember(
            self.run.dir,
            memory.model_copy(update={"written": self._rows.given, "closed": (*memory.closed, folder.name)}),
        )
        mark_if_sent(self.run.dir, folder)  # it may have gone online meanwhile
