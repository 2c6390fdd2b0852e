"""What Slurm's commands print about a cluster, as values. Text in, values out; nothing here runs a command.

Each parser shows an example of the lines that it reads.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

NO_LIMIT = {"UNLIMITED", "INFINITE", "NONE", "N/A", "(NULL)", ""}
# How the states of working nodes begin in sinfo: idle, mixed, allocated, completing, reserved, planned.
NODES_THAT_WORK = ("idle", "mix", "alloc", "comp", "resv", "plan")
GRES = re.compile(r"gpu:(?:(?P<type>[^:(),]+):)?(?P<count>\d+)")
DURATION = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")

# The type of GPUs to which a cluster gives none.
UNTYPED = ""


@dataclass(frozen=True)
class Settings:
    """What decides how long a job lives, from ``scontrol show config``. Times in seconds."""

    version: str
    cluster: str
    requeue: bool
    preempt_type: str
    preempt_mode: str
    kill_wait: int
    max_array_size: int
    accounting: bool
    user_signal: bool


@dataclass(frozen=True)
class Access:
    """Who may use a partition: names, or None for everybody."""

    groups: frozenset[str] | None = None
    accounts: frozenset[str] | None = None
    denied_accounts: frozenset[str] = frozenset()
    root_only: bool = False


@dataclass(frozen=True)
class LivePartition:
    """A partition as the cluster reports it.

    gpus: GPUs by type on nodes that work. per_node: the most GPUs of each type on one such node.
    tier: jobs of a higher tier may preempt those of a lower one.
    grace: seconds between a preemption's first SIGTERM and its end; None if the cluster did not say.
    """

    name: str
    up: bool
    default: bool
    max_minutes: int | None
    gpus: dict[str, int]
    features: frozenset[str]
    tier: int = 1
    preempt_mode: str | None = None
    grace: int | None = None
    access: Access = Access()
    per_node: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Association:
    """An account that the user may submit to, and how many jobs it allows."""

    account: str
    qos: tuple[str, ...]
    max_jobs: int | None
    max_submit: int | None


@dataclass(frozen=True)
class Qos:
    """A quality of service that preempts or limits. `grace` in seconds."""

    name: str
    grace: int
    preempts: tuple[str, ...]
    max_submit_per_user: int | None


def parse_config(text: str) -> Settings:
    """``scontrol show config``: lines like ``KillWait                = 30 sec``. A missing setting has Slurm's default."""
    config = {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in text.splitlines())}
    # The option moved from SlurmctldParameters to PreemptParameters.
    signals = config.get("SlurmctldParameters", "") + config.get("PreemptParameters", "")
    return Settings(
        version=config.get("SLURM_VERSION", "unknown"),
        cluster=config.get("ClusterName", "unknown"),
        requeue=config.get("JobRequeue", "1") == "1",
        preempt_type=config.get("PreemptType", "preempt/none").removeprefix("preempt/"),
        preempt_mode=config.get("PreemptMode", "OFF").upper(),
        kill_wait=_number(config.get("KillWait", "")) or 30,
        # 0 means that there are no arrays.
        max_array_size=_number(config.get("MaxArraySize", "1001")) or 0,
        accounting=config.get("AccountingStorageType", "").endswith("slurmdbd"),
        user_signal="send_user_signal" in signals,
    )


def parse_sinfo(text: str) -> list[LivePartition]:
    """``sinfo --format=%P|%a|%l|%D|%T|%G|%f``: a row per partition and kind of node, summed up per partition.

    ``gpu*|up|2-00:00:00|3|mixed|gpu:a100:4(S:0-1)|avx512`` says: the default partition `gpu` is up and allows 2 days, and
    3 of its nodes, in use in part, have 4 a100 each. ``idle*`` is a node that does not respond.
    """
    partitions: dict[str, LivePartition] = {}
    for line in text.splitlines():
        name, available, limit, nodes, state, gres, features = (word.strip() for word in line.split("|"))
        plain = name.rstrip("*")
        known = partitions.get(plain)
        works = state.lower().startswith(NODES_THAT_WORK) and not state.endswith("*")
        gpus, per_node = (Counter(known.gpus), dict(known.per_node)) if known else (Counter[str](), {})
        for kind, count in parse_gres(gres).items() if works else ():
            gpus[kind] += count * int(nodes)
            per_node[kind] = max(count, per_node.get(kind, 0))
        # The nodes of one partition may differ, so features of all rows are collected.
        named = frozenset() if features == "(null)" else frozenset(features.split(","))
        both = named if known is None else known.features | named
        partitions[plain] = LivePartition(
            name=plain,
            up=available == "up",
            default=name.endswith("*"),
            max_minutes=parse_minutes(limit),
            gpus=dict(gpus),
            features=both,
            per_node=per_node,
        )
    return list(partitions.values())


