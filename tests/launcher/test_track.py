import json
import os
import socket
import time
from pathlib import Path

import pytest

from launcher.records import RunStatus, State
from launcher.track.find import find_run, find_runs, find_sweep
from launcher.track.tracker import status_json, track
from train.errors import BadInput
from train.runtime.attempts import attempt_line
from train.store.layout import RunDir, SweepDir
from train.store.lease import acquire
from train.store.line_file import append_records
from train.store.storage import append_lines, make_folder, write_json, write_text

HEADER = {
    "step": 0,
    "max_steps": 60,
    "train_rows": 4000,
    "eval_rows": 100,
    "trainable_parameters": 1,
    "total_parameters": 2,
}
# Above the kernel's highest.
DEAD_PID = 2**22 + 1


def make_run(sweep: SweepDir, name: str = "r8-0123456789", steps: int = 0) -> RunDir:
    run = RunDir(make_folder(sweep.path / name))
    write_text(run.config, "{}")
    if steps:
        append_lines(run.journal, [HEADER, *({"step": step, "loss": 1 / step} for step in range(1, steps + 1))])
    return run


def kill_holder(run: RunDir, host: str = "", heartbeat_age: float = 0.0) -> None:
    """Leave the lease of a process that is gone, or of another host."""
    acquire(run, job="77", attempt=1)
    values = json.loads(run.lease.read_bytes())
    write_json(run.lease, values | {"pid": DEAD_PID, "host": host or socket.gethostname()})
    os.utime(run.lease, (time.time() - heartbeat_age,) * 2)


def end_attempt(run: RunDir, cause: str, last_step: int = 5) -> None:
    lease = acquire(run, job="77", attempt=1)
    append_records(run.attempts, [attempt_line(run, lease, (cause, None), 0, last_step)])
    run.lease.unlink()


def submit_job(sweep: SweepDir, runs: list[RunDir], pid: int | None, host: str | None = None) -> None:
    pack = sweep.pack("p1")
    make_folder(pack.path)
    write_json(
        pack.pack, {"id": "p1", "sweep_dir": str(sweep.path), "cache": "c", "runs": [run.path.name for run in runs]}
    )
    if pid is not None:
        facts = {"job": str(pid), "executor": "local", "pid": pid, "pid_started": 1, "submitted": time.time()}
        write_json(pack.job, facts | {"host": host or socket.gethostname()})


def only(sweep: SweepDir) -> RunStatus:
    (status,) = track(sweep)
    return status


@pytest.fixture
def sweep(tmp_path: Path) -> SweepDir:
    return SweepDir(make_folder(tmp_path / "runs" / "rank-tiny-tasks"))


def test_a_live_run_shows_step_speed_and_time_left(sweep: SweepDir) -> None:
    run = make_run(sweep, steps=20)
    acquire(run, job="77", attempt=2)
    paces = [{"step": step, "attempt": 2, "time": 100.0 + step, "tokens_per_second": 10.0 * step} for step in (10, 20)]
    other_attempt = {"step": 9, "attempt": 1, "time": 0.0, "tokens_per_second": 1.0}
    append_lines(run.pace, [other_attempt, *paces])
    status = only(sweep)
    assert (status.state, status.step, status.max_steps, status.loss) == (State.RUNNING, 20, 60, 1 / 20)
    assert (status.tokens_per_second, status.seconds_left) == (200.0, 40.0)
    assert (status.job, status.node) == ("77", socket.gethostname())


def test_a_result_outweighs_everything_else(sweep: SweepDir) -> None:
    run = make_run(sweep, steps=20)
    end_attempt(run, "crash")
    write_json(run.result, {"steps": 60, "train_loss": 0.5, "tokens_per_second": 9.0})
    assert (only(sweep).state, only(sweep).step) == (State.DONE, 60)


@pytest.mark.parametrize(
    ("cause", "state"),
    [
        ("preempted", State.STOPPED),
        ("timeout", State.STOPPED),
        ("cancelled", State.CANCELLED),
        ("diverged", State.FAILED),
        ("crash", State.FAILED),
        ("a word of tomorrow", State.UNKNOWN),
    ],
)
def test_the_last_end_decides_where_nobody_trains(sweep: SweepDir, cause: str, state: State) -> None:
    end_attempt(make_run(sweep, steps=5), cause)
    assert (only(sweep).state, only(sweep).cause, only(sweep).attempts) == (state, cause, 1)


