"""What a cluster has and how it treats jobs, asked with a few quick commands. Each may fail without stopping the others."""

from __future__ import annotations

import grp
import os
from dataclasses import dataclass

from launcher.cluster.commands import answer_of, user_name
from launcher.cluster.parsing import (
    Association,
    LivePartition,
    Qos,
    Settings,
    parse_associations,
    parse_config,
    parse_partition_fields,
    parse_qos,
    parse_sinfo,
    with_details,
)


@dataclass(frozen=True)
class Inventory:
    """A cluster that answered ``sinfo``. What it did not say is None; an empty list means that there is nothing."""

    partitions: list[LivePartition]
    settings: Settings | None
    associations: list[Association] | None
    qos: list[Qos] | None

    def open_partitions(self) -> list[LivePartition]:
        """The partitions that take jobs of this user."""
        groups = _groups()
        accounts = {association.account for association in self.associations} if self.associations else None
        return [partition for partition in self.partitions if partition.up and _may_use(partition, groups, accounts)]


def take_inventory() -> Inventory | None:
    """Ask the cluster; None if Slurm does not answer."""
    partitions = ask_partitions()
    if partitions is None:
        return None
    settings = answer_of("scontrol", "show", "config")
    # Without accounting sacctmgr would only time out.
    has_accounting = settings is None or parse_config(settings).accounting
    manage = ("sacctmgr", "--noheader", "--parsable2", "show")
    user = user_name()
    limits = (
        answer_of(*manage, "assoc", f"user={user}", "format=Account,QOS,MaxJobs,MaxSubmitJobs")
        if has_accounting
        else None
    )
    qos = answer_of(*manage, "qos", "format=Name,GraceTime,Preempt,MaxSubmitJobsPerUser") if has_accounting else None
    return Inventory(
        partitions,
        None if settings is None else parse_config(settings),
        None if limits is None else parse_associations(limits),
        None if qos is None else parse_qos(qos),
    )


def ask_partitions() -> list[LivePartition] | None:
    """The partitions of the cluster, None if Slurm does not answer."""
    rows = answer_of("sinfo", "--noheader", "--format=%P|%a|%l|%D|%T|%G|%f")
    if rows is None:
        return None
    details = parse_partition_fields(answer_of("scontrol", "--oneliner", "show", "partition") or "")
    return [with_details(partition, details.get(partition.name, {})) for partition in parse_sinfo(rows)]


def _may_use(partition: LivePartition, groups: set[str], accounts: set[str] | None) -> bool:
    """Whether the partition's lists let the user in. What is not known counts as open."""
    access = partition.access
    if access.root_only and os.geteuid() != 0:
        return False
    if access.groups is not None and not access.groups & groups:
        return False
    if accounts is None:
        return True
    allowed = accounts if access.accounts is None else accounts & access.accounts
    return bool(allowed - access.denied_accounts)


def _groups() -> set[str]:
    """The names of the user's groups."""
    names = set()
    for number in {os.getgid(), *os.getgroups()}:
        try:
            names.add(grp.getgrgid(number).gr_name)
        except KeyError:
            continue
    return names
