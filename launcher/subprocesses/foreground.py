"""Verbs that hand the terminal to a process of their own: ``merge`` and ``chat`` need torch, ``dashboard`` needs wandb."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

from launcher.installation import child_environment
from launcher.report.axes import swept_axes
from launcher.report.writer import read_configs
from launcher.submit.frozen import frozen_cache
from launcher.terminal.interrupts import Interrupts
from train.store.layout import RunDir, SweepDir
from train.store.record_file import DamageLog


def export(action: Literal["merge", "chat"], run: RunDir, cache: Path | None, *prompt: str, json_output: bool) -> int:
    """Run ``train.export``; the exit code of the program. Without a `cache` the one of the training is used.

    Raises:
        BadInput: the run's sweep holds no plan.
    """
    cache = cache or frozen_cache(SweepDir(run.path.parent))
    options = ["--json"] if json_output else []
    return _run("-m", "train.export", action, str(run.path), str(cache), *prompt, *options)


def make_dashboard(sweep: SweepDir, *, json_output: bool) -> int:
    """Run ``train.mirror.dashboard`` for the axes of `sweep`; the exit code of the program."""
    swept = swept_axes(list(read_configs(sweep.runs(), DamageLog()).values()))
    axes = [{"key": axis.key, "scale": axis.scale} for axis in swept]
    request = {"sweep_dir": str(sweep.path), "axes": axes, "json": json_output}
    # wandb-workspaces uses deprecated parts of pydantic; the user can do nothing about these warnings.
    return _run("-W", "ignore", "-m", "train.mirror.dashboard", request=json.dumps(request))


def _run(*arguments: str, request: str | None = None) -> int:
    """Run Python on this terminal, with `request` on its stdin if there is one; the exit code, 1 if a signal ended it.

    A Ctrl-C reaches both processes. It is left to the child, so here it is only counted.
    """
    command = [sys.executable, *arguments]
    with Interrupts().counted():
        code = subprocess.run(command, input=request, text=True, env=child_environment(), check=False).returncode
    return code if code >= 0 else 1
