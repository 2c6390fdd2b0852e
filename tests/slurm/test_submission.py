"""From a command to the queue: every job once, whatever happens to answers and launchers."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from sweeps import END_DEADLINE_SECONDS, PAIR, SEEDS, SLURM, TINY, Lab, Sweep

from real_cluster import Cluster
from slurm.settings import Settings
from train.errors import LeaseHeld
from train.store.storage import read_json

Journals = dict[str, bytes]

RATES = "train.learning_rate=1e-4,1e-3"
SMALL, LARGE, EIGHT = "lora.r=2,4,8", "lora.r=2048", "lora.r=2,4,8,2048"
HABITS = {"SBATCH_PARTITION": "urgent", "SBATCH_OUTPUT": "/dev/null", "SQUEUE_PARTITION": "urgent", "LOGNAME": "root"}
BRIEF = ("model=tiny", "train.max_steps=3", "lora.target_modules=all-linear")


@contextlib.contextmanager
def drained(cluster: Cluster) -> Iterator[None]:
    """No job starts."""
    nodes = "NodeName=t4-[1-2],a100-[1-2]"
    cluster.ask("scontrol", "update", nodes, "State=DRAIN", "Reason=test")
    try:
        yield
    finally:
        cluster.ask("scontrol", "update", nodes, "State=RESUME")


def between(lab: Lab) -> float:
    """A memory in GiB that, by the forecast, holds two small runs and no large one."""
    plan = json.loads(lab.run("plan", "lora.r=8,2048", *BRIEF, *SLURM, "cluster.max_runs_per_pack=1", "--json"))
    small, large = sorted(pack["forecast"]["vram_gib"] for pack in plan["packs"])
    assert large > 1.1 * small
    # A little is kept free.
    return round((small + large) / 2 / 0.97, 3)


def put_before(lab: Lab, command: str, script: str) -> str:
    """A PATH on which `command` is first a script of ours, which may call the real one as $REAL."""
    folder = lab.project / f"instead-of-{command}"
    folder.mkdir(exist_ok=True)
    program = folder / command
    program.write_text(f"#!/bin/sh\nREAL=/usr/bin/{command}\n{script}\n")
    program.chmod(0o755)
    return f"{folder}:/usr/sbin:/usr/bin:/sbin:/bin"


def job_numbers(lab: Lab, sweep: str) -> list[str]:
    """The ids of all jobs and arrays in the queue, or lately in it, that train runs of a sweep."""
    rows = lab.cluster.ask("squeue", "--noheader", "--states=all", "--format=%F %j").splitlines()
    named = [row.split() for row in rows]
    return sorted({job for job, name in named if name.startswith(f"{sweep}.") and ".report." not in name})


@dataclass
class Effort:
    """How long a command took: the processor time of it and all that it called, and by the clock."""

    work: float = 0.0
    wall: float = 0.0


@contextlib.contextmanager
def own_seconds() -> Iterator[Effort]:
    """Measures the commands that are run in here, to their ends."""
    effort, began, before = Effort(), time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    yield effort
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    effort.work = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    effort.wall = time.monotonic() - began


def trained_packs(sweep: Sweep) -> list[str]:
    """The runs of every job that was submitted, to see that none is in two."""
    records = [read_json(path) for path in sweep.folder.arrays.glob("*/array.json")]
    return sorted(run for record in records for pack in record["packs"] for run in read_json(Path(pack))["runs"])


EIGHT_WORDS = (RATES, *BRIEF, "cluster.max_runs_per_pack=2")


@pytest.fixture
def eight(lab: Lab) -> tuple[tuple[str, ...], Journals]:
    """A command for eight runs that go to t4 and a100, an array for each; and their journals if nobody disturbs them."""
    small = lab.undisturbed("undisturbed-small", SMALL, *EIGHT_WORDS)
    large = lab.undisturbed("undisturbed-large", LARGE, *EIGHT_WORDS)
    a100 = "cluster.partitions.a100={gpu:a100,gpus:4,max_minutes:60}"
    t4_size = f"cluster.partitions.t4.memory_gib={between(lab)}"
    return (EIGHT, *EIGHT_WORDS, *SLURM, t4_size, a100), small | large


def test_eight_runs_over_two_partitions(lab: Lab, eight: tuple[tuple[str, ...], Journals]) -> None:
    """Scenarios 1 and 18. One array per partition, the report at the end, and nothing that others can read under umask 022."""
    words, journals = eight
    sweep = lab.submit("eight", *words, **HABITS)
    arrays = [read_json(path) for path in sweep.folder.arrays.glob("*/array.json")]
    assert sorted(array["partition"] for array in arrays) == ["a100", "t4"]
    assert sum(len(array["packs"]) for array in arrays) == 4
    assert sorted({lab.cluster.field(job, "Partition") for job in sweep.jobs}) == ["a100", "t4"]
    sweep.assert_as_if_undisturbed(journals, "done")
    sweep.wait("the report", sweep.folder.report.exists)
    for path in sweep.folder.path.rglob("*"):
        assert path.is_symlink() or stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
        assert path.owner() == lab.cluster.user
    told = json.loads(lab.run("status", sweep.name, "--json"))
    assert {(run["state"], run["attempts"]) for run in told["runs"]} == {("done", 1)}


def test_a_launcher_killed_between_sbatch_and_its_record(lab: Lab, eight: tuple[tuple[str, ...], Journals]) -> None:
    """Scenario 12. Killed after the first array, then after the second: each time the next command submits exactly what is missing,
    at last nothing but the job that writes the report. The jobs start without their launcher.
    """
    words, journals = eight
    sweep = lab.sweep("killed")
    path = put_before(lab, "sbatch", '$REAL "$@"; kill -9 $PPID')
    submitted = []
    # So that all is still to be done when the next command comes.
    with drained(lab.cluster):
        for _ in range(2):
            killed = lab.launch(*words, "sweep.name=killed", PATH=path)
            # As runuser tells of it.
            assert killed.returncode == 128 + signal.SIGKILL, killed.stderr
            records = [read_json(file) for file in sweep.folder.arrays.glob("*/array.json")]
            submitted.append({record["partition"]: record["job"] for record in records})
        assert [sorted(records) for records in submitted] == [["t4"], ["a100", "t4"]]
        # No record knows the id that its array has in the queue.
        assert set(submitted[1].values()) == {None}
        assert "No job waits to write the report" in lab.run("status", sweep.name)
        assert "Nothing to start" in lab.run(*words, "sweep.name=killed")
        assert "No job waits" not in lab.run("status", sweep.name)
    packed = trained_packs(sweep)
    assert len(packed) == len(set(packed)) == 8
    assert len(job_numbers(lab, "killed")) == 2
    sweep.assert_as_if_undisturbed(journals, "done")
    sweep.wait("the report", sweep.folder.report.exists)


def test_a_lost_answer_is_looked_up(lab: Lab, pair: Journals) -> None:
    """sbatch says that its answer got lost, after the job is in the queue: it is found by its name, not submitted again."""
    lost = "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2; exit 1"
    path = put_before(
        lab, "sbatch", f'case "$(cat "$1")" in *.report*) exec $REAL "$@";; esac; $REAL "$@" >/dev/null; {lost}'
    )
    said = lab.run(*PAIR, *SLURM, "sweep.name=lost", PATH=path)
    sweep = lab.sweep("lost")
    assert "checking whether" in said
    assert job_numbers(lab, "lost") == [sweep.job]
    sweep.assert_as_if_undisturbed(pair, "done")


def test_the_same_sweep_submitted_twice_at_once(lab: Lab, pair: Journals) -> None:
    """Scenario 13. One submits; the other ends at once, says who is at work, and does not pretend that all went well."""
    go = lab.project / "go"
    path = put_before(lab, "sbatch", f'while [ ! -e {go} ]; do sleep 0.1; done; exec $REAL "$@"')
    command, settings = lab.cluster.python(lab.project)
    words = (*command, "-m", "launcher", *PAIR, *SLURM, "sweep.name=twice")
    both = [lab.cluster.start_as_user(*words, cwd=lab.project, **settings | {"PATH": path}) for _ in range(2)]
    lab.cluster.wait("the loser's end", lambda: any(process.poll() is not None for process in both))
    winner, loser = sorted(both, key=lambda process: process.poll() is not None)
    said, error = loser.communicate()
    assert loser.returncode == LeaseHeld.exit_code == 1, said + error
    assert "Another launcher (process" in error
    assert "status twice" in " ".join(error.split())
    go.touch()
    said, error = winner.communicate(timeout=END_DEADLINE_SECONDS)
    assert winner.returncode == 0, error
    assert "1 job in the queue" in said
    sweep = lab.sweep("twice")
    assert len(trained_packs(sweep)) == 2
    assert job_numbers(lab, "twice") == [sweep.job]
    sweep.assert_as_if_undisturbed(pair, "done")


def test_more_tasks_than_an_array_may_have_and_a_full_queue(cluster: Cluster, lab: Lab, seeds: Journals) -> None:
    """Scenario 14. Arrays are cut; what the queue does not take now goes in with the next command, and so does the report's job.

    All the while no two jobs run at once, though they are in three arrays of two commands.
    """
    words = ("train.seed=range(0,4)", *SEEDS[1:], "cluster.max_parallel=1")
    cluster.set(max_array_size=2, submit_limit=3)
    # No job ends and makes room before all are submitted.
    with drained(cluster):
        sweep = lab.submit("many", *words)
        assert "1 more do not fit into the queue" in sweep.said
        assert "No job will write the report" in sweep.said
        assert len(trained_packs(sweep)) == 3
        assert sorted(len(read_json(path)["packs"]) for path in sweep.folder.arrays.glob("*/array.json")) == [1, 2]
        cluster.set(max_array_size=2)
        said = lab.run(*words, *SLURM, f"sweep.name={sweep.name}")
        assert "1 job in the queue" in said
        assert "the new jobs wait until the earlier ones have ended" in said
    submitted = trained_packs(sweep)
    assert len(submitted) == len(set(submitted)) == 4
    sweep.assert_as_if_undisturbed({run.id: seeds[run.id] for run in sweep.runs}, "done")
    times = sorted((line["started"], line["ended"]) for run in sweep.runs for line in sweep.attempts(run))
    assert all(ended <= started for (_, ended), (started, _) in pairwise(times))
    sweep.wait("the report", sweep.folder.report.exists)


def test_a_thousand_runs_are_submitted_and_tracked_quickly(
    cluster: Cluster, lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    """With packing off: a job per run. The limits are those of a quiet machine, and so count the work of the launcher and of what
    it calls, not the time that they wait for a core that others have; how long sbatch takes is Slurm's business, and counted too.
    """
    words = ("train.seed=range(0,1000)", "model=tiny", "train.max_steps=2", "cluster.max_runs_per_pack=1")
    times = lab.project / "sbatch-seconds"
    timed = f'began=$(date +%s.%N); $REAL "$@"; code=$?; echo "$(date +%s.%N) $began" >> {times}; exit $code'
    path = put_before(lab, "sbatch", timed)
    with drained(cluster):
        lab.run("stage", *words)
        with own_seconds() as submitting:
            sweep = lab.submit("thousand", *words, PATH=path)
        with own_seconds() as tracking:
            lab.run("status", sweep.name)
        with own_seconds() as cancelling:
            lab.run("cancel", sweep.name)
    rows = [line.split() for line in times.read_text().splitlines()]
    in_sbatch = sum(float(end) - float(begin) for end, begin in rows)
    with capsys.disabled():
        print(
            f"\n1,000 jobs: submitted in {submitting.work:.1f} s of work and {in_sbatch:.1f} s of sbatch ({submitting.wall:.1f} s), "
            f"tracked in {tracking.work:.1f} s of work ({tracking.wall:.1f} s), cancelled in {cancelling.wall:.1f} s"
        )
    assert "1000 jobs in the queue" in sweep.said
    # Arrays, and the job that writes the report.
    assert len(rows) == math.ceil(1000 / Settings().max_array_size) + 1
    assert {status.state.value for status in sweep.statuses()} == {"cancelled"}
    assert submitting.work + in_sbatch < 15
    assert tracking.work < 2


def test_wait_stays_until_the_report_and_nobody_learns_the_key(lab: Lab) -> None:
    """The W&B key in the environment reaches the job, and neither what Slurm shows of it nor what lies on disk."""
    # Where nobody listens.
    key, port = "canary" * 7, "http://127.0.0.1:9"
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
