"""What tracking costs the trainer: seconds per step with W&B off, offline, online, and online with a server that never answers.

    PYTHONPATH=.:tests python -m bench.tracking

The jobs are real (eight runs of the tiny model, on the CPU). The server is the tests' stand-in on 127.0.0.1. Every round measures
all modes. The best round of each mode counts, since other work on the machine only adds time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

import psutil

from json_lines import read_lines
from train.store.layout import SweepDir
from train.store.lease import read_lease
from wandb_server import KEY, Mode, WandbServer

ROUNDS = 3
STEPS = 100
# A label in the table -> `tracking.mode`, and what the server does.
CASES: dict[str, tuple[str, Mode]] = {
    "off": ("off", "good"),
    "offline": ("offline", "good"),
    "online": ("online", "good"),
    "online, silent server": ("online", "silent"),
}


@dataclass(frozen=True)
class Cost:
    """One job: the trainer's seconds per step, its CPU seconds (start included), and the seconds of the whole command."""

    step_seconds: float
    cpu_seconds: float
    wall_seconds: float


def measure(case: str, server: WandbServer, folder: Path, name: str) -> Cost:
    """Train a pack of eight runs in one of `CASES`."""
    mode, server.mode = CASES[case]
    settings = [
        "model=tiny",
        "quant=none",
        "lora.r=1,2,3,4,5,6,7,8",
        f"train.max_steps={STEPS}",
        # No checkpoints between the timed steps.
        "train.save_steps=1000",
        f"tracking.mode={mode}",
    ]
    places = [f"root={folder}/runs", f"cache={folder}/cache", f"sweep.name={name}"]
    environment = os.environ | {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    environment.pop("WANDB_MODE", None)
    began = time.monotonic()
    command = [sys.executable, "-m", "launcher", *settings, *places]
    sweep = SweepDir(folder / "runs" / name)
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as program:
        cpu = cpu_seconds(program, sweep)
    wall = time.monotonic() - began
    paces = read_lines(sweep.runs()[0].pace)
    first, last = paces[0], paces[-1]
    return Cost((last["seconds"] - first["seconds"]) / (last["step"] - first["step"]), cpu, wall)


def cpu_seconds(program: subprocess.Popen[bytes], sweep: SweepDir) -> float:
    """CPU seconds of the trainer, which holds the runs' leases, until it ends. Other work hardly changes them, unlike a clock's."""
    seconds = 0.0
    while program.poll() is None:
        lease = next(filter(None, map(read_lease, sweep.runs())), None)
        if lease is not None:
            with suppress(psutil.NoSuchProcess):
                times = psutil.Process(lease.pid).cpu_times()
                seconds = max(seconds, times.user + times.system)
        time.sleep(0.1)
    return seconds


def least(costs: list[Cost]) -> Cost:
    """The smallest of each figure."""
    return Cost(*(min(values) for values in zip(*map(astuple, costs), strict=True)))


def main() -> None:
    """Measure all cases in turn and print the table."""
    costs = defaultdict[str, list[Cost]](list)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, WandbServer() as server:
        for turn in range(ROUNDS):
            for number, case in enumerate(CASES):
                costs[case].append(measure(case, server, Path(folder), f"case{number}-round{turn}"))
                print(json.dumps({"case": case, "round": turn, **vars(costs[case][-1])}), file=sys.stderr, flush=True)
    print(f"Best of {ROUNDS} rounds; load before and after: {load:.1f}, {os.getloadavg()[0]:.1f}\n")
    print(
        "| tracking | ms per step | against off | CPU seconds of the trainer | against off | seconds of the command |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    off = least(costs["off"])
    for case in CASES:
        best = least(costs[case])
        step = best.step_seconds / off.step_seconds - 1
        cpu = best.cpu_seconds / off.cpu_seconds - 1
        print(
            f"| {case} | {1000 * best.step_seconds:.2f} | {step:+.1%} | {best.cpu_seconds:.1f} | {cpu:+.1%} | {best.wall_seconds:.1f} |"
        )


if __name__ == "__main__":
    main()
