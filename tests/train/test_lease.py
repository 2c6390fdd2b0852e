"""One live process per run folder; a dead one's place is taken over and its attempt accounted for."""

import json
import multiprocessing
import os
import socket
import time
from pathlib import Path

import pytest

from json_lines import read_lines
from train.errors import LeaseHeld
from train.runtime.attempts import open_attempt
from train.store import lease as lease_module
from train.store.layout import RunDir
from train.store.lease import STALE_SECONDS, Heartbeat, acquire, owns, process_started, read_lease, release
from train.store.storage import append_lines


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


def _take_and_die(path: str) -> None:
    open_attempt(RunDir(Path(path)))


def in_another_process(run: RunDir) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_take_and_die, args=(str(run.path),))
    process.start()
    process.join()
    assert process.exitcode == 0


def rewrite(run: RunDir, **changes: object) -> None:
    run.lease.write_text(json.dumps(json.loads(run.lease.read_text()) | changes))


def test_a_live_lease_is_refused_with_its_owner_named(run: RunDir) -> None:
    acquire(run, job="1", attempt=1)
    with pytest.raises(LeaseHeld, match=str(os.getpid())):
        acquire(run, job="2", attempt=1)


def test_a_dead_lease_gives_way_and_leaves_a_line(run: RunDir) -> None:
    append_lines(run.journal, [{"step": 17, "loss": 1.0}])
    in_another_process(run)
    dead = read_lease(run)
    assert dead is not None
    assert not dead.alive()
    lease = open_attempt(run)
    assert lease.attempt == 2
    (line,) = read_lines(run.attempts)
    assert (line["attempt"], line["cause"], line["last_step"]) == (1, "node_fail", 17)
    assert str(dead.pid) in line["detail"]


def test_an_accounted_dead_lease_leaves_no_second_line(run: RunDir) -> None:
    in_another_process(run)
    line = {"attempt": 1, "cause": "preempted", "detail": None, "first_step": 0, "last_step": 0, "seconds": 1.0}
    append_lines(run.attempts, [line | {"started": 1.0, "ended": 2.0, "node": "n1", "device": "cpu", "job": "1"}])
    assert open_attempt(run).attempt == 2
    assert len(read_lines(run.attempts)) == 1


def test_a_pid_that_another_process_got_is_not_the_owner(run: RunDir) -> None:
    acquire(run, job="1", attempt=1)
    rewrite(run, pid_started=1)
    assert acquire(run, job="2", attempt=1).job == "2"


def test_elsewhere_the_heartbeat_decides(run: RunDir) -> None:
    acquire(run, job="1", attempt=1)
    rewrite(run, host="another-node")
    lease = read_lease(run)
    assert lease is not None
    assert lease.alive()
    old = time.time() - STALE_SECONDS - 1
    os.utime(run.lease, (old, old))
    assert acquire(run, job="2", attempt=1).host == socket.gethostname()


def test_release_leaves_a_successor_alone(run: RunDir) -> None:
    mine = acquire(run, job="1", attempt=1)
    rewrite(run, token="successor")
    release(run, mine)
    assert run.lease.exists()


def test_the_heartbeat_beats(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.store.lease.HEARTBEAT_SECONDS", 0.02)
    mine = acquire(run, job="1", attempt=1)
    os.utime(run.lease, (0, 0))
    with Heartbeat([(run, mine)]):
        time.sleep(0.2)
    lease = read_lease(run)
    assert lease is not None
    assert time.time() - lease.heartbeat < 5


def _hold_and_lose(path: str) -> None:
    """Take a lease, lose it to another process, and continue to write as if nothing had happened."""
    lease_module.HEARTBEAT_SECONDS = 0.02
    run = RunDir(Path(path))
    with Heartbeat([(run, open_attempt(run))]):
        rewrite(run, token="successor")
        time.sleep(5)
        (run.path / "written-after-all").touch()


def test_a_process_that_lost_its_lease_writes_no_more(run: RunDir) -> None:
    process = multiprocessing.get_context("fork").Process(target=_hold_and_lose, args=(str(run.path),))
    process.start()
    process.join()
    assert process.exitcode == 1
    assert not (run.path / "written-after-all").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"token": "x"}'])
