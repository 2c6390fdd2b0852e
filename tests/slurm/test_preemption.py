"""Jobs that Slurm stops: each run ends done, with the bytes of a run that nobody disturbed, and its attempts tell why."""

from __future__ import annotations

import time

from sweeps import END_DEADLINE_SECONDS, EVAL_STEPS, PAIR, Lab, evaluating, loading, saving

from real_cluster import PROJECT, Cluster

Journals = dict[str, bytes]

# Beside what torch takes: a run of the test of memory needs 1.2 GB, two need 1.8 GB.
ONE_FITS_KIB = 1_500_000


def test_preempted_in_training_with_a_grace_time(cluster: Cluster, lab: Lab, pair: Journals) -> None:
    """Scenario 2. The job saves, queues itself again and goes on where it was: nothing is computed twice."""
    cluster.set(grace=10)
    sweep = lab.submit("grace")
    sweep.stall_beyond(20)
    sweep.preempt()
    sweep.wait_for_attempts(1)
    (line,) = sweep.attempts()
    assert (line["cause"], line["restart_count"]) == ("preempted", 0)
    assert "higher priority" in line["detail"]
    assert line["saved_step"] == line["last_step"] > 20
    sweep.assert_as_if_undisturbed(pair, "preempted", "done")
    first, second = sweep.attempts()
    assert (second["first_step"], second["restart_count"]) == (first["last_step"], 1)
    assert first["job"] == second["job"] == sweep.job
    # The log of the first attempt was not emptied.
    assert sweep.logs().count("importing torch") == 2


def test_preempted_without_a_grace_time(cluster: Cluster, lab: Lab, pair: Journals) -> None:
    """Scenario 3: KillWait is all there is; the tiny model is saved in time."""
    cluster.set(grace=0, kill_wait=5)
    sweep = lab.submit("no-grace")
    sweep.stall_beyond(20)
    sweep.preempt()
    sweep.assert_as_if_undisturbed(pair, "preempted", "done")
    first, second = sweep.attempts()
    # Without a grace time a preemption is a requeue like any other.
    assert "puts it back into the queue" in first["detail"]
    assert (first["restart_count"], second["restart_count"]) == (0, 1)
    assert len(sweep.jobs) == 1


def test_preempted_where_slurm_cancels(cluster: Cluster, lab: Lab, pair: Journals) -> None:
    """PreemptMode=CANCEL queues nothing again by itself; the job asks for it once it has saved."""
    cluster.set(grace=10, preempt_mode="CANCEL")
    sweep = lab.submit("slurm-cancels")
    sweep.stall_beyond(20)
    sweep.preempt()
    sweep.assert_as_if_undisturbed(pair, "preempted", "done")
    assert len(sweep.jobs) == 1


def test_preempted_five_times_in_a_row_at_every_moment(cluster: Cluster, lab: Lab) -> None:
    """Scenarios 4 and 5: while it loads, evaluates and saves. It stands still there until Slurm's signal, so each one hits.

    Loading is preempted before anything was saved; that alone never holds a run.
    """
    cluster.set(grace=3)
    words = ("lora.r=4,8", "model=tiny", "train.max_steps=60", f"train.eval_steps={EVAL_STEPS}", "train.save_steps=1",
             "train.sample_prompts=0")  # fmt: skip
    journals = lab.undisturbed("undisturbed-moments", *words)
    sweep = lab.submit("moments", *words)
    for number, moment in enumerate((loading, evaluating, saving, evaluating, saving)):
        sweep.stall(moment.__name__, moment)
        sweep.preempt()
        sweep.wait_for_attempts(number + 1)
    sweep.assert_as_if_undisturbed(journals, *["preempted"] * 5, "done")
    ended = sweep.attempts()
    assert all("higher priority" in line["detail"] for line in ended[:-1])
    assert [line["trained"] for line in ended] == [False, *[True] * 5]
    # Not a step beyond the evaluation.
    assert all(line["last_step"] % EVAL_STEPS == 0 for line in (ended[1], ended[3]))
    assert len(sweep.jobs) == 1


def test_time_limits_are_chained(lab: Lab, pair: Journals) -> None:
    """Scenario 6. The job stands still until Slurm's warning, which wakes it up; then it saves and queues itself again.

    Once it stands an administrator shortens its limit, so that nobody waits for the rest of it.
    """
    sweep = lab.submit("limit", *PAIR, "cluster.partitions={t4:{gpu:t4,gpus:4,max_minutes:2}}")
    sweep.stall_beyond(20)
    assert lab.cluster.field(sweep.job, "TimeLimit") == "00:02:00"
    _, minutes, seconds = map(int, lab.cluster.field(sweep.job, "RunTime").split(":"))
    lab.cluster.ask("scontrol", "update", f"JobId={sweep.job}", f"TimeLimit={minutes + 1 + (seconds > 45)}")
    sweep.wait("the warning before the limit", lambda: sweep.attempts(), END_DEADLINE_SECONDS)
    lab.cluster.ask("scontrol", "update", f"JobId={sweep.job}", "TimeLimit=2")
    (line,) = sweep.attempts()
    assert line["cause"] == "timeout"
    assert "the time limit" in line["detail"]
    assert line["saved_step"] == line["last_step"] > 20
    sweep.assert_as_if_undisturbed(pair, "timeout", "done")
    assert [line["restart_count"] for line in sweep.attempts()] == [0, 1]
    assert len(sweep.jobs) == 1


