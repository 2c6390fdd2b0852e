"""What the mirror remembers of a run on disk: how far W&B has it, and what its offline folders hold.

A run reaches W&B online or offline:

- Online (and by ``launcher sync``) the server itself says how far it has the run when the run is opened.
- Offline folders are made for ``wandb sync``, which appends whatever they hold, so two of them must not overlap. If a folder's mirror
  dies, its rows are written again into a new folder. Once a run has been online, its folders are marked as synced.

Online and offline have a file and a lease each, so that ``launcher sync`` can send a run that a job writes offline at that moment.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from train.mirror.request import MirroredRun
from train.store.layout import RunDir
from train.store.record_file import FileRecord, read_record, write_record
from train.store.storage import write_text

# The last step that W&B has of a run that it does not know; steps count from 0.
NOTHING = -1


class Online(FileRecord):
    """How far a server has the run.

    Attributes:
        destination: the project's address.
        confirmed: the last step that the server reported to have.
        told: the end that was reported to the server, with the number of attempts at that time.
    """

    destination: str
    confirmed: int = NOTHING
    told: str | None = None


class Offline(FileRecord):
    """How far offline folders have the run.

    Attributes:
        written: the last step in the closed folders.
        closed: the names of the folders that were closed. Any other is being written, or its writer died.
        sent: whether a folder that was not closed has been sent with ``wandb sync``. Only the server knows how much it held.
    """

    written: int = NOTHING
    closed: tuple[str, ...] = ()
    sent: bool = False


def recall_online(run: RunDir) -> Online | None:
    """What is remembered of the server; None if the run was never online."""
    return read_record(run.mirror_online, Online)


def recall_offline(run: RunDir) -> Offline:
    """What is remembered of the offline folders."""
    return read_record(run.mirror_offline, Offline) or Offline()


def remember(run: RunDir, memory: Online | Offline) -> None:
    """Write `memory` to the run's folder."""
    write_record(run.mirror_online if isinstance(memory, Online) else run.mirror_offline, memory)


def went_online(run: MirroredRun, destination: str, confirmed: int) -> None:
    """Note that the server has the run up to `confirmed`, and keep plain ``wandb sync`` from sending its offline folders too."""
    old = recall_online(run.dir)
    reported = old.told if old is not None and old.destination == destination else None
    remember(run.dir, Online(destination=destination, confirmed=confirmed, told=reported))
    for folder in offline_folders(run):
        mark_synced(run.dir, folder)


def discard_torn_folders(run: MirroredRun) -> Offline:
    """Remove the offline folders whose mirror died; their rows will be written again. A folder that was sent already is kept."""
    memory = recall_offline(run.dir)
    for torn in (folder for folder in offline_folders(run) if folder.name not in memory.closed):
        # A mark on a run that was never online is from `wandb sync`: the user sent the folder while it was being written.
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
    """Keep plain ``wandb sync`` from sending a folder of which the server has some rows already."""
    if recall_online(run) is not None or recall_offline(run).sent:
        mark_synced(run, folder)


def mark_synced(run: RunDir, folder: Path) -> None:
    """Write the file that makes ``wandb sync`` skip a folder. ``wandb clean`` removes folders that have it."""
    if not _synced_mark(run, folder).exists():
        write_text(_synced_mark(run, folder), "")


def _synced_mark(run: RunDir, folder: Path) -> Path:
    return folder / f"run-{run.id}.wandb.synced"
