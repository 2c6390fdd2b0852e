"""The JSON documents below a sweep folder, a model each; `train.store.record_file` reads and writes them.

`train.store.layout` says where each lies and docs/files.md who writes it. `launcher.records` has the plan's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from train.store.causes import Cause
from train.store.layout import PackDir, RunDir
from train.store.record_file import FileRecord, RecordPart, read_existing


class ForecastRecord(RecordPart):
    """What a pack was expected to take; `usd` is null if the cluster's configuration has no price."""

    vram_gib: float | None = None
    seconds: float | None = None
    gpu_hours: float | None = None
    usd: float | None = None


class PackRecord(FileRecord):
    """``pack.json``: what one job trains. `runs` are the names of run folders in `sweep_dir`; `axes` maps each to its swept values."""

    id: str
    sweep_dir: str
    cache: str
    runs: list[str]
    axes: dict[str, dict[str, Any]] = Field(default_factory=dict)
    forecast: ForecastRecord = ForecastRecord()
    tracking: dict[str, Any] = Field(default_factory=lambda: {"mode": "off"})

    def run_dirs(self) -> list[RunDir]:
        """The folders of its runs."""
        return [RunDir(Path(self.sweep_dir) / name) for name in self.runs]


class LocalJobRecord(FileRecord):
    """``job.json``: the process that was started for a pack on this machine. `submitted` is Unix time."""

    job: str
    executor: str
    pid: int
    pid_started: int | None
    host: str
    submitted: float


class ArrayRecord(FileRecord):
    """``array.json``: an array of jobs on Slurm. `packs` are files, by task; `job` is null until sbatch has answered."""

    name: str
    partition: str
    gres: str | None = None
    minutes: int | None = None
    parallel: int | None = None
    packs: list[str]
    submitted: float
    job: str | None

    @property
    def at_once(self) -> int:
        """How many of its jobs may run at the same time."""
        return len(self.packs) if self.parallel is None else self.parallel


class ReportJobRecord(FileRecord):
    """``report-job/report.json``: the job that writes the report, and the tokens of the arrays that it waits for."""

    job: str
    arrays: list[str]
    submitted: float


class ResultRecord(FileRecord):
    """``result.json``: what a finished run measured. It is written last, so a run that has it is done.

    A null was not measured (a run without held-out rows), or the key did not exist when the file was written.
    """

    run_id: str | None = None
    name: str | None = None
    steps: int
    train_loss: float
    eval_loss: float | None = None
    eval_exact_match: float | None = None
    best_eval_loss: float | None = None
    best_eval_step: int | None = None
    base_eval_loss: float | None = None
    base_eval_exact_match: float | None = None
    tokens: int | None = None
    seconds: float | None = None
    gpu_hours: float | None = None
    tokens_per_second: float
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    adapter_mb: float | None = None
    attempts: int | None = None
    device: str | None = None
    dtype: str | None = None
    path: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    peak_memory_gib: float | None = None


class CancelRequest(FileRecord):
    """``cancel.json``: the user wants the run to stop, since `time`."""

    time: float


class StopNote(FileRecord):
    """``stop.json``: why the process with the lease `token` was asked to stop."""

    token: str
    signal: str
    cause: Annotated[Cause | str, Field(union_mode="left_to_right")]
    detail: str
    time: float


class ActivityNote(FileRecord):
    """``activity.json``: what the process `pid` on `host` does other than steps, and how much of it is done; 0 of 0 is not counted."""

    host: str
    pid: int
    pid_started: int
    doing: str
    done: int
    total: int


class RendezvousRecord(FileRecord):
    """``rendezvous.json``: where the main process of a job listens; `port` is null if the job has nothing to do."""

    job: str
    port: int | None


class DashboardRecord(FileRecord):
    """``dashboard.json``: which W&B workspace shows the sweep."""

    server: str
    entity: str
    project: str
    name: str
    id: str
    address: str


def read_pack(pack: PackDir) -> PackRecord:
    """What a pack trains.

    Raises:
        DamagedFile: its file is missing or damaged.
    """
    return read_existing(pack.pack, PackRecord)


def runs_of_pack(pack: PackDir) -> list[RunDir]:
    """The folders of the runs that a pack trains, in the sweep folder that holds it now.

    Raises:
        DamagedFile: its file is missing or damaged.
    """
    sweep = pack.path.parent.parent
    return [RunDir(sweep / name) for name in read_pack(pack).runs]
