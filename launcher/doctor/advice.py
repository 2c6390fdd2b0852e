"""A cluster's settings in plain words: what will happen to a job here. Facts in, sentences out."""

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
    found = [*_partitions(mine, inventory)]
    if inventory.settings is None:
        found.append(
            Advice("warning", "'scontrol show config' did not answer, so what happens to jobs here is unknown.")
        )
    else:
        found += [*_preemption(inventory, inventory.settings, mine), *_settings(inventory.settings)]
    return [*found, *_limits(inventory)]


def _partitions(mine: list[LivePartition], inventory: Inventory) -> Iterator[Advice]:
    if not mine:
        yield Advice("warning", "No partition with working GPUs is open to you here, so no job would start.")
    closed = {partition.name for partition in inventory.partitions if partition.gpus} - {p.name for p in mine}
    if closed:
        yield Advice("note", f"Down, or not open to you: {', '.join(sorted(closed))}.")


def _preemption(inventory: Inventory, settings: Settings, mine: list[LivePartition]) -> Iterator[Advice]:
    """What a job with less priority has to expect."""
    if settings.preempt_type == "none" or settings.preempt_mode == "OFF":
        yield Advice("good", "No job is pushed out by another here (PreemptMode=OFF).")
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
        how = "the signal that they chose (send_user_signal)" if settings.user_signal else "SIGTERM"
        yield Advice("note", f"Jobs learn of a preemption by {how}.")


def _fate(mode: str, names: str) -> Advice:
    """What becomes of a preempted job."""
    fates: dict[str, Advice] = {
        "REQUEUE": Advice(
            "good", f"A job that is pushed out of {names} is queued again and goes on from its last checkpoint."
        ),
        "CANCEL": Advice(
            "warning",
            f"A job that is pushed out of {names} is cancelled (PreemptMode=CANCEL). It asks to be queued again once it has saved, "
            "and goes on from there; if it has no time to ask, 'python -m launcher resume' goes on from its last checkpoint.",
        ),
        "SUSPEND": Advice("note", f"A job that is pushed out of {names} is stopped and goes on later where it was."),
    }
    return fates.get(mode, Advice("note", f"PreemptMode={mode} holds for {names}."))


def _grace_of_qos(inventory: Inventory) -> Advice:
    """Where the quality of service decides who is pushed out, it also has the grace time."""
    if inventory.qos is None:
        return Advice(
            "note", "The quality of service decides who is pushed out, and 'sacctmgr show qos' did not answer."
        )
    times = ", ".join(f"{qos.name} {qos.grace} s" for qos in inventory.qos)
    return Advice("note", f"The quality of service decides who is pushed out; grace times: {times}.")


def _grace(partition: LivePartition, settings: Settings) -> Advice:
    """How long a preempted job of a partition has."""
    if partition.grace is None:
        return Advice("note", f"The grace time of {partition.name} is not known.")
    if partition.grace == 0:
        return Advice(
            "warning",
            f"{partition.name} gives no grace time (GraceTime=0): a job that is pushed out has {settings.kill_wait} s (KillWait) to "
            "save; what it cannot save in them is trained again from the last periodic checkpoint (train.save_steps).",
        )
    return Advice(
        "good",
        f"In {partition.name} a job has {partition.grace} s from the first signal of a preemption (GraceTime) and "
        f"{settings.kill_wait} s more (KillWait) to save.",
    )


def _settings(settings: Settings) -> Iterator[Advice]:
    """What holds for every job."""
    yield Advice(
        "good", "A job that comes to its time limit saves first and queues itself again, as often as it takes."
    )
    if not settings.requeue:
        yield Advice("note", "Jobs are not queued again unless they ask for it (JobRequeue=0); these do ask.")
    yield Advice("note", _arrays(settings.max_array_size))
    if not settings.accounting:
        yield Advice("note", "There is no accounting: how jobs ended is read from the run folders alone.")


def _arrays(most: int) -> str:
    """What becomes of a large sweep. Slurm's setting is the first index that is too large, so it is also the number of tasks."""
    if most < 2:
        return f"There are no job arrays here (MaxArraySize={most}): every job is submitted by itself."
    return f"A sweep of more than {most:,} jobs is cut into several arrays (MaxArraySize)."


def _limits(inventory: Inventory) -> Iterator[Advice]:
    """What the user may do at once."""
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
            yield Advice("note", f"Account {association.account} lets you have {text}; the rest goes in later.")
