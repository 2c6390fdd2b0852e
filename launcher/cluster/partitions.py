"""Where jobs may go: to Slurm or to this machine, and on Slurm to which partitions.

What the configuration says about a partition is completed by what the cluster and the table of GPUs (`launcher.estimate.gpus`) know.
"""

from __future__ import annotations

import shutil

from launcher.cluster.commands import CommandRefused, NoAnswer, run_command
from launcher.cluster.inventory import Inventory, take_inventory
from launcher.cluster.parsing import UNTYPED, LivePartition
from launcher.config import ClusterConfig, PartitionConfig
from launcher.errors import ClusterError
from launcher.estimate.devices import Partition, gpu_device, local_partition
from launcher.estimate.gpus import GpuModel, known_gpu
from train.errors import BadInput
from train.runtime.slurm import NOT_CONFIGURED


def explain_choice(cluster: ClusterConfig, *, slurm: bool) -> str:
    """A line that says where the jobs will run, and why."""
    if cluster.kind != "auto":
        return f"cluster={cluster.kind}: {'submitting to Slurm' if slurm else 'training on this machine'}"
    return f"cluster=auto: {'Slurm answers here, submitting to it' if slurm else 'no Slurm here, training on this machine'}"


def on_slurm(cluster: ClusterConfig) -> bool:
    """Whether jobs go to Slurm, because the user asks for it or because it answers here."""
    return cluster.kind == "slurm" or (cluster.kind == "auto" and slurm_answers())


def slurm_answers() -> bool:
    """Whether this machine belongs to a Slurm cluster.

    Raises:
        ClusterError: it does, and the controller does not answer.
    """
    try:
        run_command("sinfo", "--noheader", "--format=%P")
    except NoAnswer as exc:
        # Slurm's tools may be installed on a machine that belongs to no cluster.
        if shutil.which("sinfo") is None or NOT_CONFIGURED in str(exc):
            return False
        raise ClusterError(
            f"{exc}. This machine belongs to a Slurm cluster whose controller does not answer. Try again when sinfo works, or train "
            "here with cluster=local."
        ) from exc
    except CommandRefused:
        return False
    return True


def partitions_for(cluster: ClusterConfig) -> tuple[Partition, ...]:
    """Where the packs of a sweep may go.

    Raises:
        ClusterError: Slurm is asked for by name, leaves questions open, and does not answer.
        BadInput: there is no such partition, or none whose GPUs have a known size.
    """
    if not on_slurm(cluster):
        return (local_partition(cluster.gpus_per_job),)
    described = bool(cluster.partitions) and all(map(_is_described, cluster.partitions.values()))
    # How many GPUs a node has is in no configuration, so for a job of several GPUs the cluster is asked in any case.
    inventory = None if described and cluster.gpus_per_job == 1 else take_inventory()
    if inventory is None and not described:
        raise ClusterError(
            "Slurm does not answer here, and the configuration does not describe its partitions. Run this where sinfo works, "
            "use cluster=local, or describe them: cluster.partitions.NAME.gpu=a100."
        )
    return choose_partitions(cluster, inventory)


def choose_partitions(cluster: ClusterConfig, inventory: Inventory | None) -> tuple[Partition, ...]:
    """The partitions that `cluster` names, completed from `inventory`. If it names none, all with GPUs that are open to the user.

    Raises:
        BadInput: a named partition does not exist, no GPU has a known size, or no node has as many as a job asks for.
    """
    live = {partition.name: partition for partition in inventory.partitions} if inventory else {}
    named = cluster.partitions or _open_with_gpus(inventory)
    partitions: list[Partition] = []
    for name, settings in named.items():
        if live and name not in live:
            raise BadInput(f"cluster.partitions.{name}: this cluster has no such partition; it has {', '.join(live)}.")
        partitions += _partitions(name, settings, live.get(name), cluster.gpus_per_job)
    if not partitions:
        raise BadInput(_nothing_known(named, live))
    large_enough = [partition for partition in partitions if partition.most_per_job >= cluster.gpus_per_job]
    if not large_enough:
        names = ", ".join(dict.fromkeys(partition.name for partition in partitions))
        most = max(partition.most_per_job for partition in partitions)
        raise BadInput(
            f"cluster.gpus_per_job={cluster.gpus_per_job}: a job does not leave its node, and no node of {names} has more than "
            f"{most:.0f} GPUs of a kind; set it to at most {most:.0f}."
        )
    return tuple(large_enough)


def _open_with_gpus(inventory: Inventory | None) -> dict[str, PartitionConfig]:
    partitions = inventory.open_partitions() if inventory else []
    return {partition.name: PartitionConfig() for partition in partitions if partition.gpus}


def _partitions(name: str, settings: PartitionConfig, live: LivePartition | None, gpus_per_job: int) -> list[Partition]:
    """One for each kind of GPU in the partition whose size is known. What the user sets wins over what the cluster says."""
    kinds = {settings.gpu: settings.gpus} if settings.gpu else dict(live.gpus) if live else {}
    partitions = []
    for kind, count in kinds.items():
        model = known_gpu(kind or "") or _gpu_of_features(live)
        memory_gib = settings.memory_gib or (model.memory_gib if model else None)
        if memory_gib is None:
            continue
        partitions.append(
            Partition(
                name,
                gpu_device(kind or (model.name if model else name), memory_gib),
                gres=settings.model_copy(update={"gpu": kind or None}).gres_request,
                gpus=settings.gpus or count or (live.gpus.get(kind or UNTYPED) if live else None),
                max_minutes=settings.max_minutes or (live.max_minutes if live else None),
                usd_per_gpu_hour=settings.usd_per_gpu_hour,
                tier=settings.tier if settings.tier is not None else live.tier if live else 1,
                gpus_per_job=gpus_per_job,
                per_node=live.per_node.get(kind or UNTYPED) if live else None,
            )
        )
    return partitions


def _gpu_of_features(live: LivePartition | None) -> GpuModel | None:
    """The GPU that the features of a partition's nodes name, if they agree on one."""
    named = (known_gpu(feature) for feature in live.features) if live else ()
    models = {model for model in named if model is not None}
    return models.pop() if len(models) == 1 else None


def _is_described(settings: PartitionConfig) -> bool:
    """Whether the cluster need not be asked about a partition."""
    return settings.gpu is not None and settings.gpus is not None and settings.max_minutes is not None


def _nothing_known(named: dict[str, PartitionConfig], live: dict[str, LivePartition]) -> str:
    """Why no pack can be placed."""
    kinds = sorted({kind or "untyped" for name in named if name in live for kind in live[name].gpus})
    if kinds:
        name = next(iter(named))
        return (
            f"It is not known how much memory the GPUs of this cluster have ({', '.join(kinds)}). Set it: "
            f"cluster.partitions.{name}.memory_gib=24."
        )
    return "this cluster has no partition with working GPUs that is open to you; 'python -m launcher doctor' shows what it has."
