"""The whole product on this machine: a sweep that is killed without warning in the middle, resumed, and reported.

Then the same sweep under another name, whose job takes the quantized base from the cache. Prints how long each job took from the start
of its process to its first step.

    PYTHONPATH=.:tests python -m bench.product --work /tmp/product

Ends with exit code 0 only if every run has every step exactly once.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from json_lines import read_lines
from train.store.layout import RunDir, SweepDir

SWEEP, WARM_SWEEP = "product", "product-warm"
# Steps.
KILL_AFTER = 10
TRAIN_SECONDS = 400.0


def overrides(name: str, model: Path, work: Path, steps: int) -> list[str]:
    """The command line of a short `sweep=rank` over `model`."""
    return [
        "sweep=rank",
        f"sweep.name={name}",
        "cluster=local",
        f"model.source={model}",
        "tracking=off",
        f"root={work / 'runs'}",
        f"cache={work / 'cache'}",
        f"train.max_steps={steps}",
        f"train.save_steps={steps // 6}",
        "train.sample_prompts=1",
        "train.sample_tokens=8",
        "data.train_rows=400",
        "data.eval_rows=8",
    ]


def steps_of(run: RunDir) -> list[int]:
    """The steps in a run's journal, in its order."""
    return [line["step"] for line in read_lines(run.journal) if "loss" in line]


def starts_of(sweep: SweepDir) -> list[str]:
    """For each attempt of a sweep, a sentence on how long it took from the start of its process to its first step."""
    paces = [read_lines(RunDir(journal.parent).pace) for journal in sorted(sweep.path.glob("*/journal.jsonl"))]
    starts = {line["attempt"]: line for pace in paces for line in pace if "seconds_to_first_step" in line}
    return [
        f"{line['seconds_to_first_step']:.1f} s to the first step: "
        + ", ".join(f"{what.replace('_', ' ')} {seconds:.1f}" for what, seconds in line["start_seconds"].items())
        for line in starts.values()
    ]


def kill_the_job(sweep: SweepDir, launcher: subprocess.Popen[bytes]) -> int:
    """Send SIGKILL to the training process once it is in the middle; the step that it had reached.

    Raises:
        SystemExit: the launcher ended first, or no run got that far in `TRAIN_SECONDS`.
    """
    deadline = time.monotonic() + TRAIN_SECONDS
    while time.monotonic() < deadline:
        runs = [RunDir(lease.parent) for lease in sweep.path.glob("*/lease.json")]
        reached = max((len(steps_of(run)) for run in runs), default=0)
        if reached >= KILL_AFTER:
            for pid in {json.loads(run.lease.read_text())["pid"] for run in runs}:
                os.kill(pid, signal.SIGKILL)
            launcher.wait(60)
            return reached
        if launcher.poll() is not None:
            raise SystemExit(f"the launcher ended with {launcher.returncode} before step {KILL_AFTER}")
        time.sleep(0.02)
    launcher.kill()
    raise SystemExit(f"no run reached step {KILL_AFTER} in {TRAIN_SECONDS:.0f} s")


def launch(*arguments: str) -> int:
    """Run a verb to its end, with its output on this terminal; the exit code."""
    # So that its time does not include the disk's work on what earlier programs wrote.
    os.sync()
    began = time.monotonic()
    code = subprocess.call([sys.executable, "-m", "launcher", *arguments])
    print(f"launcher {arguments[0]}: exit code {code} after {time.monotonic() - began:.0f} s", flush=True)
    return code


def main(given: list[str] | None = None) -> None:
    """Launch, kill, resume, report, check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lorapack-product")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "lorapack-bench")
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    arguments = parser.parse_args(given)
    work = arguments.work.resolve()
    # Enough steps to kill it in the middle.
    shape, steps = ("tiny", 200) if arguments.quick else ("llama2_7b", 24)
    # A process of its own, since it needs torch.
    make = [sys.executable, "-m", "bench.shapes", shape, str(arguments.models.resolve())]
    model = Path(subprocess.check_output(make, text=True).splitlines()[-1])
    sweep, root = SweepDir(work / "runs" / SWEEP), f"root={work / 'runs'}"
    reached = kill_the_job(
        sweep, subprocess.Popen([sys.executable, "-m", "launcher", *overrides(SWEEP, model, work, steps)])
    )
    print(f"killed at step {reached} of {steps}", flush=True)
    codes = [launch("resume", SWEEP, root), launch("report", SWEEP, root)]
    runs = [RunDir(journal.parent) for journal in sorted(sweep.path.glob("*/journal.jsonl"))]
    for run in runs:
        causes = [line["cause"] for line in read_lines(run.attempts)]
        print(f"{run.path.name}: {len(steps_of(run))} steps, attempts {', '.join(causes)}, done {run.result.exists()}")
    whole = all(steps_of(run) == list(range(1, steps + 1)) and run.result.exists() for run in runs)
    if not (whole and runs and codes == [0, 0]):
        raise SystemExit("INCOMPLETE: see above")
    print(f"{len(runs)} runs, every step of each in its journal exactly once", flush=True)
    # Otherwise the warm start's first files wait for the base that the cold start wrote to the cache.
    os.sync()
    if launch(*overrides(WARM_SWEEP, model, work, steps=6)) != 0:
        raise SystemExit("the same sweep with a warm cache failed: see above")
    for kind, start in zip(
        ("cold", "resumed", "warm"), starts_of(sweep) + starts_of(SweepDir(work / "runs" / WARM_SWEEP)), strict=True
    ):
        print(f"{kind}: {start}")


if __name__ == "__main__":
    main()
