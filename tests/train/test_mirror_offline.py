"""Without a key or a server, folders are written that W&B's own tools read and send; plain ``wandb sync`` and ours agree."""

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirrored import WrittenPack, assert_arrived, launcher, use_server, wait_until, wandb_command, without_pace
from terminal import Terminal
from train.mirror.worker import wandb_sync_command
from train.store.layout import SweepDir
from train.store.storage import Record, read_json
from wandb_server import KEY, WandbServer

pytestmark = pytest.mark.slow

# Of W&B's files.
HEADER_BYTES = 7


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A server for which there is no key while jobs run."""
    with WandbServer() as running:
        use_server(running, tmp_path, monkeypatch, key=None)
        yield running


def three_attempts(pack: WrittenPack) -> list[Path]:
    """A job that is preempted twice and rolled back each time; the offline folders of its first run."""
    with pack.job(cause="preempted"):
        pack.train(17)
    with pack.job(cause="preempted"):
        pack.roll_back(10)
        pack.train(24)
    with pack.job(cause="done"):
        pack.roll_back(20)
        pack.train(40)
    return sorted(pack.sweep.wandb.glob(f"offline-run-*-{pack.runs[0].id}"))


def rows_in(folders: list[Path]) -> list[Record]:
    """The rows of one run's offline folders, in order, as ``wandb leet`` reads them."""
    texts = [wandb_command(folder, "leet", "inspect", "--json", str(folder)) for folder in folders]
    records = [json.loads(line) for text in texts for line in text.splitlines()]
    return without_pace([record["history"]["item"] for record in records if record["type"] == "history"])


def test_three_attempts_then_wandb_sync(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pack = WrittenPack(tmp_path, 2, max_steps=40, mode="auto")
    folders = three_attempts(pack)
    assert "W&B: offline (no API key found" in capfd.readouterr().out
    assert len(folders) == 3
    assert rows_in(folders) == pack.expected(pack.runs[0]), "leet reads every row once"
    with Terminal(sys.executable, "-m", "wandb", "leet", str(folders[-1]), cwd=tmp_path) as leet:
        leet.see("Name: r1", "State: Finished", "train/loss", "eval/loss", "perf/tokens_per_second")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    wandb_command(tmp_path, "sync", *map(str, sorted(pack.sweep.wandb.glob("offline-run-*"))))
    assert_arrived(server, pack)
    assert [stored.overwritten for stored in server.runs.values()] == [0, 0]
    assert server.runs[pack.runs[0].id].ends[-1] == 0
    assert server.runs[pack.runs[0].id].preempting > 0
    done = launcher(tmp_path, "sync", "ranks", f"root={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert_arrived(server, pack)


def test_three_attempts_then_our_sync_then_theirs(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = WrittenPack(tmp_path, 2, max_steps=40, mode="auto")
    three_attempts(pack)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    done = launcher(tmp_path, "sync", "ranks", f"root={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "2 of 2 runs sent (82 rows)" in done.stdout
    assert_arrived(server, pack)
    wandb_command(tmp_path, "sync", *map(str, pack.sweep.wandb.glob("offline-run-*")))
    assert_arrived(server, pack)


def test_a_mirror_that_is_killed_leaves_no_torn_folder(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = WrittenPack(tmp_path, 1, max_steps=40, mode="auto")
    with pack.job(cause="preempted"):
        pack.train(15)
        torn = pack.wait_for_folder()
        began = time.monotonic()
        wait_until(lambda: (torn / f"run-{pack.runs[0].id}.wandb").stat().st_size > HEADER_BYTES)
        assert time.monotonic() - began < 12, "the client by itself flushes after 15 s"
        pack.kill_mirror()
        early = shutil.copytree(torn, tmp_path / torn.name)
        pack.train(18)
    with pack.job(cause="done"):
        pack.train(40)
    assert not torn.exists()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    wandb_command(tmp_path, "sync", str(early))
    assert server.runs, "one without its first flush would keep wandb sync from sending any"
    server.runs.clear()
    wandb_command(tmp_path, "sync", *map(str, pack.sweep.wandb.glob("offline-run-*")))
    assert_arrived(server, pack)


def test_our_sync_while_a_job_is_offline(server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute nodes without internet, watched from the login node."""
    pack = WrittenPack(tmp_path, 2, max_steps=40, mode="auto")
    with pack.job(cause="done"):
        pack.train(15)
        pack.wait_for_folder()
        with monkeypatch.context() as login_node:
            login_node.setenv("WANDB_API_KEY", KEY)
            done = launcher(tmp_path, "sync", f"root={tmp_path}")
        assert done.returncode == 0, done.stderr
        assert_arrived(server, pack)
        assert [stored.ends for stored in server.runs.values()] == [[], []], "they are still running"
        assert all(stored.preempting for stored in server.runs.values()), (
            "nor has one crashed that nobody hears of for long"
        )
        pack.train(40)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    wandb_command(tmp_path, "sync", *map(str, pack.sweep.wandb.glob("offline-run-*")))
    assert [len(stored.rows) for stored in server.runs.values()] == [16, 16], "their rows were sent by ours"
    launcher(tmp_path, "sync", f"root={tmp_path}")
    assert_arrived(server, pack)
    assert [stored.ends for stored in server.runs.values()] == [[0], [0]]


def test_folders_are_not_needed(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pack = WrittenPack(tmp_path, 1, max_steps=20, mode="auto")
    with pack.job(cause="done"):
        pack.train(20)
    assert read_json(pack.runs[0].mirror_offline)["written"] == 20
    assert f", or {wandb_sync_command(pack.sweep)}\n" in capfd.readouterr().out
    shutil.rmtree(pack.sweep.wandb)
    with monkeypatch.context() as login_node:
        login_node.setenv("WANDB_API_KEY", KEY)
        began = time.monotonic()
        assert launcher(tmp_path, "sync", f"root={tmp_path}").returncode == 0
    assert time.monotonic() - began < 60
    assert_arrived(server, pack)
    with pack.job(cause="preempted"):
        pass
    assert "wandb sync" not in capfd.readouterr().out, "it passes over the folders of a run that a server has in part"


def test_the_printed_line_works_in_a_folder_with_a_space(tmp_path: Path) -> None:
    """A shell takes the line as it is printed: `ls` in the place of W&B's program gets the folders, and nothing else."""
    sweep = SweepDir(tmp_path / "my runs; it's" / "ranks")
    for name in ("offline-run-1", "offline-run-2", "other"):
        (sweep.wandb / name).mkdir(parents=True)
    command = wandb_sync_command(sweep)
    assert shlex.split(command) == ["wandb", "sync", f"{sweep.wandb}/offline-*"]
    listed = subprocess.run(
        ["sh", "-c", command.replace("wandb sync", "ls -d")], capture_output=True, text=True, check=True
    )
    assert listed.stdout.splitlines() == [str(sweep.wandb / f"offline-run-{n}") for n in (1, 2)]
