"""What tracking costs the trainer: seconds per step with W&B off, offline, online and online with a server that never answers.

``PYTHONPATH=.:tests python -m bench.tracking``. The jobs are real (eight runs of the tiny model, on the CPU), the server is the tests'
stand-in on 127.0.0.1. Rounds alternate between the ways, and the least disturbed round of each counts, since other work on the
machine only ever adds time.
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

from train.store.layout import SweepDir
from train.store.lease import read_lease
from train.store.storage import read_lines
from wandb_server import KEY, Mode, WandbServer

ROUNDS, STEPS = 3, 100
WAYS: dict[str, tuple[str, Mode]] = {
    "off": ("off", "good"),
    "offline": ("offline", "good"),
    "online": ("online", "good"),
    "online, silent server": ("online", "silent"),
}


@dataclass(frozen=True)
class Cost:
    """One job: the trainer's seconds per step, its processor's seconds (start included), and the seconds of the whole command."""

    step_seconds: float
    cpu_seconds: float
    wall_seconds: float


def measure(way: str, server: WandbServer, folder: Path, name: str) -> Cost:
    """Train a pack of eight runs in one of `WAYS`."""
    mode, server.mode = WAYS[way]
    settings = [
        "model=tiny",
        "quant=none",
        "lora.r=1,2,3,4,5,6,7,8",
        f"train.max_steps={STEPS}",
        "train.save_steps=1000",  # no disk in the steps
        f"tracking.mode={mode}",
    ]
    places = [f"root={folder}/runs", f"cache={folder}/cache", f"sweep.name={name}"]
    environment = os.environ | {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    environment.pop("WANDB_MODE", None)
    began = time.monotonic()
    command = [sys.executable, "-m", "launcher", *settings, *places]
    sweep = SweepDir(folder / "runs" / name)
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as program:
        cpu = processor_seconds(program, sweep)
    wall = time.monotonic() - began
    paces = read_lines(sweep.runs()[0].pace)
    first, last = paces[0], paces[-1]
    return Cost((last["seconds"] - first["seconds"]) / (last["step"] - first["step"]), cpu, wall)


def processor_seconds(program: subprocess.Popen[bytes], sweep: SweepDir) -> float:
    """What the trainer, which holds the runs, has used up when it ends; unlike a clock it hardly heeds other work."""
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
    """The least of each figure."""
    return Cost(*(min(values) for values in zip(*map(astuple, costs), strict=True)))


def main() -> None:
    """Measure all ways in turn and print the table."""
    found, load = defaultdict[str, list[Cost]](list), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, WandbServer() as server:
        for turn in range(ROUNDS):
            for way in WAYS:
                found[way].append(measure(way, server, Path(folder), f"{way.split()[0].strip(',')}-{len(way)}-{turn}"))
                print(json.dumps({"way": way, "round": turn, **found[way][-1].__dict__}), file=sys.stderr, flush=True)
    print(f"Best of {ROUNDS} rounds; load before and after: {load:.1f}, {os.getloadavg()[0]:.1f}\n")
    print(
        "| tracking | ms per step | against off | processor seconds of the trainer | against off | seconds of the command |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    off = least(found["off"])
    for way, costs in found.items():
        best = least(costs)
        step, cpu = best.step_seconds / off.step_seconds - 1, best.cpu_seconds / off.cpu_seconds - 1
        print(
            f"| {way} | {1000 * best.step_seconds:.2f} | {step:+.1%} | {best.cpu_seconds:.1f} | {cpu:+.1%} | {best.wall_seconds:.1f} |"
        )


if __name__ == "__main__":
    main()
