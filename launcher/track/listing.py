"""What a list of sweeps says of each."""

from __future__ import annotations

from typing import Any

from launcher.track.find import submitted_at
from train.rundir import SweepDir


def sweep_facts(sweep: SweepDir) -> dict[str, Any]:
    """Runs, finished runs, when it was last submitted (Unix time) and how much disk it takes."""
    runs = sweep.runs()
    return {
        "name": sweep.path.name,
        "runs": len(runs),
        "done": sum(run.result.exists() for run in runs),
        "submitted": submitted_at(sweep),
        "bytes": sum(path.lstat().st_size for path in sweep.path.rglob("*") if path.is_file()),
    }
