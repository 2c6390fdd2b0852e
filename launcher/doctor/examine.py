"""Look at cluster, machine and W&B, and show what was found: in the terminal, or as one JSON document."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launcher.cluster.inventory import Inventory, take_inventory
from launcher.cluster.parsing import LivePartition
from launcher.cluster.partitions import slurm_answers
from launcher.doctor.advice import Advice, cluster_advice
from launcher.doctor.machine import Machine, look_at_machine, machine_advice
from launcher.errors import ClusterError
from launcher.estimate.gpus import known_gpu
from launcher.terminal.units import MISSING, number
from train.mirror.reach import Reach, look_for_server

MARKS = {"good": "[green]ok[/]", "note": "[cyan]note[/]", "warning": "[yellow]warning[/]"}
NO_SLURM = "No Slurm answers here (sinfo), so cluster=auto trains on this machine."


@dataclass(frozen=True)
class Examination:
    """What was found; `inventory` is None without Slurm."""

    inventory: Inventory | None
    machine: Machine
    wandb: Reach
    advice: list[Advice]


def examine(root: Path, cache: Path) -> Examination:
    """Look at everything; every question to the cluster has a time-out."""
    inventory = take_inventory()
    machine = look_at_machine(root, cache)
    wandb = look_for_server(None)
    about_cluster = _about_silence() if inventory is None else cluster_advice(inventory)
    about_machine = machine_advice(machine, slurm=inventory is not None)
    return Examination(inventory, machine, wandb, [*about_cluster, *about_machine, _about_wandb(wandb)])


def examination_json(examination: Examination) -> dict[str, Any]:
    """``{"slurm": {"settings", "partitions"} or null, "machine", "wandb", "advice": [{"level", "text"}]}``; no key is in it."""
    inventory = examination.inventory
    mine = set() if inventory is None else {partition.name for partition in inventory.open_partitions()}
    # An inventory of which some answers are missing counts, so this is null only without Slurm.
    slurm = inventory and {
        "settings": inventory.settings and asdict(inventory.settings),
        "partitions": [_partition_json(partition, mine) for partition in inventory.partitions],
    }
    wandb = {
        "server": examination.wandb.server,
        "key_found": examination.wandb.key is not None,
        "trouble": examination.wandb.trouble,
    }
    advice = [asdict(advice) for advice in examination.advice]
    return {"slurm": slurm, "machine": asdict(examination.machine), "wandb": wandb, "advice": advice}


def print_examination(examination: Examination, console: Console) -> None:
    """Partitions, machine, and what to know."""
    inventory = examination.inventory
    if inventory is not None:
        console.print(_partition_table(inventory))
    console.print(_machine_table(examination.machine))
    table = Table(title="what to know", title_justify="left", title_style="bold", show_header=False, box=None)
    for advice in examination.advice:
        table.add_row(MARKS[advice.level], escape(advice.text))
    console.print(table)


def _about_silence() -> list[Advice]:
    """Why there is no inventory, in the words that a sweep would get."""
    try:
        slurm_answers()
    except ClusterError as exc:
        return [Advice("warning", str(exc))]
    return [Advice("note", NO_SLURM)]


def _about_wandb(wandb: Reach) -> Advice:
    """Where the runs' numbers will go."""
    if wandb.trouble is None:
        return Advice("good", f"Weights & Biases answers at {wandb.server}.")
    text = f"Weights & Biases is not reached from here: {wandb.trouble}. Runs are kept in offline folders until 'sync'."
    return Advice("note", text)


def _partition_json(partition: LivePartition, mine: set[str]) -> dict[str, Any]:
    return {
        "name": partition.name,
        "up": partition.up,
        "open_to_you": partition.name in mine,
        "gpus": [
            {"type": kind or None, "count": count, "memory_gib": _memory(kind)}
            for kind, count in partition.gpus.items()
        ],
        "max_minutes": partition.max_minutes,
        "tier": partition.tier,
        "preempt_mode": partition.preempt_mode,
        "grace_seconds": partition.grace,
    }


def _partition_table(inventory: Inventory) -> Table:
    settings = inventory.settings
    name = "Slurm" if settings is None else f"Slurm {settings.version}, cluster {settings.cluster}"
    table = Table(title=escape(name), title_justify="left", title_style="bold", header_style="dim", box=None)
    for column in ("partition", "GPUs", "longest job", "grace time", "priority"):
        table.add_column(column)
    mine = {partition.name for partition in inventory.open_partitions()}
    for partition in inventory.partitions:
        closed = "" if partition.name in mine else " (closed to you)"
        hours = "no limit" if partition.max_minutes is None else f"{number(partition.max_minutes / 60, 1)} h"
        grace = MISSING if partition.grace is None else f"{partition.grace} s"
        table.add_row(escape(partition.name + closed), escape(_gpus(partition)), hours, grace, str(partition.tier))
    return table


def _gpus(partition: LivePartition) -> str:
    """``4 x t4 (15 GiB)``."""
    words = []
    for kind, count in partition.gpus.items():
        memory = _memory(kind)
        words.append(f"{count} x {kind or 'GPU'} ({'memory unknown' if memory is None else f'{memory:.0f} GiB'})")
    return ", ".join(words) or "none"


def _memory(kind: str) -> float | None:
    model = known_gpu(kind)
    return model.memory_gib if model else None


def _machine_table(machine: Machine) -> Table:
    table = Table(title="this machine", title_justify="left", title_style="bold", show_header=False, box=None)
    device = machine.device
    table.add_row("host", escape(f"{machine.host}, Python {machine.python}"))
    table.add_row("device", escape(f"{device.name}, {device.memory_gib:.0f} GiB"))
    packages = (f"{name} {version or 'missing'}" for name, version in machine.packages.items())
    table.add_row("packages", escape(", ".join(packages)))
    for name, disk in (("root", machine.root), ("cache", machine.cache)):
        table.add_row(name, escape(f"{disk.path}: {disk.kind}, {disk.free_gib:.0f} GiB free"))
    return table
