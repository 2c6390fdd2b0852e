"""What becomes of runs whose last job is on Slurm: their states and verdicts by what squeue and sacct say, or do not say."""

from __future__ import annotations

import json
import os
import socket
import time
from functools import partial
from pathlib import Path

import pytest

from json_lines import read_lines
from launcher.cluster.arrays import ArrayRequest, JobNames, job_names
from launcher.cluster.commands import CommandRefused, NoAnswer
from launcher.cluster.requests import Placement
from launcher.cluster.slurm import QUEUE_IS_FULL, Afterwards, _look_for, find_array, max_array_size, submit_afterwards
from launcher.config import ClusterConfig
from launcher.control.cancel import cancel_runs
from launcher.errors import ClusterError
from launcher.plan.decision import decide
from launcher.records import RunStatus, State, Verdict, verb_command
from launcher.report.job import report_note
from launcher.track.jobs import jobs_of, look_up
from launcher.track.tracker import track
from stand_in import put_command
from train.runtime.attempts import attempt_line, open_attempt
from train.runtime.slurm import killed_for_memory
from train.store.layout import RunDir, SweepDir
from train.store.lease import acquire
from train.store.line_file import append_records
from train.store.storage import make_folder, write_json, write_text

NO_CONTACT = "echo 'Unable to contact slurm controller' >&2; exit 1"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that was given to job 12 an hour ago."""
    sweep = SweepDir(make_folder(tmp_path / "runs" / "rank"))
    run = RunDir(make_folder(sweep.path / "r8-0123456789"))
    write_text(run.config, "{}")
    pack = sweep.pack("p1")
    make_folder(pack.path)
    write_json(pack.pack, {"id": "p1", "sweep_dir": str(sweep.path), "cache": "c", "runs": [run.path.name]})
    array = sweep.array("1a")
    make_folder(array.path)
    record = {"name": "rank.1a", "partition": "t4", "packs": [str(pack.pack)], "submitted": time.time() - 3600}
    write_json(array.record, record | {"job": "12"})
    return run


def slurm_says(folder: Path, monkeypatch: pytest.MonkeyPatch, squeue: str, sacct: str = "exit 1") -> None:
    put_command(folder, "squeue", squeue, monkeypatch)
    put_command(folder, "sacct", sacct, monkeypatch)


def status(run: RunDir) -> RunStatus:
    (found,) = track(SweepDir(run.path.parent))
    return found


def verdict(run: RunDir) -> Verdict:
    (job,) = look_up(jobs_of(SweepDir(run.path.parent)))
    return decide(run, retry_failed=False, job=job).verdict


def end_attempt(run: RunDir, cause: str) -> None:
    lease = acquire(run, job="12", attempt=1)
    append_records(run.attempts, [attempt_line(run, lease, (cause, None), 0, 5)])
    run.lease.unlink()


def leave_lease(run: RunDir, heartbeat_age: float) -> None:
    """The lease of a process on another node."""
    acquire(run, job="12", attempt=1)
    write_json(run.lease, json.loads(run.lease.read_bytes()) | {"host": f"not-{socket.gethostname()}"})
    os.utime(run.lease, (time.time() - heartbeat_age,) * 2)


@pytest.mark.parametrize(
    ("line", "state", "told"),
    [
        ("PENDING|Resources|", State.PENDING, Verdict.RUNNING),
        ("PENDING|JobHeldUser|", State.PENDING, Verdict.RUNNING),
        ("CONFIGURING|None|t4-1", State.PENDING, Verdict.RUNNING),
        ("RUNNING|None|t4-1", State.RUNNING, Verdict.RUNNING),
        ("COMPLETING|None|t4-1", State.RUNNING, Verdict.RUNNING),
        ("A_WORD_OF_TOMORROW|None|t4-1", State.UNKNOWN, Verdict.RUNNING),
        ("TIMEOUT|None|t4-1", State.STOPPED, Verdict.NEW),
        ("FAILED|None|t4-1", State.FAILED, Verdict.NEW),
    ],
)
def test_the_queue_tells_of_a_run_that_never_spoke(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, state: State, told: Verdict
) -> None:
    slurm_says(tmp_path, monkeypatch, f"echo 'rank.1a|12|{line}'")
    assert status(run).state is state
    assert verdict(run) is told


def test_a_job_of_the_same_name_is_not_taken_for_the_one_that_was_submitted(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = "echo 'rank.1a|11|RUNNING|None|t4-1'; echo 'rank.1a|13|RUNNING|None|t4-1'"
    slurm_says(tmp_path, monkeypatch, f"{others}; echo 'rank.1a|12|PENDING|Resources|'")
    assert status(run).state is State.PENDING
    slurm_says(tmp_path, monkeypatch, others, "echo 'rank.1a|11|COMPLETED|2026-11-24T10:00:00|t4-1'")
    (job,) = look_up(jobs_of(SweepDir(run.path.parent)))
    assert (job.alive, job.id) == (False, "12")
    assert verdict(run) is Verdict.NEW


def test_a_job_whose_id_was_lost_is_the_oldest_of_its_name(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = SweepDir(run.path.parent).array("1a").record
    write_json(record, json.loads(record.read_bytes()) | {"job": None})
    slurm_says(tmp_path, monkeypatch, "printf 'rank.1a|%s|RUNNING|None|t4-1\\n' 10 9 100")
    (job,) = look_up(jobs_of(SweepDir(run.path.parent)))
    assert (job.alive, job.id) == (True, "9")
    assert find_array("rank.1a", 2) == ["9_0", "9_1"]


def test_namesakes_under_other_roots_and_after_a_deletion_have_other_jobs(tmp_path: Path) -> None:
    def names(root: str, accepted: float) -> JobNames:
        sweep = SweepDir(tmp_path / root / "rank")
        make_folder(sweep.plans)
        write_json(sweep.plans / "1.json", {"accepted": accepted})
        return job_names(sweep)

    first, elsewhere, again = names("a", 1.0), names("b", 1.0), names("a", 2.0)
    assert len({names.array(["p1"]) for names in (first, elsewhere, again)}) == 3
    assert len({names.report for names in (first, elsewhere, again)}) == 3
    write_json(tmp_path / "a" / "rank" / "plans" / "2.json", {"accepted": 3.0})
    # The plan that follows a killed launcher's.
    assert job_names(SweepDir(tmp_path / "a" / "rank")) == again


def test_a_requeued_run_is_pending_with_its_last_cause(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_attempt(run, "preempted")
    slurm_says(tmp_path, monkeypatch, "echo 'rank.1a|12|PENDING|BeginTime|'")
    found = status(run)
    assert (found.state, found.cause, found.reason) == (State.PENDING, "preempted", "BeginTime")


def test_a_run_that_ended_for_good_is_not_its_jobs_any_more(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_attempt(run, "diverged")
    slurm_says(tmp_path, monkeypatch, "echo 'rank.1a|12|RUNNING|None|t4-1'")
    assert status(run).state is State.FAILED
    assert verdict(run) is Verdict.FAILED


def test_silence_is_unknown_and_submits_nothing(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end_attempt(run, "preempted")
    slurm_says(tmp_path, monkeypatch, NO_CONTACT)
    found = status(run)
    assert found.state is State.UNKNOWN
    assert found.reason is not None
    assert "not heard of for" in found.reason
    with pytest.raises(ClusterError, match="nothing was submitted"):
        verdict(run)
    leave_lease(run, heartbeat_age=3)
    # A fresh heartbeat needs no controller.
    assert status(run).state is State.RUNNING


def test_a_lost_process_is_explained_by_sacct(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_lease(run, heartbeat_age=1000)
    slurm_says(tmp_path, monkeypatch, "exit 0", "echo 'rank.1a|12|OUT_OF_MEMORY|2026-11-24T10:00:00|t4-1'")
    assert (status(run).state, status(run).cause) == (State.FAILED, "out_of_memory")
    assert verdict(run) is Verdict.FAILED
    (job,) = look_up(jobs_of(SweepDir(run.path.parent)))
    assert decide(run, retry_failed=True, job=job).most_runs == 1
    # as a real 22.05 with cgroups said it: the step is killed, and the job's script ends with srun's exit code
    rows = "rank.1a|12|FAILED|2026-11-24T10:00:00|t4-1\nbatch|12.batch|FAILED|2026-11-24T10:00:00|t4-1\n"
    killed = f"{rows}sh|12.0|OUT_OF_MEMORY|2026-11-24T10:00:00|t4-1"
    for queue in ("exit 0", "echo 'rank.1a|12|FAILED|NonZeroExitCode|t4-1'"):
        slurm_says(tmp_path, monkeypatch, queue, f"echo '{killed}'")
        assert (status(run).state, status(run).cause) == (State.FAILED, "out_of_memory")
        assert verdict(run) is Verdict.FAILED
    slurm_says(tmp_path, monkeypatch, "exit 0", f"echo '{rows.strip()}'")
    assert (status(run).state, status(run).cause) == (State.FAILED, "crash")
    slurm_says(tmp_path, monkeypatch, "exit 0")
    # Neither in the queue nor in books that nobody can open.
    assert status(run).state is State.UNKNOWN
    # So nobody waits for it.
    assert not status(run).under_way
    # But what is not in the queue may be submitted again.
    assert verdict(run) is Verdict.NEW


def test_the_next_attempt_writes_down_that_slurm_killed_the_one_before_for_its_memory(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_lease(run, heartbeat_age=1000)
    slurm_says(tmp_path, monkeypatch, "exit 0", "printf 'FAILED\nFAILED\nOUT_OF_MEMORY\n'")
    monkeypatch.delenv("SUBMITIT_LOCAL_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    killed_for_memory.cache_clear()
    open_attempt(run)
    (line,) = read_lines(run.attempts)
    assert (line["cause"], line["job"]) == ("out_of_memory", "12")
    assert "cluster.ram_gib" in line["detail"]


def test_what_slurm_has_ended_is_not_in_training(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed on another node it leaves a lease that stays fresh for a while."""
    leave_lease(run, heartbeat_age=1)
    slurm_says(tmp_path, monkeypatch, "echo 'rank.1a|12|RUNNING|None|t4-1'")
    assert verdict(run) is Verdict.RUNNING
    slurm_says(tmp_path, monkeypatch, "echo 'rank.1a|12|FAILED|NonZeroExitCode|t4-1'")
    assert status(run).state is State.FAILED
    assert verdict(run) is Verdict.NEW
    # Nobody can tell: it may be in another cluster's queue.
    for silence in (NO_CONTACT, "exit 0"):
        slurm_says(tmp_path, monkeypatch, silence)
        assert verdict(run) is Verdict.RUNNING


