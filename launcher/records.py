"""The frozen values that one stage hands to the next: compose -> plan -> submit, and what track and report read back."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from launcher.config import ClusterConfig
from train.config import RunConfig, TrackingConfig
from train.sizing import ComputePath
from train.store.layout import RunDir, SweepDir
from train.store.record_file import FileRecord, RecordPart
from train.store.records import ForecastRecord


@dataclass(frozen=True)
class Run:
    """One configuration of a sweep. `axes` maps each swept key to this run's value."""

    config: RunConfig
    id: str
    name: str
    axes: dict[str, Any]

    @property
    def folder(self) -> str:
        """The name of the run's folder in the sweep folder."""
        return f"{self.name}-{self.id}"


@dataclass(frozen=True)
class Sweep:
    """What the user asked for, composed and checked. `command` is the line that asks for it again.

    `left_out` says which runs of the folder cannot be trained because a file is damaged, and what other files are.
    """

    name: str
    root: Path
    cache: Path
    runs: tuple[Run, ...]
    cluster: ClusterConfig
    tracking: TrackingConfig
    command: str
    left_out: tuple[str, ...] = ()

    @property
    def dir(self) -> SweepDir:
        """The sweep's folder."""
        return SweepDir(self.root / self.name)

    def run_dir(self, run: Run) -> RunDir:
        """The folder of one run."""
        return RunDir(self.dir.path / run.folder)


class Verdict(StrEnum):
    """What a plan will do with a run.

    new -> never trained, will be; resumable -> will continue from its checkpoint; running -> a live process has it, left alone;
    done -> has its result, left alone; failed -> would end the same way again, left alone until `resume`;
    unknown -> a file of it is damaged, so that nobody can tell, left alone until that is repaired.
    """

    NEW = "new"
    DONE = "done"
    RUNNING = "running"
    RESUMABLE = "resumable"
    FAILED = "failed"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class PlannedRun:
    """A run, the verdict on it with its reason, and the pack that will train it (None where nothing is to do)."""

    run: Run
    verdict: Verdict
    reason: str
    pack: str | None


@dataclass(frozen=True)
class Forecast:
    """What a pack is expected to take. `usd` is None where the cluster names no price."""

    vram_gib: float
    seconds: float
    gpu_hours: float
    usd: float | None


@dataclass(frozen=True)
class Pack:
    """The runs that one job trains together, by id, and what the job is asked for with.

    gres: what ``--gres`` takes, empty on this machine. minutes: the job's time limit, None for no limit.
    path: how the base is computed, None if that is checked once it is fetched. slower: how many times as long that takes as by our own
    decoder.
    """

    id: str
    partition: str
    runs: tuple[str, ...]
    forecast: Forecast
    gres: str = ""
    minutes: int | None = None
    path: ComputePath | None = None
    slower: float = 1.0


@dataclass(frozen=True)
class JobSlots:
    """How many jobs of a plan may run at once on Slurm (`launcher.cluster.arrays.job_slots`).

    taken: the arrays of the sweep that are in the queue already: number, and how many of its jobs may run at once.
    waits: whether these arrays have to end before the first job of the plan starts.
    """

    count: int
    taken: tuple[tuple[str, int], ...] = ()
    waits: bool = False

    @property
    def after(self) -> tuple[str, ...]:
        """The arrays that have to end first."""
        return self.earlier if self.waits else ()

    @property
    def earlier(self) -> tuple[str, ...]:
        """The arrays of the sweep that are in the queue already."""
        return tuple(number for number, _ in self.taken)


@dataclass(frozen=True)
class Plan:
    """What will happen, completely: `submit` does exactly this. `slots` is None on this machine, or where nothing is to do."""

    sweep: Sweep
    runs: tuple[PlannedRun, ...]
    packs: tuple[Pack, ...]
    slots: JobSlots | None = None


class PlannedRunRecord(RecordPart):
    """A run in a plan's file; `verdict` is a `Verdict`, or a word of a later version."""

    id: str
    name: str
    verdict: str
    reason: str
    overrides: dict[str, Any]
    pack: str | None

    @property
    def folder(self) -> str:
        """The name of the run's folder in the sweep folder."""
        return f"{self.name}-{self.id}"


class PlannedPackRecord(RecordPart):
    """A pack in a plan's file, with the ids of its runs."""

    id: str
    partition: str
    runs: list[str]
    forecast: ForecastRecord
    path: str | None = None
    slower: float | None = None


class PlanRecord(FileRecord):
    """``plans/<n>.json``: an accepted plan, when that was (Unix time), and what `resume` and the report need to know."""

    sweep: str
    root: str
    runs: list[PlannedRunRecord]
    packs: list[PlannedPackRecord]
    accepted: float
    command: str
    cache: str
    cluster: dict[str, Any]
    tracking: dict[str, Any]


class State(StrEnum):
    """Where a run is in its life.

    pending -> submitted, not started; running -> a live process trains it; stopped -> ended resumably (preempted, time limit,
    Ctrl-C); cancelled -> stopped on request; failed -> ended by an error that would come again; done -> has its result;
    unknown -> its process has not been heard of for a while, which is never taken for failed; or one of its files is damaged.
    """

    PENDING = "pending"
    RUNNING = "running"
    STOPPED = "stopped"
    CANCELLED = "cancelled"
    FAILED = "failed"
    DONE = "done"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class RunStatus:
    """What is known of a run now. Speeds in tokens per second of this run alone; `seconds_left` by its latest pace.

    `reason` is why it waits, is held, or is unknown. `doing` is what its job does just now besides steps: ``evaluating 12/64``.
    `gone` says that no job can train it any more, where how that ended is unknown. `damaged` says that `reason` names a file.
    """

    id: str
    name: str
    state: State
    step: int
    max_steps: int | None
    loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    attempts: int
    cause: str | None
    job: str | None
    node: str | None
    reason: str | None = None
    doing: str | None = None
    gone: bool = False
    damaged: bool = False

    @property
    def under_way(self) -> bool:
        """Whether it trains, waits, or may do so as far as anybody knows."""
        return self.state in {State.PENDING, State.RUNNING, State.UNKNOWN} and not self.gone


def verb_command(verb: str, sweep: SweepDir) -> str:
    """What to type for a verb on this sweep, quoted for the shell. The root is named unless it is ./runs.

    ``python -m launcher status rank 'root=/data/my runs'``
    """
    root = sweep.path.parent
    extra = [] if root == Path("runs").absolute() else [f"root={root}"]
    return shlex.join(["python", "-m", "launcher", verb, sweep.path.name, *extra])
