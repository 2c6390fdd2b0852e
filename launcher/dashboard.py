"""``dashboard`` needs W&B's client: it runs as a process of its own, on this terminal."""

from __future__ import annotations

import json
import subprocess
import sys

from launcher.report.differences import swept_axes
from launcher.report.writer import read_configs
from launcher.stopping import Interrupts
from launcher.submit.prepare import train_environment
from train.rundir import SweepDir


def make_dashboard(sweep: SweepDir, *, json_output: bool) -> int:
    """Run ``train.dashboard`` for the axes of `sweep`; the exit code of the program. A Ctrl-C is that process's business."""
    swept = swept_axes(list(read_configs(sweep.runs()).values()))
    axes = [{"key": axis.key, "scale": axis.scale} for axis in swept]
    request = {"sweep_dir": str(sweep.path), "axes": axes, "json": json_output}
    with Interrupts().counted():
        # wandb-workspaces uses deprecated parts of pydantic, which are no business of the user's.
        code = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "train.dashboard"],
            input=json.dumps(request),
            text=True,
            env=train_environment(),
            check=False,
        ).returncode
    return code if code >= 0 else 1