def test_a_cluster_without_arrays_takes_its_jobs_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for said, most in (("MaxArraySize = 501", 501), ("MaxArraySize = 0", 1), ("", 1001)):
        put_command(tmp_path, "scontrol", f"echo '{said}'", monkeypatch)
        assert max_array_size() == most


def test_only_a_limit_that_waiting_mends_is_a_full_queue() -> None:
    last = "Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
    assert any(words in f"AssocMaxSubmitJobLimit {last}" for words in QUEUE_IS_FULL)
    assert not any(words in f"QOSMaxWallDurationPerJobLimit {last}" for words in QUEUE_IS_FULL)


def test_an_order_whose_answer_got_lost_is_looked_for_until_the_controller_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.cluster.slurm.RETRY_WAITS_SECONDS", (0, 0))
    request = ArrayRequest("1a", "rank.1a", "t4", "gpu:t4:1", ("p1",), 10, 1)
    away = f"[ -e {tmp_path}/twice ] && echo 'rank.1a|12|PENDING|Resources|' && exit 0; [ -e {tmp_path}/once ] && : > {tmp_path}/twice"
    slurm_says(tmp_path, monkeypatch, f"{away}; : > {tmp_path}/once; {NO_CONTACT}")
    assert _look_for(request) == ["12"]
    slurm_says(tmp_path, monkeypatch, NO_CONTACT)
    with pytest.raises(NoAnswer):
        _look_for(request)


