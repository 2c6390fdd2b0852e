"""Starting, watching and ending the cluster's processes, without systemd."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from slurm.nodes import NODES
from slurm.packages import SYSTEM_FOLDERS
from slurm.settings import Folder, Record

# Every daemon, and every slurmstepd that it starts, has this variable with the run folder.
MARK = "SLURM_BOX"
POLL_SECONDS = 0.05
CLIENT_TIMEOUT_SECONDS = 30


class DaemonFailed(Exception):
    """A daemon ended, or did not answer in time; the text has the end of its log."""


def environment(folder: Folder) -> dict[str, str]:
    """The environment of this cluster's daemons and clients."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    path = os.pathsep.join([kept.get("PATH", ""), SYSTEM_FOLDERS])
    return kept | {"SLURM_CONF": str(folder.conf), "PATH": path}


def daemon_commands(folder: Folder, record: Record) -> dict[str, list[str]]:
    """The command of each daemon, by name. All stay in the foreground."""
    munge = folder.munge_key.parent
    commands = {
        "munged": [
            program_path("munged"), "--foreground", f"--socket={folder.munge_socket}", f"--key-file={folder.munge_key}",
            f"--pid-file={munge}/pid", f"--seed-file={munge}/seed", f"--log-file={munge}/log",
        ],
        "mariadbd": [
            program_path("mariadbd"), "--no-defaults", "--user=root", f"--datadir={folder.database}",
            f"--socket={folder.database}/socket", f"--pid-file={folder.database}/pid", "--bind-address=127.0.0.1",
            f"--port={record.ports.mariadb}", f"--init-file={folder.database}/users.sql",
            "--innodb-flush-log-at-trx-commit=0", "--skip-name-resolve",
        ],
        "slurmdbd": [program_path("slurmdbd"), "-D"],
        "slurmctld": [program_path("slurmctld"), "-D"],
    }  # fmt: skip
    for node in NODES:
        commands[f"slurmd-{node.name}"] = [*_own_hostname(node.name), program_path("slurmd"), "-D", "-N", node.name]
    return commands


def program_path(name: str) -> str:
    """Where a program is installed, also if its folder is not on PATH."""
    return shutil.which(name, path=SYSTEM_FOLDERS) or name


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
    """When a process started, in ticks since boot; None if it is gone or a zombie. With it a reused process id is noticed."""
    try:
        # The command's name in brackets may contain spaces and brackets, so fields are counted behind the last one (proc(5)).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def alive(pid: int, started: int) -> bool:
    """Whether that process still runs, and its id was not reused."""
    return start_time(pid) == started


def processes_of(folder: Folder, cluster: str) -> list[int]:
    """Every process of this cluster: daemons and step managers by `MARK`, jobs by Slurm's own variable."""
    marks = {f"{MARK}={folder.path}".encode(), f"SLURM_CLUSTER_NAME={cluster}".encode()}
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in pids if pid != os.getpid() and marks & _environ(pid) and start_time(pid) is not None]


def end(pids: Iterable[int], seconds: float = 10.0) -> None:
    """Send SIGTERM, and SIGKILL to what is left after `seconds`."""
    left = _signalled(pids, signal.SIGTERM)
    limit = time.monotonic() + seconds
    while left and time.monotonic() < limit:
        time.sleep(POLL_SECONDS)
        left = [pid for pid in left if start_time(pid) is not None]
    left = _signalled(left, signal.SIGKILL)
    while any(start_time(pid) is not None for pid in left):
        time.sleep(POLL_SECONDS)


def _signalled(pids: Iterable[int], number: signal.Signals) -> list[int]:
    """Signal these processes; those that still existed."""
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


def _own_hostname(name: str) -> list[str]:
    """A command that gives a node a host name of its own, so that jobs see several hosts; nothing if namespaces are forbidden."""
    unshare = [program_path("unshare"), "--uts"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode != 0:
        return []
    return [*unshare, "sh", "-c", 'hostname "$0" && exec "$@"', name]
