"""Jobs that Slurm stops: each run ends done, with the bytes of a run that nobody disturbed, and its attempts tell why."""

from __future__ import annotations

import time

from sweeps import END_DEADLINE_SECONDS, PAIR, Lab

from real_cluster import Cluster
from train.storage import read_lines

Journals = dict[str, bytes]


def test_preempted_in_training_with_a_grace_time(cluster: Cluster, lab: Lab, pair: Journals) -> None:
    """Scenario 2. The job saves, queues itself again and goes on where it was: nothing is computed twice."""
    cluster.set(grace=10)
    sweep = lab.submit("grace")
    sweep.wait_for_step(20)
    sweep.preempt()
    sweep.wait_for_attempts(1)
    (line,) = sweep.attempts()
    assert (line["cause"], line["restart_count"]) == ("preempted", 0)
    assert "higher priority" in line["detail"]
    assert line["saved_step"] == line["last_step"] > 20
    sweep.assert_as_if_undisturbed(pair)
    assert sweep.causes() == ["preempted", "done"]
    first, second = sweep.attempts()
    assert (second["first_step"], second["restart_count"]) == (first["last_step"], 1)
    assert first["job"] == second["job"] == sweep.job
    assert sweep.logs().count("importing torch") == 2  # the log of the first attempt was not emptied


def test_preempted_without_a_grace_time(cluster: Cluster, lab: Lab, pair: Journals) -> None:
    """Scenario 3: KillWait is all there is; the tiny model is saved in time."""
    cluster.set(grace=0, kill_wait=5)
    sweep = lab.submit("no-grace")
    sweep.wait_for_step(20)
    sweep.preempt()
    sweep.assert_as_if_undisturbed(pair)
    assert sweep.causes() == ["preempted", "done"]


def test_preempted_where_slurm_cancels(cluster: Cluster, lab: Lab, pair: Journals) -> None:
    """PreemptMode=CANCEL queues nothing again by itself; the job asks for it once it has saved."""
    cluster.set(grace=10, preempt_mode="CANCEL")
    sweep = lab.submit("slurm-cancels")
    sweep.wait_for_step(20)
    sweep.preempt()
    sweep.assert_as_if_undisturbed(pair)
    assert sweep.causes() == ["preempted", "done"]
    assert len(sweep.jobs) == 1


def test_preempted_five_times_while_it_loads_evaluates_saves_and_trains(
    cluster: Cluster, lab: Lab, pair: Journals
) -> None:
    """Scenarios 4 and 5. Loading is preempted before anything was saved; that alone never holds a run."""
    cluster.set(grace=3)
    sweep = lab.submit("often")
    for number in range(2):
        sweep.wait("a start", lambda number=number: sweep.logs().count("importing torch") > number)
        sweep.preempt()
        sweep.wait_for_attempts(number + 1)
    assert [line["trained"] for line in sweep.attempts()] == [False, False]
    for number in range(2, 5):
        sweep.wait_for_step(max(line["last_step"] for line in sweep.attempts()) + 10)
        sweep.preempt()
        sweep.wait_for_attempts(number + 1)
    sweep.assert_as_if_undisturbed(pair)
    assert sweep.causes() == ["preempted"] * 5 + ["done"]


def test_preempted_while_it_evaluates_and_saves(cluster: Cluster, lab: Lab) -> None:
    """Scenario 4: evaluating and saving after each step leave hardly a moment for anything else."""
    words = ("lora.r=4,8", "model=tiny", "train.max_steps=20", "train.eval_steps=1", "train.save_steps=1")
    journals = lab.undisturbed("undisturbed-evaluations", *words)
    sweep = lab.submit("evaluations", *words)
    sweep.wait_for_step(3)
    sweep.preempt()
    sweep.assert_as_if_undisturbed(journals)
    assert sweep.causes() == ["preempted", "done"]


def test_time_limits_are_chained(lab: Lab, pair: Journals) -> None:
    """Scenario 6. The job stands still until Slurm's warning, which wakes it up; then it saves and queues itself again."""
    sweep = lab.submit("limit", *PAIR, "cluster.partitions={t4:{gpu:t4,gpus:4,max_minutes:2}}")
    sweep.wait_for_step(20)
    sweep.stall()
    sweep.wait("the warning before the limit", lambda: sweep.attempts(), END_DEADLINE_SECONDS)
    (line,) = sweep.attempts()
    assert line["cause"] == "timeout"
    assert line["saved_step"] == line["last_step"] > 20
    assert lab.cluster.field(sweep.job, "TimeLimit") == "00:02:00"
    sweep.assert_as_if_undisturbed(pair)
    assert set(sweep.causes()) == {"timeout", "done"}
    assert len(sweep.jobs) == 1


