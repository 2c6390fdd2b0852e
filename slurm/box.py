"""Start the cluster, change its settings, end it."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from slurm.daemons import (
    DaemonFailed,
    alive,
    client,
    daemon_commands,
    end,
    processes_of,
    program_path,
    start,
    wait_until,
)
from slurm.files import cgroup_conf, database_users, gres_conf, slurm_conf, slurmdbd_conf
from slurm.nodes import GPUS_PER_NODE, NODES, PARTITIONS, URGENT
from slurm.packages import install, make_user
from slurm.settings import Folder, Ports, Record, Settings, read_record

LOCK = Path("/run/lorapack-slurm.lock")
FREEZER = Path("/sys/fs/cgroup/freezer")
# Below the ports that the kernel gives to clients.
PORT_BLOCKS = range(20_000, 32_000, 10)
CANCEL_MARGIN_SECONDS = 5.0
# Settings that slurmctld takes up without a restart.
LIVE = {"grace", "kill_wait", "requeue", "preempt_mode", "max_time", "default_time", "submit_limit", "epilog", "user"}


def up(folder: Folder, settings: Settings) -> Record:
    """Start the cluster, or bring a running one to these settings; returns when its nodes take jobs.

    Raises:
        CannotInstall: this machine cannot have it.
        DaemonFailed: a daemon did not come up.
    """
    with _one_at_a_time():
        install()
        make_user(settings.user)
        running = read_record(folder)
        if running and not missing_daemons(running):
            return _change(folder, running, settings)
        down(folder)
        return _start(folder, settings)


def down(folder: Folder) -> None:
    """End every job and daemon of the cluster. The folder with its logs stays until the next `up`."""
    record = read_record(folder)
    if record is None:
        return
    if _is_up(record, "slurmctld"):
        _cancel_jobs(folder, record.settings.kill_wait)
    cluster = f"box{record.ports.first}"
    daemons = [pid for pid, started in record.pids.values() if alive(pid, started)]
    end([*daemons, *(pid for pid in processes_of(folder, cluster) if pid not in daemons)])
    end(processes_of(folder, cluster))
    folder.record.unlink()


def missing_daemons(record: Record) -> list[str]:
    """The daemons that should run and do not."""
    return [name for name in record.pids if not _is_up(record, name)]


def restart(folder: Folder, name: str) -> Record:
    """End a daemon, if it still runs, and start it again; returns when it answers.

    Raises:
        KeyError: the cluster has no such daemon.
        DaemonFailed: it did not come up.
    """
    record = read_record(folder)
    if record is None:
        raise DaemonFailed(f"{folder.path} holds no running cluster; start one with slurm/cluster up")
    pid, started = record.pids[name]
    if alive(pid, started):
        end([pid])
    record = record.with_pids({name: start(name, daemon_commands(folder, record)[name], folder)})
    record.write(folder)
    _wait_for_nodes(folder)
    return record


def _start(folder: Folder, settings: Settings) -> Record:
    record = Record(settings, _free_ports(), {})
    _make_folder(folder)
    _write_files(folder, record)
    _make_munge_key(folder)
    record = _started(folder, record, "munged")
    wait_until("munged", folder.munge_socket.exists, folder.log("munged"))
    if settings.accounting:
        record = _start_accounting(folder, record)
    nodes = [f"slurmd-{node.name}" for node in NODES]
    record = _started(folder, record, "slurmctld", *nodes)
    _wait_for_nodes(folder)
    return record


def _make_munge_key(folder: Folder) -> None:
    folder.munge_key.parent.mkdir(mode=0o755)
    folder.munge_key.write_bytes(os.urandom(1024))
    folder.munge_key.chmod(0o600)


def _start_accounting(folder: Folder, record: Record) -> Record:
    """Start database and slurmdbd, and add the user's association, without which slurmctld takes no jobs."""
    _install_database(folder)
    record = _started(folder, record, "mariadbd")
    wait_until("mariadbd", lambda: _listens(record.ports.mariadb), folder.log("mariadbd"))
    record = _started(folder, record, "slurmdbd")
    wait_until(
        "slurmdbd", lambda: client(folder, "sacctmgr", "-n", "list", "cluster", check=False).returncode == 0,
        folder.log("slurmdbd"),
    )  # fmt: skip
    _make_accounts(folder, record)
    return record