def test_an_unreadable_lease_gives_way(run: RunDir, content: str) -> None:
    run.lease.write_text(content)
    assert acquire(run, job="2", attempt=1).job == "2"


def _race(path: str, barrier: object, winners: object) -> None:
    run = RunDir(Path(path))
    barrier.wait()  # type: ignore[attr-defined]
    try:
        mine = acquire(run, job="x", attempt=1)
    except LeaseHeld:
        mine = None
    winners.put(mine is not None)  # type: ignore[attr-defined]
    barrier.wait()  # type: ignore[attr-defined]
    if mine is not None:
        assert owns(run, mine)


@pytest.mark.slow
def test_one_of_many_rivals_takes_over_a_dead_lease(run: RunDir) -> None:
    context = multiprocessing.get_context("fork")
    for _ in range(20):
        acquire(run, job="dead", attempt=1)
        rewrite(run, pid_started=1)
        barrier, winners = context.Barrier(6), context.Queue()
        processes = [context.Process(target=_race, args=(str(run.path), barrier, winners)) for _ in range(6)]
        for process in processes:
            process.start()
        assert sorted(winners.get(timeout=60) for _ in processes) == [False] * 5 + [True]
        for process in processes:
            process.join()
            assert process.exitcode == 0
        assert [file.name for file in run.path.iterdir()] == [run.lease.name]
        rewrite(run, pid_started=1)


def test_a_late_rival_does_not_replace_the_new_owner(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    acquire(run, job="dead", attempt=1)
    rewrite(run, pid_started=1)
    dead = read_lease(run)
    winner = acquire(run, job="2", attempt=2)
    looks = iter([dead])
    look = lease_module._read
    monkeypatch.setattr(lease_module, "_read", lambda path: next(looks, None) or look(path))
    with pytest.raises(LeaseHeld):
        acquire(run, job="3", attempt=2)
    assert next(looks, "all used") == "all used"
    assert owns(run, winner)
    assert [file.name for file in run.path.iterdir()] == [run.lease.name]


def test_a_process_that_died_while_taking_over_is_replaced_too(run: RunDir) -> None:
    acquire(run, job="dead", attempt=1)
    rewrite(run, pid_started=1)
    dead = json.loads(run.lease.read_text())
    claim = run.lease.with_name(f".{run.lease.name}.{dead['token']}.claim")
    claim.write_text(json.dumps(dead | {"token": "claimant"}))
    assert owns(run, acquire(run, job="2", attempt=2))
    assert [file.name for file in run.path.iterdir()] == [run.lease.name]


def test_a_takeover_in_progress_is_left_alone(run: RunDir) -> None:
    acquire(run, job="dead", attempt=1)
    rewrite(run, pid_started=1)
    dead = json.loads(run.lease.read_text())
    claim = run.lease.with_name(f".{run.lease.name}.{dead['token']}.claim")
    claim.write_text(json.dumps(dead | {"token": "claimant", "pid_started": process_started(os.getpid())}))
    with pytest.raises(LeaseHeld):
        acquire(run, job="2", attempt=2)


def test_a_process_is_known_by_its_start_time() -> None:
    assert process_started(os.getpid()) is not None
    assert process_started(2**22 + 1) is None


def test_a_released_lease_may_get_another_owner_while_the_heartbeat_runs(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancelled run leaves its pack, and may be resumed elsewhere before the pack ends."""
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("the pack was killed"))
    ours = acquire(run, job="1", attempt=1)
    with Heartbeat([(run, ours)]):
        release(run, ours)
        acquire(run, job="2", attempt=2)
        time.sleep(0.1)
