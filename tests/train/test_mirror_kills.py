"""The mirror is killed at random, as Slurm and the kernel do: nothing is missing, nothing arrives twice."""

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirrored import WrittenPack, assert_arrived, launcher, use_server, wait_until
from train.store.storage import make_folder
from wandb_server import WandbServer

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as running:
        use_server(running, tmp_path, monkeypatch)
        yield running


def test_signals_to_every_process_of_the_step(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb-core dies of SIGTERM; the mirror does not, and starts another that tells the server what has happened. Nor does
    it leave anything in the node's temporary folder."""
    scratch = make_folder(tmp_path / "scratch")
    monkeypatch.setenv("TMPDIR", str(scratch))
    pack = WrittenPack(tmp_path, 2, max_steps=40)
    with pack.job(cause="preempted") as said:
        pack.train(9)
        for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
            rows = [pack.step + 1] * 2
            wait_until(lambda rows=rows: [len(stored.rows) for stored in server.runs.values()] == rows)
            pack.kill_mirror(number)
            pack.train(pack.step + 5)
    assert said == []
    assert list(scratch.iterdir()) == []
    assert_arrived(server, pack)
    assert all(stored.preempting for stored in server.runs.values())
    assert [stored.ends for stored in server.runs.values()] == [[], []]


def test_at_random_moments(server: WandbServer, tmp_path: Path) -> None:
    chance = random.Random(0)
    pack = WrittenPack(tmp_path, 3, max_steps=60)
    for end, number in zip((18, 37, 48, 60), [signal.SIGKILL, signal.SIGTERM] * 2, strict=True):
        with pack.job(cause="done" if end == 60 else "preempted"):
            if pack.attempt > 1:
                pack.roll_back(pack.step - 6)
            for step in range(pack.step + 3, end, 3):
                pack.train(step)
                time.sleep(0.1)
            pack.train(end)
            time.sleep(chance.uniform(0, 3))
            pack.kill_mirror(number)
    done = launcher(tmp_path, "sync", f"root={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_arrived(server, pack)
    assert [stored.ends for stored in server.runs.values()] == [[0]] * 3


def test_the_worker_alone_is_replaced(server: WandbServer, tmp_path: Path) -> None:
    pack = WrittenPack(tmp_path, 2, max_steps=20)
    with pack.job(cause="done") as said:
        pack.train(5)
        wait_until(lambda: [len(stored.rows) for stored in server.runs.values()] == [6, 6])
        pack.end_worker()
        pack.train(20)
    assert said == []
    assert_arrived(server, pack)


def test_no_process_is_left_when_the_trainer_dies(server: WandbServer, tmp_path: Path) -> None:
    """The end of the trainer, however it dies, is the end of the mirror's standard input."""
    pack = WrittenPack(tmp_path, 1, max_steps=20)
    with pack.job(cause="preempted"):
        pack.train(5)
        wait_until(lambda: bool(server.runs))
        processes = pack.mirror_processes()
        assert len(processes) >= 3, "supervisor, worker, wandb-core"
    wait_until(lambda: not any(process.is_running() and process.status() != "zombie" for process in processes))
