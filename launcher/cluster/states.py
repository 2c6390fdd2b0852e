"""One table from Slurm's words to ours.

A job's life in Slurm: PENDING -> (CONFIGURING) -> RUNNING -> COMPLETING -> one of the final words. A requeued job is PENDING again
under the same id (REQUEUE_HOLD: until somebody releases it); ``sacct -D`` then has a row with a final word for every attempt.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.records import State
from train.store.causes import Cause


@dataclass(frozen=True)
class SlurmState:
    """What a word of Slurm says of a job's runs that have no result: their state, and the cause of the end if it was one."""

    state: State
    cause: Cause | None = None

    @property
    def over(self) -> bool:
        """Whether a job in this state has ended."""
        return self.state not in {State.PENDING, State.RUNNING, State.UNKNOWN}


PENDING, RUNNING, UNKNOWN = SlurmState(State.PENDING), SlurmState(State.RUNNING), SlurmState(State.UNKNOWN)
FAILED, OUT_OF_MEMORY = SlurmState(State.FAILED, Cause.CRASH), SlurmState(State.FAILED, Cause.OUT_OF_MEMORY)

SLURM_STATES = {
    "PENDING": PENDING,
    "CONFIGURING": PENDING,
    "REQUEUED": PENDING,
    "REQUEUE_FED": PENDING,
    "REQUEUE_HOLD": PENDING,
    "RESV_DEL_HOLD": PENDING,
    "SPECIAL_EXIT": PENDING,  # held after a requeue
    "RUNNING": RUNNING,
    "COMPLETING": RUNNING,  # its processes are being ended; the next look tells how
    "RESIZING": RUNNING,
    "SIGNALING": RUNNING,
    "STAGE_OUT": RUNNING,
    "STOPPED": RUNNING,  # SIGSTOP, keeps its place
    "SUSPENDED": RUNNING,
    "COMPLETED": SlurmState(State.STOPPED),
    "CANCELLED": SlurmState(State.CANCELLED, Cause.CANCELLED),
    "TIMEOUT": SlurmState(State.STOPPED, Cause.TIMEOUT),
    "DEADLINE": SlurmState(State.STOPPED, Cause.TIMEOUT),
    "PREEMPTED": SlurmState(State.STOPPED, Cause.PREEMPTED),
    "REVOKED": SlurmState(State.STOPPED),  # runs on another cluster of the federation
    "NODE_FAIL": SlurmState(State.STOPPED, Cause.NODE_FAIL),
    "BOOT_FAIL": SlurmState(State.STOPPED, Cause.NODE_FAIL),
    "LAUNCH_FAILED": SlurmState(State.STOPPED, Cause.NODE_FAIL),
    "RECONFIG_FAIL": SlurmState(State.STOPPED, Cause.NODE_FAIL),
    "OUT_OF_MEMORY": OUT_OF_MEMORY,
    "FAILED": FAILED,
}


def slurm_state(word: str) -> SlurmState:
    """Translate a word of squeue or sacct, also ``CANCELLED by 1000`` and ``PREEMPTED+``; another word is unknown."""
    name = word.split()[0] if word.split() else ""
    return SLURM_STATES.get(name.rstrip("+"), UNKNOWN)
