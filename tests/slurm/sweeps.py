"""Small sweeps on the real cluster: started by the ordinary user, watched by their files, held against a run that nobody disturbed."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launcher.jobs import jobs_of, look_up
from launcher.records import RunStatus
from launcher.track.tracker import track
from real_cluster import Cluster
from train.lease import read_lease
from train.rundir import RunDir, SweepDir
from train.storage import Record, read_json, read_lines

STEPS = 300  # ten to thirty seconds of training
TINY = ("model=tiny", f"train.max_steps={STEPS}", "train.save_steps=50")
PAIR = ("lora.r=4,8", *TINY)  # one pack of two runs
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

    def submit(self, name: str, *words: str) -> Sweep:
        """Submit a sweep."""
        sweep = self.sweep(name)
        where = SLURM[:1] if any(word.startswith("cluster.partitions") for word in words) else SLURM
        sweep.said = self.run(*(words or PAIR), *where, f"sweep.name={name}")
        return sweep

    def sweep(self, name: str) -> Sweep:
        """A sweep by its name."""
        return Sweep(self, SweepDir(self.project / "runs" / name))

    def undisturbed(self, name: str, *words: str) -> dict[str, bytes]:
        """The journals of the same runs trained to the end on this machine, by run id. What another test left halfway goes."""
        folder = SweepDir(self.project / "runs" / name)
        if not _all_done(folder):
            shutil.rmtree(folder.path, ignore_errors=True)
            self.run(*words, "cluster=local", f"sweep.name={name}")
            assert _all_done(folder)
        return {run.id: run.journal.read_bytes() for run in folder.runs()}


def _all_done(folder: SweepDir) -> bool:
    runs = folder.runs()
    return bool(runs) and all(run.result.exists() for run in runs)


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

    def statuses(self) -> list[RunStatus]:
        """What `status` says."""
        with self.cluster.commands():
            return track(self.folder)

    def looked_up(self) -> list[str | None]:
        """The words that Slurm has for the jobs."""
        with self.cluster.commands():
            views = [job.slurm.view if job.slurm else None for job in look_up(jobs_of(self.folder))]
        return [None if view is None else view.word for view in views]

    def attempts(self, run: RunDir | None = None) -> list[Record]:
        return read_lines((run or self.first).attempts)

    def causes(self, run: RunDir | None = None) -> list[str]:
        return [line["cause"] for line in self.attempts(run)]

    def step(self) -> int:
        """The last step in the first run's journal."""
        lines = read_lines(self.first.journal)
        return int(lines[-1]["step"]) if lines else 0

    def wait(self, what: str, ready: Callable[[], object], seconds: float = STEP_DEADLINE_SECONDS) -> None:
        """Wait with a deadline; the failure shows the logs of the jobs too."""
        try:
            self.cluster.wait(f"{self.name}: {what}", ready, seconds)
        except Exception as exc:
            raise AssertionError(f"{exc}\n{self.logs()}\n{[self.causes(run) for run in self.runs]}") from exc

    def wait_for_step(self, step: int) -> None:
        """Wait until the first run has come beyond `step`, and is still training."""
        self.wait(f"step {step}", lambda: self.step() > step)
        assert not self.first.result.exists(), "too late: the run is done"

    def wait_for_attempts(self, count: int) -> None:
        self.wait(f"{count} ended attempts", lambda: len(self.attempts()) >= count)

    def wait_until_done(self) -> None:
        self.wait("every run done", lambda: all(run.result.exists() for run in self.runs), END_DEADLINE_SECONDS)

    def node(self) -> str:
        """Where its newest job runs."""
        return self.cluster.field(self.job, "NodeList")

    def preempt(self, seconds: int = 1) -> None:
        """Let an urgent job push out the newest job."""
        self.cluster.urgent(self.node(), seconds)

    def stall(self) -> int:
        """Stop the process that trains, as a node does that hangs, so that what comes does not depend on the machine's speed."""
        lease = read_lease(self.first)
        assert lease is not None
        os.kill(lease.pid, signal.SIGSTOP)
        return lease.pid

    def logs(self) -> str:
        """What its jobs wrote."""
        files = sorted(self.folder.arrays.glob("*/submitit/*_log.*"))
        return "\n".join(f"{file.name}\n{file.read_text()[-3000:]}" for file in files)

    def assert_as_if_undisturbed(self, journals: dict[str, bytes]) -> None:
        """Every run is done, and its journal has the very bytes of the run that nobody disturbed."""
        self.wait_until_done()
        assert {run.id for run in self.runs} <= set(journals)
        for run in self.runs:
            assert read_json(run.result)["steps"] == read_lines(run.journal)[-1]["step"]
            assert run.journal.read_bytes() == journals[run.id], f"{run.path.name} is not what it would be alone"
