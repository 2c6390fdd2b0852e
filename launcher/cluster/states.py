"""One table from Slurm's job states to ours. A new state of Slurm belongs here; until then it counts as unknown.

A job's life in Slurm: PENDING -> (CONFIGURING) -> RUNNING -> COMPLETING -> a final state. A requeued job is PENDING again
under the same id (REQUEUE_HOLD: once somebody has released it). ``sacct -D`` then has a row with a final state for every attempt.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.records import State
from train.store.causes import Cause


@dataclass(frozen=True)
class SlurmState:
    """What a job's state says of its runs without a result: their state, and the cause if the job has ended."""

    state: State
    cause: Cause | None = None

    @property
    def over(self) -> bool:
        """Whether a job in this state has ended."""
        return self.state not in {State.PENDING, State.RUNNING, State.UNKNOWN}


PENDING = SlurmState(State.PENDING)
RUNNING = SlurmState(State.RUNNING)
UNKNOWN = SlurmState(State.UNKNOWN)
FAILED = SlurmState(State.FAILED, Cause.CRASH)
OUT_OF_MEMORY = SlurmState(State.FAILED, Cause.OUT_OF_MEMORY)

SLURM_STATES = {
    "PENDING": PENDING,
    "CONFIGURING": PENDING,
    "REQUEUED": PENDING,
    "REQUEUE_FED": PENDING,
    "REQUEUE_HOLD": PENDING,
    "RESV_DEL_HOLD": PENDING,
    # Held after a requeue.
    "SPECIAL_EXIT": PENDING,
    "RUNNING": RUNNING,
    # Its processes are being ended; how, is known once it has left this state.
    "COMPLETING": RUNNING,
    "RESIZING": RUNNING,
    "SIGNALING": RUNNING,
    "STAGE_OUT": RUNNING,
    # By SIGSTOP; it keeps its nodes.
    "STOPPED": RUNNING,
    "SUSPENDED": RUNNING,
    "COMPLETED": SlurmState(State.STOPPED),
    "CANCELLED": SlurmState(State.CANCELLED, Cause.CANCELLED),
    "TIMEOUT": SlurmState(State.STOPPED, Cause.TIMEOUT),
    "DEADLINE": SlurmState(State.STOPPED, Cause.TIMEOUT),
    "PREEMPTED": SlurmState(State.STOPPED, Cause.PREEMPTED),
    # It runs on another cluster of the federation.
    "REVOKED": SlurmState(State.STOPPED),
    "NODE_FAIL": SlurmState(State.STOPPED, Cause.NODE_FAIL),
    "BOOT_FAIL": SlurmState(State.STOPPED, Cause.NODE_FAIL),
    "LAUNCH_FAILED": SlurmState(State.STOPPED, Cause.NODE_FAIL),
    "RECONFIG_FAIL": SlurmState(State.STOPPED, Cause.NODE_FAIL),
    "OUT_OF_MEMORY": OUT_OF_MEMORY,
    "FAILED": FAILED,
}


def slurm_state(raw_state: str) -> SlurmState:
    """Translate a state of squeue or sacct, also ``CANCELLED by 1000`` and ``PREEMPTED+``. Any other text is unknown."""
    name = raw_state.split()[0] if raw_state.split() else ""
    return SLURM_STATES.get(name.rstrip("+"), UNKNOWN)
