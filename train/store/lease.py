"""Who trains a run now: one live process per run folder, and a dead one's place is taken over.

The lease file names its process; its modification time is the heartbeat. On the same host a lease is dead when its process is
gone, elsewhere when the heartbeat is older than `STALE_SECONDS` (Slurm can start a job's second copy while the first still
runs on a node that it lost: two writers are real). Light on purpose: the launcher reads leases.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from pydantic import Field

from train.errors import DamagedFile, LeaseHeld, NewerFormat
from train.store.periodic import PeriodicThread
from train.store.record_file import FileRecord, parse_record, read_content
from train.store.storage import storage_errors, sync_folder

log = logging.getLogger("lorapack.store")

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 90.0
# Until a copy of the job that lost its lease has surely noticed.
FENCE_SECONDS = 2 * HEARTBEAT_SECONDS + 5

# Tokens of leases that this process gave back while it continued with others.
_released: set[str] = set()


class Leased(Protocol):
    """A folder that one process at a time may work on: a run's, or a sweep's for its launcher."""

    @property
    def path(self) -> Path:
        """The folder."""

    @property
    def lease(self) -> Path:
        """Its lease file."""


class Lease(FileRecord):
    """The process that owns a run folder; times are Unix seconds, `pid_started` is in the kernel's clock ticks.

    `restarts` counts how often Slurm had requeued the job when it took the folder.
    """

    token: str
    host: str
    pid: int
    pid_started: int
    job: str
    attempt: int
    started: float
    restarts: int = 0
    # The modification time of the file.
    heartbeat: float = Field(0.0, exclude=True)

    def alive(self) -> bool:
        """Whether its process still runs, as far as this host can tell."""
        if self.host == socket.gethostname():
            return process_started(self.pid) == self.pid_started
        return time.time() - self.heartbeat < STALE_SECONDS

    def superseded_by(self, job: str, restarts: int) -> bool:
        """Whether this is an earlier copy of the same job: Slurm has given up its node, so it may not go on."""
        return self.job == job and self.restarts < restarts and self.host != socket.gethostname()


def read_lease(run: Leased) -> Lease | None:
    """The lease on a run folder, live or dead, or None; a damaged one counts as none.

    Raises:
        DamagedFile: nobody can tell whose it is: a later version wrote it, or it cannot be opened.
    """
    return _read(run.lease)


def acquire(run: Leased, *, job: str, attempt: int, restarts: int = 0) -> Lease:
    """Take the run folder for this process; a dead lease gives way, and so does an earlier copy of the same job.

    That copy may still run, on a node that Slurm lost; it ends when its next heartbeat finds the new owner.

    Raises:
        LeaseHeld: another live process has it.
    """
    pid = os.getpid()
    token, host, pid_started = uuid.uuid4().hex, socket.gethostname(), process_started(pid) or 0
    mine = Lease(
        token=token,
        host=host,
        pid=pid,
        pid_started=pid_started,
        job=job,
        attempt=attempt,
        started=time.time(),
        restarts=restarts,
    )
    _take(run.lease, mine, run.path.name)
    return mine


def owns(run: Leased, lease: Lease) -> bool:
    """Whether the folder is still in these hands."""
    return _token(run.lease) == lease.token


def release(run: Leased, lease: Lease) -> None:
    """Give the run folder back, if it is still ours; from now on its heartbeat is nobody's business here."""
    _released.add(lease.token)
    held = read_lease(run)
    if held is not None and held.token == lease.token:
        run.lease.unlink(missing_ok=True)


class Heartbeat(PeriodicThread):
    """A thread that keeps leases fresh, also while the main thread loads a model or saves for minutes.

    A process that finds its lease with another owner was taken for dead, for example because its node lost the network for long. It
    must not write another byte, so it ends at once; the new owner continues from the last checkpoint.
    """

    def __init__(self, held: Sequence[tuple[Leased, Lease]]) -> None:
        super().__init__("heartbeat", HEARTBEAT_SECONDS)
        self._held = [(folder.lease, lease.token) for folder, lease in held]

    def act(self) -> None:
        """Renew every lease that was not released."""
        for path, token in self._held:
            # The next owner of a released folder may be there already.
            if token in _released:
                continue
            owner = _token(path)
            if owner not in (None, token):
                log.error(f"{path}: another process owns this folder now; ending without another write")
                os._exit(1)
            # Released meanwhile, or a passing fault of the file system: the next beat may reach it.
            with suppress(OSError):
                os.utime(path)


