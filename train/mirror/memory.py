"""What the mirror remembers of a run on disk: how far W&B has it, and which offline folders hold what.

Two ways lead to W&B, and a run takes one of them. Online (and ``launcher sync``) the server itself says how far it is when a run
is opened. Offline folders, made for ``wandb sync``, must not overlap: it appends whatever they hold. So a folder whose
mirror died is written anew, and once a run has been online its folders are marked as synced.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from train.mirror.request import MirroredRun
from train.rundir import RunDir, read_json, write_json, write_text

NOTHING = -1  # steps count from 0


@dataclass(frozen=True)
class Memory:
    """How far W&B has a run.

    Attributes:
        destination: project URL of the last online session; None if there was none.
        confirmed: the last step that the server was seen to have.
        told: the end that the server was told, with the number of attempts then.
        written: the last step in offline folders that were closed.
        open_folder: an offline folder that is being written, or whose writer died.
    """

    destination: str | None = None
    confirmed: int = NOTHING
    told: str | None = None
    written: int = NOTHING
    open_folder: str | None = None


def recall(run: RunDir) -> Memory:
    """What is remembered of a run."""
    return Memory(**(read_json(run.mirror) or {}))


def remember(run: RunDir, memory: Memory) -> Memory:
    """Write it down; what was written is returned."""
    write_json(run.mirror, asdict(memory))
    return memory


def went_online(run: MirroredRun, destination: str, confirmed: int) -> Memory:
    """The server has the run up to `confirmed`: plain ``wandb sync`` must not send its offline folders again."""
    for folder in offline_folders(run):
        mark_synced(run.dir, folder)
    old = recall(run.dir)
    told = old.told if old.destination == destination else None
    return remember(run.dir, replace(old, destination=destination, confirmed=confirmed, told=told))


def discard_torn_folder(run: MirroredRun) -> Memory:
    """Remove an offline folder whose mirror died; its rows, as many as reached the disk, will be written anew."""
    memory = recall(run.dir)
    if memory.open_folder is None:
        return memory
    torn = run.sweep.wandb / memory.open_folder
    if _synced_mark(run.dir, torn).exists():  # the user sent it meanwhile: only the server knows how far it went
        memory = replace(memory, destination="wandb sync")
    else:
        shutil.rmtree(torn, ignore_errors=True)
    return remember(run.dir, replace(memory, open_folder=None))


def offline_folders(run: MirroredRun) -> list[Path]:
    """The run's offline folders, the oldest first."""
    return sorted(run.sweep.wandb.glob(f"offline-run-*-{run.dir.id}"))


def mark_synced(run: RunDir, folder: Path) -> None:
    """Leave the mark by which ``wandb sync`` passes over a folder and ``wandb clean`` removes it."""
    if not _synced_mark(run, folder).exists():
        write_text(_synced_mark(run, folder), "")


def _synced_mark(run: RunDir, folder: Path) -> Path:
    return folder / f"run-{run.id}.wandb.synced"
