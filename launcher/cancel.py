"""Ask runs to stop through a file in their folders, which works wherever they train."""

from __future__ import annotations

import time

from launcher.records import RunStatus, State
from launcher.track.tracker import track
from train.rundir import RunDir, SweepDir, write_json

STOPPABLE = {State.PENDING, State.RUNNING, State.UNKNOWN}
POLL_SECONDS = 0.5


def cancel_runs(runs: list[RunDir], wait_seconds: float = 15.0) -> list[RunStatus]:
    """Ask those of `runs` that train or wait to stop; their states once they have, or after `wait_seconds`.

    All runs are of one sweep.
    """
    if not runs:
        return []
    sweep = SweepDir(runs[0].path.parent)
    states = {status.id: status.state for status in track(sweep, runs)}
    asked = [run for run in runs if states[run.id] in STOPPABLE]
    for run in asked:
        write_json(run.cancel_request, {"time": time.time()})
    return _wait(sweep, asked, time.monotonic() + wait_seconds)


def _wait(sweep: SweepDir, runs: list[RunDir], until: float) -> list[RunStatus]:
    while True:
        statuses = track(sweep, runs)
        if time.monotonic() > until or all(status.state not in STOPPABLE for status in statuses):
            return statuses
        time.sleep(POLL_SECONDS)
