"""What a cluster consists of: its folder, the settings that decide what happens to a job, and the ports of its daemons.

A new option of ``slurm/cluster up`` is a field of `Settings`, an argument in `program`, and a line in `files`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from slurm.nodes import NODES


@dataclass(frozen=True)
class Settings:
    """What `slurm/cluster up` takes as arguments. Times in seconds, limits of partitions in minutes.

    grace: between the first SIGTERM of a preemption and its end (GraceTime); kill_wait: between SIGTERM and SIGKILL.
    send_user_signal: a preemption sends the job's own ``--signal`` instead of SIGTERM.
    preempt_mode: what happens to a preempted job, REQUEUE or CANCEL.
    submit_limit: jobs and array tasks that the ordinary user may have in the queue (MaxSubmitJobs), 0 for any number.
    epilog: a program that nodes run after each job, which is COMPLETING until it ends; empty for none.
    """

    grace: int = 10
    kill_wait: int = 20
    max_array_size: int = 501
    max_time: int = 1440
    default_time: int = 60
    submit_limit: int = 0
    requeue: bool = True
    preempt_mode: str = "REQUEUE"
    accounting: bool = True
    send_user_signal: bool = False
    epilog: str = ""
    user: str = "student"


@dataclass(frozen=True)
class Ports:
    """A block of ten ports for one cluster, so that several clusters can share a machine."""

    first: int

    @property
    def all(self) -> list[int]:
        """Every port that a daemon listens on."""
        return [self.slurmctld, self.slurmdbd, self.mariadb, *(self.slurmd(place) for place in range(len(NODES)))]

    @property
    def slurmctld(self) -> int:
        """The controller's port."""
        return self.first

    @property
    def slurmdbd(self) -> int:
        """The accounting daemon's port."""
        return self.first + 1

    @property
    def mariadb(self) -> int:
        """The database's port."""
        return self.first + 2

    def slurmd(self, place: int) -> int:
        """The port of the node with that place in `NODES`."""
        return self.first + 3 + place


@dataclass(frozen=True)
class Folder:
    """The run folder: everything of one cluster, a property per file. Every user may enter it."""

    path: Path

    @property
    def conf(self) -> Path:
        """Slurm's configuration; SLURM_CONF is its path."""
        return self.path / "slurm.conf"

    @property
    def dbd_conf(self) -> Path:
        """slurmdbd's configuration; slurmdbd looks for it in the folder of slurm.conf."""
        return self.path / "slurmdbd.conf"

    @property
    def gres_conf(self) -> Path:
        """Which files represent GPUs."""
        return self.path / "gres.conf"

    @property
    def cgroup_conf(self) -> Path:
        """How the processes of a job are tracked."""
        return self.path / "cgroup.conf"

    @property
    def munge_key(self) -> Path:
        """The secret with which the daemons authenticate each other."""
        return self.path / "munge" / "key"

    @property
    def munge_socket(self) -> Path:
        """Where clients and daemons ask munged."""
        return self.path / "munge" / "socket"

    @property
    def database(self) -> Path:
        """MariaDB's data."""
        return self.path / "mariadb"

    @property
    def state(self) -> Path:
        """What slurmctld remembers about jobs."""
        return self.path / "state"

    @property
    def gpus(self) -> Path:
        """Character devices that represent GPUs."""
        return self.path / "gpus"

    @property
    def logs(self) -> Path:
        """A log per daemon."""
        return self.path / "log"

    def log(self, daemon: str) -> Path:
        """The output of that daemon."""
        return self.logs / f"{daemon}.log"

    def spool(self, node: str) -> Path:
        """slurmd's working folder of a node."""
        return self.path / "spool" / node

    @property
    def record(self) -> Path:
        """Settings, ports and process ids of the cluster as it runs."""
        return self.path / "cluster.json"


@dataclass(frozen=True)
class Record:
    """A running cluster, as its folder records it. `pids` maps a daemon's name to its process id and start time."""

    settings: Settings
    ports: Ports
    pids: dict[str, tuple[int, int]]

    def write(self, folder: Folder) -> None:
        """Write a new file and rename it, so that a reader never sees half of one."""
        values = {"settings": asdict(self.settings), "first_port": self.ports.first, "pids": self.pids}
        new = folder.record.with_suffix(".new")
        new.write_text(json.dumps(values, indent=1))
        new.rename(folder.record)

    def with_pids(self, pids: dict[str, tuple[int, int]]) -> Record:
        """The same cluster with these daemons added or replaced."""
        return replace(self, pids=self.pids | pids)


def read_record(folder: Folder) -> Record | None:
    """The cluster that was started in `folder`, None if none was."""
    try:
        values = json.loads(folder.record.read_text())
    except FileNotFoundError:
        return None
    known = {field.name for field in fields(Settings)}
    settings = Settings(**{name: value for name, value in values["settings"].items() if name in known})
    pids = {name: (pid, started) for name, (pid, started) in values["pids"].items()}
    return Record(settings, Ports(values["first_port"]), pids)
