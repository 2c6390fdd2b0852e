"""A real trainer with its real mirrors that trains in blocks and says what they took: ``python -m paced_trainer PACK_JSON...``.

For every line on standard input, seconds and a delay, it trains for so many seconds, dawdling at every step for that delay, and
answers with a line of JSON; the end of standard input ends the job as a preemption does. All packs hold the same runs: the first
is trained, each is mirrored as it says.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import torch

import packs
from train.config import read_run_config
from train.lora.targets import adapted_modules
from train.mirror.child import mirrored
from train.runtime.attempts import open_attempt
from train.runtime.signals import StopFlag, Stopped
from train.store.layout import RunDir
from train.store.record_file import read_existing
from train.store.records import PackRecord
from train.trainer.context import JobContext
from train.trainer.pack import build_loop
from train.trainer.run_writer import RunWriter
from train.trainer.session import RunSession

# The first steps of a block find cold caches.
WARM_UP_STEPS = 10
# With an evaluation, and so a write to the journals, in each.
CHUNK_STEPS = 10


def seconds_waited() -> float:
    """A clock of the time in which this thread waited for anything but a core: others' work on the machine does not move it."""
    waited_for_core_ns = int(Path("/proc/thread-self/schedstat").read_text().split()[1])
    return time.monotonic() - time.thread_time() - waited_for_core_ns / 1e9


class Blocks(StopFlag):
    """Looked at before every step: measures chunks of steps, and at the end of a block answers and waits for the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.sessions: list[RunSession] = []
        self._end = self._delay = self._waited = 0.0
        self._seen, self._over = -1, False
        self._first: int | None = None
        self._cpu: list[float] = []

    def check(self) -> None:
        # It is looked at in evaluations, too.
        if self.sessions[0].step != self._seen:
            self._seen = self.sessions[0].step
            self._between_steps()
        super().check()

    def _between_steps(self) -> None:
        # A step later, since a step whose evaluation is due is not complete.
        if self._over:
            self.signal_name = "SIGTERM"
            return
        if self._first is None:
            self._wait_for_next()
        steps = self._seen - (self._first or 0)
        if steps == 0:
            self._waited = seconds_waited()
        if steps >= 0 and steps % CHUNK_STEPS == 0:
            self._cpu.append(time.thread_time())
            # A whole chunk at least: a busy machine may let a block's time pass in its warm-up.
            if time.monotonic() >= self._end and len(self._cpu) > 1:
                self._answer(steps)
                self._wait_for_next()
        self._dawdle()

    def _answer(self, steps: int) -> None:
        chunks = [(after - before) / CHUNK_STEPS for before, after in pairwise(self._cpu)]
        waited = (seconds_waited() - self._waited) / max(1, steps)
        print(json.dumps({"waited": waited, "computed": chunks}), flush=True)

    def _wait_for_next(self) -> None:
        line = sys.stdin.readline().split()
        if not line:
            self._over = True
            return
        seconds, self._delay = map(float, line)
        self._first, self._cpu = self._seen + WARM_UP_STEPS, []
        self._end = time.monotonic() + seconds

    def _dawdle(self) -> None:
        """Half of the delay goes by waiting, half of it by computing."""
        time.sleep(self._delay / 2)
        end = time.thread_time() + self._delay / 2
        while time.thread_time() < end:
            pass


def main(pack_files: list[Path]) -> None:
    """Train the runs of the first pack until standard input ends."""
    torch.set_num_threads(1)
    base, data, flag = packs.tiny_base(torch.float32), packs.random_data(), Blocks()
    contents = [read_existing(file, PackRecord) for file in pack_files]
    for name in contents[0].runs:
        run = RunDir(Path(contents[0].sweep_dir) / name)
        config = read_run_config(run.config)
        seldom = config.model_copy(update={"train": config.train.model_copy(update={"save_steps": 1_000_000})})
        targets = adapted_modules(config.lora, list(base.shapes))
        flag.sessions.append(
            RunSession(seldom, data, targets, RunWriter(run, open_attempt(run), packs.stock_peft(base)))
        )
    with ExitStack() as stack:
        for file, pack in zip(pack_files, contents, strict=True):
            stack.enter_context(mirrored(file, pack))
        loop = build_loop(base, flag.sessions, 10_000, None, JobContext(stop=flag))
        try:
            loop.run()
        except Stopped:
            for session in loop.sessions:
                session.end("preempted", "its test has seen enough")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