def test_a_killed_process_is_seen_here_and_only_suspected_elsewhere(sweep: SweepDir) -> None:
    killed, silent, fresh = (make_run(sweep, f"{name}-0123456789", steps=5) for name in ("a", "b", "c"))
    kill_holder(killed)
    kill_holder(silent, host="elsewhere", heartbeat_age=1000)
    kill_holder(fresh, host="elsewhere")
    states = {status.name: (status.state, status.attempts) for status in track(sweep)}
    assert states == {"a": (State.STOPPED, 1), "b": (State.UNKNOWN, 1), "c": (State.RUNNING, 1)}


def test_a_job_that_has_not_begun_is_pending_until_it_dies(sweep: SweepDir) -> None:
    run = make_run(sweep)
    assert only(sweep).state is State.STOPPED
    submit_job(sweep, [run], pid=None)
    # Queued by a launcher that is gone.
    assert only(sweep).state is State.STOPPED
    launcher = acquire(sweep, job="launcher", attempt=0)
    assert launcher.alive()
    assert only(sweep).state is State.PENDING
    submit_job(sweep, [run], pid=DEAD_PID)
    assert only(sweep).state is State.STOPPED
    submit_job(sweep, [run], pid=DEAD_PID, host="elsewhere")
    assert only(sweep).state is State.PENDING


def test_a_torn_line_and_a_huge_journal_do_not_matter(sweep: SweepDir) -> None:
    run = make_run(sweep, steps=5000)
    with run.journal.open("a") as journal:
        journal.write('{"step":5001,"lo')
    assert (only(sweep).step, only(sweep).max_steps) == (5000, 60)


def test_runs_are_listed_as_people_count(sweep: SweepDir) -> None:
    for name in ("r16", "r4", "r8"):
        make_run(sweep, f"{name}-0123456789")
    assert [status.name for status in track(sweep)] == ["r4", "r8", "r16"]


def test_a_thousand_runs_take_less_than_two_seconds(sweep: SweepDir) -> None:
    runs = [RunDir(make_folder(sweep.path / f"r{i}-{i:010d}")) for i in range(1000)]
    journal = (
        "\n".join(json.dumps(line) for line in [HEADER, *({"step": i, "loss": 1.0} for i in range(1, 200))]) + "\n"
    )
    attempt = {"attempt": 1, "cause": "preempted", "detail": None, "first_step": 0, "last_step": 199, "ended": 1.0}
    attempt |= {"seconds": 1.0, "started": 0.0, "node": "n", "device": "cpu", "job": "1"}
    for run in runs:
        run.config.write_text("{}")
        run.journal.write_text(journal)
        run.attempts.write_text(json.dumps(attempt) + "\n")
    submit_job(sweep, runs, pid=DEAD_PID)
    started = time.process_time()
    statuses = track(sweep)
    assert time.process_time() - started < 2
    assert len(statuses) == 1000
    assert json.loads(json.dumps(status_json(sweep, statuses)))["runs"][0]["state"] == "stopped"


def test_names_parts_and_nothing_find_folders(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    older, newer = (SweepDir(make_folder(root / name)) for name in ("rank-tiny", "alpha-tiny"))
    r8, r16 = make_run(older, "r8-0000000001"), make_run(older, "r16-0000000002")
    a8 = make_run(newer, "a8-0000000003")
    for age, sweep in ((100, older), (0, newer)):
        make_folder(sweep.plans)
        plan = sweep.plans / "1.json"
        plan.write_text("{}")
        os.utime(plan, (time.time() - age,) * 2)
    assert find_sweep(root, "") == newer
    assert find_sweep(root, "rank") == older
    assert find_run(root, "r8") == r8
    assert find_run(root, "0002") == r16
    assert find_run(root, "rank-tiny/r16") == r16
    assert find_run(root, "") == a8
    assert find_runs(root, "rank") == older.runs()
    assert find_runs(root, "r16") == [r16]
    assert find_runs(root, "") == [a8]
    for find, part, said in (
        (find_sweep, "tiny", "alpha-tiny, rank-tiny"),
        (find_run, "8-", "rank-tiny/r8-0000000001"),
        (find_run, "zz", "choose from"),
        # Part of two sweeps and a run: never a guess.
        (find_runs, "a", "alpha-tiny/a8"),
    ):
        with pytest.raises(BadInput, match=said):
            find(root, part)
    with pytest.raises(BadInput, match="no finished run"):
        find_run(root, "", finished=True)