def test_requeued_by_hand_on_two_gpus(lab: Lab) -> None:
    """Scenario 7, by a job of two processes that share every step (by gloo on these CPUs): both are stopped, both come back."""
    words = (*PAIR, "cluster.gpus_per_job=2")
    journals = lab.undisturbed("undisturbed-team", *words, CUDA_VISIBLE_DEVICES="0,1")
    sweep = lab.submit("by-hand", *words)
    sweep.stall_beyond(20)
    allocated = lab.cluster.field(sweep.job, "TresPerNode"), lab.cluster.field(sweep.job, "NumTasks")
    assert allocated == ("gres:gpu:t4:2", "2")
    lab.cluster.ask("scontrol", "requeue", sweep.job)
    sweep.assert_as_if_undisturbed(journals, "preempted", "done")
    assert "back into the queue" in sweep.attempts()[0]["detail"]
    assert [line["restart_count"] for line in sweep.attempts()] == [0, 1]
    assert len(sweep.jobs) == 1


def test_a_cluster_that_does_not_requeue(cluster: Cluster, lab: Lab, pair: Journals) -> None:
    """Scenario 10. Under JobRequeue=0 the job is queued again, since it asks for that; where even this is forbidden it says so
    and ends, and `resume` goes on from what it saved.
    """
    cluster.set(requeue=False)
    sweep = lab.submit("no-requeue")
    sweep.stall_beyond(20)
    sweep.preempt()
    sweep.wait_for_attempts(1)
    sweep.wait("the second start", lambda: cluster.field(sweep.job, "Restarts") == "1")
    sweep.stall_beyond(sweep.attempts()[0]["last_step"])
    cluster.ask("scontrol", "update", f"JobId={sweep.job}", "Requeue=0")
    sweep.preempt()
    sweep.wait_for_attempts(2)
    sweep.wait("the end of the job", lambda: cluster.state(sweep.job) not in {"RUNNING", "COMPLETING"})
    assert "does not requeue this job" in sweep.logs()
    assert {status.state.value for status in sweep.statuses()} == {"stopped"}
    lab.run("resume", sweep.name)
    sweep.assert_as_if_undisturbed(pair, "preempted", "preempted", "done")
    assert len(sweep.jobs) == 2


def test_a_finished_job_that_is_requeued_ends_at_once(lab: Lab, pair: Journals) -> None:
    """Scenario 16: it looks for results before it imports torch."""
    sweep = lab.submit("finished")
    sweep.assert_as_if_undisturbed(pair, "done")
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
    sweep.assert_as_if_undisturbed(pair, "done")


def test_a_job_imports_only_the_frozen_code(cluster: Cluster, lab: Lab, pair: Journals) -> None:
    """Every file of the working tree is broken after submission: neither the first start nor that after a requeue sees it."""
    copy = Lab(cluster, cluster.project("broken"))
    sweep = copy.submit("frozen", *PAIR, f"cache={lab.project / 'cache'}")
    broken = [file for name in PROJECT for file in (copy.project / name).rglob("*") if file.is_file()]
    for file in broken:
        file.write_text("raise RuntimeError('this is not the frozen code')\n")
    refused = copy.run("status", check=False)
    assert "this is not the frozen code" in refused
    sweep.stall_beyond(20)
    cluster.ask("scontrol", "requeue", sweep.job)
    sweep.assert_as_if_undisturbed(pair, "preempted", "done")
    assert "not the frozen code" not in sweep.logs()


def imported_kib(lab: Lab) -> int:
    """The address space that the trainer takes before it has read a model; it is another with every build of torch."""
    (python, *_), settings = lab.cluster.python(lab.project)
    program = "import train.trainer.pack; print(open('/proc/self/status').read())"
    process = lab.cluster.start_as_user(python, "-c", program, cwd=lab.project, **settings)
    said, errors = process.communicate(timeout=END_DEADLINE_SECONDS)
    assert process.returncode == 0, errors
    return next(int(line.split()[1]) for line in said.splitlines() if line.startswith("VmPeak:"))


def test_what_ran_out_of_memory_is_not_tried_as_it_was(lab: Lab) -> None:
    """Scenario 17. A limit on the job's address space makes the allocator fail as it does on a full node; one run alone fits."""
    large = ("train.batch_size=512", "train.micro_batch_tokens=200000")
    words = ("lora.r=4,8", "model=tiny", "train.max_steps=3", "train.sample_prompts=0", *large)
    journals = lab.undisturbed("undisturbed-alone", *words, "cluster.max_runs_per_pack=1", "cluster.max_parallel=2")
    sweep = lab.submit("memory", *words, f"cluster.setup=[ulimit -v {imported_kib(lab) + ONE_FITS_KIB}]")
    sweep.wait_for_attempts(1)
    assert [sweep.causes(run) for run in sweep.runs] == [["out_of_memory"]] * 2
    said = lab.run(*words, "cluster=slurm", f"sweep.name={sweep.name}", check=False)
    assert "out_of_memory" in said
    assert "python -m launcher resume" in said
    assert len(sweep.jobs) == 1
    lab.run("resume", sweep.name)
    # Two packs of one run instead of one pack of two.
    assert len(set(sweep.jobs)) == 3
    sweep.assert_as_if_undisturbed(journals, "out_of_memory", "done")
