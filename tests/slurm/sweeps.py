"""Small sweeps on the real cluster: started by the ordinary user, watched by their files, held against a run that nobody disturbed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from json_lines import read_lines
from launcher.records import RunStatus
from launcher.track.jobs import jobs_of, look_up, newest_job_per_run
from launcher.track.tracker import track
from real_cluster import Cluster
from train.store.layout import RunDir, SweepDir
from train.store.lease import read_lease
from train.store.storage import Record, read_json

STEPS = 120
EVAL_STEPS = 5
# Journals are written at every save.
TINY = ("model=tiny", f"train.max_steps={STEPS}", "train.save_steps=20")
# One pack of two runs.
PAIR = ("lora.r=4,8", *TINY)
SEEDS = (
    "train.seed=range(0,6)",
    "model=tiny",
    "train.max_steps=60",
    "train.save_steps=5",
    "cluster.max_runs_per_pack=1",
)
SLURM = ("cluster=slurm", "cluster.partitions={t4:{gpu:t4,gpus:4,max_minutes:1440}}")
STEP_DEADLINE_SECONDS, END_DEADLINE_SECONDS = 120.0, 240.0


@dataclass(frozen=True)
class Lab:
    """The ordinary user's copy of the project on the cluster, and his sweeps."""

    cluster: Cluster
    project: Path

    def run(self, *words: str, check: bool = True, **variables: str) -> str:
        """``python -m launcher WORDS``; what it printed, also on stderr."""
        answer = self.cluster.launcher(self.project, *words, check=check, **variables)
        return answer.stdout + answer.stderr

    def launch(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """The same, however it ends."""
        return self.cluster.launcher(self.project, *words, check=False, **variables)

    def submit(self, name: str, *words: str, **variables: str) -> Sweep:
        """Submit a sweep."""
        sweep = self.sweep(name)
        where = SLURM[:1] if any(word.startswith("cluster.partitions") for word in words) else SLURM
        sweep.said = self.run(*(words or PAIR), *where, f"sweep.name={name}", **variables)
        return sweep

    def sweep(self, name: str) -> Sweep:
        """A sweep by its name."""
        return Sweep(self, SweepDir(self.project / "runs" / name))

    def undisturbed(self, name: str, *words: str, **variables: str) -> dict[str, bytes]:
        """The journals of the same runs trained to the end on this machine, by run id. What another test left halfway goes."""
        folder = SweepDir(self.project / "runs" / name)
        if not _all_done(folder):
            shutil.rmtree(folder.path, ignore_errors=True)
            self.run(*words, "cluster=local", f"sweep.name={name}", **variables)
            assert _all_done(folder)
        return {run.id: run.journal.read_bytes() for run in folder.runs()}


def _all_done(folder: SweepDir) -> bool:
    runs = folder.runs()
    return bool(runs) and all(run.result.exists() for run in runs)


def is_stopped(pid: int) -> bool:
    """Whether a process stands still (SIGSTOP has arrived)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "tT"


class Sweep:
    """One submitted sweep."""

    said = ""

    def __init__(self, lab: Lab, folder: SweepDir) -> None:
        self.lab, self.cluster, self.folder = lab, lab.cluster, folder

    @property
    def name(self) -> str:
        return self.folder.path.name

    @property
    def runs(self) -> list[RunDir]:
        return self.folder.runs()

    @property
    def first(self) -> RunDir:
        return self.runs[0]

    @property
    def jobs(self) -> list[str]:
        """The ids of all jobs that were submitted for it, the oldest first."""
        return [job.id for job in jobs_of(self.folder) if job.id is not None]

    @property
    def job(self) -> str:
        """The id of the newest."""
        return self.jobs[-1]

    def job_of(self, run: RunDir) -> str:
        """The id of the newest job of a run."""
        job = newest_job_per_run(jobs_of(self.folder))[run.path.name]
        assert job.id is not None
        return job.id

    def statuses(self) -> list[RunStatus]:
        """What `status` says."""
        with self.cluster.commands():
            return track(self.folder)

    def attempts(self, run: RunDir | None = None) -> list[Record]:
        return read_lines((run or self.first).attempts)

    def causes(self, run: RunDir | None = None) -> list[str]:
        return [line["cause"] for line in self.attempts(run)]

    def step(self, run: RunDir | None = None) -> int:
        """The last step in the journal of a run, by default the first."""
        line = next(reversed(read_lines((run or self.first).journal)), None)
        return int(line["step"]) if line else 0

    def wait(self, what: str, ready: Callable[[], object], seconds: float = STEP_DEADLINE_SECONDS) -> None:
        """Wait with a deadline; the failure shows the logs of the jobs too."""
        try:
            self.cluster.wait(f"{self.name}: {what}", ready, seconds)
        except Exception as exc:
            raise AssertionError(f"{exc}\n{self.logs()}\n{[self.causes(run) for run in self.runs]}") from exc

    def stall_beyond(self, step: int) -> int:
        """Let the process that trains stand still once the first run has come beyond `step` (see `stall`)."""
        return self.stall(f"beyond step {step}", lambda sweep: sweep.step() > step)

    def wait_for_attempts(self, count: int) -> None:
        """Wait for so many ended attempts at every run: they are written one after the other."""
        self.wait(f"{count} ended attempts", lambda: all(len(self.attempts(run)) >= count for run in self.runs))

    def wait_until_done(self) -> None:
        self.wait("every run done", lambda: all(run.result.exists() for run in self.runs), END_DEADLINE_SECONDS)

    def node(self) -> str:
        """Where its newest job runs."""
        return self.cluster.field(self.job, "NodeList")

    def preempt(self, seconds: int = 1) -> None:
        """Let an urgent job push out the newest job."""
        self.cluster.urgent(self.node(), seconds)

    def stall(
        self, what: str = "training", moment: Callable[[Sweep], bool] = lambda _: True, run: RunDir | None = None
    ) -> int:
        """Make the process that trains a run (by default the first) stand still at a moment that its files show; its process id.

        It hangs there until a signal of Slurm wakes it (SIGCONT comes with SIGTERM), so that what comes hits that very moment, however
        fast the machine is. Where the moment had passed before the process stood, the next one is waited for.
        """
        run = run or self.first
        deadline = time.monotonic() + STEP_DEADLINE_SECONDS
        while time.monotonic() < deadline:
            lease = read_lease(run)
            if lease is not None and moment(self):
                with suppress(ProcessLookupError, FileNotFoundError):
                    os.kill(lease.pid, signal.SIGSTOP)
                    while not is_stopped(lease.pid):
                        time.sleep(0.001)
                    if moment(self):
                        return lease.pid
                    os.kill(lease.pid, signal.SIGCONT)
            assert not run.result.exists(), f"the run is done and was never seen {what}"
            time.sleep(0.001)
        raise AssertionError(f"{self.name} was never seen {what}\n{self.logs()}")

    def logs(self) -> str:
        """What its jobs wrote."""
        files = sorted(self.folder.arrays.glob("*/submitit/*_log.*"))
        return "\n".join(f"{file.name}\n{file.read_text()[-3000:]}" for file in files)

    def assert_as_if_undisturbed(self, journals: dict[str, bytes], *causes: str) -> None:
        """Every run is done, its journal has the very bytes of the run that nobody disturbed, and its attempts ended by `causes`."""
        self.wait_until_done()
        assert {run.id for run in self.runs} == set(journals)
        for run in self.runs:
            assert run.journal.read_bytes() == journals[run.id], f"{run.path.name} is not what it would be alone"
            result = read_json(run.result)
            assert (result["steps"], result["attempts"]) == (read_lines(run.journal)[-1]["step"], len(causes))
            self._assert_told(run, causes)

    def _assert_told(self, run: RunDir, causes: tuple[str, ...]) -> None:
        """The lines of a run's attempts: a cause and a job for each, and each begins where the one before left the run."""
        lines = self.attempts(run)
        assert tuple(line["cause"] for line in lines) == causes, lines
        assert [line["attempt"] for line in lines] == list(range(1, len(lines) + 1))
        # Also of jobs whose launcher died before it knew their ids.
        with self.cluster.commands():
            assert {line["job"] for line in lines} <= {job.id for job in look_up(jobs_of(self.folder))}
        for before, line in pairwise(lines):
            # A process that was killed may have saved some of its runs alone.
            wordless = before["first_step"] is None
            assert line["first_step"] in (None, before["saved_step"]) or wordless, lines


def loading(sweep: Sweep) -> bool:
    """The process has begun to import torch, and no run has a place in the pack."""
    return "importing torch" in sweep.logs() and not any(run.journal.exists() for run in sweep.runs)


def evaluating(sweep: Sweep) -> bool:
    """Every line up to a step of an evaluation is written (`train.trainer.loop` does so before it evaluates), and its own is not.

    For sweeps with `train.eval_steps=EVAL_STEPS` and no sample answers.
    """
    line = next(reversed(read_lines(sweep.first.journal)), None)
    return line is not None and line["step"] % EVAL_STEPS == 0 < line["step"] and "eval_loss" not in line


def saving(sweep: Sweep) -> bool:
    """A checkpoint is half written, under the name that it has until it is whole."""
    return any(True for run in sweep.runs for _ in run.checkpoints.glob(".step-*.tmp"))
