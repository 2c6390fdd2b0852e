"""One run on its way to W&B: it is opened when it has a row to show, sent while it grows, and closed as it ended.

Online the server is the only one that knows what it has, and a `finish` that fails on the way is silent about it. So the end of a run
takes two or more sessions:

    1  while the run grows      `starting_step` says where to continue; `finish` sends the rest, and reports no end
    2  once it has ended        opened again: `starting_step` shows what is still missing; that is sent, and `finish` reports the end
    3  if 2 found rows missing  the same again, until a session finds none; then it is noted on disk that the server knows the end

Offline the folders on disk are the memory: see `train.mirror.memory`.
"""

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
from train.store.line_file import read_records

# Sessions in which the server may still lack a row after the run has ended.
TRIES = 3


@dataclass(frozen=True)
class MirrorLease:
    """The right to mirror a run online or offline, which one process has at a time; a `train.store.lease.Leased`."""

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
    """A run that this process mirrors. Nothing is opened before `advance` finds a row.

    Attributes:
        way: ``online`` or ``offline``.
        sent: how many rows this process has sent.
        opened: whether the run was opened in W&B.
    """

    way: str

    def __init__(self, run: MirroredRun, client: Client) -> None:
        self.run = run
        self._client = client
        self._train = read_run_config(run.dir.config).train
        self._rows = RunRows(run.dir, self._train, self._known_step())
        self._held = ExitStack()
        self._owned = False
        self._session: wandb.Run | None = None
        self.sent = 0
        self.opened = False

    def advance(self) -> None:
        """Send the rows that are complete.

        Raises:
            LeaseHeld: another process mirrors the run.
        """
        rows = self._take()
        if rows and self._session is None:
            # Opening may show that W&B has some of them: `_open` starts `_rows` again at the first one that is missing.
            self._begin()
            rows = self._take()
        self._log(rows)

    def close(self) -> None:
        """Send the rest, report the run's state to W&B, and release the lease.

        Raises:
            LeaseHeld: another process mirrors the run.
            TimeoutError: W&B did not accept everything in time.
        """
        with self._held:
            self.advance()
            end = shown(self.run.dir)
            if self._session is None and self._lacks(end):
                self._begin()
                self._log(self._take())
            if self._session is not None:
                self._close(end)

    # What differs between online and offline

    @abstractmethod
    def _known_step(self) -> int:
        """The last step that W&B has, as far as is known on disk."""

    @abstractmethod
    def _open(self) -> wandb.Run:
        """Open the run in W&B, and start `_rows` at the first row that W&B lacks."""

    def _lacks(self, _end: Shown) -> bool:
        """Whether W&B may have every row but not know that the run is at `_end`."""
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
        """Finish the session, with the run's summary and exit code."""
        session = self._opened
        self._session = None
        session.summary.update(summary(self.run, self._rows.header, self._rows.diverged))
        # The run will continue, but not soon. Without this mark W&B shows a silent run as crashed.
        if end not in EXIT_CODES:
            session.mark_preempting()
        session.finish(exit_code=EXIT_CODES.get(end, 1))

    @property
    def _opened(self) -> wandb.Run:
        assert self._session is not None, "rows are sent to an open run"
        return self._session


class OnlineMirror(RunMirror):
    """To a server, which knows itself how far it has the run. With `verify`, `close` checks that also if the run has not ended."""

    way = "online"

    def __init__(self, run: MirroredRun, client: Client, *, verify: bool = False) -> None:
        self._destination = client.destination(run)
        self._verify = verify
        super().__init__(run, client)

    def _known_step(self) -> int:
        memory = recall_online(self.run.dir)
        return memory.confirmed if memory is not None and memory.destination == self._destination else NOTHING

    def _open(self, *, reports_end: bool = False) -> wandb.Run:
        session = self._client.open(self.run, reports_end=reports_end)
        # A server that has the steps 0 to 20 says 21; one that has none says 0, and -1 is `NOTHING`.
        confirmed = session.starting_step - 1
        went_online(self.run, self._destination, confirmed)
        self._rows = RunRows(self.run.dir, self._train, confirmed)
        return session

    def _lacks(self, end: Shown) -> bool:
        memory = recall_online(self.run.dir)
        reported = memory.told if memory is not None and memory.destination == self._destination else None
        return end in EXIT_CODES and self._report_of(end) != reported and self.run.dir.journal.exists()

    def _close(self, end: Shown) -> None:
        """Finish, then open the run again until the server has everything; see the sessions in the module's docstring."""
        self._finish(end)
        if end not in EXIT_CODES and not self._verify:
            return
        for _ in range(TRIES):
            self._session = self._open(reports_end=end in EXIT_CODES)
            missing = self._take()
            self._log(missing)
            self._finish(end)
            if not missing:
                reported = self._report_of(end) if end in EXIT_CODES else None
                remember(self.run.dir, Online(destination=self._destination, confirmed=self._rows.given, told=reported))
                return
        raise TimeoutError(
            f"{self.run.dir.path.name}: W&B still lacks rows after {TRIES} tries; 'python -m launcher sync' can send them later"
        )

    def _report_of(self, end: Shown) -> str:
        """What is noted once the server knows the end. A run that is resumed and ends the same way again has to be reported again."""
        return f"{end} after {len(read_records(self.run.dir.attempts, AttemptLine))} attempts"


class OfflineMirror(RunMirror):
    """To a folder per attempt in W&B's own format, for ``wandb leet`` and ``wandb sync``."""

    way = "offline"

    def _known_step(self) -> int:
        return recall_offline(self.run.dir).written

    def _open(self) -> wandb.Run:
        memory = discard_torn_folders(self.run)
        self._rows = RunRows(self.run.dir, self._train, memory.written)
        session = self._client.open(self.run, reports_end=True)
        mark_if_sent(self.run.dir, self._client.folder(session))
        return session

    def _close(self, end: Shown) -> None:
        folder = self._client.folder(self._opened)
        self._finish(end)
        memory = recall_offline(self.run.dir)
        closed = (*memory.closed, folder.name)
        remember(self.run.dir, memory.model_copy(update={"written": self._rows.given, "closed": closed}))
        # `launcher sync` may have sent the run in the meantime.
        mark_if_sent(self.run.dir, folder)
