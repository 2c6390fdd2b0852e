"""Starting, watching and ending the cluster's processes, without systemd."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from slurm.packages import SYSTEM_FOLDERS
from slurm.settings import Folder

MARK = "SLURM_BOX"  # every daemon, and every slurmstepd after it, has this variable with the run folder
POLL_SECONDS = 0.05
CLIENT_TIMEOUT_SECONDS = 30


class DaemonFailed(Exception):
    """A daemon ended, or did not answer in time; the text has the end of its log."""


def environment(folder: Folder) -> dict[str, str]:
    """What daemons and clients of this cluster need to know."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    path = os.pathsep.join([kept.get("PATH", ""), SYSTEM_FOLDERS])
    return kept | {"SLURM_CONF": str(folder.conf), "PATH": path}


def start(name: str, command: list[str], folder: Folder) -> tuple[int, int]:
    """Start a daemon that stays in the foreground; its process id and start time."""
    with folder.log(name).open("a") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment(folder) | {MARK: str(folder.path)},
            cwd=folder.path,
            start_new_session=True,
            umask=0o022,
        )
    return process.pid, start_time(process.pid) or 0


def client(folder: Folder, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's own commands against this cluster."""
    return subprocess.run(
        command, env=environment(folder), capture_output=True, text=True, check=check, timeout=CLIENT_TIMEOUT_SECONDS
    )


def wait_until(what: str, ready: Callable[[], bool], log: Path, seconds: float = 30.0) -> None:
    """Wait for a daemon.

    Raises:
        DaemonFailed: it was not ready in time.
    """
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            tail = log.read_text(errors="replace")[-1500:] if log.exists() else "(no log)"
            raise DaemonFailed(f"{what} was not ready after {seconds:.0f} s. The end of {log}:\n{tail}")
        time.sleep(POLL_SECONDS)


def start_time(pid: int) -> int | None:
    """When a process started, in ticks since boot; None if it is gone or a zombie. It tells a reused id from ours."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] in "ZX" else int(words[19])


def alive(pid: int, started: int) -> bool:
    """Whether that very process still runs."""
    return start_time(pid) == started


def processes_of(folder: Folder, cluster: str) -> list[int]:
    """Every process of this cluster: daemons and step managers by our mark, jobs by the name Slurm gives them."""
    marks = {f"{MARK}={folder.path}".encode(), f"SLURM_CLUSTER_NAME={cluster}".encode()}
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in pids if pid != os.getpid() and marks & _environ(pid) and start_time(pid) is not None]


def end(pids: Iterable[int], seconds: float = 10.0) -> None:
    """SIGTERM, and SIGKILL for what is left after `seconds`."""
    left = _signalled(pids, signal.SIGTERM)
    limit = time.monotonic() + seconds
    while left and time.monotonic() < limit:
        time.sleep(POLL_SECONDS)
        left = [pid for pid in left if start_time(pid) is not None]
    left = _signalled(left, signal.SIGKILL)
    while any(start_time(pid) is not None for pid in left):
        time.sleep(POLL_SECONDS)


def _signalled(pids: Iterable[int], number: signal.Signals) -> list[int]:
    """Those processes that were there to be signalled."""
    reached = []
    for pid in pids:
        try:
            os.kill(pid, number)
            reached.append(pid)
        except ProcessLookupError:
            continue
    return reached


def _environ(pid: int) -> set[bytes]:
    try:
        return set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    except OSError:
        return set()