def test_a_pack_that_ran_out_of_memory_is_halved(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = SweepDir(run.path.parent).pack("p1").pack
    write_json(
        pack, json.loads(pack.read_bytes()) | {"runs": [run.path.name, *(f"r{i}-000000000{i}" for i in range(5))]}
    )
    end_attempt(run, "out_of_memory")
    slurm_says(tmp_path, monkeypatch, "echo 'rank.1a|12|COMPLETED|None|t4-1'")
    (job,) = look_up(jobs_of(SweepDir(run.path.parent)))
    assert decide(run, retry_failed=False, job=job).verdict is Verdict.FAILED
    assert decide(run, retry_failed=True, job=job).most_runs == 3


def test_a_sweep_without_a_report_says_so(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = SweepDir(run.path.parent)

    def note(squeue: str) -> str | None:
        slurm_says(tmp_path, monkeypatch, squeue)
        return report_note(sweep, track(sweep))

    running = "echo 'rank.1a|12|RUNNING|None|t4-1'"
    # Its launcher died, or found the queue full.
    assert "No job waits to write the report" in (note(running) or "")
    make_folder(sweep.report_job)
    write_json(sweep.report_record, {"job": "13", "arrays": ["1a"], "submitted": time.time()})
    assert note(running) is None
    # Nothing to report.
    assert note("echo 'rank.1a|12|FAILED|None|t4-1'") is None
    write_json(run.result, {"steps": 5, "train_loss": 0.5, "tokens_per_second": 1.0})
    report_job = job_names(sweep).report
    assert note(f"echo '{report_job}|13|PENDING|Dependency|'") is None
    assert note(f"echo '{report_job}|13|RUNNING|None|t4-1'") is None
    # And would for ever.
    assert "waits (QOSMinGRES)" in (note(f"echo '{report_job}|13|PENDING|QOSMinGRES|'") or "")
    # Nobody knows.
    assert note(NO_CONTACT) is None
    assert f"`{verb_command('report', sweep)}` writes it" in (note("exit 0") or "")
    write_text(sweep.report, "")
    assert note("exit 0") is None
    os.utime(sweep.report, (time.time() - 60,) * 2)
    assert "The finished runs have no current report" in (note("exit 0") or "")


def test_a_cancel_without_an_answer_says_what_happens_next(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm_says(tmp_path, monkeypatch, NO_CONTACT)
    put_command(tmp_path, "scancel", NO_CONTACT, monkeypatch)
    with pytest.raises(ClusterError, match=r"save and end by themselves.*Run this again"):
        cancel_runs([run], wait_seconds=0)
    assert run.cancel_request.exists()


def test_the_report_asks_for_a_gpu_where_no_job_is_let_in_without(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = SweepDir(run.path.parent)
    put_command(tmp_path, "srun", "exit 1", monkeypatch)
    needs = (
        "grep -q gres=gpu:t4:1 $1 && echo Submitted batch job 14 && exit; echo 'sbatch: error: QOSMinGRES' >&2; exit 1"
    )
    put_command(tmp_path, "sbatch", needs, monkeypatch)

    def submit(gres: str | None) -> str:
        cluster = ClusterConfig(kind="slurm")
        job = Afterwards(partial(str, "done"), ("12",), Placement("t4", None, gres))
        return submit_afterwards(job, sweep, tmp_path, cluster)

    assert submit("gpu:t4:1") == "14"
    with pytest.raises(CommandRefused, match="QOSMinGRES"):
        submit(None)
    put_command(tmp_path, "sbatch", "grep -q gres= $1 && exit 1; echo Submitted batch job 15", monkeypatch)
    # Where it is let in it takes nobody's GPU.
    assert submit("gpu:t4:1") == "15"


def test_one_squeue_and_one_sacct_for_a_thousand_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = SweepDir(make_folder(tmp_path / "runs" / "many"))
    packs = []
    for place in range(1000):
        run = RunDir(make_folder(sweep.path / f"s{place}-{place:010d}"))
        run.config.write_text("{}")
        pack = sweep.pack(f"p{place}")
        make_folder(pack.path)
        pack.pack.write_text(json.dumps({"id": f"p{place}", "sweep_dir": "s", "cache": "c", "runs": [run.path.name]}))
        packs.append(str(pack.pack))
    make_folder(sweep.array("1a").path)
    record = {"name": "many.1a", "partition": "t4", "packs": packs, "submitted": time.time(), "job": "12"}
    write_json(sweep.array("1a").record, record)
    calls = tmp_path / "calls"
    lines = 'for i in $(seq 0 499); do echo "many.1a|12_$i|PENDING|Priority|"; done'
    slurm_says(tmp_path, monkeypatch, f"echo squeue >> {calls}; {lines}", f"echo sacct >> {calls}")
    began = time.process_time()
    states = [found.state for found in track(sweep)]
    assert time.process_time() - began < 2
    assert (states.count(State.PENDING), states.count(State.UNKNOWN)) == (500, 500)
    assert calls.read_text().split() == ["squeue", "sacct"]
