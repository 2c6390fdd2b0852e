"""Looks on while Slurm trains: the same progress as of jobs on this machine. Nothing depends on it."""

from __future__ import annotations

import time

from rich.console import Console

from launcher.progress import open_progress
from launcher.stopping import Interrupts
from launcher.track.tracker import track
from train.rundir import SweepDir

TICK_SECONDS = 0.5
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 3.0, 30.0  # between questions to a controller that serves many users


def watch(sweep: SweepDir, console: Console, interrupts: Interrupts) -> None:
    """Show the runs of the sweep until none trains or waits any more, or until the user has seen enough."""
    pause = FIRST_PAUSE_SECONDS
    with open_progress(console) as progress:
        while not interrupts.count:
            statuses = track(sweep)
            progress.show(statuses)
            if not any(status.under_way for status in statuses):
                return
            wake_at = time.monotonic() + pause
            while time.monotonic() < wake_at and not interrupts.count:
                time.sleep(TICK_SECONDS)
            pause = min(LONGEST_PAUSE_SECONDS, 1.1 * pause)
