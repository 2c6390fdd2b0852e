"""What users do to a sweep in training, with the real trainer: Ctrl-C on a terminal, and a run's folder deleted."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shutil
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

import launcher
from json_lines import read_lines
from stand_in import Program, wait_for
from train.config import ModelConfig
from train.store.layout import CacheDir, RunDir, SweepDir
from train.store.storage import read_json

pytestmark = pytest.mark.slow

STEPS = 300
COMMAND = [
    "model=tiny",
    "sweep.name=mine",
    "data.source=rows.jsonl",
    "data.eval_rows=4",
    "train.batch_size=1",
    f"train.max_steps={STEPS}",
]


@pytest.fixture
def program(tmp_path: Path, tiny_model: tuple[ModelConfig, CacheDir, Path]) -> Program:
    program = Program(Path(launcher.__file__).parent.parent, tmp_path)
    # Other people's libraries warn.
    del program.environment["PYTHONWARNINGS"]
    program.environment |= {"LORAPACK_CACHE": str(tiny_model[1].path), "TERM": "xterm"}
    rows = [{"instruction": f"Say {i}.", "output": str(i)} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return program


def runs(program: Program) -> list[RunDir]:
    return [run for path in (program.cwd / "runs").glob("*") for run in SweepDir(path).runs()]


def steps_done(program: Program) -> int:
    return min((len(read_lines(run.journal)) for run in runs(program)), default=0)


class Terminal:
    """The program in a terminal of its own, where Ctrl-C is a key."""

    def __init__(self, program: Program, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launcher", *arguments],
            cwd=program.cwd,
            env=program.environment,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self.shown = b""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                self.shown += os.read(self._master, 4096)
            # Its last process closed the terminal.
            except OSError:
                return

    def press_ctrl_c(self) -> None:
        os.write(self._master, b"\x03")


def test_ctrl_c_stops_resumably_the_same_command_goes_on_and_no_run_is_trained_twice(program: Program) -> None:
    terminal = Terminal(program, *COMMAND, "train.save_steps=100000")
    wait_for(lambda: steps_done(program) > 10, timeout=180)
    terminal.press_ctrl_c()
    assert terminal.process.wait(timeout=120) == 130, terminal.shown
    assert b"The same command continues from the last checkpoint" in terminal.shown
    assert b"Traceback" not in terminal.shown
    (run,) = runs(program)
    (ended,) = read_lines(run.attempts)
    assert (ended["cause"], run.checkpoint_steps()[-1:]) == ("preempted", [ended["last_step"]])
    assert 0 < ended["last_step"] < STEPS

    again = program(*COMMAND, "train.save_steps=100000", timeout=240)
    assert again.returncode == 0, again.stderr
    assert f"continues after step {ended['last_step']}" in again.stdout
    assert [line["step"] for line in read_lines(run.journal) if "loss" in line] == list(range(1, STEPS + 1))
    assert read_json(run.result)["attempts"] == 2

    trained = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    finished = program(*COMMAND, "train.save_steps=100000", timeout=240)
    assert finished.returncode == 0, finished.stderr
    assert "Every run of this sweep is done; nothing to train." in finished.stdout
    extended = program(*COMMAND, "lora.r=16,2", timeout=240)
    assert extended.returncode == 0, extended.stderr
    (added,) = [other for other in runs(program) if other.path != run.path]
    assert read_json(added.result)["steps"] == STEPS
    packs = [read_json(path)["runs"] for path in (program.cwd / "runs").glob("mine/jobs/*/pack.json")]
    assert sorted(packs) == sorted([[run.path.name], [run.path.name], [added.path.name]])
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == trained, "it was left alone"


def test_a_run_whose_folder_is_deleted_ends_alone(program: Program) -> None:
    launched = program.start(*COMMAND, "lora.r=2,4")
    wait_for(lambda: steps_done(program) > 10, timeout=180)
    deleted = next(run for run in runs(program) if run.name == "r2")
    # At once: a folder in use is never empty for long.
    shutil.rmtree(deleted.path.rename(deleted.path.parent.parent / "deleted"))
    out, err = launched.communicate(timeout=240)
    assert launched.returncode == 1, err
    assert f"{deleted.path.name} ends: storage" in out
    assert "r2 failed: its folder is gone" in out
    assert not deleted.path.exists()
    (other,) = runs(program)
    assert read_json(other.result)["steps"] == STEPS
    assert [line["cause"] for line in read_lines(other.attempts)] == ["done"]
