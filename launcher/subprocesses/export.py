"""``merge`` and ``chat`` need torch: they run as a process of their own, on this terminal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

from launcher.installation import child_environment
from launcher.report.differences import swept_axes
from launcher.report.writer import read_configs
from launcher.submit.frozen import frozen_cache
from launcher.terminal.interrupts import Interrupts
from train.store.layout import RunDir, SweepDir


def export(action: Literal["merge", "chat"], run: RunDir, cache: Path | None, *prompt: str, json_output: bool) -> int:
    """Run ``train.export``; the exit code of the program. Without a `cache` the one of the training is used.

    A Ctrl-C is that process's business.

    Raises:
        BadInput: the run's sweep holds no plan.
    """
    cache = cache or frozen_cache(SweepDir(run.path.parent))
    options = ["--json"] if json_output else []
    command = [sys.executable, "-m", "train.export", action, str(run.path), str(cache), *prompt, *options]
    with Interrupts().counted():
        code = subprocess.run(command, env=child_environment(), check=False).returncode
    return code if code >= 0 else 1


def make_dashboard(sweep: SweepDir, *, json_output: bool) -> int:
    """Run ``train.mirror.dashboard`` for the axes of `sweep`; the exit code of the program. A Ctrl-C is that process's business."""
    swept = swept_axes(list(read_configs(sweep.runs()).values()))
    axes = [{"key": axis.key, "scale": axis.scale} for axis in swept]
    request = {"sweep_dir": str(sweep.path), "axes": axes, "json": json_output}
    with Interrupts().counted():
        # wandb-workspaces uses deprecated parts of pydantic, which are no business of the user's.
        code = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "train.mirror.dashboard"],
            input=json.dumps(request),
            text=True,
            env=child_environment(),
            check=False,
        ).returncode
    return code if code >= 0 else 1
