"""Compares the forecast of memory and time with measurements: one process, every combination that decides memory.

    PYTHONPATH=.:tests python -m bench.forecast --json forecast.json

The base is loaded once per residency and checkpointing. Memory peaks are reset for each setting.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
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


def compare(model: Path, cases: Sequence[Setting], timed: int) -> list[Measured]:
    """Measure every setting; the results hold the launcher's forecasts."""
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
        compared.append(measured)
    return compared


def report(compared: Sequence[Measured]) -> str:
    """The table, and the worst errors."""
    from bench.tables import markdown

    good = [case for case in compared if case.error is None]
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


def _line(m: Measured) -> list[str]:
    if m.error is not None:
        return [m.setting.label, m.error, f"{m.forecast_gib:.1f}", "", "", f"{m.forecast_ms:,.0f}", "", "", ""]
    return [
        m.setting.label,
        f"{m.peak_allocated_gib:.2f}",
        f"{m.forecast_gib:.2f}",
        f"{m.memory_error:+.0%}",
        f"{m.ms_per_step:,.0f}",
        f"{m.forecast_ms:,.0f}",
        f"{m.time_error:+.0%}",
        f"{m.tokens_per_second:,.0f}",
        m.note,
    ]


def main(given: list[str] | None = None) -> None:
    """Compare on this machine and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", type=Path, default=Path(tempfile.gettempdir()) / "lorapack-bench", help="kept between calls"
    )
    parser.add_argument("--shape", default="llama2_7b", help="as in bench.speed")
    parser.add_argument("--json", type=Path, help="write every number to this file")
    parser.add_argument("--quick", action="store_true", help="try the harness: a tiny model, two settings")
    arguments = parser.parse_args(given)
    root = arguments.models.resolve()
    # Before torch is imported.
    prepare_torch(bench_cache(root / "any").compiled)

    from bench.shapes import model_folder
    from bench.speed import where

    model = model_folder("tiny" if arguments.quick else arguments.shape, root, weights=False)
    compared = compare(model, settings(arguments.quick), timed=2 if arguments.quick else TIMED)
    if arguments.json is not None:
        records = [asdict(case) | {"memory_error": case.memory_error} for case in compared]
        arguments.json.write_text(json.dumps({"where": where(), "settings": records}, indent=1))
    print(f"{where()}\n\n{report(compared)}")


if __name__ == "__main__":
    main()
