"""``merge`` and ``chat`` need torch: they run as a process of their own, on this terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Literal

from launcher.prepare import train_environment
from launcher.stopping import Interrupts
from train.rundir import RunDir


def export(action: Literal["merge", "chat"], run: RunDir, cache: Path, *prompt: str, json_output: bool) -> int:
    """Run ``train.export``; the exit code of the program. A Ctrl-C is that process's business."""
    options = ["--json"] if json_output else []
    command = [sys.executable, "-m", "train.export", action, str(run.path), str(cache), *prompt, *options]
    with Interrupts().counted():
        code = subprocess.run(command, env=train_environment(), check=False).returncode
    return code if code >= 0 else 1
