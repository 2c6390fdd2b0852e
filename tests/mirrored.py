"""A pack as its trainer writes it, without training: journals that grow, are cut back and end, for tests of the mirror to W&B."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from captured_log import captured_log
from json_lines import read_lines
from train.config import parse_run_config
from train.mirror.child import mirrored
from train.mirror.rows import JOURNAL_NAMES
from train.store.layout import RunDir, SweepDir
from train.store.records import read_pack
from train.store.storage import Record, append_lines, make_folder, write_json, write_text
from wandb_server import KEY, WandbServer

EVAL_STEPS = 10
FORECAST = {"vram_gib": 3.5, "seconds": 60.0, "gpu_hours": 0.5, "usd": 1.0}


class WrittenPack:
    """A pack of `count` runs that differ in rank; every number of their journals is a function of run and step."""

    def __init__(
        self, folder: Path, count: int, *, max_steps: int = 60, mode: str = "online", questions: int = 0
    ) -> None:
        self.sweep = SweepDir(make_folder(folder / "ranks"))
        self.max_steps, self.attempt, self.step, self.questions = max_steps, 0, -1, questions
        self.runs = [self._make_run(r) for r in range(1, count + 1)]
        self.dir = self.sweep.pack("p1")
        make_folder(self.dir.path)
        names = [run.path.name for run in self.runs]
        axes = {name: {"lora.r": r} for r, name in enumerate(names, 1)}
        facts = {"id": "p1", "sweep_dir": str(self.sweep.path), "cache": str(folder / "cache"), "runs": names}
        write_json(self.dir.pack, facts | {"axes": axes, "forecast": FORECAST, "tracking": {"mode": mode}})

    @contextmanager
    def job(self, *, cause: str) -> Iterator[list[str]]:
        """An attempt with its mirror: this process is the trainer. Gives the lines of the job's log, once it has ended."""
        with captured_log(logging.WARNING) as said, mirrored(self.dir.pack, read_pack(self.dir)):
            self.begin()
            yield said
            self.end(cause)

    def begin(self) -> None:
        """Take the runs, as an attempt does."""
        self.attempt += 1
        lease = {"token": "t", "host": socket.gethostname(), "pid": os.getpid(), "pid_started": _started(), "job": "1"}
        for run in self.runs:
            write_json(run.lease, lease | {"attempt": self.attempt, "started": time.time()})
            if not run.journal.exists():
                append_lines(run.journal, [self._header(), self._evaluation(run, 0)])
        self.step = max(self.step, 0)

    def train(self, to: int) -> None:
        """Write steps up to `to`, as one flush of the trainer."""
        for run in self.runs:
            lines = []
            for step in range(self.step + 1, to + 1):
                lines.append(self._line(run, step))
                if step % EVAL_STEPS == 0 or step == self.max_steps:
                    lines.append(self._evaluation(run, step))
            append_lines(run.journal, lines)
            append_lines(run.pace, [self.pace(to)])
        self.step = to

    def answer(self, step: int) -> None:
        """Write sample answers that were given after `step`."""
        for run in self.runs:
            answer = {"prompt": "Say 1.", "expected": "1", "answer": f"{run.name} at {step}", "whole": True}
            append_lines(run.samples, [{"step": step, "samples": [{"row": 0} | answer] * self.questions}])

    def roll_back(self, to: int) -> None:
        """What a new attempt does with a journal that is ahead of its checkpoint."""
        for run in self.runs:
            kept = [line for line in read_lines(run.journal) if line["step"] <= to]
            run.journal.write_bytes(b"")
            append_lines(run.journal, kept)
        self.step = to

    def end(self, cause: str) -> None:
        """End the attempt; `done` has results."""
        for run in self.runs:
            line = {"attempt": self.attempt, "cause": cause, "detail": None, "first_step": 0, "last_step": self.step}
            line |= {"seconds": 1.0, "started": 1.0, "ended": 2.0, "node": "here", "device": "cpu", "job": "1"}
            append_lines(run.attempts, [line])
            if cause == "done":
                write_json(run.result, self._result(run))
            run.lease.unlink()

    def wait_for_folder(self) -> Path:
        """The offline folder of the first run, once it is there."""
        deadline = time.monotonic() + 60
        while not (found := sorted(self.sweep.wandb.glob(f"offline-run-*-{self.runs[0].id}/*.wandb"))):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return found[-1].parent

    def kill_mirror(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to every process of the mirror, wandb-core too, as Slurm does."""
        for process in self.mirror_processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def end_worker(self) -> None:
        """Kill the process that talks to W&B, and leave its supervisor."""
        next(process for process in self.mirror_processes() if "work" in _command_of(process)).kill()

    def mirror_processes(self) -> list[psutil.Process]:
        """The processes that this one started for the mirror (it has others: multiprocessing's tracker and fork server)."""
        mirrors = [child for child in psutil.Process().children() if "train.mirror" in _command_of(child)]
        return [process for mirror in mirrors for process in [mirror, *_below(mirror)]]

    def expected(self, run: RunDir) -> list[Record]:
        """The run's journal as rows: a record per step under W&B's names."""
        rows: dict[int, Record] = {}
        for line in read_lines(run.journal)[1:]:
            named = {name: line[key] for key, name in JOURNAL_NAMES.items() if key in line}
            rows.setdefault(line["step"], {"_step": line["step"]}).update(named)
        return list(rows.values())

    def _make_run(self, r: int) -> RunDir:
        values: dict[str, dict[str, Any]] = {
            "model": {"name": "tiny", "source": "builtin:tiny", "fingerprint": "f1"},
            "data": {"name": "tasks", "source": "builtin:tasks", "fingerprint": "f2"},
            "lora": {"r": r, "lora_alpha": 8.0, "target_modules": ["q_proj"]},
            "quant": {"load_in_4bit": True},
            "train": {"learning_rate": 1e-3, "batch_size": 2, "max_steps": self.max_steps}
            | {"eval_steps": EVAL_STEPS, "sample_prompts": self.questions},
        }
        config = parse_run_config(values)
        run = RunDir(make_folder(self.sweep.path / f"r{r}-{config.run_id()}"))
        write_text(run.config, yaml.safe_dump(config.model_dump()))
        return run

    def _header(self) -> Record:
        return {"step": 0, "max_steps": self.max_steps, "trainable_parameters": 1792, "total_parameters": 182_976}

    def _line(self, run: RunDir, step: int) -> Record:
        rank = float(run.name[1:])
        numbers = {"loss": rank + 1 / step, "grad_norm": rank / 10, "learning_rate": 1e-3 / step, "loss_scale": 1024.0}
        return {"step": step, "epoch": step / 100, "tokens": 300} | numbers

    def _evaluation(self, run: RunDir, step: int) -> Record:
        return {"step": step, "eval_loss": float(run.name[1:]) + 2 / (step + 1), "eval_exact_match": 0.25}

    def pace(self, step: int) -> Record:
        speed = {"tokens_per_second": 100.0 + step, "pack_tokens_per_second": 800.0 + step, "peak_memory_gib": 3.25}
        return {"step": step, "attempt": self.attempt, "time": time.time(), "seconds": 1.0} | speed

    def _result(self, run: RunDir) -> Record:
        evaluations = [line for line in read_lines(run.journal) if "eval_loss" in line]
        return {
            "run_id": run.id,
            "name": run.name,
            "steps": self.step,
            "train_loss": 1.0,
            "eval_loss": evaluations[-1]["eval_loss"],
            "best_eval_loss": min(line["eval_loss"] for line in evaluations),
            "tokens_per_second": 123.0,
            "peak_memory_gib": 3.25,
            "gpu_hours": 0.25,
            "trainable_parameters": 1792,
            "adapter_mb": 1.5,
            "attempts": self.attempt,
        }


def without_pace(rows: list[Record]) -> list[Record]:
    """Rows reduced to what the journal said."""
    names = {"_step", *JOURNAL_NAMES.values()}
    return [{key: value for key, value in row.items() if key in names} for row in rows]


def use_server(server: WandbServer, folder: Path, monkeypatch: pytest.MonkeyPatch, *, key: str | None = KEY) -> None:
    """Let this process and its children find `server` as W&B, and no key but `key`."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("NETRC", str(folder / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(folder / "wandb-config"))
    monkeypatch.setenv("WANDB__FILE_STREAM_TRANSMIT_INTERVAL", "1")
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    else:
        monkeypatch.delenv("WANDB_API_KEY", raising=False)


def _command_of(process: psutil.Process) -> list[str]:
    """Its command line, nothing of one that ends as we look."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _below(process: psutil.Process) -> list[psutil.Process]:
    """The processes that it started, and theirs; none of one that ends as we look."""
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _started() -> int:
    from train.store.lease import process_started

    return process_started(os.getpid()) or 0


def wandb_command(folder: Path, *arguments: str) -> str:
    """What W&B's own command prints, started in `folder`."""
    command = [sys.executable, "-m", "wandb", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def launcher(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m launcher`` to its end, started in `folder`."""
    command = [sys.executable, "-m", "launcher", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def assert_arrived(server: WandbServer, pack: WrittenPack) -> None:
    """Every step of every journal is at the server: once, in order, with the journal's values."""
    assert sorted(server.runs) == sorted(run.id for run in pack.runs)
    for run in pack.runs:
        stored = server.runs[run.id]
        assert without_pace(stored.history) == pack.expected(run), run.path.name


def wait_until(condition: Callable[[], object], timeout: float = 60.0) -> None:
    """Poll until `condition` holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
