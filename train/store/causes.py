"""How an attempt at a run can end, and what follows from it: the one table that code, messages and docs/cluster.md use.

Light: imports nothing of this project.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Cause(StrEnum):
    """Why an attempt ended; `CONSEQUENCES` says what each means and what follows. Files hold these words."""

    DONE = "done"
    PREEMPTED = "preempted"
    TIMEOUT = "timeout"
    NODE_FAIL = "node_fail"
    STORAGE = "storage"
    CANCELLED = "cancelled"
    OUT_OF_MEMORY = "out_of_memory"
    DIVERGED = "diverged"
    BAD_INPUT = "bad_input"
    CRASH = "crash"


class Next(StrEnum):
    """What becomes of a run after an attempt.

    retry: the next job continues from the last checkpoint. hold: not tried again because the user stopped it. give up: not tried again
    because it would end the same way. `resume` trains all of them.
    """

    NOTHING = "nothing"
    RETRY = "retry"
    HOLD = "hold"
    GIVE_UP = "give up"


@dataclass(frozen=True)
class Consequence:
    """What a cause means and what follows.

    Attributes:
        meaning: what happened.
        next: what becomes of the run.
        advice: how that happens, or what you do first.
        by_itself: whether a retry needs no command of yours: the job, or Slurm, puts it back into the queue.
        patience: how many attempts in a row may end this way at one step before the run is held.
    """

    meaning: str
    next: Next
    advice: str = ""
    by_itself: bool = False
    patience: int = 2


CONSEQUENCES: dict[Cause, Consequence] = {
    Cause.DONE: Consequence("the run has its result", Next.NOTHING),
    Cause.PREEMPTED: Consequence(
        "another job took the place, or the job was asked to stop",
        Next.RETRY,
        "the job queues itself again",
        by_itself=True,
        patience=8,
    ),
    Cause.TIMEOUT: Consequence("the time limit came", Next.RETRY, "the job queues itself again", by_itself=True),
    Cause.NODE_FAIL: Consequence(
        "the process was killed or its node was lost",
        Next.RETRY,
        "Slurm requeues the job, or your next command does",
        by_itself=True,
        patience=3,
    ),
    Cause.STORAGE: Consequence(
        "the run's folder refused a write: full, deleted or out of reach",
        Next.RETRY,
        "this run ends alone and the rest of its pack trains on; your next command retries it",
    ),
    Cause.CANCELLED: Consequence("you asked for it", Next.HOLD, "it stays stopped until you run it again"),
    Cause.OUT_OF_MEMORY: Consequence(
        "the GPU's memory, or the job's, was not enough", Next.GIVE_UP, "`resume` tries packs of half the size"
    ),
    Cause.DIVERGED: Consequence(
        "loss or gradient was not finite", Next.GIVE_UP, "`resume` starts before the divergence"
    ),
    Cause.BAD_INPUT: Consequence(
        "the model or the data cannot be trained on", Next.GIVE_UP, "correct it, then `resume`"
    ),
    Cause.CRASH: Consequence("any other error", Next.GIVE_UP, "read `logs`, then `resume`"),
}


def consequence(cause: str) -> Consequence | None:
    """What follows from a cause as a file has it; None for a cause of a later version."""
    return next((follows for known, follows in CONSEQUENCES.items() if known == cause), None)


# The run would end the same way again.
NON_RETRYABLE = frozenset(cause for cause, what in CONSEQUENCES.items() if what.next is Next.GIVE_UP)
# A job that continues with other runs does not train this one again.
TERMINAL = frozenset(cause for cause, what in CONSEQUENCES.items() if what.next in {Next.GIVE_UP, Next.HOLD})
# The job was asked to stop, and it saved. Unless its user cancelled it, it queues itself again.
STOPPED_AND_REQUEUED = frozenset({Cause.PREEMPTED, Cause.TIMEOUT})
