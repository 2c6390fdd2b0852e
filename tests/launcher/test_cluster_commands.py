"""What the cluster's commands say, and what may be concluded from their silence."""

import os
import pwd
import time
from pathlib import Path

import pytest

from launcher.cluster.commands import CommandRefused, NoAnswer, answer_of, refusal, run_command, user_name
from launcher.cluster.partitions import explain_choice, on_slurm
from launcher.cluster.sbatch import _plain_environment
from launcher.cluster.states import SLURM_STATES, slurm_state
from launcher.config import ClusterConfig
from launcher.errors import ClusterError
from launcher.records import State
from stand_in import put_command


def test_a_refusal_differs_from_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(NoAnswer, match="not installed here"):
        run_command("squeue-of-nowhere")
    put_command(tmp_path, "squeue", "echo $LC_ALL $1", monkeypatch)
    assert run_command("squeue", "job") == "C job\n"
    put_command(tmp_path, "squeue", "echo 'squeue: error: Invalid user: nobody' >&2; exit 1", monkeypatch)
    with pytest.raises(CommandRefused, match="squeue refused: Invalid user: nobody"):
        run_command("squeue")
    assert answer_of("squeue") is None


def test_what_is_asked_does_not_depend_on_what_the_user_is_used_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Jobs elsewhere would seem gone, and be submitted again.
    monkeypatch.setenv("SQUEUE_PARTITION", "debug")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    # As after 'runuser -u'.
    monkeypatch.setenv("LOGNAME", "somebody-else")
    monkeypatch.setenv("USER", "somebody-else")
    put_command(tmp_path, "squeue", 'echo "$SQUEUE_PARTITION,$SLURM_TIME_FORMAT"', monkeypatch)
    assert run_command("squeue") == ",standard\n"
    assert user_name() == pwd.getpwuid(os.getuid()).pw_name


def test_what_a_job_asks_for_is_not_overruled_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SBATCH_", "SLURM_"))]:
        monkeypatch.delenv(name)

    def left(cluster: ClusterConfig) -> set[str]:
        with _plain_environment(cluster):
            return {name for name in os.environ if name.startswith(("SBATCH_", "SLURM_"))}

    names = {"SBATCH_PARTITION", "SBATCH_NO_REQUEUE", "SBATCH_ACCOUNT", "SLURM_CONF", "SLURM_CLUSTERS"}
    for name in names:
        monkeypatch.setenv(name, "x")
    assert left(ClusterConfig(kind="slurm")) == {"SBATCH_ACCOUNT", "SLURM_CONF", "SLURM_CLUSTERS"}
    assert left(ClusterConfig(kind="slurm", account="lab")) == {"SLURM_CONF", "SLURM_CLUSTERS"}
    # Inside of salloc.
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert left(ClusterConfig(kind="slurm")) == {"SBATCH_ACCOUNT", "SLURM_CONF"}
    assert names <= set(os.environ)


def test_a_command_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_command(tmp_path, "sacct", "exec sleep 30", monkeypatch)
    began = time.monotonic()
    with pytest.raises(NoAnswer, match="did not answer"):
        run_command("sacct", timeout=0.3)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "said",
    [
        "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        "sacct: error: Problem talking to the database: Connection refused",
    ],
)
def test_a_lost_answer_is_no_refusal(said: str) -> None:
    assert isinstance(refusal("sbatch", said), NoAnswer)


def test_slurms_words_are_in_one_table_and_others_are_unknown() -> None:
    assert slurm_state("PREEMPTED").state is State.STOPPED
    assert slurm_state("PREEMPTED").cause == "preempted"
    assert slurm_state("CANCELLED by 1000").state is State.CANCELLED
    assert slurm_state("NODE_FAIL+").cause == "node_fail"
    for word in ("", "A_WORD_OF_TOMORROW"):
        assert slurm_state(word).state is State.UNKNOWN
    failed = {word for word, meaning in SLURM_STATES.items() if meaning.state is State.FAILED}
    # Nothing else that Slurm does to a job is the job's failure.
    assert failed == {"FAILED", "OUT_OF_MEMORY"}
    # Only a result says that.
    assert not any(meaning.state is State.DONE for meaning in SLURM_STATES.values())


def test_the_choice_of_cluster_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = ClusterConfig(kind="auto")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not on_slurm(auto)
    put_command(tmp_path, "sinfo", "exit 1", monkeypatch)
    assert not on_slurm(auto)
    put_command(tmp_path, "sinfo", "echo 'Could not establish a configuration source' >&2; exit 1", monkeypatch)
    assert not on_slurm(auto)
    put_command(tmp_path, "sinfo", "echo 'Unable to contact slurm controller' >&2; exit 1", monkeypatch)
    with pytest.raises(ClusterError, match="cluster=local"):
        on_slurm(auto)
    assert "no Slurm here" in explain_choice(auto, slurm=False)
    put_command(tmp_path, "sinfo", "echo gpu", monkeypatch)
    assert on_slurm(auto)
    assert "Slurm answers here" in explain_choice(auto, slurm=True)
    local = ClusterConfig(kind="local")
    assert not on_slurm(local)
    assert "cluster=local" in explain_choice(local, slurm=False)
