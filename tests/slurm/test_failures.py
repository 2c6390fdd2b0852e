"""Daemons that die, and questions that stay without an answer."""

from __future__ import annotations

import os
import signal

from sweeps import TINY, Lab

from real_cluster import Cluster
from slurm.daemons import start_time

Journals = dict[str, bytes]

LONG = ("lora.r=4,8", *TINY[:1], "train.max_steps=10000", "train.save_steps=50")  # nobody waits for its end


def test_a_node_is_lost_and_its_job_comes_back_beside_the_next(cluster: Cluster, lab: Lab, pair: Journals) -> None:
    """Scenario 8. slurmd is killed and its job hangs; it wakes up when Slurm has started the job again: two copies, one may write."""
    sweep = lab.submit("node")
    sweep.wait_for_step(20)
    node, process = sweep.node(), sweep.stall()
    cluster.kill_daemon(f"slurmd-{node}")
    try:
        sweep.wait("the second copy", lambda: sweep.attempts())
        os.kill(process, signal.SIGCONT)
        sweep.assert_as_if_undisturbed(pair)
    finally:
        cluster.restart(f"slurmd-{node}")
    assert sweep.causes() == ["node_fail", "done"]
    first, second = sweep.attempts()
    assert first["node"] == node != second["node"]
    assert (first["restart_count"], second["restart_count"]) == (0, 1)
    assert start_time(process) is None


def test_the_controller_restarts_in_mid_sweep(cluster: Cluster, lab: Lab, pair: Journals) -> None:
    """Scenario 9. Without it a status is told by files alone, and nobody is called failed."""
    sweep = lab.submit("controller")
    sweep.wait_for_step(20)
    cluster.stop_daemon("slurmctld")
    try:
        states = {status.state.value for status in sweep.statuses()}
        assert states <= {"running", "done", "unknown"}
    finally:
        cluster.restart("slurmctld")
    sweep.assert_as_if_undisturbed(pair)
    assert sweep.causes() == ["done"]


def test_a_cluster_without_sacct(cluster: Cluster, lab: Lab, pair: Journals) -> None:
    """Scenario 11. Preempted, requeued and tracked by squeue alone."""
    cluster.set(accounting=False)
    sweep = lab.submit("no-sacct")
    sweep.wait_for_step(20)
    sweep.preempt()
    sweep.wait_for_attempts(1)
    assert {status.state.value for status in sweep.statuses()} <= {"pending", "running"}
    sweep.assert_as_if_undisturbed(pair)
    assert sweep.causes() == ["preempted", "done"]
    cluster.set()


def test_cancel_in_every_state(cluster: Cluster, lab: Lab) -> None:
    """Scenario 15: pending, held, running, requeued. Each ends cancelled, and nothing is left in the queue."""
    running, requeued = (lab.submit(name, *LONG) for name in ("cancel-running", "cancel-requeued"))
    for sweep in (running, requeued):
        sweep.wait_for_step(5)
    cluster.ask("scontrol", "requeue", requeued.job)
    # Nodes that are drained while Slurm still ends a requeued job keep it in that state for minutes (seen with 22.05).
    requeued.wait("its place in the queue", lambda: cluster.state(requeued.job) == "PENDING")
    for node in ("t4-1", "t4-2"):
        cluster.ask("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")
    try:
        pending, held = lab.submit("cancel-pending"), lab.submit("cancel-held")
        cluster.ask("scontrol", "hold", held.job)
        for sweep in (pending, held, requeued, running):
            lab.run("cancel", sweep.name)
        for sweep in (pending, held, requeued, running):
            sweep.wait(
                "cancelled", lambda sweep=sweep: {status.state.value for status in sweep.statuses()} == {"cancelled"}
            )
        cluster.wait("an empty queue", lambda: cluster.ask("squeue", "--noheader") == "")
    finally:
        for node in ("t4-1", "t4-2"):
            cluster.ask("scontrol", "update", f"NodeName={node}", "State=RESUME")
    assert running.causes() == ["cancelled"]
    assert running.attempts()[0]["saved_step"] == running.attempts()[0]["last_step"]
    assert pending.causes() == held.causes() == []


def test_scancel_is_no_preemption(lab: Lab) -> None:
    """A job that its user ends with Slurm's own command stays ended, though it saved what it had."""
    sweep = lab.submit("scancel")
    sweep.wait_for_step(20)
    lab.cluster.ask("scancel", sweep.job)
    sweep.wait_for_attempts(1)
    sweep.wait("the end", lambda: lab.cluster.state(sweep.job) == "CANCELLED")
    assert sweep.causes() == ["cancelled"]
    assert {status.state.value for status in sweep.statuses()} == {"cancelled"}
