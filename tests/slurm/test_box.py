"""The cluster in a box is what the other tests take it for."""

from __future__ import annotations

import shutil
import subprocess
import time

import pytest

from real_cluster import Cluster, box, cluster_folder
from slurm.daemons import processes_of
from slurm.program import arguments_of
from slurm.settings import Folder


def test_comes_up_twice_in_a_row_and_leaves_no_process(cluster: Cluster) -> None:
    # A second cluster, beside the first.
    folder = cluster_folder()
    for _ in range(2):
        begin = time.monotonic()
        answer = box(folder, "up", "--kill-wait", "2")
        seconds = time.monotonic() - begin
        assert answer.stdout == f"export SLURM_CONF={folder.conf}\n"
        assert seconds < 30
        box(folder, "status")
        job = _stubborn_job(folder)
        assert job.returncode == 0, job.stderr
        name = next(
            line.split("=")[1] for line in folder.conf.read_text().splitlines() if line.startswith("ClusterName")
        )
        assert processes_of(folder, name)
        box(folder, "down")
        assert not processes_of(folder, name)
        assert box(folder, "status", check=False).returncode == 1
    shutil.rmtree(folder.path)
    assert cluster.ask("sinfo", "--noheader", "--format=%P %a") == "t4* up\na100 up\nurgent up"


@pytest.mark.parametrize(
    "words", [["--folder", "/a", "restart", "slurmd-t4-1"], ["restart", "slurmd-t4-1", "--folder", "/a"]]
)
def test_the_folder_is_named_before_the_verb_or_after_it(words: list[str]) -> None:
    assert vars(arguments_of(words)) == {"folder": "/a", "verb": "restart", "daemon": "slurmd-t4-1"}


def _stubborn_job(folder: Folder) -> subprocess.CompletedProcess[str]:
    """A running job whose processes ignore SIGTERM or have left its session."""
    shell = "setsid sleep 600 & trap '' TERM; sleep 600 & sleep 600"
    return subprocess.run(
        ["srun", "--partition=t4", "--gres=gpu:1", "--immediate=20", "bash", "-c", f"({shell}) & sleep 1"],
        env={"SLURM_CONF": str(folder.conf), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_jobs_of_an_ordinary_user_get_typed_gpus_and_are_recorded(cluster: Cluster) -> None:
    out = cluster.readable / "gpu.txt"
    out.touch(mode=0o666)
    out.chmod(0o666)
    job = cluster.submit(
        f'echo "$(hostname) $CUDA_VISIBLE_DEVICES $(id -un)" > {out}', "-p", "a100", "--gres=gpu:a100:2"
    )
    cluster.wait_for(job, "COMPLETED")
    host, gpus, user = out.read_text().split()
    assert (host.startswith("a100-"), gpus, user) == (True, "0,1", cluster.user)
    cluster.wait("sacct's row", lambda: "COMPLETED" in cluster.ask("sacct", "-X", "-n", "-j", job, "-o", "State"))


def test_an_urgent_job_requeues_what_is_in_its_way(cluster: Cluster) -> None:
    cluster.set(grace=0, kill_wait=2)
    job = cluster.submit("sleep 300", "-p", "t4", "--gres=gpu:1", "--nodelist=t4-1", "--requeue")
    cluster.wait_for(job, "RUNNING")
    urgent = cluster.urgent("t4-1", seconds=1)
    cluster.wait_for(urgent, "COMPLETED")
    cluster.wait_for(job, "RUNNING")
    assert cluster.field(job, "Restarts") == "1"


def test_settings_change_under_running_jobs(cluster: Cluster) -> None:
    job = cluster.submit("sleep 300", "-p", "t4", "--gres=gpu:1")
    cluster.wait_for(job, "RUNNING")
    cluster.set(grace=3, kill_wait=7, requeue=False, max_array_size=40, max_time=90)
    config = dict(
        line.split("=", 1)
        for line in cluster.ask("scontrol", "show", "config").replace(" ", "").splitlines()
        if "=" in line
    )
    assert (config["KillWait"], config["JobRequeue"], config["MaxArraySize"]) == ("7sec", "0", "40")
    partition = cluster.ask("scontrol", "--oneliner", "show", "partition", "a100")
    assert {"GraceTime=3", "MaxTime=01:30:00"} <= set(partition.split())
    cluster.set(accounting=False)
    assert "disabled" in cluster.as_user("sacct", check=False).stderr
    cluster.set()
    assert cluster.state(job) == "RUNNING"


def test_a_killed_daemon_is_noticed_and_started_again(cluster: Cluster) -> None:
    cluster.kill_daemon("slurmd-t4-2")
    status = box(cluster.folder, "status", check=False)
    assert (status.returncode, "missing slurmd-t4-2" in status.stdout) == (1, True)
    cluster.restart("slurmd-t4-2")
    box(cluster.folder, "status")


def test_a_submit_limit_holds_for_the_ordinary_user(cluster: Cluster) -> None:
    cluster.set(submit_limit=2)
    refused = cluster.as_user("sbatch", "--array=0-2", "--wrap=sleep 1", check=False)
    assert (refused.returncode, "AssocMaxSubmitJobLimit" in refused.stderr) == (1, True)
    cluster.set()
    cluster.submit("sleep 1", "--array=0-2")


def test_the_user_runs_the_projects_python(cluster: Cluster) -> None:
    project = cluster.project("imports")
    assert "usage" in cluster.launcher(project, "-h").stdout.lower()