def process_started(pid: int) -> int | None:
    """When process `pid` of this host started (clock ticks after boot), None if it is gone or a zombie.

    The start time tells a process from a later one with the same number; /proc/<pid>/stat, field 22 (proc(5)).
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def process_age() -> float:
    """Seconds since this process started, its interpreter and imports included."""
    started = process_started(os.getpid())
    # The clock of /proc/<pid>/stat.
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    return max(0.0, now - started / os.sysconf("SC_CLK_TCK")) if started else 0.0


def _take(path: Path, mine: Lease, what: str) -> None:
    """Make `path` ours, if it is free or its owner dead; `what` names the folder in the refusal."""
    while not _create(path, mine):
        held = _read(path)
        if held is not None and held.alive() and not held.superseded_by(mine.job, mine.restarts):
            raise LeaseHeld(
                f"{what} is being trained by process {held.pid} on {held.host} (job {held.job}); "
                "wait for it, or stop it with 'python -m launcher cancel'."
            )
        if _succeed(path, held.token if held is not None else _token(path), mine, what):
            return


def _succeed(path: Path, dead_token: str | None, mine: Lease, what: str) -> bool:
    """Put our lease in the place of a dead or unreadable one, unless somebody did so since we looked.

    Whoever holds the claim on that very lease may replace it, and looks again before. The file is there all the while: was it
    moved away first, a latecomer would find a free folder between two owners. The claim is taken like any lease, so one whose
    claimant was killed gives way too.

    Raises:
        LeaseHeld: another live process is about to take over.
    """
    claim = path.with_name(f".{path.name}.{dead_token or 'unreadable'}.claim")
    _take(claim, mine, what)
    try:
        if not path.exists() or _token(path) != dead_token:
            return False
        with storage_errors(path):
            beside = _write_beside(path, mine)
            os.replace(beside, path)
        return True
    finally:
        claim.unlink(missing_ok=True)


def _create(path: Path, lease: Lease) -> bool:
    """Create the lease file complete and only if there is none: a hard link is atomic, also on NFS."""
    with storage_errors(path):
        beside = _write_beside(path, lease)
        try:
            os.link(beside, path)
        except FileExistsError:
            return False
        finally:
            beside.unlink(missing_ok=True)
    return True


def _write_beside(path: Path, lease: Lease) -> Path:
    """The lease's content, durable, under a name of its own in the same folder."""
    beside = path.with_name(f".{path.name}.{lease.token}.tmp")
    try:
        beside.write_text(json.dumps(lease.model_dump()))
        sync_folder(beside)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    return beside


def _read(path: Path) -> Lease | None:
    """The lease in a file, None if there is none or it is damaged: a power cut can leave an empty file.

    Raises:
        NewerFormat: a later version wrote it, whose process may be alive.
        DamagedFile: it cannot even be read (a folder in its place, or no permission), so nobody can take it over.
    """
    content = read_content(path)
    if content is None:
        return None
    try:
        return _with_heartbeat(parse_record(content, Lease, path), path)
    except NewerFormat:
        raise
    except DamagedFile:
        return None


def _with_heartbeat(lease: Lease, path: Path) -> Lease | None:
    """The lease with its last heartbeat; None if it was given back meanwhile."""
    try:
        return lease.model_copy(update={"heartbeat": path.stat().st_mtime})
    except FileNotFoundError:
        return None


def _token(path: Path) -> str | None:
    """Whose lease a file is, None if nobody's who can be read."""
    try:
        return str(json.loads(path.read_bytes())["token"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
