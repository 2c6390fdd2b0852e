"""What all parts of a job's training share."""

from __future__ import annotations

from dataclasses import dataclass, field

from train.runtime.activity import Activity
from train.runtime.signals import StopFlag
from train.trainer.process_group import SINGLE_PROCESS, SingleProcess


@dataclass(frozen=True)
class JobContext:
    """The surroundings of a job, passed on as one.

    Attributes:
        stop: whether the job was asked to stop; looked at between micro-batches.
        activity: learns what this process does besides steps, and how much of it is done.
        group: the processes that share every step; all of them run the same loop.
    """

    stop: StopFlag = field(default_factory=StopFlag)
    activity: Activity = field(default_factory=Activity)
    group: SingleProcess = SINGLE_PROCESS
