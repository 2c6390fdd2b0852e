"""The sweep that version 0.1.0 left (tests/fixtures/README.md), copied to a root of its own, and the program called on it."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher import cli
from stand_in import put_command
from train.store.layout import SweepDir

FIXTURES = Path(__file__).parent.parent / "fixtures"
ASKED_FOR = (
    "sweep.zip={lora.r:[2,4,2,2,8,16,4,32],lora.lora_alpha:[4,8,1e38,16,16,32,16,64],"
    "train.learning_rate:[1e-3,1e-3,1,1e-3,1e-3,1e-3,1e-3,1e-3],train.max_steps:[12,12,12,5000,5000,5000,5000,12]}"
)
COMMON = (
    "model=tiny quant=none data.eval_rows=8 train.eval_steps=4 train.save_steps=4 train.sample_prompts=2 "
    "train.sample_tokens=8 tracking.mode=offline sweep.name=ranks cluster=local"
)
KILLED = "r16-a32-lr0.001-steps5000-27d95a30e7"


@dataclass(frozen=True)
class Answer:
    """What the program did with one command."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


@dataclass(frozen=True)
class OldSweep:
    """A copy of the folder below `root`, and the verbs."""

    root: Path
    capsys: pytest.CaptureFixture[str]

    @property
    def dir(self) -> SweepDir:
        return SweepDir(self.root / "ranks")

    def __call__(self, *arguments: str) -> Answer:
        """Run the program in this process."""
        self.capsys.readouterr()
        code = cli.main([*arguments, f"root={self.root}"])
        captured = self.capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    def plan(self) -> Answer:
        """Plan the runs of the folder and a new one."""
        return self("plan", "--json", ASKED_FOR, *COMMON.split(), f"cache={self.root.parent / 'cache'}")

    def report(self) -> Answer:
        return self("report", "--json")

    def status(self) -> Answer:
        return self("status", "--json")


def copied(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> OldSweep:
    """A copy whose jobs are long gone, on a machine whose Slurm knows none of them."""
    for command in ("squeue", "sacct", "scancel", "scontrol"):
        put_command(tmp_path, command, "exit 0", monkeypatch)
    monkeypatch.setattr("launcher.report.plots.draw_plots", lambda report: {})
    root = tmp_path / "runs"
    root.mkdir(mode=0o700)
    shutil.copytree(FIXTURES / "sweep-0.1.0", root / "ranks")
    for folder, _, files in os.walk(root):
        os.chmod(folder, 0o700)
        for file in files:
            os.chmod(Path(folder) / file, 0o600)
    long_ago = time.time() - 3600
    os.utime(root / "ranks" / KILLED / "lease.json", (long_ago, long_ago))
    return OldSweep(root, capsys)
