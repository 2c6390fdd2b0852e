"""From a command to the queue: every job once, whatever happens to answers and launchers."""

from __future__ import annotations

import contextlib
import json
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sweeps import END_DEADLINE_SECONDS, PAIR, SLURM, TINY, Lab, Sweep

from real_cluster import Cluster
from train.storage import read_json

Journals = dict[str, bytes]

RATES = "train.learning_rate=1e-4,1e-3"
SMALL, LARGE, EIGHT = "lora.r=2,4,8", "lora.r=2048", "lora.r=2,4,8,2048"
BRIEF = ("model=tiny", "train.max_steps=3", "lora.target_modules=all-linear")


@contextlib.contextmanager
def drained(cluster: Cluster) -> Iterator[None]:
    """No job starts in the partition of the tests."""
    nodes = ("t4-1", "t4-2")
    for node in nodes:
        cluster.ask("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")
    try:
        yield
    finally:
        for node in nodes:
            cluster.ask("scontrol", "update", f"NodeName={node}", "State=RESUME")


def between(lab: Lab) -> float:
    """A memory in GiB that, by the forecast, holds two small runs and no large one."""
    plan = json.loads(lab.run("plan", "lora.r=8,2048", *BRIEF, *SLURM, "cluster.max_runs_per_pack=1", "--json"))
    small, large = sorted(pack["forecast"]["vram_gib"] for pack in plan["packs"])
    assert large > 1.1 * small
    return round((small + large) / 2 / 0.97, 3)  # a little is kept free


def put_before(lab: Lab, command: str, script: str) -> str:
    """A PATH on which `command` is first a script of ours, which may call the real one as $REAL."""
    folder = lab.project / f"instead-of-{command}"
    folder.mkdir(exist_ok=True)
    program = folder / command
    program.write_text(f"#!/bin/sh\nREAL=/usr/bin/{command}\n{script}\n")
    program.chmod(0o755)
    return f"{folder}:/usr/sbin:/usr/bin:/sbin:/bin"


def trained_packs(sweep: Sweep) -> list[str]:
    """The runs of every job that was submitted, to see that none is in two."""
    records = [read_json(path) for path in sweep.folder.arrays.glob("*/array.json")]
    return sorted(run for record in records for pack in record["packs"] for run in read_json(Path(pack))["runs"])


def test_eight_runs_over_two_partitions(lab: Lab) -> None:
    """Scenarios 1 and 18. One array per partition, the report at the end, and nothing that others can read under umask 022."""
    words = (RATES, *BRIEF, "cluster.max_runs_per_pack=2")
    journals = lab.undisturbed("undisturbed-small", SMALL, *words) | lab.undisturbed("undisturbed-large", LARGE, *words)
    a100 = "cluster.partitions.a100={gpu:a100,gpus:4,max_minutes:60}"
    t4_size = f"cluster.partitions.t4.memory_gib={between(lab)}"
    sweep = lab.submit("eight", EIGHT, *words, SLURM[1], t4_size, a100)
    arrays = [read_json(path) for path in sweep.folder.arrays.glob("*/array.json")]
    assert sorted(array["partition"] for array in arrays) == ["a100", "t4"]
    assert sum(len(array["packs"]) for array in arrays) == 4
    sweep.assert_as_if_undisturbed(journals)
    assert {cause for run in sweep.runs for cause in sweep.causes(run)} == {"done"}
    sweep.wait("the report", sweep.folder.report.exists)
    for path in sweep.folder.path.rglob("*"):
        assert path.is_symlink() or stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
        assert path.owner() == lab.cluster.user
    told = json.loads(lab.run("status", sweep.name, "--json"))
    assert {run["state"] for run in told["runs"]} == {"done"}


def test_a_launcher_killed_between_sbatch_and_its_record(lab: Lab, pair: Journals) -> None:
    """Scenario 12. Its jobs start without it, and the next command submits exactly what is missing: nothing."""
    path = put_before(lab, "sbatch", '$REAL "$@"; kill -9 $PPID')
    lab.run(*PAIR, *SLURM, "sweep.name=killed", check=False, PATH=path)
    sweep = lab.sweep("killed")
    (record,) = [read_json(path) for path in sweep.folder.arrays.glob("*/array.json")]
    assert record["job"] is None
    said = lab.run(*PAIR, *SLURM, f"sweep.name={sweep.name}")
    assert "Nothing to start" in said
    assert len(trained_packs(sweep)) == 2
    sweep.assert_as_if_undisturbed(pair)
    assert sweep.causes() == ["done"]


def test_a_lost_answer_is_looked_up(lab: Lab, pair: Journals) -> None:
    """sbatch says that its answer got lost, after the job is in the queue: it is found by its name, not submitted again."""
    lost = "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2; exit 1"
    path = put_before(
        lab, "sbatch", f'case "$(cat "$1")" in *.report*) exec $REAL "$@";; esac; $REAL "$@" >/dev/null; {lost}'
    )
    said = lab.run(*PAIR, *SLURM, "sweep.name=lost", PATH=path)
    sweep = lab.sweep("lost")
    assert "looking whether" in said
    names = lab.cluster.ask("squeue", "--noheader", "--format=%j").splitlines()
    assert len([name for name in names if name.startswith("lost.") and not name.startswith("lost.report.")]) == 1
    assert sweep.job.isdigit()
    sweep.assert_as_if_undisturbed(pair)


