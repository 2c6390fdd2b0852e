"""Daemons that die, and questions that stay without an answer."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from sweeps import END_DEADLINE_SECONDS, PAIR, SEEDS, SLURM, Lab

from real_cluster import Cluster
from slurm.daemons import start_time

Journals = dict[str, bytes]


def test_a_node_is_lost_and_its_job_comes_back_beside_the_next(cluster: Cluster, lab: Lab, pair: Journals) -> None:
    """Scenario 8. slurmd is killed and its job hangs; it wakes up when Slurm has started the job again: two copies, one may write."""
    sweep = lab.submit("node")
    process = sweep.stall_beyond(20)
    node = sweep.node()
    cluster.kill_daemon(f"slurmd-{node}")
    try:
        sweep.wait("the second copy", lambda: sweep.attempts())
        os.kill(process, signal.SIGCONT)
        sweep.assert_as_if_undisturbed(pair, "node_fail", "done")
    finally:
        cluster.restart(f"slurmd-{node}")
    first, second = sweep.attempts()
    assert first["node"] == node != second["node"]
    assert (first["restart_count"], second["restart_count"]) == (0, 1)
    assert start_time(process) is None
    assert len(sweep.jobs) == 1


def test_the_controller_restarts_in_mid_sweep(cluster: Cluster, lab: Lab, pair: Journals) -> None:
    """Scenario 9, killed and stopped. Without it a status is told by files alone, and the same command submits nothing."""
    sweep = lab.submit("controller")
    process = sweep.stall_beyond(20)
    cluster.wait_until_kept(sweep.job)
    cluster.kill_daemon("slurmctld")
    try:
        # Each waits for squeue to give up.
        with ThreadPoolExecutor() as threads:
            again = threads.submit(lab.run, *PAIR, *SLURM, f"sweep.name={sweep.name}")
            assert {status.state.value for status in sweep.statuses()} == {"running"}
        assert "Nothing to start" in again.result()
    finally:
        cluster.restart("slurmctld")
        os.kill(process, signal.SIGCONT)
    cluster.restart("slurmctld")
    sweep.assert_as_if_undisturbed(pair, "done")
    assert len(sweep.jobs) == 1


def test_a_cluster_without_sacct(cluster: Cluster, lab: Lab, pair: Journals) -> None:
    """Scenario 11. Preempted, requeued and tracked by squeue alone."""
    cluster.set(accounting=False)
    sweep = lab.submit("no-sacct")
    sweep.stall_beyond(20)
    sweep.preempt()
    sweep.wait_for_attempts(1)
    assert {status.state.value for status in sweep.statuses()} <= {"pending", "running"}
    sweep.assert_as_if_undisturbed(pair, "preempted", "done")
    assert len(sweep.jobs) == 1


@contextmanager
def slow_epilogs(cluster: Cluster) -> Iterator[Path]:
    """Jobs that end stay COMPLETING for as long as the file that is given exists, as on clusters whose nodes are cleaned after each."""
    hold, program = cluster.readable / "hold", cluster.readable / "epilog"
    program.write_text(f"#!/bin/sh\nwhile [ -e {hold} ]; do sleep 0.1; done\n")
    program.chmod(0o755)
    cluster.set(epilog=str(program))
    try:
        yield hold
    finally:
        hold.unlink(missing_ok=True)


def test_cancel_in_every_state(cluster: Cluster, lab: Lab, seeds: Journals) -> None:
    """Scenario 15, one command for jobs that are done, running, being requeued, requeued, waiting and held. All that is not done ends
    cancelled, nothing is left in the queue, and `resume` takes each up where it was.
    """
    sweep = lab.submit("cancel", *SEEDS, "cluster.max_parallel=4")
    done, running, completing, requeued, *_, held = sweep.runs
    job = sweep.job_of
    sweep.wait("four at once", lambda: [cluster.state(job(run)) for run in sweep.runs].count("RUNNING") == 4)
    array = job(done).partition("_")[0]
    # Nothing more starts.
    cluster.ask("scontrol", "update", f"JobId={array}", "ArrayTaskThrottle=1")
    cluster.ask("scontrol", "hold", job(held))
    # Each has its moment for a second or so.
    with ThreadPoolExecutor() as threads:
        stalls = [
            threads.submit(sweep.stall, "training", lambda sweep, run=run: sweep.step(run) > 5, run)
            for run in (running, completing, requeued)
        ]
    process = stalls[0].result()
    cluster.ask("scontrol", "requeue", job(requeued))
    sweep.wait("one done, one requeued", lambda: done.result.exists() and cluster.state(job(requeued)) == "PENDING")
    with slow_epilogs(cluster) as hold:
        hold.touch()
        cluster.ask("scontrol", "requeue", job(completing))
        sweep.wait("the end of the process", lambda: sweep.attempts(completing))
        command, settings = cluster.python(lab.project)
        words = (*command, "-m", "launcher", "cancel", sweep.name)
        cancel = cluster.start_as_user(*words, cwd=lab.project, **settings)
        sweep.wait("the order", lambda: all(run.cancel_request.exists() for run in sweep.runs[1:]))
        # Still, after `cancel` looked.
        assert cluster.state(job(completing)) == "COMPLETING"
        os.kill(process, signal.SIGCONT)
        hold.unlink()
        _, error = cancel.communicate(timeout=END_DEADLINE_SECONDS)
    assert cancel.returncode == 0, error
    assert not done.cancel_request.exists()
    sweep.wait("cancelled", lambda: [s.state.value for s in sweep.statuses()] == ["done", *["cancelled"] * 5])
    cluster.wait("an empty queue", lambda: cluster.ask("squeue", "--noheader") == "")
    assert [sweep.causes(run) for run in sweep.runs] == [["done"], ["cancelled"], ["preempted"], ["preempted"], [], []]
    ended = [sweep.attempts(run)[0] for run in (running, completing, requeued)]
    assert all(line["saved_step"] == line["last_step"] > 5 for line in ended)
    lab.run("resume", sweep.name)
    sweep.wait_until_done()
    assert [sweep.causes(run)[-1] for run in sweep.runs] == ["done"] * 6
    assert {run.id: run.journal.read_bytes() for run in sweep.runs} == seeds
    assert "Nothing to cancel" in lab.run("cancel", sweep.name)


def test_scancel_is_no_preemption(lab: Lab, pair: Journals) -> None:
    """A job that its user ends with Slurm's own command stays ended, though it saved what it had; until `resume`."""
    sweep = lab.submit("scancel")
    sweep.stall_beyond(20)
    lab.cluster.ask("scancel", sweep.job)
    sweep.wait_for_attempts(1)
    sweep.wait("the end", lambda: lab.cluster.state(sweep.job) == "CANCELLED")
    assert [sweep.causes(run) for run in sweep.runs] == [["cancelled"]] * 2
    assert {status.state.value for status in sweep.statuses()} == {"cancelled"}
    lab.run("resume", sweep.name)
    sweep.assert_as_if_undisturbed(pair, "cancelled", "done")
