"""What tracking costs training: nothing, whatever W&B's server does. The table of wall-clock times is `bench.tracking`'s."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import psutil
import pytest

import paced_trainer
from mirrored import WrittenPack, assert_arrived, launcher, use_server, wait_until
from train.storage import read_json, write_json
from wandb_server import WandbServer

OUTAGES = ["down", "500", "401", "silent"]
WAYS = ["off", "offline", "good", *OUTAGES]
DAWDLING = "dawdling"  # the control: a trainer that waits and computes for longer
MOST = 0.05  # of the step without tracking
BLOCK_SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 0.7, 2, 20


@dataclass
class Steps:
    """What the steps of one way took, in seconds per step: of computing by chunk, of waiting by block."""

    computed: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)

    @property
    def computing(self) -> float:
        """The tenth of the chunks that other work on the machine disturbed least: it only ever adds."""
        return sorted(self.computed)[len(self.computed) // 10]

    @property
    def waiting(self) -> float:
        """The mean of the blocks, in which others' work does not show, without the worst quarter: machines pause as a whole, too."""
        return fmean(sorted(self.waited)[: -max(1, len(self.waited) // 4)])


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A folder that no disk slows down."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


class Trainer:
    """A training job in a process of its own, with one mirror online and one offline; both stand still unless `way` is theirs."""

    def __init__(self, pack: WrittenPack, server: WandbServer) -> None:
        self.server = server
        offline = pack.sweep.pack("p2").pack
        offline.parent.mkdir()
        write_json(offline, read_json(pack.dir.pack) | {"id": "p2", "tracking": {"mode": "offline"}})
        self.files = {"online": str(pack.dir.pack), "offline": str(offline)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "paced_trainer", *self.files.values()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(paced_trainer.__file__).parent,
            text=True,
        )

    def train(self, way: str, into: Steps, delay: float = 0.0) -> None:
        """Train for a block."""
        mirror = {"off": None, DAWDLING: None, "offline": "offline"}.get(way, "online")
        with self.server_that_is(way), self.awake(mirror):
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            print(BLOCK_SECONDS, delay, file=self.process.stdin, flush=True)
            answer = json.loads(next(line for line in self.process.stdout if line.startswith("{")))
        into.computed += answer["computed"]
        into.waited.append(answer["waited"])

    def settle(self, pack: WrittenPack) -> None:
        """Train until both mirrors are at work, then let them stand still."""
        self.train("good", Steps())
        self.signal("online", signal.SIGCONT)
        pack.wait_for_folder()
        wait_until(lambda: len(self.server.runs) == len(pack.runs))
        for mirror in self.files:
            self.signal(mirror, signal.SIGSTOP)

    @contextmanager
    def server_that_is(self, way: str) -> Iterator[None]:
        if way == "down":
            self.server.stop()
        elif way in OUTAGES:
            self.server.mode = way  # type: ignore[assignment]
        yield
        self.server.mode = "good"
        if way == "down":
            self.server.start()

    @contextmanager
    def awake(self, mirror: str | None) -> Iterator[None]:
        self.signal(mirror, signal.SIGCONT)
        yield
        self.signal(mirror, signal.SIGSTOP)

    def signal(self, mirror: str | None, number: signal.Signals) -> None:
        """Send a signal to every process of a mirror."""
        supervisors = [child for child in psutil.Process(self.process.pid).children() if mirror is not None]
        for supervisor in [child for child in supervisors if self.files[str(mirror)] in child.cmdline()]:
            for process in [supervisor, *supervisor.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def end(self) -> None:
        """End the job as a preemption does; its mirrors finish."""
        for mirror in self.files:
            self.signal(mirror, signal.SIGCONT)
        self.process.communicate(timeout=120)
        assert self.process.returncode == 0

    def abandon(self) -> None:
        """End what a failed test leaves; the mirrors end with their trainer once they are awake."""
        if self.process.poll() is None:
            for mirror in self.files:
                self.signal(mirror, signal.SIGCONT)
            self.process.kill()


def measured(trainer: Trainer) -> dict[str, Steps]:
    """The steps of each way, in short turns. Rounds go on until all but the control are alike, as long as a loaded machine needs."""
    found = defaultdict[str, Steps](Steps)
    chance = random.Random(0)
    for turn in range(MOST_ROUNDS):
        for way in ["off", *chance.sample([*WAYS[1:], DAWDLING], len(WAYS))]:
            trainer.train(way, found[way], 0.5 * found["off"].computing if way == DAWDLING else 0.0)
        if turn + 1 >= LEAST_ROUNDS and slower(found).keys() == {DAWDLING}:
            break
    return found


def slower(found: dict[str, Steps]) -> dict[str, Steps]:
    """The ways of which a step computes, or waits, for longer than without tracking, by more than `MOST` of the step."""
    off = found["off"]
    allowed = MOST * (off.computing + off.waiting)
    return {
        way: steps
        for way, steps in found.items()
        if steps.computing - off.computing >= allowed or steps.waiting - off.waiting >= allowed
    }


def test_whatever_the_server_does_a_step_takes_as_long_as_without_tracking(
    in_memory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real trainer and real clients; other work on the machine is kept out of the figures."""
    tests = Path(paced_trainer.__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{tests.parent}:{tests}")
    pack = WrittenPack(in_memory, 4, max_steps=1_000_000)
    with WandbServer() as server:
        use_server(server, in_memory, monkeypatch)
        trainer = Trainer(pack, server)
        try:
            trainer.settle(pack)
            found = measured(trainer)
            trainer.end()
        finally:
            trainer.abandon()
        with capsys.disabled():
            table = [f"{way} {1000 * s.computing:.2f} + {1000 * s.waiting:.3f}" for way, s in found.items()]
            print(f"\nms per step, computing + waiting, {len(found['off'].waited)} rounds: {', '.join(table)}")
        assert slower(found).keys() == {DAWDLING}
        dawdling, allowed = found[DAWDLING], (1 + MOST) * found["off"].computing
        assert min(dawdling.computing, dawdling.waiting + found["off"].computing) > allowed, (
            "neither clock stands still"
        )
        done = launcher(in_memory, "sync", f"root={in_memory}")
        assert done.returncode == 0, done.stdout + done.stderr
        assert_arrived(server, pack)