def test_requeued_by_hand(lab: Lab, pair: Journals) -> None:
    """Scenario 7."""
    sweep = lab.submit("by-hand")
    sweep.wait_for_step(20)
    lab.cluster.ask("scontrol", "requeue", sweep.job)
    sweep.assert_as_if_undisturbed(pair)
    assert sweep.causes() == ["preempted", "done"]
    assert "back into the queue" in sweep.attempts()[0]["detail"]


def test_a_cluster_that_does_not_requeue(lab: Lab, pair: Journals) -> None:
    """Scenario 10. The job says so and ends; `resume` goes on from what it saved."""
    sweep = lab.submit("no-requeue")
    sweep.wait_for_step(20)
    lab.cluster.ask("scontrol", "update", f"JobId={sweep.job}", "Requeue=0")
    sweep.preempt()
    sweep.wait_for_attempts(1)
    sweep.wait("the end of the job", lambda: lab.cluster.state(sweep.job) not in {"RUNNING", "COMPLETING"})
    assert "does not requeue this job" in sweep.logs()
    assert {status.state.value for status in sweep.statuses()} == {"stopped"}
    lab.run("resume", sweep.name)
    sweep.assert_as_if_undisturbed(pair)
    assert sweep.causes() == ["preempted", "done"]
    assert len(sweep.jobs) == 2


def test_a_finished_job_that_is_requeued_ends_at_once(lab: Lab, pair: Journals) -> None:
    """Scenario 16: it looks for results before it imports torch."""
    sweep = lab.submit("finished")
    sweep.assert_as_if_undisturbed(pair)
    sweep.wait("the end of the job", lambda: lab.cluster.state(sweep.job) == "COMPLETED")
    lab.cluster.ask("scontrol", "requeue", sweep.job)
    sweep.wait("another start", lambda: "nothing to train" in sweep.logs())
    sweep.wait("another end", lambda: lab.cluster.state(sweep.job) == "COMPLETED")
    begun, ended = (
        time.mktime(time.strptime(lab.cluster.field(sweep.job, name), "%Y-%m-%dT%H:%M:%S"))
        for name in ("StartTime", "EndTime")
    )
    assert ended - begun < 10
    assert sweep.logs().count("importing torch") == 1
    assert sweep.causes() == ["done"]


def test_a_job_imports_only_the_frozen_code(lab: Lab, pair: Journals) -> None:
    """The working tree is broken after submission: neither the first start nor the one after a requeue sees it."""
    sweep = lab.submit("frozen")
    broken = lab.project / "train" / "job.py"
    intact = broken.read_text()
    broken.write_text("raise RuntimeError('this is not the frozen code')\n")
    try:
        sweep.wait_for_step(20)
        lab.cluster.ask("scontrol", "requeue", sweep.job)
        sweep.assert_as_if_undisturbed(pair)
    finally:
        broken.write_text(intact)
    assert sweep.causes() == ["preempted", "done"]
    assert "not the frozen code" not in sweep.logs()


def imported_kib(lab: Lab) -> int:
    """The address space that the trainer takes before it has read a model; it is another with every build of torch."""
    (python, *_), settings = lab.cluster.python(lab.project)
    program = "import train.pack; print(open('/proc/self/status').read())"
    process = lab.cluster.start_as_user(python, "-c", program, cwd=lab.project, **settings)
    said, errors = process.communicate(timeout=END_DEADLINE_SECONDS)
    assert process.returncode == 0, errors
    return next(int(line.split()[1]) for line in said.splitlines() if line.startswith("VmPeak:"))


def test_what_ran_out_of_memory_is_not_tried_as_it_was(lab: Lab) -> None:
    """Scenario 17. A limit on the job's address space makes the allocator fail as it does on a full node."""
    large = ("train.batch_size=512", "train.micro_batch_tokens=200000")  # 2.5 GB beside what torch takes
    words = ("lora.r=4,8", "model=tiny", "train.max_steps=20", *large)
    sweep = lab.submit("memory", *words, f"cluster.setup=[ulimit -v {imported_kib(lab) + 900_000}]")
    sweep.wait_for_attempts(1)
    assert sweep.causes() == ["out_of_memory"]
    said = lab.run(*words, "cluster=slurm", f"sweep.name={sweep.name}", check=False)
    assert "out_of_memory" in said
    assert len(sweep.jobs) == 1
    assert read_lines(sweep.first.attempts)[-1]["cause"] == "out_of_memory"
    lab.run("resume", sweep.name)
    assert len(set(sweep.jobs)) == 3  # two packs of one run instead of one pack of two
