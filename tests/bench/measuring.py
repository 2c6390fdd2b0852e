"""What is measured and how: settings, results, a clock that never waits for the GPU, the matrix ceiling, a rendezvous."""

from __future__ import annotations

import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch

GIB = 2**30
RANK = 16
ALPHA = 32.0
QV = ("q_proj", "v_proj")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MEET_SECONDS = 240.0
# What q_proj and v_proj are in the model of this folder, as a JSON list.
TARGETS_FILE = "bench-targets.json"


@dataclass(frozen=True)
class Setting:
    """One line of a table.

    Attributes:
        runs: how many runs share the base in one process; 1 for every peer.
        batch: sequences per run and step; 0 means the largest that fits.
        processes: how many processes train at the same time on the GPU.
        checkpointing: whether activations are recomputed; ``auto`` leaves it to the program.
        targets: the adapted linear layers.
        residency: how lorapack holds its base.
    """

    runs: int = 1
    batch: int = 4
    processes: int = 1
    checkpointing: bool | Literal["auto"] = False
    targets: tuple[str, ...] = QV
    residency: Literal["auto", "nf4", "resident"] = "auto"

    @staticmethod
    def of(values: dict[str, Any]) -> Setting:
        """The setting that `dataclasses.asdict` and JSON made into `values`."""
        return Setting(**{**values, "targets": tuple(values["targets"])})

    def targets_in(self, model: Path) -> list[str]:
        """The adapted layers by their names in a model folder: an architecture may have one matrix for q, k and v."""
        own = model / TARGETS_FILE
        return json.loads(own.read_text()) if self.targets == QV and own.exists() else list(self.targets)

    @property
    def label(self) -> str:
        """The setting in a table."""
        parts = [f"{self.runs} x {self.batch}" if self.runs > 1 or self.processes == 1 else f"batch {self.batch}"]
        parts += [f"{self.processes} processes"] if self.processes > 1 else []
        parts += ["all-linear"] if self.targets == LINEARS else []
        parts += ["checkpointing"] if self.checkpointing is True else []
        parts += [self.residency] if self.residency != "auto" else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Measured:
    """A setting's result in one process. `error` says why there is none. Memory is in GiB, 0 on a CPU.

    The forecasts are what a plan says of such a pack; 0 for peers.
    """

    who: str
    setting: Setting
    ms_per_step: float = 0.0
    tokens_per_step: float = 0.0
    tokens_per_second: float = 0.0
    peak_allocated_gib: float = 0.0
    peak_reserved_gib: float = 0.0
    warm_seconds: float = 0.0
    forecast_gib: float = 0.0
    forecast_ms: float = 0.0
    note: str = ""
    error: str | None = None

    @property
    def memory_error(self) -> float:
        """Forecast divided by measurement, minus one; 0 where memory was not measured (on a CPU)."""
        return self.forecast_gib / self.peak_allocated_gib - 1 if self.peak_allocated_gib else 0.0

    @property
    def time_error(self) -> float:
        """Forecast divided by measurement, minus one."""
        return self.forecast_ms / self.ms_per_step - 1

    @staticmethod
    def of(values: dict[str, Any]) -> Measured:
        """The result that `dataclasses.asdict` and JSON made into `values`."""
        return Measured(**{**values, "setting": Setting.of(values["setting"])})


class StepClock:
    """Times `timed` steps after `warm` untimed ones, in milliseconds.

    It records CUDA events between the kernels, so the program never waits for the GPU in order to be timed.
    """

    def __init__(self, warm: int, timed: int) -> None:
        self.warm = warm
        self.timed = timed
        self.started = time.monotonic()
        self.warm_seconds = 0.0
        self._marks: list[Any] = []
        self._steps = 0

    def tick(self) -> None:
        """A step has been issued."""
        self._steps += 1
        if self._steps == self.warm:
            synchronize()
            self.warm_seconds = time.monotonic() - self.started
        if self.warm <= self._steps <= self.warm + self.timed:
            self._marks.append(_mark())

    @property
    def warmed(self) -> bool:
        """Whether the next step is the first timed one."""
        return self._steps == self.warm

    @property
    def done(self) -> bool:
        """Whether all steps are timed."""
        return self._steps >= self.warm + self.timed

    def restart(self) -> None:
        """Begin the timed part now, after waiting for others."""
        self._marks = [_mark()]

    def milliseconds(self) -> list[float]:
        """The time of each timed step; waits for the last one."""
        synchronize()
        if torch.cuda.is_available():
            return [first.elapsed_time(second) for first, second in pairwise(self._marks)]
        return [1000 * (second - first) for first, second in pairwise(self._marks)]


