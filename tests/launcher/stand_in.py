"""A launcher whose trainer is a stand-in: everything is real (jobs, leases, signals, journals) but torch and the model.

`install` copies the project and replaces three modules: ``train/trainer/pack.py`` counts steps instead of computing them,
``train/prepare.py`` answers without fetching anything, and ``train/export.py`` says what it was asked.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import launcher

PACK = '''
"""Stand-in: counts steps. A step takes train.weight_decay seconds; train.seed 13 breaks, 14 diverges."""

import logging
import time

import yaml

from train.runtime.attempts import attempt_line, last_step
from train.store.lease import release
from train.store.line_file import append_records
from train.store.storage import append_lines, make_folder, write_json


def train_as_main_process(leases, pack, cache, process, stop, activity):
    logging.getLogger("lorapack.trainer").info("loading the stand-in")
    for run, lease in leases:
        train = yaml.safe_load(run.config.read_text())["train"]
        if train["seed"] == 13:
            raise RuntimeError("the stand-in was told to break")
        first = last_step(run)
        if not run.journal.exists():
            append_lines(run.journal, [{"step": 0, "max_steps": train["max_steps"]}])
        for step in range(first + 1, train["max_steps"] + 1):
            if stop or run.cancel_request.exists():
                make_folder(run.checkpoint(step - 1))
            stop.check()
            if run.cancel_request.exists():
                end(run, lease, "cancelled", first, step - 1)
                break
            if train["seed"] == 14 and step == 3:
                append_lines(run.journal, [{"step": step, "diverged": "the loss is nan"}])
                end(run, lease, "diverged", first, step)
                break
            time.sleep(train["weight_decay"])
            append_lines(run.journal, [{"step": step, "loss": 1 / step}])
            pace = {"step": step, "attempt": lease.attempt, "time": time.time(), "seconds": 1.0, "tokens_per_second": 100.0}
            append_lines(run.pace, [pace])
        else:
            end(run, lease, "done", first, train["max_steps"])
            write_json(run.result, result(run, train["max_steps"]))


def end(run, lease, cause, first, last):
    detail = "the loss is nan" if cause == "diverged" else None
    append_records(run.attempts, [attempt_line(run, lease, (cause, detail), first, last)])
    release(run, lease)


def result(run, steps):
    losses = {"train_loss": 0.5, "eval_loss": 0.6, "best_eval_loss": 0.6, "best_eval_step": steps, "base_eval_loss": 2.0}
    shares = {"eval_exact_match": 0.5, "base_eval_exact_match": 0.0}
    costs = {"tokens": 100, "seconds": 1.0, "gpu_hours": 0.0, "tokens_per_second": 100.0, "peak_memory_gib": 0.1}
    sizes = {"trainable_parameters": 10, "total_parameters": 100, "adapter_mb": 0.1, "attempts": 1}
    where = {"device": "cpu", "dtype": "float32", "path": "own", "versions": {}}
    return {"run_id": run.id, "name": run.name, "steps": steps} | losses | shares | costs | sizes | where
'''

PREPARE = '''
"""Stand-in: everything is prepared, except data whose split is called "bad"."""

import json
import sys

requests = json.load(sys.stdin)["requests"]
print("preparing", len(requests), file=sys.stderr)
if any(request["data"]["split"] == "bad" for request in requests):
    print(json.dumps({"ok": False, "error": "BadInput", "exit_code": 2, "message": "row 3 of the data is malformed"}))
    sys.exit(2)
prepared = [{"model_dir": "/model", "train_rows": 4000, "eval_rows": 100} for _ in requests]
print(json.dumps({"ok": True, "prepared": prepared}))
'''

EXPORT = '''
"""Stand-in: says what it was asked."""

import json
import sys

print(json.dumps(sys.argv[1:]))
'''

SMALL = ["model=tiny", "train.max_steps=5"]


def install(folder: Path) -> Path:
    """Copy the project to `folder` with the stand-ins in place."""
    source = Path(launcher.__file__).parent.parent
    for name in ("launcher", "train", "conf"):
        shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for module, text in (("trainer/pack.py", PACK), ("prepare.py", PREPARE), ("export.py", EXPORT)):
        replaced = folder / "train" / module
        # A stand-in beside a module that moved would stand in for nothing.
        assert replaced.exists(), replaced
        replaced.write_text(text)
    return folder


class Program:
    """``python -m launcher`` of an installed stand-in, started in a folder of its own."""

    def __init__(self, installed: Path, cwd: Path) -> None:
        self.cwd = cwd
        self.environment = os.environ | {"PYTHONPATH": str(installed), "COLUMNS": "200", "PYTHONWARNINGS": "error"}

    def __call__(self, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run to the end."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start, and leave it running."""
        return subprocess.Popen(
            [sys.executable, "-m", "launcher", *arguments],
            cwd=self.cwd,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def wait_for(condition: Callable[[], object], timeout: float = 30.0) -> None:
    """Poll until `condition` holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def put_command(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for one of the system's commands, alone on the PATH."""
    command = folder / name
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
