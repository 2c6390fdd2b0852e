"""``launcher sync`` as a user types it, with the real client behind it: idempotent, bounded, beside a job, and discreet."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launcher.subprocesses.sync import PARALLEL
from mirrored import WrittenPack, assert_arrived, launcher, use_server, wait_until
from terminal import Terminal
from wandb_server import KEY, WandbServer

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as running:
        use_server(running, tmp_path, monkeypatch)
        yield running


def trained(folder: Path, count: int, *, max_steps: int = 20) -> WrittenPack:
    """A pack that was trained to its end without any tracking."""
    pack = WrittenPack(folder, count, max_steps=max_steps, mode="off")
    with pack.job(cause="done"):
        pack.train(max_steps)
    return pack


def test_sixty_four_runs_and_then_nothing_new(server: WandbServer, tmp_path: Path) -> None:
    pack = trained(tmp_path, 64)
    first = launcher(tmp_path, "sync", f"root={tmp_path}")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "64 of 64 runs sent (1,344 rows)" in first.stdout
    assert_arrived(server, pack)
    assert server.most_at_once <= PARALLEL
    assert all(stored.ends == [0] and not stored.overwritten for stored in server.runs.values())
    requests = sum(server.requests.values())
    again = launcher(tmp_path, "sync", f"root={tmp_path}")
    assert "0 of 64 runs sent (0 rows), 64 were up to date" in again.stdout
    assert_arrived(server, pack)
    assert sum(server.requests.values()) == requests + 1, "one look whether the server is there"


def test_what_w_and_b_knows_of_a_run(server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever another program that uses W&B, of which this one is a child, has left in the environment."""
    pack = trained(tmp_path, 2)
    for name, value in {
        "RUN_ID": "abc",
        "SWEEP_ID": "def",
        "SERVICE": "3-1-tcp-localhost-1",
        "RESUME": "never",
    }.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    done = launcher(tmp_path, "sync", f"root={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_arrived(server, pack)
    stored = server.runs[pack.runs[1].id]
    assert stored.fields["groupName"] == "ranks"
    assert stored.fields["jobType"] == "train"
    assert stored.fields["tags"] == ["r=2"]
    assert stored.fields["displayName"] == "r2"
    assert stored.config["lora"]["r"] == 2
    assert stored.config["forecast"]["vram_gib"] == 3.5
    expected = {"eval_loss", "best_eval_loss", "tokens_per_second", "peak_vram_gib", "gpu_hours", "cost_usd"}
    assert expected | {"trainable_parameters", "adapter_mb", "attempts"} <= stored.summary.keys()
    assert stored.summary["cost_usd"] == pytest.approx(0.25 * 1.0 / 0.5)
    assert {"perf/tokens_per_second", "perf/peak_vram_gib", "train/loss_scale"} <= stored.history[5].keys()


def test_beside_a_job_that_mirrors(server: WandbServer, tmp_path: Path) -> None:
    pack = WrittenPack(tmp_path, 2, max_steps=20)
    with pack.job(cause="done"):
        pack.train(10)
        wait_until(lambda: len(server.runs) == 2)
        done = launcher(tmp_path, "sync", "--json", f"root={tmp_path}")
        assert done.returncode == 0, done.stderr
        assert [run["outcome"] for run in json.loads(done.stdout)["runs"]] == ["busy", "busy"]
        pack.train(20)
    assert_arrived(server, pack)


def test_one_that_was_killed_is_completed_by_the_next(server: WandbServer, tmp_path: Path) -> None:
    """It says which runs it did not reach, and shows its progress."""
    pack = trained(tmp_path, 16)
    command = (sys.executable, "-m", "launcher", "sync", f"root={tmp_path}")
    with Terminal(*command, cwd=tmp_path) as first:
        wait_until(lambda: any(stored.ends for stored in server.runs.values()))
        for process in psutil.Process(first.process.pid).children(recursive=True):
            process.kill()
        first.see("the upload ended before it reached")
        assert first.end() == 1
    assert len(server.runs) < 16
    with Terminal(*command, cwd=tmp_path) as second:
        second.see("to W&B", "16/16")
        assert second.end() == 0
    assert_arrived(server, pack)
    assert all(stored.ends[-1:] == [0] for stored in server.runs.values())


def test_no_key_is_the_users_mistake(server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path, 1)
    monkeypatch.delenv("WANDB_API_KEY")
    done = launcher(tmp_path, "sync", f"root={tmp_path}")
    assert done.returncode == 2
    assert "no API key found" in done.stderr
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    server.stop()
    done = launcher(tmp_path, "sync", f"root={tmp_path}")
    assert done.returncode == 1
    assert "cannot be reached" in done.stderr


def test_going_online_without_a_key_is_refused_before_anything_is_written(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    done = launcher(tmp_path, "model=tiny", "tracking.mode=online", f"root={tmp_path}/runs")
    assert done.returncode == 2
    assert "needs an API key" in done.stderr
    assert not (tmp_path / "runs").exists()
