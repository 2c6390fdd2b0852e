"""Compares the forecast of memory and time with measurements: one process, every combination that decides memory.

    PYTHONPATH=.:tests python -m bench.forecast --json forecast.json

The base is loaded once per residency and checkpointing. Memory peaks are reset for each setting.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bench.start import bench_cache
from train.runtime.environment import prepare_torch

if TYPE_CHECKING:
    from bench.measuring import Measured, Setting

# How far a forecast may be off.
MEMORY_BAR = 0.10
TIME_BAR = 0.25
# Steps.
FIRST_STEP = 2
TIMED = 8
HEADER = ("setting", "peak GiB", "forecast", "error", "ms/step", "forecast", "error", "tok/s", "trainer's choice")


@dataclass(frozen=True)
class Compared:
    """A setting's measurement and its forecast."""

    measured: Measured
    forecast_gib: float
    forecast_ms: float

    @property
    def memory_error(self) -> float:
        """Forecast divided by measurement, minus one; 0 where memory was not measured (on a CPU)."""
        return self.forecast_gib / self.measured.peak_allocated_gib - 1 if self.measured.peak_allocated_gib else 0.0

    @property
    def time_error(self) -> float:
        """Forecast divided by measurement, minus one."""
        return self.forecast_ms / self.measured.ms_per_step - 1


def settings(quick: bool) -> list[Setting]:
    """Runs, batch, targets, checkpointing and residency in usual combinations, ordered so that neighbors share a base."""
    from bench.measuring import LINEARS, QV, Setting

    if quick:
        return [Setting(runs=runs, residency="nf4") for runs in (1, 2)]
    cases = {
        ("nf4", False): [
            (1, 4, QV),
            (4, 4, QV),
            (8, 4, QV),
            (16, 4, QV),
            (1, 16, QV),
            (1, 4, LINEARS),
            (8, 4, LINEARS),
        ],
        ("nf4", True): [(1, 4, QV), (8, 4, QV), (8, 16, QV), (8, 4, LINEARS)],
        ("resident", False): [(1, 4, QV), (8, 4, QV), (4, 16, QV), (16, 4, LINEARS)],
        ("resident", True): [(1, 16, QV), (16, 4, QV), (4, 16, LINEARS)],
    }
    return [
        Setting(runs, batch, checkpointing=recomputed, targets=targets, residency=residency)
        for (residency, recomputed), packs in cases.items()
        for runs, batch, targets in packs
    ]


def compare(model: Path, cases: Sequence[Setting], timed: int) -> list[Compared]:
    """Measure every setting, and ask the launcher for its forecast."""
    from bench.measuring import StepClock, attempt
    from bench.ours import NAME, DeviceModel
    from bench.rows import data

    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    bench = DeviceModel(model, data(vocabulary), bench_cache(model), first_step=FIRST_STEP)
    compared = []
    for setting in cases:
        clock = StepClock(FIRST_STEP + timed, timed)
        measured = attempt(NAME, setting, partial(bench.measure, setting, clock))
        print(f"{setting.label}: {measured.error or f'{measured.peak_allocated_gib:.1f} GiB'}", flush=True)
        compared.append(Compared(measured, *forecast(model, setting)))
    return compared


def forecast(model: Path, setting: Setting) -> tuple[float, float]:
    """Peak in GiB and milliseconds of a step, as the plan of such a pack gives them on this machine."""
    from bench.ours import run_config
    from bench.rows import LONGEST, ROWS, table
    from launcher.estimate.arithmetic import memory_bytes, training_seconds
    from launcher.estimate.devices import GIB, local_device
    from launcher.estimate.shapes import staged_shape
    from launcher.estimate.workload import DatasetStats, adapter_of, workload

    shape, device = staged_shape(model), local_device()
    rows = DatasetStats(ROWS, eval_rows=0, tokens_per_row=float(table(256).lengths().mean()), longest=LONGEST)
    configs = [run_config(model, setting, seed) for seed in range(setting.runs)]
    work = [workload(config.train, rows, adapter_of(config.lora, shape), done_steps=0) for config in configs]
    seconds = training_seconds(configs[0], work, shape, device)
    return memory_bytes(configs[0], work, shape, device) / GIB, 1000 * seconds / work[0].steps


def report(compared: Sequence[Compared]) -> str:
    """The table, and the worst errors."""
    from bench.tables import markdown

    good = [case for case in compared if case.measured.error is None]
    lines = [_line(case) for case in compared]
    memory = max((abs(case.memory_error) for case in good), default=0.0)
    seconds = max((abs(case.time_error) for case in good), default=0.0)
    within = (
        sum(abs(case.memory_error) <= MEMORY_BAR for case in good),
        sum(abs(c.time_error) <= TIME_BAR for c in good),
    )
    verdict = (
        f"Memory within {MEMORY_BAR:.0%} in {within[0]} of {len(compared)} settings (worst {memory:.0%}), "
        f"time within {TIME_BAR:.0%} in {within[1]} (worst {seconds:.0%})."
    )
    return f"{markdown(HEADER, lines)}\n\n{verdict}"


def _line(case: Compared) -> list[str]:
    m = case.measured
    if m.error is not None:
        return [m.setting.label, m.error, f"{case.forecast_gib:.1f}", "", "", f"{case.forecast_ms:,.0f}", "", "", ""]
    return [
        m.setting.label,
        f"{m.peak_allocated_gib:.2f}",
        f"{case.forecast_gib:.2f}",
        f"{case.memory_error:+.0%}",
        f"{m.ms_per_step:,.0f}",
        f"{case.forecast_ms:,.0f}",
        f"{case.time_error:+.0%}",
        f"{m.tokens_per_second:,.0f}",
        m.note,
    ]


def main(given: list[str] | None = None) -> None:
    """Compare on this machine and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", type=Path, default=Path(tempfile.gettempdir()) / "lorapack-bench", help="kept between calls"
    )
    parser.add_argument("--json", type=Path, help="write every number to this file")
    parser.add_argument("--quick", action="store_true", help="try the harness: a tiny model, two settings")
    arguments = parser.parse_args(given)
    root = arguments.models.resolve()
    # Before torch is imported.
    prepare_torch(bench_cache(root / "any").compiled)

    from bench.shapes import model_folder
    from bench.speed import where

    model = model_folder("tiny" if arguments.quick else "llama2_7b", root)
    compared = compare(model, settings(arguments.quick), timed=2 if arguments.quick else TIMED)
    if arguments.json is not None:
        records = [asdict(case) | {"memory_error": case.memory_error} for case in compared]
        arguments.json.write_text(json.dumps({"where": where(), "settings": records}, indent=1))
    print(f"{where()}\n\n{report(compared)}")


if __name__ == "__main__":
    main()