def test_the_same_sweep_submitted_twice_at_once(lab: Lab, pair: Journals) -> None:
    """Scenario 13."""
    command, settings = lab.cluster.python(lab.project)
    words = (*command, "-m", "launcher", *PAIR, *SLURM, "sweep.name=twice")
    both = [lab.cluster.start_as_user(*words, cwd=lab.project, **settings) for _ in range(2)]
    said = [process.communicate(timeout=240) for process in both]
    sweep = lab.sweep("twice")
    assert 0 in [process.returncode for process in both], said
    assert len(trained_packs(sweep)) == 2
    sweep.assert_as_if_undisturbed(pair)
    assert sweep.causes() == ["done"]


def test_more_tasks_than_an_array_may_have_and_a_full_queue(cluster: Cluster, lab: Lab) -> None:
    """Scenario 14. Arrays are cut; what the queue does not take now goes in with the next command."""
    cluster.set(max_array_size=3, submit_limit=4)
    words = ("train.seed=range(0,6)", "model=tiny", "train.max_steps=2", "cluster.max_runs_per_pack=1")
    with drained(cluster):  # no job ends and makes room before all are submitted
        sweep = lab.submit("many", *words)
    assert "do not fit into the queue" in sweep.said
    assert 1 <= len(trained_packs(sweep)) <= 4
    assert all(len(read_json(path)["packs"]) <= 3 for path in sweep.folder.arrays.glob("*/array.json"))
    before = len(trained_packs(sweep))
    sweep.wait("room in the queue", lambda: cluster.ask("squeue", "--noheader") == "", END_DEADLINE_SECONDS)
    cluster.set(max_array_size=3)
    lab.run(*words, *SLURM, f"sweep.name={sweep.name}")
    submitted = trained_packs(sweep)
    assert len(submitted) == len(set(submitted)) == 6 > before
    sweep.wait_until_done()


def test_a_thousand_runs_are_submitted_and_tracked_quickly(
    cluster: Cluster, lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    """With packing off: a job per run. The limits hold on a machine with other work beside."""
    words = ("train.seed=range(0,1000)", "model=tiny", "train.max_steps=2", "cluster.max_runs_per_pack=1")
    with drained(cluster):
        lab.run("stage", *words)
        began = time.monotonic()
        sweep = lab.submit("thousand", *words)
        submitting = time.monotonic() - began
        began = time.monotonic()
        lab.run("status", sweep.name)
        tracking = time.monotonic() - began
        began = time.monotonic()
        lab.run("cancel", sweep.name)
        cancelling = time.monotonic() - began
    with capsys.disabled():
        print(
            f"\n1,000 jobs: submitted in {submitting:.1f} s, tracked in {tracking:.1f} s, cancelled in {cancelling:.1f} s"
        )
    assert "1000 jobs in the queue" in sweep.said
    assert {status.state.value for status in sweep.statuses()} == {"cancelled"}
    assert submitting < 45
    assert tracking < 10


def test_wait_stays_until_the_report_and_nobody_learns_the_key(lab: Lab) -> None:
    """The W&B key in the environment reaches the job, and neither what Slurm shows of it nor what lies on disk."""
    key, port = "canary" * 7, "http://127.0.0.1:9"  # where nobody listens
    words = ("lora.r=4,8", "model=tiny", "train.max_steps=3", *SLURM, "sweep.name=wait", "--wait")
    said = lab.run(*words, WANDB_API_KEY=key, WANDB_BASE_URL=port, WANDB_MODE="")
    assert "Best run" in said
    sweep = lab.sweep("wait")
    assert sweep.folder.report.exists()
    assert f"W&B: offline ({port} cannot be reached" in sweep.logs(), "the job has the key"
    shown = lab.cluster.ask("scontrol", "--details", "show", "job", sweep.job)
    shown += lab.cluster.ask("scontrol", "write", "batch_script", sweep.job, "-")
    shown += lab.cluster.ask("sacct", "--allusers", "--parsable2", "--format=JobID,SubmitLine,Comment,WorkDir")
    assert sweep.job in shown
    assert key not in said + shown
    files = [path for path in lab.project.rglob("*") if path.is_file()]
    assert [path for path in files if key.encode() in path.read_bytes()] == []


def test_logs_follow_a_job_to_its_end(lab: Lab) -> None:
    sweep = lab.submit("logs", "lora.r=4", *TINY)
    command, settings = lab.cluster.python(lab.project)
    words = (*command, "-m", "launcher", "logs", "-f", f"{sweep.name}/{sweep.first.path.name}")
    follower = lab.cluster.start_as_user(*words, cwd=lab.project, **settings)
    try:
        out, err = follower.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        follower.kill()
        raise
    assert "trainable params" in out, err
    assert sweep.first.result.exists()
