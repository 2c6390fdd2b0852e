"""Doctor and plan on a real Slurm: what they say is what the cluster is, under several settings."""

from __future__ import annotations

import json
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from real_cluster import Cluster


@pytest.fixture(scope="module")
def project(running_cluster: Cluster) -> Path:
    return running_cluster.project("inventory")


def doctor(cluster: Cluster, project: Path, *words: str) -> dict[str, Any]:
    return dict(json.loads(cluster.launcher(project, "doctor", "--json", *words).stdout))


def plan(cluster: Cluster, project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return cluster.launcher(project, "plan", "--json", "data=alpaca", *words, check=False)


def test_the_doctor_says_what_the_cluster_is(cluster: Cluster, project: Path) -> None:
    found = doctor(cluster, project)
    assert {p["name"]: (p["gpus"], p["tier"]) for p in found["slurm"]["partitions"] if p["name"] != "urgent"} == {
        "t4": ([{"type": "t4", "count": 4, "memory_gib": 15.0}], 1),
        "a100": ([{"type": "a100", "count": 4, "memory_gib": 40.0}], 1),
    }
    assert all(partition["open_to_you"] for partition in found["slurm"]["partitions"])
    warnings = [advice["text"] for advice in found["advice"] if advice["level"] == "warning"]
    # The cluster in a box has GPUs in name only, and its tests mostly run with a CPU build of torch: doctor has to say so.
    expected = ["cannot use GPUs"] if version("torch").endswith("+cpu") else []
    assert len(warnings) == len(expected)
    assert all(words in warning for words, warning in zip(expected, warnings, strict=True))


def test_the_doctor_follows_every_setting(cluster: Cluster, project: Path) -> None:
    cluster.set(
        grace=0, kill_wait=7, requeue=False, max_array_size=40, max_time=90, submit_limit=3, send_user_signal=True
    )
    found = doctor(cluster, project)
    settings = found["slurm"]["settings"]
    assert (settings["kill_wait"], settings["requeue"], settings["max_array_size"]) == (7, False, 40)
    assert (settings["accounting"], settings["user_signal"]) == (True, True)
    assert {p["max_minutes"] for p in found["slurm"]["partitions"]} == {90}
    told = " ".join(advice["text"] for advice in found["advice"])
    assert all(
        words in told
        for words in ("GraceTime=0", "7 s (KillWait)", "JobRequeue=0", "more than 40 jobs", "3 jobs in the queue")
    )
    cluster.set(preempt_mode="CANCEL", accounting=False)
    told = " ".join(advice["text"] for advice in doctor(cluster, project)["advice"])
    assert all(words in told for words in ("PreemptMode=CANCEL", "no accounting"))


def test_the_doctor_ends_while_the_controller_is_away(cluster: Cluster, project: Path) -> None:
    cluster.stop_daemon("slurmctld")
    begin = time.monotonic()
    found = doctor(cluster, project)
    assert time.monotonic() - begin < 60
    assert found["slurm"] is None
    cluster.restart("slurmctld")


def test_a_written_site_is_all_that_a_plan_needs(cluster: Cluster, project: Path) -> None:
    written = doctor(cluster, project, "write=site")["written"]
    assert Path(written) == project / "conf" / "cluster" / "site.yaml"
    made = json.loads(plan(cluster, project, "model=llama2_7b", "cluster=site").stdout)
    assert [pack["partition"] for pack in made["packs"]] == ["t4"]


@pytest.mark.parametrize(
    ("words", "partition"),
    [
        (["model=llama2_7b"], "t4"),
        (["model=own", "model.source=acme/Llama-13B", "quant=none"], "a100"),
        (["model=llama2_7b", "cluster.partitions.a100.gpu=a100"], "a100"),
        (["model=llama2_7b", "cluster.partitions.urgent.gpu=a100"], "urgent"),
    ],
)
def test_packs_go_where_they_fit(cluster: Cluster, project: Path, words: list[str], partition: str) -> None:
    made = json.loads(plan(cluster, project, *words).stdout)
    assert [pack["partition"] for pack in made["packs"]] == [partition]
    assert made["packs"][0].keys() == {"id", "partition", "path", "slower", "runs", "forecast"}


def test_what_fits_nowhere_is_refused_before_the_queue(cluster: Cluster, project: Path) -> None:
    refused = plan(cluster, project, "model=own", "model.source=acme/Llama-34B", "quant=none")
    assert refused.returncode == 2
    assert "With quant=nf4 it would take" in " ".join(refused.stderr.split())
    assert cluster.ask("squeue", "--noheader") == ""


def test_a_partition_whose_nodes_are_drained_is_not_planned_for(cluster: Cluster, project: Path) -> None:
    # A node that is down comes back by itself.
    cluster.ask("scontrol", "update", "nodename=t4-[1-2]", "state=drain", "reason=test")
    try:
        made = json.loads(plan(cluster, project, "model=llama2_7b").stdout)
    finally:
        cluster.ask("scontrol", "update", "nodename=t4-[1-2]", "state=resume")
    assert [pack["partition"] for pack in made["packs"]] == ["a100"]


def test_a_cluster_that_requeues_nothing_by_itself_does_so_on_request(cluster: Cluster) -> None:
    """What `--requeue` is for, and what PreemptMode=CANCEL does all the same."""
    cluster.set(grace=0, kill_wait=2, requeue=False)
    asked, silent = (
        cluster.submit("sleep 300", "-p", "t4", "--gres=gpu:1", "--nodelist=t4-1", *more)
        for more in (["--requeue"], [])
    )
    cluster.wait("both to run", lambda: {cluster.state(job) for job in (asked, silent)} == {"RUNNING"})
    cluster.urgent("t4-1", seconds=1)
    cluster.wait_for(silent, "PREEMPTED")
    cluster.wait(
        "the other to run again", lambda: (cluster.state(asked), cluster.field(asked, "Restarts")) == ("RUNNING", "1")
    )
    cluster.set(grace=0, kill_wait=2, preempt_mode="CANCEL")
    cluster.urgent("t4-1", seconds=1)
    cluster.wait_for(asked, "PREEMPTED")