def _make_accounts(folder: Folder, record: Record) -> None:
    manage = ("sacctmgr", "--immediate", "--quiet")
    client(folder, *manage, "add", "cluster", f"box{record.ports.first}", check=False)
    client(folder, *manage, "add", "account", "lab", check=False)
    client(folder, *manage, "add", "user", f"{record.settings.user},root", "account=lab", check=False)
    # -1 removes the limit.
    limit = record.settings.submit_limit or -1
    client(folder, *manage, "modify", "user", record.settings.user, "set", f"MaxSubmitJobs={limit}", check=False)


def _install_database(folder: Folder) -> None:
    options = ["--no-defaults", "--user=root", "--auth-root-authentication-method=normal", "--skip-test-db"]
    with folder.log("mariadbd").open("a") as log:
        subprocess.run(
            [program_path("mariadb-install-db"), *options, f"--datadir={folder.database}"],
            stdout=log, stderr=log, check=True,
        )  # fmt: skip
    (folder.database / "users.sql").write_text(database_users())


def _change(folder: Folder, running: Record, settings: Settings) -> Record:
    """Bring a running cluster to `settings`: live if possible, else by restarting slurmctld, or everything."""
    before = running.settings
    if before == settings:
        return running
    if settings.accounting and "slurmdbd" not in running.pids:
        down(folder)
        return _start(folder, settings)
    record = replace(running, settings=settings)
    _write_files(folder, record)
    record.write(folder)
    if settings.accounting:
        _make_accounts(folder, record)
    changed = {name for name in vars(settings) if getattr(settings, name) != getattr(before, name)}
    if not changed <= LIVE:
        record = restart(folder, "slurmctld")
    client(folder, "scontrol", "reconfigure")
    return record


def _write_files(folder: Folder, record: Record) -> None:
    host = socket.gethostname().partition(".")[0]
    conf = slurm_conf(record.settings, folder, record.ports, host, freezer=_freezer_works())
    folder.conf.write_text(conf)
    folder.gres_conf.write_text(gres_conf(folder))
    folder.cgroup_conf.write_text(cgroup_conf())
    folder.dbd_conf.touch(mode=0o600)
    folder.dbd_conf.write_text(slurmdbd_conf(folder, record.ports))


def _make_folder(folder: Folder) -> None:
    """An empty run folder that every user may enter, with a character device for every GPU."""
    if folder.path.exists():
        shutil.rmtree(folder.path)
    for path in (folder.path, folder.state, folder.gpus, folder.logs):
        path.mkdir(parents=True, mode=0o755)
        path.chmod(0o755)
    for node in NODES:
        folder.spool(node.name).mkdir(parents=True, mode=0o755)
        for number in range(GPUS_PER_NODE):
            (folder.gpus / f"{node.name}-{number}").symlink_to("/dev/null")


def _started(folder: Folder, record: Record, *names: str) -> Record:
    commands = daemon_commands(folder, record)
    record = record.with_pids({name: start(name, commands[name], folder) for name in names})
    record.write(folder)
    return record


def _wait_for_nodes(folder: Folder) -> None:
    def ready() -> bool:
        answer = client(folder, "sinfo", "--noheader", "--Node", "--format=%N %T", check=False)
        states = dict(line.split() for line in answer.stdout.splitlines())
        return {node.name for node in NODES} == {n for n, s in states.items() if s in {"idle", "mixed", "allocated"}}

    wait_until("the four nodes", ready, folder.log("slurmctld"))


def _cancel_jobs(folder: Folder, kill_wait: int) -> None:
    """Let Slurm end the jobs, because it knows their processes best."""

    def empty() -> bool:
        return client(folder, "squeue", "--noheader", check=False).stdout.strip() == ""

    for partition in (*PARTITIONS, URGENT):
        client(folder, "scancel", f"--partition={partition}", check=False)
    try:
        wait_until("the queue", empty, folder.log("slurmctld"), kill_wait + CANCEL_MARGIN_SECONDS)
    except DaemonFailed:
        # The caller ends their processes one by one.
        return


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Hold a lock: two clusters that start at once would compete for packages and ports."""
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_up(record: Record, name: str) -> bool:
    return name in record.pids and alive(*record.pids[name])


def _free_ports() -> Ports:
    """The first block of ports on which nothing listens."""
    for first in PORT_BLOCKS:
        ports = Ports(first)
        if not any(map(_listens, ports.all)):
            return ports
    raise DaemonFailed(f"no free ports between {PORT_BLOCKS.start} and {PORT_BLOCKS.stop}")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _freezer_works() -> bool:
    """Whether the cgroup controller with which Slurm 22 tracks processes exists here and may be used."""
    probe = FREEZER / "lorapack-probe"
    try:
        probe.mkdir(exist_ok=True)
        probe.rmdir()
    except OSError:
        return False
    return True
