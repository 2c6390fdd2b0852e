"""lorapack, measured through its own parts: `fit_to_device`, `open_base`, `seat` and the loop's optimizer step with its recorder.

    python -m bench.ours --model FOLDER --settings SETTINGS.json --out RESULTS.jsonl [--profile t4]

One process; the base is loaded anew only where settings ask for another residency or for checkpointing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.measuring import (
    ALPHA,
    GIB,
    RANK,
    Measured,
    Setting,
    StepClock,
    append,
    attempt,
    ceiling_flops,
    forget_memory,
    note_result,
    result,
)
from bench.rows import LONGEST, data
from train.attempts import open_attempt
from train.base import PackedBase
from train.config import RunConfig, parse_run_config
from train.data.token_table import TokenisedData
from train.loop import PackLoop
from train.pack import fit_to_device, open_base, seat
from train.rundir import RunDir, make_folder
from train.session import RunSession
from train.signals import StopFlag
from train.sizing import Fit
from train.targets import adapted_modules

NAME = "lorapack"
T4_GIB, T4_CAPABILITY = 15.0, (7, 5)  # what a T4 leaves to a process, and its compute capability


@contextmanager
def profile(name: str) -> Iterator[None]:
    """This GPU as it is, or a stand-in for a T4: its memory by a cap, its abilities by what torch answers when asked."""
    if name != "t4" or not torch.cuda.is_available():
        yield
        return
    device_bytes = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(T4_GIB * GIB / device_bytes)
    capability = mock.patch("torch.cuda.get_device_capability", return_value=T4_CAPABILITY)
    memory = mock.patch("train.memory.device_bytes", return_value=int(T4_GIB * GIB))
    with capability, memory:
        yield


def run_config(folder: Path, setting: Setting, seed: int) -> RunConfig:
    """One run of a setting, by the configuration's own keys and defaults."""
    return parse_run_config(
        {
            "model": {"name": "bench", "source": str(folder), "fingerprint": "bench"},
            "data": {"name": "bench", "source": "bench", "fingerprint": "bench"},
            "lora": {"r": RANK, "lora_alpha": ALPHA, "target_modules": list(setting.targets)},
            "quant": {"load_in_4bit": True},
            "train": {
                "learning_rate": 2e-4,
                "lr_scheduler_type": "constant",
                "batch_size": setting.batch,
                "max_steps": 100_000,
                "seed": seed,
                "residency": setting.residency,
                "gradient_checkpointing": setting.checkpointing,
            },
        }
    )


@dataclass
class Bench:
    """The base that is loaded now, and why it is so."""

    folder: Path
    rows: TokenisedData
    fit: Fit | None = None
    base: PackedBase | None = None

    def base_for(self, setting: Setting) -> tuple[PackedBase, Fit]:
        """The base as `setting` wants it, loaded anew only if it has to be."""
        config = run_config(self.folder, setting, seed=0)
        fit = fit_to_device(config, self.folder, LONGEST)
        if self.base is None or fit != self.fit:
            self.base = None
            forget_memory()
            self.base, self.fit = open_base(config, self.folder, fit, LONGEST, say), fit
        return self.base, fit

    def measure(self, setting: Setting, clock: StepClock) -> Measured:
        """Seat the pack, warm up, time."""
        base, fit = self.base_for(setting)
        with tempfile.TemporaryDirectory() as folder, seated(self, setting, Path(folder)) as loop:
            tokens = time_steps(loop, clock)
        base.attach(None)
        return result(NAME, setting, clock, tokens, note=str(fit))


@contextmanager
def seated(bench: Bench, setting: Setting, folder: Path) -> Iterator[PackLoop]:
    """A pack of new runs over the bench's base, in run folders below `folder`."""
    base, fit = bench.base_for(setting)
    sessions = []
    for i in range(setting.runs):
        run, config = RunDir(make_folder(folder / f"run{i}-x")), run_config(bench.folder, setting, seed=i)
        sessions.append(
            RunSession(run, config, bench.rows, adapted_modules(config.lora, list(base.shapes)), open_attempt(run))
        )
    loop = seat(base, sessions, StopFlag(), fit.micro_batch_tokens, lambda text: None)
    try:
        yield loop
    finally:
        for session in sessions:
            session.end("cancelled", "measured")


def time_steps(loop: PackLoop, clock: StepClock) -> list[int]:
    """Take the clock's steps; the real tokens of each timed one."""
    tokens = [0]
    while not clock.done:
        loop._train_step()
        clock.tick()
        tokens.append(sum(session.tokens for session in loop.sessions))
    totals = tokens[clock.warm :]
    return [after - before for before, after in pairwise(totals)]


def say(text: str) -> None:
    print(text, flush=True)


def arguments_of(given: list[str] | None) -> Any:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--settings", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--warm", type=int, default=6)
    parser.add_argument("--timed", type=int, default=20)
    parser.add_argument("--profile", choices=["here", "t4"], default="here")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    """Measure every setting, and the matrix ceiling before them."""
    arguments = arguments_of(given)
    settings = [Setting.of(values) for values in json.loads(arguments.settings.read_text())]
    append(arguments.out, {"ceiling_flops": ceiling_flops()})
    vocabulary = json.loads((arguments.model / "config.json").read_text())["vocab_size"]
    bench = Bench(arguments.model, data(vocabulary))
    with profile(arguments.profile):
        for place, setting in enumerate(settings):
            clock = StepClock(arguments.warm, arguments.timed)
            note_result(arguments.out, place, attempt(NAME, setting, partial(bench.measure, setting, clock)))


if __name__ == "__main__":
    main()
