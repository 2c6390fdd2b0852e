"""Who trains a run now: one live process per run folder; the lease of a dead process is taken over.

The lease file names its process; its modification time is the heartbeat. On the same host a lease is dead when its process is gone.
On another host it is dead when the heartbeat is older than `STALE_SECONDS`. Two writers do happen: Slurm can start a job's second copy
while the first still runs on a node that Slurm has lost.

Process A on host a loses the network; process B on host b wants the run:

    t =  0 s   A beats for the last time
    t = 89 s   B finds a heartbeat of 89 s: A counts as alive, and B is refused with `LeaseHeld`
    t = 95 s   B finds a heartbeat of 95 s, more than `STALE_SECONDS`: it takes over and continues from the last checkpoint
    t = 99 s   A reaches the file system again, finds B's token at its next beat, and ends at once

B does not wait for A's end here: 95 s without a beat are nine beats missed. If B is a later copy of A's own Slurm job, it does not wait
until A is stale. Then A may still be writing, so B waits `FENCE_SECONDS` before it writes (`train.job`).

Light on purpose: the launcher reads leases.
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
# How long an earlier copy of a job may still write after its lease was taken over. It looks every 10 s, so it has looked twice after
# 20 s, even if one look failed; 5 s are for its last write.
FENCE_SECONDS = 2 * HEARTBEAT_SECONDS + 5

# Tokens of leases that this process gave back while it continued with others. Its heartbeat leaves these alone.
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
    # The modification time of the file, so it is never written.
    heartbeat: float = Field(0.0, exclude=True)

    def alive(self) -> bool:
        """Whether its process still runs, as far as this host can tell."""
        # Here the kernel knows. A process that is busy for 10 minutes is alive; one that was killed a second ago is not.
        if self.host == socket.gethostname():
            return process_started(self.pid) == self.pid_started
        return time.time() - self.heartbeat < STALE_SECONDS

    def superseded_by(self, job: str, restarts: int) -> bool:
        """Whether this is an earlier copy of the same job: Slurm has given up its node, so it must not continue."""
        # On the same host `alive` is certain: if the earlier copy runs there, its lease must not be replaced.
        return self.job == job and self.restarts < restarts and self.host != socket.gethostname()


def read_lease(run: Leased) -> Lease | None:
    """The lease on a run folder, live or dead; None if there is none or it is damaged.

    Raises:
        DamagedFile: its owner is unknown: a later version wrote it, or it cannot be opened.
    """
    return _read(run.lease)


def acquire(run: Leased, *, job: str, attempt: int, restarts: int = 0) -> Lease:
    """Take the run folder for this process. A dead lease is replaced, and so is that of an earlier copy of the same job.

    That copy may still run, on a node that Slurm has lost. It ends when its next heartbeat finds the new owner.

    Raises:
        LeaseHeld: another live process has it.
    """
    pid = os.getpid()
    mine = Lease(
        token=uuid.uuid4().hex,
        host=socket.gethostname(),
        pid=pid,
        pid_started=process_started(pid) or 0,
        job=job,
        attempt=attempt,
        started=time.time(),
        restarts=restarts,
    )
    _take(run.lease, mine, run.path.name)
    return mine


def owns(run: Leased, lease: Lease) -> bool:
    """Whether the folder still belongs to the process with `lease`."""
    return _token(run.lease) == lease.token


def release(run: Leased, lease: Lease) -> None:
    """Give the run folder back, if it is still ours; this process no longer keeps its lease fresh."""
    # First, so that the heartbeat does not take the next owner, who may come at once, for a thief.
    _released.add(lease.token)
    held = read_lease(run)
    if held is not None and held.token == lease.token:
        run.lease.unlink(missing_ok=True)


class Heartbeat(PeriodicThread):
    """A thread that keeps leases fresh, also while the main thread loads a model or saves for minutes.

    A process that finds another owner's lease was taken for dead, for example because its node lost the network for long. It must not
    write another byte, so it ends at once. The new owner continues from the last checkpoint.
    """

    def __init__(self, held: Sequence[tuple[Leased, Lease]]) -> None:
        super().__init__("heartbeat", HEARTBEAT_SECONDS)
        self._held = [(folder.lease, lease.token) for folder, lease in held]

    def act(self) -> None:
        """Renew every lease that was not released."""
        for path, token in self._held:
            # A released folder may have its next owner already.
            if token in _released:
                continue
            owner = _token(path)
            # None: the file cannot be read just now, so no other owner is known.
            if owner not in (None, token):
                log.error(f"{path}: another process owns this folder now; ending without another write")
                # Not sys.exit: it would end this thread alone, and handlers at exit might write.
                os._exit(1)
            # Released in the meantime, or a passing fault of the file system: the next beat may succeed.
            with suppress(OSError):
                os.utime(path)


def process_started(pid: int) -> int | None:
    """When process `pid` of this host started (clock ticks after boot), None if it is gone or a zombie.

    The start time distinguishes a process from a later one with the same number; /proc/<pid>/stat, field 22 (proc(5)).
    """
    # "4711 (my (odd) name) S 1 4711 …": the name may hold anything, so fields are counted from the last ")". The first after it is
    # field 3, the state, so field 22 has the index 22 - 3 = 19.
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
    # With 100 ticks a second, a start at tick 250,000 and a clock of 2,512.5 s: 12.5 s.
    return max(0.0, now - started / os.sysconf("SC_CLK_TCK")) if started else 0.0


def _take(path: Path, mine: Lease, what: str) -> None:
    """Make `path` ours, if it is free or its owner dead; `what` names the folder in the refusal.

    Raises:
        LeaseHeld: a live process has it.
    """
    # It loops because the owner may release the lease, or another process may create one, between `_create` and `_read`. A turn fails
    # only if another process succeeded, so the loop ends.
    while not _create(path, mine):
        held = _read(path)
        if held is not None and held.alive() and not held.superseded_by(mine.job, mine.restarts):
            raise LeaseHeld(
                f"{what} is being trained by process {held.pid} on {held.host} (job {held.job}); "
                "wait for it, or stop it with 'python -m launcher cancel'."
            )
        # A damaged lease may still show its token; the takeover has to name exactly the lease that was judged dead.
        if _succeed(path, held.token if held is not None else _token(path), mine, what):
            return


def _succeed(path: Path, dead_token: str | None, mine: Lease, what: str) -> bool:
    """Replace a dead or unreadable lease by ours; False if another process replaced it since we looked.

    B and C both found A's lease dead:

        B  takes the claim `.lease.json.<A's token>.claim`
        C  finds the claim held by a live process: `LeaseHeld`
        B  looks again (the lease is still A's), renames its own lease over A's, and removes the claim
        D  judged A dead before that, takes the claim now, looks again, finds B's token: False, and D starts over

    The lease file exists all the while. If it was moved away first, a latecomer would find a free folder between two owners. The claim
    is taken like any lease, so the claim of a process that was killed can be taken over too.

    Raises:
        LeaseHeld: another live process is about to take over.
    """
    claim = path.with_name(f".{path.name}.{dead_token or 'unreadable'}.claim")
    _take(claim, mine, what)
    try:
        # The second look, now that no other process may replace this very lease.
        if not path.exists() or _token(path) != dead_token:
            return False
        with storage_errors(path):
            temporary = _write_temporary(path, mine)
            os.replace(temporary, path)
        return True
    finally:
        claim.unlink(missing_ok=True)


def _create(path: Path, lease: Lease) -> bool:
    """Create the lease file if there is none; whether it was created. A hard link is atomic, also on NFS, and the file is complete."""
    with storage_errors(path):
        temporary = _write_temporary(path, lease)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
    return True


def _write_temporary(path: Path, lease: Lease) -> Path:
    """Write the lease, durable, under a temporary name in the same folder."""
    temporary = path.with_name(f".{path.name}.{lease.token}.tmp")
    try:
        temporary.write_text(json.dumps(lease.model_dump()))
        sync_folder(temporary)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _read(path: Path) -> Lease | None:
    """The lease in a file; None if there is no file or it is damaged: a power cut can leave an empty file.

    Raises:
        NewerFormat: a later version wrote it, whose process may be alive.
        DamagedFile: it cannot be read at all (a folder in its place, or no permission), so it cannot be taken over.
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
    """The lease with its last heartbeat; None if it was released in the meantime."""
    try:
        return lease.model_copy(update={"heartbeat": path.stat().st_mtime})
    except FileNotFoundError:
        return None


def _token(path: Path) -> str | None:
    """The token in a lease file; None if there is no file or no token can be read."""
    try:
        return str(json.loads(path.read_bytes())["token"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
