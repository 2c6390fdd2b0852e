import os
import signal
import stat
import time
from pathlib import Path

import pytest
import yaml

from json_lines import read_lines
from launcher.cluster.local import LocalJob, LocalQueue, log_files, refuse_too_few_gpus, start_job, visible_gpus
from launcher.config import ClusterConfig
from launcher.track.logs import LogTailer
from stand_in import install, put_command, wait_for
from train.errors import BadInput
from train.store.layout import PackDir, RunDir, SweepDir
from train.store.lease import process_started, read_lease
from train.store.storage import make_folder, read_json, write_json, write_text


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("code"))


CONFIG = {
    "model": {"name": "tiny", "source": "builtin:tiny"},
    "data": {"name": "tasks", "source": "builtin:tasks"},
    "lora": {"r": 8, "lora_alpha": 16.0, "target_modules": "all-linear"},
    "quant": {"load_in_4bit": False},
}
TRAIN = {"learning_rate": 1e-3, "batch_size": 4, "seed": 0, "max_steps": 5}


@pytest.fixture
def sweep(tmp_path: Path) -> SweepDir:
    return SweepDir(make_folder(tmp_path / "runs" / "sweep"))


def make_pack(sweep: SweepDir, name: str, seconds_per_step: float = 0.0) -> PackDir:
    """A pack of one run with five steps of the stand-in."""
    run = RunDir(make_folder(sweep.path / f"{name}-0123456789"))
    write_text(run.config, yaml.safe_dump(CONFIG | {"train": TRAIN | {"weight_decay": seconds_per_step}}))
    pack = sweep.pack(name)
    make_folder(pack.path)
    write_json(pack.pack, {"id": name, "sweep_dir": str(sweep.path), "cache": "cache", "runs": [run.path.name]})
    return pack


def end_of(job: LocalJob) -> RunDir:
    wait_for(lambda: job.ended)
    return job.runs()[0]


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_a_job_trains_from_the_frozen_code_and_leaves_no_process(sweep: SweepDir, code: Path) -> None:
    before = children()
    job = start_job(make_pack(sweep, "p"), code, gpus=())
    facts = read_json(job.pack.job)
    assert facts["executor"] == "local"
    assert process_started(facts["pid"]) == facts["pid_started"]
    run = end_of(job)
    assert run.result.exists()
    assert read_lines(run.attempts)[-1]["job"] == job.id
    assert "loading the stand-in" in LogTailer().new_lines(job.pack)
    assert children() == before
    for file in log_files(job.pack):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_job_survives_ctrl_c_and_hang_up(sweep: SweepDir, code: Path) -> None:
    ours = signal.getsignal(signal.SIGINT)
    job = start_job(make_pack(sweep, "p", seconds_per_step=0.2), code, gpus=())
    wait_for(job.pids)
    for number in (signal.SIGINT, signal.SIGHUP):
        os.kill(int(job.id), number)
    (task,) = job.pids()
    os.kill(task, signal.SIGHUP)
    assert end_of(job).result.exists()
    # Only jobs are deaf (so are we, where nohup started the tests).
    assert signal.getsignal(signal.SIGINT) is ours


def test_jobs_are_asked_to_stop_by_their_leases(sweep: SweepDir, code: Path) -> None:
    job = start_job(make_pack(sweep, "p", seconds_per_step=0.2), code, gpus=())
    wait_for(job.pids)
    for pid in job.pids():
        os.kill(pid, signal.SIGINT)
    run = end_of(job)
    assert read_lines(run.attempts)[-1]["cause"] == "preempted"
    assert job.pids() == set()


def test_packs_take_turns_and_cancelled_ones_are_left_out(sweep: SweepDir, code: Path) -> None:
    packs = [make_pack(sweep, name) for name in ("a", "b", "c")]
    write_json(RunDir(sweep.path / "b-0123456789").cancel_request, {"time": time.time()})
    queue = LocalQueue(packs, code, slots=1, gpus=[])
    order: list[LocalJob] = []
    while queue.busy:
        order += queue.advance()
        assert len(queue.running) <= 1
        time.sleep(0.05)
    assert [job.pack.path.name for job in order] == ["a", "c"]
    assert all(job.runs()[0].result.exists() for job in order)
    assert not packs[1].job.exists()


def test_each_job_gets_a_gpu_of_its_own(sweep: SweepDir, code: Path) -> None:
    packs = [make_pack(sweep, name, seconds_per_step=5.0) for name in ("a", "b", "c")]
    queue = LocalQueue(packs, code, slots=8, gpus=["GPU-one", "1"])
    queue.advance()
    wait_for(lambda: all(job.pids() for job in queue.running))
    seen = {}
    for job in queue.running:
        (pid,) = job.pids()
        environment = dict(
            line.split("=", 1) for line in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in line
        )
        seen[job.pack.path.name] = environment["CUDA_VISIBLE_DEVICES"]
        os.kill(pid, signal.SIGKILL)
    assert seen == {"a": "GPU-one", "b": "1"}
    assert len(queue.waiting) == 1
    for job in queue.running:
        end_of(job)
        lease = read_lease(job.runs()[0])
        assert lease is not None
        assert not lease.alive()


def test_a_job_on_two_gpus_is_two_processes_that_both_see_them(sweep: SweepDir, code: Path) -> None:
    packs = [make_pack(sweep, name) for name in ("a", "b")]
    queue = LocalQueue(packs, code, slots=8, gpus=["0", "1", "2"], gpus_per_job=2)
    assert queue.advance() == []
    (job,) = queue.running
    assert job.gpus == ("0", "1")
    wait_for(lambda: job.ended)
    assert len(list(job.pack.submitit.glob("*_log.out"))) == 2


def test_more_gpus_than_there_are_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    refuse_too_few_gpus(ClusterConfig(kind="local", gpus_per_job=2))
    with pytest.raises(BadInput, match="gpus_per_job=3, and this machine has 2"):
        refuse_too_few_gpus(ClusterConfig(kind="local", gpus_per_job=3))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    refuse_too_few_gpus(ClusterConfig(kind="local", gpus_per_job=3))


@pytest.mark.parametrize(("setting", "gpus"), [("", []), ("-1", []), ("0,2", ["0", "2"]), ("GPU-x", ["GPU-x"])])
def test_the_users_choice_of_gpus_is_respected(setting: str, gpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    assert visible_gpus() == gpus


def test_gpus_are_counted_by_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    put_command(tmp_path, "nvidia-smi", "echo 'GPU 0: H200 (UUID: a)'; echo 'GPU 1: H200 (UUID: b)'", monkeypatch)
    assert visible_gpus() == ["0", "1"]
    put_command(tmp_path, "nvidia-smi", "echo no driver; exit 9", monkeypatch)
    assert visible_gpus() == []
