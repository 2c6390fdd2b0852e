"""Why Slurm asks a job to stop, from what ``scontrol show job`` said in each case on a real 22.05."""

import time
from pathlib import Path

import pytest

from captured_log import captured_log
from train.runtime.slurm import (
    END_WAIT_SECONDS,
    SlurmJob,
    cause_of_signal,
    parse_job,
    requeue,
    this_job,
    warning_seconds,
)

JOB = SlurmJob("12_3", restarts=0)
STARTED = time.mktime(time.strptime("2026-11-24T23:43:56", "%Y-%m-%dT%H:%M:%S"))
LINE = (
    "JobId=15 ArrayJobId=12 ArrayTaskId=3 JobName=rank.1a JobState={state} Reason=None Requeue=1 Restarts={restarts} "
    "TimeLimit={limit} StartTime=2026-11-24T23:43:56 EndTime=2026-11-24T23:44:56 PreemptTime={preempt} Command=(null)"
)


def cause(
    signal: str, after: float, state: str = "RUNNING", restarts: int = 0, preempt: str = "None", limit: str = "02:00:00"
) -> str:
    facts = parse_job(LINE.format(state=state, restarts=restarts, preempt=preempt, limit=limit))
    return cause_of_signal(signal, JOB, facts, STARTED + after)[0]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # In the grace time.
        ({"signal": "SIGTERM", "after": 60, "preempt": "2026-11-24T23:44:00"}, "preempted"),
        # Without one.
        ({"signal": "SIGTERM", "after": 60, "state": "COMPLETING", "restarts": 1}, "preempted"),
        # With preempt_send_user_signal.
        ({"signal": "SIGUSR2", "after": 60, "preempt": "2026-11-24T23:44:00"}, "preempted"),
        ({"signal": "SIGUSR2", "after": 7200 - 130}, "timeout"),
        ({"signal": "SIGUSR2", "after": 7200 - 100, "state": "SIGNALING"}, "timeout"),
        # The limit itself.
        ({"signal": "SIGTERM", "after": 7200, "state": "COMPLETING"}, "timeout"),
        # By scancel.
        ({"signal": "SIGTERM", "after": 60, "state": "COMPLETING"}, "cancelled"),
        (
            {"signal": "SIGTERM", "after": 7200 - 100, "state": "COMPLETING"},
            "cancelled",
        ),
        # A kill by hand.
        ({"signal": "SIGTERM", "after": 60, "limit": "UNLIMITED"}, "preempted"),
    ],
)
def test_the_cause_is_what_happens_to_the_job(answer: dict[str, object], expected: str) -> None:
    assert cause(**answer) == expected  # type: ignore[arg-type]


def test_without_an_answer_the_signal_decides() -> None:
    assert parse_job("slurm_load_jobs error: Invalid job id specified") is None
    assert cause_of_signal("SIGUSR2", JOB, None, 0.0)[0] == "timeout"
    assert cause_of_signal("SIGTERM", JOB, None, 0.0)[0] == "preempted"


def test_if_slurm_does_not_answer_the_job_waits_to_be_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the grace time of a preemption Slurm requeues what it kills, and not what ended by itself."""
    waits: list[float] = []
    monkeypatch.setattr("train.runtime.slurm.time.sleep", waits.append)
    monkeypatch.setenv("PATH", str(tmp_path))
    with captured_log() as logged:
        requeue(JOB)
    assert sum(waits) >= END_WAIT_SECONDS
    assert "waits to be ended" in logged[0]
    assert "launcher resume" in logged[-1]
    for answer, expected in [
        ("echo Requested operation is disabled >&2; exit 1", "does not requeue"),
        ("exit 0", "put back"),
        (
            f"[ -e {tmp_path}/back ] && exit 0; : > {tmp_path}/back; echo Unexpected message received for job 12_3 >&2; exit 1",
            "put back",
        ),
    ]:
        waits.clear()
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / "scontrol").chmod(0o755)
        with captured_log() as logged:
            requeue(JOB)
        assert expected in logged[-1]
        # Asked again soon; the rest is subprocess looking for its child.
        assert sum(wait for wait in waits if wait >= 1) <= 3


def test_limits_are_read_in_days_too() -> None:
    facts = parse_job(LINE.format(state="RUNNING", restarts=0, preempt="None", limit="1-00:00:30"))
    assert facts is not None
    assert facts.limit_at == STARTED + 86_430


def test_short_limits_are_announced_late_enough_to_train() -> None:
    assert [warning_seconds(minutes) for minutes in (1, 3, 60, 1440)] == [20, 60, 120, 120]


def test_a_job_knows_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "SLURM_JOB_ID",
        "SLURM_ARRAY_JOB_ID",
        "SLURM_ARRAY_TASK_ID",
        "SLURM_RESTART_COUNT",
        "SUBMITIT_LOCAL_JOB_ID",
    ):
        monkeypatch.delenv(name, raising=False)
    assert this_job() is None
    monkeypatch.setenv("SLURM_JOB_ID", "15")
    assert this_job() == SlurmJob("15", 0)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert this_job() == SlurmJob("12_3", 2)
    # As with cluster=local inside an allocation.
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "77")
    assert this_job() is None
