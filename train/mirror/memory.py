"""What the mirror remembers of a run on disk: how far W&B has it, and which offline folders hold what.

Two ways lead to W&B, and a run takes one of them. Online (and ``launcher sync``) the server itself says how far it is when a run
is opened. Offline folders, made for ``wandb sync``, must not overlap: it appends whatever they hold. So a folder whose
mirror died is written anew, and once a run has been online its folders are marked as synced. Each way has a file and a lease of
its own, so that ``launcher sync`` can send what a job writes offline at that moment.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from train.mirror.request import MirroredRun
from train.store.layout import RunDir
from train.store.record_file import FileRecord, read_record, write_record
from train.store.storage import write_text

NOTHING = -1  # steps count from 0


class Online(FileRecord):
    """How far a server has the run.

    Attributes:
        destination: the project's address.
        confirmed: the last step that the server was seen to have.
        told: the end that the server was told, with the number of attempts then.
    """

    destination: str
    confirmed: int = NOTHING
    told: str | None = None


class Offline(FileRecord):
    """How far folders have the run.

    Attributes:
        written: the last step in the folders that were closed.
        closed: those folders' names; any other is being written, or its writer died.
        sent: whether somebody sent one of the others with ``wandb sync``: only the server knows how much it held.
    """

    written: int = NOTHING
    closed: tuple[str, ...] = ()
    sent: bool = False


def recall_online(run: RunDir) -> Online | None:
    """What is remembered of the server; None if the run never was online."""
    return read_record(run.mirror_online, Online)


def recall_offline(run: RunDir) -> Offline:
    """What is remembered of the offline folders."""
    return read_record(run.mirror_offline, Offline) or Offline()


def remember(run: RunDir, memory: Online | Offline) -> None:
    """Write it down."""
    write_record(run.mirror_online if isinstance(memory, Online) else run.mirror_offline, memory)


def went_online(run: MirroredRun, destination: str, confirmed: int) -> None:
    """The server has the run up to `confirmed`: plain ``wandb sync`` must not send its offline folders again."""
    old = recall_online(run.dir)
    told = old.told if old is not None and old.destination == destination else None
    remember(run.dir, Online(destination=destination, confirmed=confirmed, told=told))
    for folder in offline_folders(run):
        mark_synced(run.dir, folder)


def discard_torn_folders(run: MirroredRun) -> Offline:
    """Remove the offline folders whose mirror died; their rows, as many as reached the disk, will be written anew."""
    memory = recall_offline(run.dir)
    for torn in (folder for folder in offline_folders(run) if folder.name not in memory.closed):
        if _synced_mark(run.dir, torn).exists() and recall_online(run.dir) is None:
            memory = memory.model_copy(update={"closed": (*memory.closed, torn.name), "sent": True})
            remember(run.dir, memory)
        else:
            shutil.rmtree(torn, ignore_errors=True)
    return memory


def offline_folders(run: MirroredRun) -> list[Path]:
    """The run's offline folders, the oldest first."""
    return sorted(run.sweep.wandb.glob(f"offline-run-*-{run.dir.id}"))


def mark_if_sent(run: RunDir, folder: Path) -> None:
    """Keep plain ``wandb sync`` off a folder whose rows the server has in part."""
    if recall_online(run) is not None or recall_offline(run).sent:
        mark_synced(run, folder)


def mark_synced(run: RunDir, folder: Path) -> None:
    """Leave the mark by which ``wandb sync`` passes over a folder and ``wandb clean`` removes it."""
    if not _synced_mark(run, folder).exists():
        write_text(_synced_mark(run, folder), "")


def _synced_mark(run: RunDir, folder: Path) -> Path:
    return folder / f"run-{run.id}.wandb.synced"
