"""Whatever W&B's server does, the job ends in time and ``launcher sync`` completes what is missing later."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirrored import WrittenPack, assert_arrived, launcher, use_server, wait_until
from train.mirror.child import PATIENCE_SECONDS
from wandb_server import Mode, WandbServer

OUTAGES = ["down", "500", "401", "silent"]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as running:
        use_server(running, tmp_path, monkeypatch)
        yield running


def fail(server: WandbServer, outage: Mode | str) -> None:
    if outage == "down":
        server.stop()
    else:
        server.mode = outage  # type: ignore[assignment]


def mend(server: WandbServer) -> None:
    if server.mode == "good":
        server.start()
    server.mode = "good"


@pytest.mark.parametrize("outage", OUTAGES)
def test_from_the_start(server: WandbServer, tmp_path: Path, outage: str, capfd: pytest.CaptureFixture[str]) -> None:
    pack = WrittenPack(tmp_path, 2, max_steps=20, mode="auto")
    fail(server, outage)
    began = time.monotonic()
    with pack.job(cause="done"):
        pack.train(20)
    assert time.monotonic() - began < PATIENCE_SECONDS + 10
    assert "W&B: offline (http://127.0.0.1" in capfd.readouterr().out
    assert not server.runs
    mend(server)
    assert launcher(tmp_path, "sync", f"root={tmp_path}").returncode == 0
    assert_arrived(server, pack)


@pytest.mark.parametrize("outage", OUTAGES)
def test_in_the_middle(server: WandbServer, tmp_path: Path, outage: str) -> None:
    pack = WrittenPack(tmp_path, 2, max_steps=40, mode="auto")
    with pack.job(cause="done"):
        pack.train(15)
        wait_until(lambda: [len(stored.rows) for stored in server.runs.values()] == [16, 16])
        fail(server, outage)
        pack.train(40)
        ended = time.monotonic()
    assert time.monotonic() - ended < PATIENCE_SECONDS + 10
    assert [stored.ends for stored in server.runs.values()] == [[], []]
    mend(server)
    done = launcher(tmp_path, "sync", f"root={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_arrived(server, pack)
    assert [stored.ends for stored in server.runs.values()] == [[0], [0]]


def test_an_online_run_waits_for_its_server(server: WandbServer, tmp_path: Path) -> None:
    pack = WrittenPack(tmp_path, 1, max_steps=20, mode="online")
    server.stop()
    with pack.job(cause="done"):
        pack.train(10)
        time.sleep(2)
        server.start()
        pack.train(20)
        wait_until(lambda: bool(server.runs))
    assert_arrived(server, pack)
    assert not pack.sweep.wandb.exists()
