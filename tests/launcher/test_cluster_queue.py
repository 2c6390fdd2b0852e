"""squeue's and sacct's lines as views of jobs."""

from pathlib import Path

import pytest

from launcher.cluster.queue import parse_sacct, parse_squeue, read_accounting, read_queue
from launcher.records import State
from stand_in import put_command


def test_squeue_tells_state_reason_and_node() -> None:
    views = parse_squeue(
        "rank.1a|12_0|RUNNING|None|t4-1\n"
        "rank.1a|12_1|PENDING|Resources|\n"
        "rank.1a|12_2|PENDING|BeginTime|\n"
        "rank.2b|13|A_WORD_OF_TOMORROW|None|\n"
        "rank|odd.3c|14_0|PREEMPTED|None|t4-2\n"
    )
    assert (views["rank.1a", "12_0"].state.state, views["rank.1a", "12_0"].node) == (State.RUNNING, "t4-1")
    assert (views["rank.1a", "12_1"].id, views["rank.1a", "12_1"].reason) == ("12_1", "Resources")
    assert views["rank.1a", "12_2"].state.state is State.PENDING
    assert views["rank.2b", "13"].state.state is State.UNKNOWN
    assert views["rank|odd.3c", "14_0"].state.cause == "preempted"


def test_the_last_attempt_counts_in_sacct() -> None:
    views = parse_sacct(
        "rank.1a|12_0|PREEMPTED|2026-11-24T10:00:00|t4-1\n"
        "rank.1a|12_0|COMPLETED|2026-11-24T10:05:00|t4-2\n"
        "rank.1a|12_1|CANCELLED by 1000|Unknown|None assigned\n"
        "rank.1a|12_[2-3,6%4]|CANCELLED by 1000|Unknown|None assigned\n"
    )
    assert (views["rank.1a", "12_0"].raw_state, views["rank.1a", "12_0"].node) == ("COMPLETED", "t4-2")
    assert views["rank.1a", "12_1"].state.cause == "cancelled"
    assert {view.task_index for view in views.values()} == {0, 1, 2, 3, 6}
    assert {view.number for view in views.values()} == {12}


def test_a_step_tells_that_its_job_was_killed_for_its_memory() -> None:
    killed = "rank.1a|12_0|FAILED|2026-11-24T10:00:00|t4-1\nsh|12_0.0|OUT_OF_MEMORY|2026-11-24T10:00:00|t4-1\n"
    views = parse_sacct(
        f"{killed}rank.1a|12_1|FAILED|2026-11-24T10:00:00|t4-1\nsh|12_1.0|FAILED|2026-11-24T10:00:00|t4-1\n"
        "rank.1a|12_2|NODE_FAIL|2026-11-24T10:00:00|t4-1\nsh|12_2.0|OUT_OF_MEMORY|2026-11-24T10:00:00|t4-1\n"
    )
    assert {place: view.state.cause for (_, place), view in views.items()} == {
        "12_0": "out_of_memory",
        "12_1": "crash",
        # What was killed was not the job.
        "12_2": "node_fail",
    }
    (view,) = parse_sacct(f"{killed}rank.1a|12_0|FAILED|2026-11-24T10:05:00|t4-2\n").values()
    # The attempt before was.
    assert view.state.cause == "crash"


def test_silence_is_told_from_an_empty_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_command(tmp_path, "squeue", "exit 0", monkeypatch)
    assert read_queue(["rank.1a"]).answered
    put_command(tmp_path, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1", monkeypatch)
    assert not read_queue(["rank.1a"]).answered
    put_command(tmp_path, "sacct", "exit 1", monkeypatch)
    assert read_accounting(["rank.1a"], 0.0) == {}
