"""What tracking costs training: nothing, whatever W&B's server does. The table of wall-clock times is `bench.tracking`'s."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
import pytest

import paced_trainer
from mirrored import WrittenPack, assert_arrived, launcher, use_server, wait_until
from train.store.storage import read_json, write_json
from wandb_server import WandbServer

pytestmark = pytest.mark.slow

OUTAGES = ["down", "500", "401", "silent"]
WAYS = ["off", "offline", "good", *OUTAGES]
# The control: a trainer that waits and computes for longer.
DAWDLING = "dawdling"
# Of the step without tracking.
MOST = 0.05
BLOCK_SECONDS, ROUNDS = 0.7, 20
# Rounds in which a way is no slower: what other work on the machine does to a round, it does not do to all but two.
ENOUGH = 3


@dataclass(frozen=True)
class Block:
    """What a step took in one block, in seconds of computing and of waiting.

    `computing` is that of the tenth of the block's chunks that other work on the machine disturbed least: it only ever adds.
    """

    computing: float
    waiting: float

    def dawdles(self, off: Block) -> bool:
        """Whether it computes, or waits, for longer than the block without tracking beside it, by more than `MOST` of the step."""
        allowed = MOST * (off.computing + off.waiting)
        return self.computing - off.computing >= allowed or self.waiting - off.waiting >= allowed


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

    def train(self, way: str, delay: float = 0.0) -> Block:
        """Train for a block."""
        mirror = {"off": None, DAWDLING: None, "offline": "offline"}.get(way, "online")
        with self.server_that_is(way), self.awake(mirror):
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            print(BLOCK_SECONDS, delay, file=self.process.stdin, flush=True)
            answer = json.loads(next(line for line in self.process.stdout if line.startswith("{")))
        chunks = sorted(answer["computed"])
        return Block(chunks[len(chunks) // 10], answer["waited"])

    def settle(self, pack: WrittenPack) -> None:
        """Train until both mirrors are at work, then let them stand still."""
        self.train("good")
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


def measured(trainer: Trainer) -> list[dict[str, Block]]:
    """A block of each way in every round, in another order each time, until all is judged.

    Every round begins and ends without tracking, and the slower of the two counts: on a busy machine one alone may happen to be fast.
    """
    rounds: list[dict[str, Block]] = []
    chance = random.Random(0)
    while len(rounds) < ROUNDS and not judged(rounds):
        off = trainer.train("off")
        delay = 0.5 * off.computing
        others = chance.sample([*WAYS[1:], DAWDLING], len(WAYS))
        found = {way: trainer.train(way, delay if way == DAWDLING else 0.0) for way in others}
        again = trainer.train("off")
        slower = Block(max(off.computing, again.computing), max(off.waiting, again.waiting))
        rounds.append({"off": slower} | found)
    return rounds


def judged(rounds: list[dict[str, Block]]) -> bool:
    """Whether further rounds could change nothing: all but the control have been found alike often enough."""
    return bool(rounds) and all(way == DAWDLING or alike(way, rounds) >= ENOUGH for way in rounds[0])


def alike(way: str, rounds: list[dict[str, Block]]) -> int:
    """In how many rounds a way's steps took no longer than those without tracking."""
    return sum(not blocks[way].dawdles(blocks["off"]) for blocks in rounds)


def table(rounds: list[dict[str, Block]]) -> str:
    """Medians over the rounds, in milliseconds per step."""
    lines = [f"median ms per step, computing + waiting, {len(rounds)} rounds:"]
    for way in ["off", *WAYS[1:], DAWDLING]:
        computing, waiting = (
            1000 * median(getattr(blocks[way], what) for blocks in rounds) for what in ("computing", "waiting")
        )
        lines.append(f"{way} {computing:.2f} + {waiting:.3f} (alike in {alike(way, rounds)})")
    return " ".join(lines)


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
            rounds = measured(trainer)
            trainer.end()
        finally:
            trainer.abandon()
        with capsys.disabled():
            print(f"\n{table(rounds)}")
        assert {way for way in rounds[0] if alike(way, rounds) < ENOUGH} == {DAWDLING}, table(rounds)
        assert_both_clocks_run(rounds)
        done = launcher(in_memory, "sync", f"root={in_memory}")
        assert done.returncode == 0, done.stdout + done.stderr
        assert_arrived(server, pack)


def assert_both_clocks_run(rounds: list[dict[str, Block]]) -> None:
    """The control both computes and waits for longer: neither figure stands still."""
    for what in ("computing", "waiting"):
        longer = [getattr(blocks[DAWDLING], what) - getattr(blocks["off"], what) for blocks in rounds]
        assert median(longer) > MOST * median(blocks["off"].computing for blocks in rounds), what
