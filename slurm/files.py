"""The cluster's configuration files as text: settings in, text out."""

from __future__ import annotations

from slurm.nodes import CPUS_PER_NODE, GPUS_PER_NODE, MEMORY_PER_NODE_MIB, NODES, PARTITIONS, URGENT, nodes_of
from slurm.settings import Folder, Ports, Settings

# The database listens only on 127.0.0.1 and holds only test jobs.
DATABASE_PASSWORD = "box"
# A requeued job waits for its old credential to expire, 120 s by default.
CRED_EXPIRE_SECONDS = 5


def slurm_conf(settings: Settings, folder: Folder, ports: Ports, host: str, *, freezer: bool) -> str:
    """slurm.conf; `freezer` says whether the host lets Slurm keep a job's processes in a cgroup."""
    # Clusters on one host share the names of cgroups, so no job id may occur twice.
    first_job = 100 * (ports.first - 20_000) + 1
    lines = [
        f"ClusterName=box{ports.first}",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={ports.slurmctld}",
        "SlurmUser=root",
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder.munge_socket},cred_expire={CRED_EXPIRE_SECONDS}",
        f"StateSaveLocation={folder.state}",
        f"SlurmdSpoolDir={folder.path}/spool/%n",
        f"SlurmctldPidFile={folder.path}/slurmctld.pid",
        f"SlurmdPidFile={folder.path}/slurmd-%n.pid",
        f"ProctrackType=proctrack/{'cgroup' if freezer else 'pgid'}",
        "TaskPlugin=task/none",
        "MpiDefault=none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU_Memory",
        "PriorityType=priority/basic",
        # Believe the invented CPUs and memory.
        "SlurmdParameters=config_overrides",
        # Without a default, a job that asks for no memory gets that of a whole node.
        f"DefMemPerCPU={MEMORY_PER_NODE_MIB // CPUS_PER_NODE}",
        f"FirstJobId={first_job}",
        *_behaviour(settings),
        *_quick(),
        *_accounting(settings, folder, ports),
        *_nodes(ports),
        *_partitions(settings),
    ]
    return "\n".join(lines) + "\n"


def gres_conf(folder: Folder) -> str:
    """gres.conf: the GPUs of every node, by a file each."""
    lines = [
        f"NodeName={node.name} Name=gpu Type={node.gpu} File={folder.gpus}/{node.name}-[0-{GPUS_PER_NODE - 1}]"
        for node in NODES
    ]
    return "\n".join(["AutoDetect=off", *lines]) + "\n"


def cgroup_conf() -> str:
    """cgroup.conf: the freezer tracks the processes of a job; nothing is limited."""
    return "CgroupPlugin=cgroup/v1\nConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=no\n"


def slurmdbd_conf(folder: Folder, ports: Ports) -> str:
    """slurmdbd.conf. Only SlurmUser may be able to read the file."""
    lines = [
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder.munge_socket}",
        "DbdHost=localhost",
        "DbdAddr=127.0.0.1",
        f"DbdPort={ports.slurmdbd}",
        "SlurmUser=root",
        "StorageType=accounting_storage/mysql",
        "StorageHost=127.0.0.1",
        f"StoragePort={ports.mariadb}",
        "StorageLoc=slurm_acct_db",
        "StorageUser=slurm",
        f"StoragePass={DATABASE_PASSWORD}",
        f"PidFile={folder.path}/slurmdbd.pid",
    ]
    return "\n".join(lines) + "\n"


def database_users() -> str:
    """What MariaDB executes when it starts: slurmdbd's user."""
    return (
        f"CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY '{DATABASE_PASSWORD}';\n"
        "GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';\n"
    )


def _behaviour(settings: Settings) -> list[str]:
    """What decides how long a job lives."""
    signal = ["SlurmctldParameters=preempt_send_user_signal"] if settings.send_user_signal else []
    epilog = [f"Epilog={settings.epilog}"] if settings.epilog else []
    return [
        "PreemptType=preempt/partition_prio",
        f"PreemptMode={settings.preempt_mode}",
        f"KillWait={settings.kill_wait}",
        f"JobRequeue={int(settings.requeue)}",
        f"MaxArraySize={settings.max_array_size}",
        *signal,
        *epilog,
    ]


def _quick() -> list[str]:
    """Short times, so that a test sees within seconds what takes minutes elsewhere."""
    return [
        "SlurmctldTimeout=10",
        "SlurmdTimeout=10",
        "ReturnToService=2",
        "CompleteWait=0",
        "MinJobAge=300",
        "SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=100000,bf_interval=1",
    ]


def _accounting(settings: Settings, folder: Folder, ports: Ports) -> list[str]:
    """Jobs are recorded by slurmdbd, or not at all."""
    gres = ["GresTypes=gpu"]
    if not settings.accounting:
        return [*gres, "AccountingStorageType=accounting_storage/none"]
    types = ",".join(f"gres/gpu:{partition}" for partition in PARTITIONS)
    return [
        *gres,
        "AccountingStorageType=accounting_storage/slurmdbd",
        "AccountingStorageHost=127.0.0.1",
        f"AccountingStoragePort={ports.slurmdbd}",
        f"AccountingStoragePass={folder.munge_socket}",
        "AccountingStorageEnforce=associations,limits,qos",
        f"AccountingStorageTRES=gres/gpu,{types}",
        "JobAcctGatherType=jobacct_gather/linux",
    ]


def _nodes(ports: Ports) -> list[str]:
    return [
        f"NodeName={node.name} NodeAddr=127.0.0.1 Port={ports.slurmd(place)} CPUs={CPUS_PER_NODE} "
        f"RealMemory={MEMORY_PER_NODE_MIB} Gres=gpu:{node.gpu}:{GPUS_PER_NODE} State=UNKNOWN"
        for place, node in enumerate(NODES)
    ]


def _partitions(settings: Settings) -> list[str]:
    """A partition per type of GPU, and one over all nodes whose jobs preempt the others."""
    limits = f"MaxTime={settings.max_time} DefaultTime={settings.default_time}"
    ordinary = [
        f"PartitionName={name} Nodes={nodes_of(name)} Default={'YES' if place == 0 else 'NO'} PriorityTier=1 "
        f"GraceTime={settings.grace} {limits} State=UP"
        for place, name in enumerate(PARTITIONS)
    ]
    return [*ordinary, f"PartitionName={URGENT} Nodes=ALL PriorityTier=10 PreemptMode=OFF {limits} State=UP"]
