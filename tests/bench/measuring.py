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
RANK, ALPHA = 16, 32.0
QV = ("q_proj", "v_proj")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MEET_SECONDS = 240.0


@dataclass(frozen=True)
class Setting:
    """One line of a table.

    Attributes:
        runs: that share the base in one process; 1 for every peer.
        batch: sequences per run and step; 0 asks for the largest that fits.
        processes: that train at once on the GPU.
        checkpointing: activations are recomputed; ``auto`` leaves it to the program.
        residency: of lorapack's base.
    """

    runs: int = 1
    batch: int = 4
    processes: int = 1
    checkpointing: bool | Literal["auto"] = False
    targets: tuple[str, ...] = QV
    residency: Literal["auto", "nf4", "resident"] = "auto"

    @staticmethod
    def of(values: dict[str, Any]) -> Setting:
        """From what `dataclasses.asdict` made of one, through JSON."""
        return Setting(**{**values, "targets": tuple(values["targets"])})

    @property
    def label(self) -> str:
        parts = [f"{self.runs} x {self.batch}" if self.runs > 1 or self.processes == 1 else f"batch {self.batch}"]
        parts += [f"{self.processes} processes"] if self.processes > 1 else []
        parts += ["all-linear"] if self.targets == LINEARS else []
        parts += ["checkpointing"] if self.checkpointing is True else []
        parts += [self.residency] if self.residency != "auto" else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Measured:
    """A setting's result in one process. `error` says why there is none; memory in GiB, 0 on a CPU."""

    who: str
    setting: Setting
    ms_per_step: float = 0.0
    tokens_per_step: float = 0.0
    tokens_per_second: float = 0.0
    peak_allocated_gib: float = 0.0
    peak_reserved_gib: float = 0.0
    warm_seconds: float = 0.0
    note: str = ""
    error: str | None = None

    @staticmethod
    def of(values: dict[str, Any]) -> Measured:
        return Measured(**{**values, "setting": Setting.of(values["setting"])})


class StepClock:
    """Times steps after `warm` untimed ones: events on the GPU's own time line, so that nothing waits to be timed."""

    def __init__(self, warm: int, timed: int) -> None:
        self.warm, self.timed = warm, timed
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
        return self._steps >= self.warm + self.timed

    def restart(self) -> None:
        """Begin the timed part now, after waiting for others."""
        self._marks = [_mark()]

    def milliseconds(self) -> list[float]:
        """Of each timed step; waits for the last one."""
        synchronize()
        return [_between(first, second) for first, second in pairwise(self._marks)]


def result(who: str, setting: Setting, clock: StepClock, tokens: list[int], note: str = "") -> Measured:
    """The numbers of one setting; `tokens` of each timed step. Speed is over the whole timed part, the step's time a median."""
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
    """`measure`, with a failure as a line of the table: a setting that does not fit is a result too."""
    forget_memory()
    try:
        return measure()
    except torch.OutOfMemoryError:
        return Measured(who, setting, error="out of memory")
    except Exception as exc:  # the other settings shall still be measured; the worker's log has the traceback
        traceback.print_exc()
        return Measured(who, setting, error=f"{type(exc).__name__}: {exc}"[:300])


def forget_memory() -> None:
    """Let go of what earlier settings held, and count peaks from here."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def append(out: Path, record: dict[str, Any]) -> None:
    """Add a line to a worker's results, so that what was measured outlives a worker that is killed."""
    with out.open("a") as file:
        file.write(json.dumps(record) + "\n")


def note_result(out: Path, place: int, measured: Measured) -> None:
    """Write what answers the setting at `place` of those asked for."""
    append(out, {"place": place, "measured": asdict(measured)})
    outcome = measured.error or f"{measured.tokens_per_second:,.0f} tok/s"
    print(f"{measured.who} {measured.setting.label}: {outcome}", flush=True)


def ceiling_flops(size: int = 8192, products: int = 20) -> float:
    """FLOP/s of the matrix product of `size` cubed on random bfloat16 numbers (float32 on a CPU): the median of `products`."""
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
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _mark() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(first: Any, second: Any) -> float:
    """Milliseconds."""
    return 1000 * (second - first) if isinstance(first, float) else float(first.elapsed_time(second))


class Rendezvous:
    """Where processes that train at once wait for each other: a file per process and meeting."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank

    def arrive(self, meeting: str) -> None:
        (self.folder / f"{meeting}.{self.rank}").touch()

    def all_there(self, meeting: str, processes: int) -> bool:
        return len(list(self.folder.glob(f"{meeting}.*"))) >= processes

    def meet(self, meeting: str, processes: int) -> None:
        """Wait until `processes` have arrived.

        Raises:
            TimeoutError: somebody never came.
        """
        self.arrive(meeting)
        deadline = time.monotonic() + MEET_SECONDS
        while not self.all_there(meeting, processes):
            if time.monotonic() > deadline:
                raise TimeoutError(f"fewer than {processes} processes came to {meeting}")
            time.sleep(0.005)
