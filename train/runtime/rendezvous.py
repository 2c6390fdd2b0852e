"""Which process of its job this one is, and where the processes of a job find each other. Light: it runs before torch is imported.

The processes of a job are the tasks that submitit starts (on Slurm or here), or torchrun's. They share one machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from train.errors import LorapackError
from train.runtime.attempts import job_id
from train.store.layout import PackDir
from train.store.record_file import read_record, write_record
from train.store.records import RendezvousRecord

# The longest that a process waits for the main one, which takes leases first.
JOIN_SECONDS = 600.0
POLL_SECONDS = 0.1

# Environment variables of rank, number of processes and rank on the machine; the first that is set counts.
STARTERS = (
    ("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_LOCALID"),
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
)
# Also set if a single process was started in an allocation.
SLURM_STARTER = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")


class NothingToDo(Exception):
    """The main process of this job has nothing to do."""


@dataclass(frozen=True)
class ProcessInfo:
    """A process among the `size` processes of its job; process 0 is the main one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def detect_process() -> ProcessInfo:
    """Which process this one is, by the variables that its starter set."""
    starters = (*STARTERS, SLURM_STARTER) if os.environ.get("SUBMITIT_EXECUTOR") == "slurm" else STARTERS
    for names in starters:
        if names[0] in os.environ:
            return ProcessInfo(*(int(os.environ[name]) for name in names))
    return ProcessInfo()


def publish_rendezvous(pack: PackDir, port: int | None) -> None:
    """Publish where the main process of this job listens; None tells the other processes that there is nothing to do.

    Raises:
        StorageError: the pack's folder cannot be written.
    """
    write_record(pack.rendezvous, RendezvousRecord(job=_this_start(), port=port))


def wait_for_rendezvous(pack: PackDir, stop: Callable[[], None]) -> int:
    """Wait for the port on which the main process of this job listens.

    Raises:
        NothingToDo: the main process has nothing to do.
        LorapackError: the main process did not publish it in time.
    """
    give_up_at = time.monotonic() + JOIN_SECONDS
    while time.monotonic() < give_up_at:
        stop()
        rendezvous = read_record(pack.rendezvous, RendezvousRecord)
        # An earlier start of the job may have left its file, whose port is closed or another program's by now.
        if rendezvous is not None and rendezvous.job == _this_start():
            if rendezvous.port is None:
                raise NothingToDo
            return rendezvous.port
        time.sleep(POLL_SECONDS)
    raise LorapackError(f"process 0 of this job did not start within {JOIN_SECONDS:.0f} s; see its log.")


def _this_start() -> str:
    """A name for this start of the job, the same in all of its processes: for example ``4711/2`` after the second requeue."""
    # torchrun's processes share its run id, but not a job id.
    return f"{os.environ.get('TORCHELASTIC_RUN_ID') or job_id()}/{os.environ.get('SLURM_RESTART_COUNT', 0)}"