def parse_partition_fields(text: str) -> dict[str, dict[str, str]]:
    """``scontrol --oneliner show partition``: the fields of each partition by name.

    ``PartitionName=gpu AllowGroups=ALL AllowAccounts=ml,vision MaxTime=2-00:00:00 PriorityTier=10 PreemptMode=OFF GraceTime=0``
    """
    rows = (dict(word.partition("=")[::2] for word in line.split()) for line in text.splitlines())
    return {row["PartitionName"]: row for row in rows if "PartitionName" in row}


def with_details(partition: LivePartition, fields: dict[str, str]) -> LivePartition:
    """`partition` with what only ``scontrol show partition`` says."""
    access = Access(
        _names(fields.get("AllowGroups")),
        _names(fields.get("AllowAccounts")),
        _names(fields.get("DenyAccounts")) or frozenset(),
        fields.get("RootOnly") == "YES",
    )
    return LivePartition(
        partition.name,
        partition.up,
        partition.default,
        parse_minutes(fields["MaxTime"]) if "MaxTime" in fields else partition.max_minutes,
        partition.gpus,
        partition.features,
        tier=_number(fields.get("PriorityTier", "")) or 1,
        preempt_mode=fields.get("PreemptMode"),
        grace=_number(fields.get("GraceTime", "")),
        access=access,
        per_node=partition.per_node,
    )


def parse_gres(text: str) -> dict[str, int]:
    """GPUs of a node by type: ``gpu:a100:4(S:0-1),lscratch:1`` gives four a100, ``gpu:2`` two untyped ones."""
    counts: Counter[str] = Counter()
    # Sockets and indices in brackets also contain numbers and colons.
    for match in GRES.finditer(re.sub(r"\([^)]*\)", "", text)):
        counts[match["type"] or UNTYPED] += int(match["count"])
    return dict(counts)


def parse_minutes(text: str) -> int | None:
    """A time limit: ``30``, ``30:00``, ``1:30:00``, ``2-00:00:00``, ``1-12``; None for no limit. Seconds are dropped."""
    match = DURATION.fullmatch(text.strip())
    if match is None:
        return None
    clock = [int(part) for part in match["clock"].split(":")]
    # With days the clock is hours[:minutes[:seconds]], without them minutes, minutes:seconds or hours:minutes:seconds.
    if match["days"] is not None:
        hours, minutes = (*clock, 0)[:2]
        return (int(match["days"]) * 24 + hours) * 60 + minutes
    return clock[0] * 60 + clock[1] if len(clock) == 3 else clock[0]


def parse_associations(text: str) -> list[Association]:
    """``sacctmgr --noheader --parsable2 show assoc format=Account,QOS,MaxJobs,MaxSubmitJobs``: ``ml|normal,high|8|100``."""
    rows = (line.split("|") for line in text.splitlines() if line.count("|") == 3)
    return [
        Association(account, tuple(filter(None, qos.split(","))), _number(jobs), _number(submit))
        for account, qos, jobs, submit in rows
    ]


def parse_qos(text: str) -> list[Qos]:
    """``sacctmgr --noheader --parsable2 show qos format=Name,GraceTime,Preempt,MaxSubmitJobsPerUser``: ``high|00:05:00|normal|50``."""
    rows = (line.split("|") for line in text.splitlines() if line.count("|") == 3)
    return [
        Qos(name, _clock_seconds(grace), tuple(filter(None, preempts.split(","))), _number(submit))
        for name, grace, preempts, submit in rows
    ]


def _clock_seconds(text: str) -> int:
    """``00:05:00`` in seconds."""
    seconds = 0
    for part in text.split(":"):
        seconds = 60 * seconds + (_number(part) or 0)
    return seconds


def _number(text: str) -> int | None:
    """The number at the beginning of a value such as ``30 sec``; None if it begins otherwise."""
    match = re.match(r"\d+", text)
    return int(match[0]) if match else None


def _names(text: str | None) -> frozenset[str] | None:
    """A list of names; None for everybody."""
    if text is None or text.upper() in NO_LIMIT | {"ALL"}:
        return None
    return frozenset(text.split(","))
