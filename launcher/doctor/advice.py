"""A cluster's settings in plain words: what will happen to a job here. Values in, sentences out.

Advice on another setting of Slurm is a sentence in `_settings`, on another limit one in `_limits`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from launcher.cluster.inventory import Inventory
from launcher.cluster.parsing import LivePartition, Settings

Level = Literal["good", "note", "warning"]


@dataclass(frozen=True)
class Advice:
    """One sentence or two. ``warning``: work can be lost, or jobs will not start."""

    level: Level
    text: str


def cluster_advice(inventory: Inventory) -> list[Advice]:
    """Everything that a user should know before the first job, the most important first."""
    mine = [partition for partition in inventory.open_partitions() if partition.gpus]
    advice = [*_partitions(mine, inventory)]
    if inventory.settings is None:
        advice.append(
            Advice("warning", "'scontrol show config' did not answer, so what happens to jobs here is unknown.")
        )
    else:
        advice += [*_preemption(inventory, inventory.settings, mine), *_settings(inventory.settings)]
    return [*advice, *_limits(inventory)]


def _partitions(mine: list[LivePartition], inventory: Inventory) -> Iterator[Advice]:
    if not mine:
        yield Advice("warning", "No partition with working GPUs is open to you here, so no job would start.")
    closed = {partition.name for partition in inventory.partitions if partition.gpus} - {p.name for p in mine}
    if closed:
        yield Advice("note", f"Down, or not open to you: {', '.join(sorted(closed))}.")


def _preemption(inventory: Inventory, settings: Settings, mine: list[LivePartition]) -> Iterator[Advice]:
    """What happens to a job when one of higher priority needs its place."""
    if settings.preempt_type == "none" or settings.preempt_mode == "OFF":
        yield Advice("good", "Jobs are not preempted here (PreemptMode=OFF).")
        return
    exposed = [p for p in mine if (p.preempt_mode or settings.preempt_mode).upper() != "OFF"]
    modes = sorted({(p.preempt_mode or settings.preempt_mode).upper().removeprefix("GANG,") for p in exposed})
    for mode in modes:
        names = ", ".join(p.name for p in exposed if mode in (p.preempt_mode or settings.preempt_mode).upper())
        yield _fate(mode, names)
    if "REQUEUE" in modes or "CANCEL" in modes:
        if settings.preempt_type == "qos":
            yield _grace_of_qos(inventory)
        else:
            yield from (_grace(partition, settings) for partition in exposed)
        how = "the signal that it chose (send_user_signal)" if settings.user_signal else "SIGTERM"
        yield Advice("note", f"A preempted job gets {how} first.")


def _fate(mode: str, names: str) -> Advice:
    """What becomes of a preempted job."""
    fates: dict[str, Advice] = {
        "REQUEUE": Advice(
            "good", f"A job that is preempted in {names} is requeued and continues from its last checkpoint."
        ),
        "CANCEL": Advice(
            "warning",
            f"A job that is preempted in {names} is cancelled (PreemptMode=CANCEL). It asks to be requeued once it has saved, and then "
            "continues. If it has no time to ask, 'python -m launcher resume' continues from its last checkpoint.",
        ),
        "SUSPEND": Advice("note", f"A job that is preempted in {names} is suspended and continues later where it was."),
    }
    return fates.get(mode, Advice("note", f"PreemptMode={mode} applies to {names}."))


def _grace_of_qos(inventory: Inventory) -> Advice:
    """If the quality of service decides which jobs are preempted, it also has the grace time."""
    if inventory.qos is None:
        return Advice(
            "note", "The quality of service decides which jobs are preempted, and 'sacctmgr show qos' did not answer."
        )
    times = ", ".join(f"{qos.name} {qos.grace} s" for qos in inventory.qos)
    return Advice("note", f"The quality of service decides which jobs are preempted. Grace times: {times}.")


def _grace(partition: LivePartition, settings: Settings) -> Advice:
    """How long a preempted job of a partition has."""
    if partition.grace is None:
        return Advice("note", f"The grace time of {partition.name} is unknown.")
    if partition.grace == 0:
        return Advice(
            "warning",
            f"{partition.name} gives no grace time (GraceTime=0): a preempted job has {settings.kill_wait} s (KillWait) to save. If "
            "that is too short, it trains again from its last periodic checkpoint (train.save_steps).",
        )
    return Advice(
        "good",
        f"In {partition.name} a job has {partition.grace} s from the first signal of a preemption (GraceTime) and "
        f"{settings.kill_wait} s more (KillWait) to save.",
    )


def _settings(settings: Settings) -> Iterator[Advice]:
    """What applies to every job."""
    yield Advice("good", "A job that reaches its time limit saves first and requeues itself, as often as necessary.")
    if not settings.requeue:
        yield Advice("note", "Jobs are requeued only if they ask for it (JobRequeue=0). These jobs ask.")
    yield Advice("note", _arrays(settings.max_array_size))
    if not settings.accounting:
        yield Advice("note", "There is no accounting, so how jobs ended is read from the run folders only.")


def _arrays(most: int) -> str:
    """What happens to a large sweep. MaxArraySize is the first index that is too large, so it is also the number of tasks."""
    if most < 2:
        return f"This cluster has no job arrays (MaxArraySize={most}), so every job is submitted separately."
    return f"A sweep of more than {most:,} jobs is cut into several arrays (MaxArraySize)."


def _limits(inventory: Inventory) -> Iterator[Advice]:
    """How many jobs the user may have."""
    accounting = inventory.settings is not None and inventory.settings.accounting
    if accounting and inventory.associations == []:
        yield Advice(
            "warning",
            "You have no account on this cluster, so it may refuse your jobs; ask its administrators for one.",
        )
    for association in inventory.associations or []:
        limits = {"jobs in the queue": association.max_submit, "running jobs": association.max_jobs}
        text = " and ".join(f"{count:,} {what}" for what, count in limits.items() if count is not None)
        if text:
            yield Advice("note", f"Account {association.account} lets you have {text}; the rest is submitted later.")
