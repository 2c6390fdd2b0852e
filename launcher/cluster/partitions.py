"""Slurm or this machine: decided once per command, and said."""

from __future__ import annotations

import shutil

from launcher.cluster.commands import CommandRefused, NoAnswer, run_command
from launcher.cluster.inventory import Inventory, take_inventory
from launcher.cluster.parsing import UNTYPED, LivePartition
from launcher.errors import ClusterError
from launcher.estimate.devices import Partition, gpu_device, local_partition
from launcher.estimate.gpus import GpuModel, known_gpu
from launcher.records import ClusterConfig, PartitionConfig
from train.errors import BadInput
from train.runtime.slurm import NOT_CONFIGURED


def explain_choice(cluster: ClusterConfig, *, slurm: bool) -> str:
    """A line that says where the jobs will run, and why."""
    if cluster.kind != "auto":
        return f"cluster={cluster.kind}: {'submitting to Slurm' if slurm else 'training on this machine'}"
    return f"cluster=auto: {'Slurm answers here, submitting to it' if slurm else 'no Slurm here, training on this machine'}"


def on_slurm(cluster: ClusterConfig) -> bool:
    """Whether jobs go to Slurm: asked for by name, or answering here."""
    return cluster.kind == "slurm" or (cluster.kind == "auto" and slurm_answers())


def slurm_answers() -> bool:
    """Whether this machine belongs to a Slurm cluster.

    Raises:
        ClusterError: it does, and the controller is away.
    """
    try:
        run_command("sinfo", "--noheader", "--format=%P")
    except NoAnswer as exc:
        if shutil.which("sinfo") is None or NOT_CONFIGURED in str(exc):
            return False
        raise ClusterError(
            f"{exc}. This machine belongs to a Slurm cluster whose controller is away: try again when sinfo answers, or train "
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
    described = all(_complete(partition) for partition in cluster.partitions.values())
    enough = (
        cluster.partitions and described and cluster.gpus_per_job == 1
    )  # how many GPUs a node has, only the cluster knows
    inventory = None if enough else take_inventory()
    if inventory is None and not (cluster.partitions and described):
        raise ClusterError(
            "Slurm does not answer here, and the configuration does not describe its partitions. Run this where sinfo works, "
            "use cluster=local, or describe them: cluster.partitions.NAME.gpu=a100."
        )
    return choose_partitions(cluster, inventory)


def choose_partitions(cluster: ClusterConfig, inventory: Inventory | None) -> tuple[Partition, ...]:
    """The partitions of `cluster`, completed from `inventory`; where it names none, all that have GPUs and are open to the user.

    Raises:
        BadInput: a named partition does not exist, no GPU has a known size, or no node has as many as a job asks for.
    """
    live = {partition.name: partition for partition in inventory.partitions} if inventory else {}
    named = cluster.partitions or (
        {partition.name: PartitionConfig() for partition in inventory.open_partitions() if partition.gpus}
        if inventory
        else {}
    )
    found: list[Partition] = []
    for name, settings in named.items():
        if live and name not in live:
            raise BadInput(f"cluster.partitions.{name}: this cluster has no such partition; it has {', '.join(live)}.")
        found += _partitions(name, settings, live.get(name), cluster.gpus_per_job)
    if not found:
        raise BadInput(_nothing_known(named, live))
    wide = [partition for partition in found if partition.most_per_job >= cluster.gpus_per_job]
    if not wide:
        names, most = (
            ", ".join(dict.fromkeys(partition.name for partition in found)),
            max(p.most_per_job for p in found),
        )
        raise BadInput(
            f"cluster.gpus_per_job={cluster.gpus_per_job}: a job does not leave its node, and no node of {names} has more than "
            f"{most:.0f} GPUs of a kind; set it to at most {most:.0f}."
        )
    return tuple(wide)


def _partitions(name: str, settings: PartitionConfig, live: LivePartition | None, gpus_per_job: int) -> list[Partition]:
    """One for each kind of GPU in the partition whose size is known."""
    kinds = {settings.gpu: settings.gpus} if settings.gpu else dict(live.gpus) if live else {}
    found = []
    for kind, count in kinds.items():
        model = known_gpu(kind or "") or _by_features(live)
        memory_gib = settings.memory_gib or (model.memory_gib if model else None)
        if memory_gib is None:
            continue
        found.append(
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
    return found


def _by_features(live: LivePartition | None) -> GpuModel | None:
    """The GPU that the features of a partition's nodes name, if they agree on one."""
    named = (known_gpu(feature) for feature in live.features) if live else ()
    models = {model for model in named if model is not None}
    return models.pop() if len(models) == 1 else None


def _complete(settings: PartitionConfig) -> bool:
    """Whether nothing has to be asked about a partition."""
    return settings.gpu is not None and settings.gpus is not None and settings.max_minutes is not None


def _nothing_known(named: dict[str, PartitionConfig], live: dict[str, LivePartition]) -> str:
    """Why no pack can be placed."""
    kinds = sorted({kind or "untyped" for name in named if name in live for kind in live[name].gpus})
    if kinds:
        name = next(iter(named))
        return (
            f"nobody here knows how much memory the GPUs of this cluster have ({', '.join(kinds)}); say it: "
            f"cluster.partitions.{name}.memory_gib=24."
        )
    return "this cluster has no partition with working GPUs that is open to you; 'python -m launcher doctor' shows what it has."
