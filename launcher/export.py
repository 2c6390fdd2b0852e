"""``merge`` and ``chat`` need torch: they run as a process of their own, on this terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Literal

from launcher.resume import frozen_cache
from launcher.stopping import Interrupts
from launcher.submit.prepare import train_environment
from train.rundir import RunDir, SweepDir


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
        code = subprocess.run(command, env=train_environment(), check=False).returncode
    return code if code >= 0 else 1