def result(who: str, setting: Setting, clock: StepClock, tokens: list[int], note: str = "") -> Measured:
    """The numbers of one setting; `tokens` are those of each timed step.

    Speed is that of all timed steps together; the time of a step is the median.
    """
    milliseconds = clock.milliseconds()
    cuda = torch.cuda.is_available()
    return Measured(
        who,
        setting,
        ms_per_step=statistics.median(milliseconds),
        tokens_per_step=statistics.mean(tokens),
        tokens_per_second=1000 * sum(tokens) / sum(milliseconds),
        peak_allocated_gib=torch.cuda.max_memory_allocated() / GIB if cuda else 0.0,
        peak_reserved_gib=torch.cuda.max_memory_reserved() / GIB if cuda else 0.0,
        warm_seconds=clock.warm_seconds,
        note=note,
    )


def attempt(who: str, setting: Setting, measure: Callable[[], Measured]) -> Measured:
    """The result of `measure`. A failure becomes a line of the table, since a setting that does not fit is a result too."""
    forget_memory()
    try:
        return measure()
    except torch.OutOfMemoryError:
        return Measured(who, setting, error="out of memory")
    except Exception as exc:
        # The other settings are still to be measured. The worker's log has the traceback.
        traceback.print_exc()
        return Measured(who, setting, error=f"{type(exc).__name__}: {exc}"[:300])


def forget_memory() -> None:
    """Free what earlier settings held, and count peaks from now on."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def append(out: Path, record: dict[str, Any]) -> None:
    """Add a line to a worker's results, so that what was measured outlives a worker that is killed."""
    with out.open("a") as file:
        file.write(json.dumps(record) + "\n")


def note_result(out: Path, index: int, measured: Measured) -> None:
    """Write the result of the setting at `index` of the job's settings."""
    append(out, {"index": index, "measured": asdict(measured)})
    outcome = measured.error or f"{measured.tokens_per_second:,.0f} tok/s"
    print(f"{measured.who} {measured.setting.label}: {outcome}", flush=True)


def ceiling_flops(size: int = 8192, products: int = 20) -> float:
    """FLOP/s of a square matrix product of `size` on random bfloat16 numbers (float32 on a CPU): the median of `products`."""
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    size = size if cuda else 256
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    clock = StepClock(warm=5, timed=products)
    while not clock.done:
        a @ b
        clock.tick()
    return 2 * size**3 / (statistics.median(clock.milliseconds()) / 1000)


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _mark() -> Any:
    """A point in time: a CUDA event, or seconds on a CPU."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Rendezvous:
    """A barrier for processes that train at the same time: a file per process and meeting."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self.rank = rank

    def arrive(self, meeting: str) -> None:
        """Say that this process has arrived, without waiting."""
        (self.folder / f"{meeting}.{self.rank}").touch()

    def all_there(self, meeting: str, processes: int) -> bool:
        """Whether `processes` have arrived."""
        return len(list(self.folder.glob(f"{meeting}.*"))) >= processes

    def meet(self, meeting: str, processes: int) -> None:
        """Wait until `processes` have arrived.

        Raises:
            TimeoutError: some did not arrive within `MEET_SECONDS`.
        """
        self.arrive(meeting)
        deadline = time.monotonic() + MEET_SECONDS
        while not self.all_there(meeting, processes):
            if time.monotonic() > deadline:
                raise TimeoutError(f"fewer than {processes} processes arrived at {meeting} within {MEET_SECONDS:.0f} s")
            time.sleep(0.005)
