"""What would be submitted, as values: which arrays, with which parameters, and the script that submitit makes of them."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from submitit import SlurmExecutor

from launcher.cluster.arrays import ArrayRequest, JobNames, array_requests, split
from launcher.cluster.requests import Placement, afterwards_parameters, job_python, refuse_pattern, sbatch_parameters
from launcher.config import ClusterConfig
from launcher.records import Forecast, JobSlots, Pack
from stand_in import put_command
from train.errors import BadInput
from train.store.layout import ArrayDir

SLURM = ClusterConfig(kind="slurm")
NAMES = JobNames("rank", "5eed")
REQUEST = ArrayRequest("0a1b2c3d", "rank.0a1b2c3d", "t4", "gpu:t4:1", ("p1", "p2"), 90, 2)


def pack(number: int, partition: str = "t4", minutes: int | None = 60) -> Pack:
    return Pack(f"p{number}", partition, (f"r{number}",), Forecast(1.0, 60.0, 0.1, None), f"gpu:{partition}:1", minutes)


def test_an_array_per_partition_cut_at_the_clusters_limit() -> None:
    packs = [*(pack(i) for i in range(5)), *(pack(i, "a100", minutes=90 + i) for i in range(5, 8))]
    requests = array_requests(NAMES, packs, JobSlots(6), largest=3)
    assert [(r.partition, len(r.packs)) for r in requests] == [("t4", 3), ("t4", 2), ("a100", 3)]
    assert [name for request in requests for name in request.packs] == [pack.id for pack in packs]
    assert sum(request.parallel for request in requests) == 6
    assert [request.minutes for request in requests] == [60, 60, 97]
    assert len({request.name for request in requests}) == 3
    assert all(request.name == f"rank.{request.token}" for request in requests)
    assert not any(request.after or request.follows for request in requests)


def test_one_pack_without_a_limit_leaves_the_array_without() -> None:
    (request,) = array_requests(NAMES, [pack(1), pack(2, minutes=None)], JobSlots(8), largest=9)
    assert request.minutes is None


def test_arrays_without_a_lane_wait_for_those_that_have_one() -> None:
    packs = [pack(i, partition) for i, partition in enumerate(["t4", "a100", "h100", "h200"])]
    requests = array_requests(NAMES, packs, JobSlots(2, (("12", 2),), waits=True), largest=9)
    tokens = [request.token for request in requests]
    assert [request.follows for request in requests] == [(), (), (tokens[0],), (tokens[1],)]
    assert [(request.parallel, request.after) for request in requests] == [(1, ("12",))] * 4


def whole(parallel: int) -> ArrayRequest:
    return replace(REQUEST, packs=tuple("abcde"), parallel=parallel, after=("12",))


def test_halves_are_the_same_jobs_under_other_names() -> None:
    request = whole(3)
    first, second = split([request], NAMES)
    assert (first.packs, second.packs) == (("a", "b", "c"), ("d", "e"))
    assert len({request.name, first.name, second.name}) == 3
    assert (first.parallel, second.parallel) == (2, 1)
    assert (first.after, second.after, second.follows) == (("12",), ("12",), ())


def test_halves_run_no_more_jobs_at_once_than_the_whole_and_hold_up_who_waited_for_it() -> None:
    request = whole(1)
    waiting = replace(REQUEST, token="other", follows=(request.token,))
    first, second, other = split([request, waiting], NAMES)
    assert (first.parallel, second.parallel, second.follows) == (1, 1, (first.token,))
    assert other.follows == (first.token, second.token)


def script(cluster: ClusterConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: Sequence[str] = ()) -> str:
    """What sbatch would get, by submitit itself; srun is only looked for."""
    put_command(tmp_path, "srun", "exit 1", monkeypatch)
    array = ArrayDir(tmp_path / "arrays" / "0a1b2c3d")
    executor = SlurmExecutor(array.submitit, python=job_python(tmp_path / "code", cluster.container))
    executor.update_parameters(**sbatch_parameters(REQUEST, cluster, array, before))
    return str(executor._make_submission_file_text(executor._submitit_command_str, "uid"))


def test_what_the_user_set_reaches_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wishes = {
        "account": "lab",
        "qos": "low",
        "reservation": "course",
        "constraint": "nvlink",
        "modules": ["cuda/12"],
        "setup": ["source env"],
        "container": "apptainer exec --nv image.sif",
        "cpus": 6,
        "ram_gib": 1.5,
    }
    lines = script(SLURM.model_copy(update=wishes), tmp_path, monkeypatch).splitlines()
    options = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert options >= {
        "account=lab", "qos=low", "reservation=course", "constraint=nvlink", "cpus-per-task=6", "mem=1536M",
        "partition=t4", "gres=gpu:t4:1", "time=90", "requeue", "open-mode=append", "signal=USR2@120",
        "job-name=rank.0a1b2c3d",
    }  # fmt: skip
    # Submitit's own, which some clusters refuse.
    assert not any(option.startswith("wckey") for option in options)
    assert lines.index("module load cuda/12") < lines.index("source env")
    (srun,) = (line for line in lines if line.startswith("srun"))
    assert "--open-mode=append" in srun
    assert "apptainer exec --nv image.sif sh -c" in srun


def test_an_array_waits_for_those_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "#SBATCH --dependency=afterany:12:13\n" in script(SLURM, tmp_path, monkeypatch, ["12", "13"])


def test_a_job_on_several_gpus_is_a_task_for_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = script(SLURM.model_copy(update={"gpus_per_job": 4, "cpus": 6}), tmp_path, monkeypatch).splitlines()
    options = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert options >= {"nodes=1", "ntasks-per-node=4", "gres=gpu:t4:4", "cpus-per-task=2"}


def test_nothing_is_asked_for_that_nobody_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = script(SLURM, tmp_path, monkeypatch)
    for word in ("account", "qos", "reservation", "constraint", "mem=", "module load", "dependency"):
        assert word not in text


def test_the_job_is_deaf_to_signals_until_its_handlers_stand(tmp_path: Path) -> None:
    words = shlex.split(job_python(tmp_path, None))
    assert words[:2] == ["sh", "-c"]
    assert "trap '' TERM USR1 USR2" in words[2]
    assert f"PYTHONPATH={tmp_path}" in " ".join(words)
    assert "PYTHONSAFEPATH=1" in words


def test_the_report_waits_for_all_jobs_however_they_end() -> None:
    parameters = afterwards_parameters(NAMES.report, SLURM, Placement("t4", None), ["12", "13"])
    assert parameters["dependency"] == "afterany:12:13"
    assert "gres" not in parameters
    assert (parameters["job_name"], parameters["time"]) == (NAMES.report, 30)


@pytest.mark.parametrize(("allowed", "asked"), [(10, 10), (30, 30), (1440, 30)])
def test_the_report_asks_for_no_longer_limit_than_the_partition_allows(allowed: int, asked: int) -> None:
    assert afterwards_parameters(NAMES.report, SLURM, Placement("t4", allowed), ["12"])["time"] == asked


def test_the_key_of_weights_and_biases_is_in_no_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary" * 8)
    assert "canary" not in script(SLURM, tmp_path, monkeypatch)


def test_a_root_that_slurm_would_read_as_a_pattern_is_refused(tmp_path: Path) -> None:
    """A real 22.05 wrote the logs of ``50%j`` to ``503_0``. Of spaces, quotes, ``#``, ``$`` and the like it makes nothing."""
    refuse_pattern(tmp_path / 'it\'s #1 $x (a) "b" `c`; &' / "rank")
    for odd in ("50%j", "back\\slash"):
        with pytest.raises(BadInput, match="root="):
            refuse_pattern(tmp_path / odd / "rank")
