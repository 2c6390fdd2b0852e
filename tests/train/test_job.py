"""A job as the cluster runs it: one process, one pack file, every ending with its cause on disk."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from json_lines import read_lines
from train.config import DataConfig, ModelConfig, parse_run_config
from train.data.source import data_fingerprint
from train.runtime.activity import doing, read_activity
from train.store.layout import CacheDir, PackDir, RunDir
from train.store.lease import read_lease
from train.store.storage import make_folder, read_json, write_json, write_text

pytestmark = pytest.mark.slow

MakePack = Callable[..., Path]


@pytest.fixture
def make_pack(tmp_path: Path, tiny_model: tuple[ModelConfig, CacheDir, Path]) -> MakePack:
    """Write the folders of a pack of two runs over builtin:tiny, and return the pack's file."""
    model, cache, _ = tiny_model
    rows = [{"instruction": f"Say {i} in {tmp_path}.", "input": "", "output": str(i)} for i in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))

    data = DataConfig(name="rows", source=str(tmp_path / "rows.json"), eval_rows=5)

    def make(**train: Any) -> Path:
        names = []
        for r in (2, 4):
            config = parse_run_config(
                {
                    "model": model.model_dump(),
                    "data": data.model_copy(update={"fingerprint": data_fingerprint(data)}).model_dump(),
                    "lora": {"r": r, "lora_alpha": 8.0, "target_modules": ["q_proj"]},
                    "quant": {"load_in_4bit": True},
                    "train": {"learning_rate": 1e-3, "batch_size": 2, "max_steps": 3, "save_steps": 2} | train,
                }
            )
            run = RunDir(make_folder(tmp_path / "sweep" / f"r{r}-{config.run_id()}"))
            write_text(run.config, yaml.safe_dump(config.model_dump()))
            names.append(run.path.name)
        pack = make_folder(tmp_path / "sweep" / "jobs" / "p1") / "pack.json"
        write_json(pack, {"id": "p1", "sweep_dir": str(tmp_path / "sweep"), "cache": str(cache.path), "runs": names})
        return pack

    return make


def start(pack: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "train.job", str(pack)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def start_two(pack: Path, name: str) -> list[subprocess.Popen[str]]:
    """The two processes of a job, as torchrun starts them; on the CPU where there are not two GPUs to give them."""
    variables = {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": name}
    if torch.cuda.device_count() < 2:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "train.job", str(pack)]
    return [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | variables | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]


def run_job(pack: Path) -> tuple[str, str]:
    """Standard output and error of a job run to its end; the process itself never fails."""
    process = start(pack)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out, err


def runs_of(pack: Path) -> list[RunDir]:
    content = read_json(pack)
    return [RunDir(Path(content["sweep_dir"]) / name) for name in content["runs"]]


def causes(pack: Path) -> list[list[str]]:
    return [[line["cause"] for line in read_lines(run.attempts)] for run in runs_of(pack)]


def test_from_pack_file_to_results_and_not_again(make_pack: MakePack) -> None:
    pack, process_began = make_pack(), time.time()
    out, _ = run_job(pack)
    assert "trainable params: " in out
    assert "first step done " in out
    assert causes(pack) == [["done"], ["done"]]
    assert not (pack.parent / "activity.json").exists()
    for run in runs_of(pack):
        result = read_json(run.result)
        assert result["run_id"] == run.id
        assert result["steps"] == 3
        assert result["eval_loss"] > 0
        assert result["attempts"] == 1
        assert not run.lease.exists()
        assert not run.checkpoints.exists()
        first, *later = read_lines(run.pace)
        assert first["step"] == 1
        assert first["seconds_to_first_step"] == pytest.approx(sum(first["start_seconds"].values()), abs=0.01)
        assert {"importing", "loading", "evaluating", "saving", "first_step"} <= first["start_seconds"].keys()
        assert 0 < first["seconds_to_first_step"] <= first["time"] - process_began + 1
        assert not any("start_seconds" in line for line in later)
    began = time.monotonic()
    out, _ = run_job(pack)
    assert "nothing to train" in out
    assert time.monotonic() - began < 10, "a job that Slurm requeued after its runs were done has to end at once"


def test_a_signal_saves_and_the_next_attempt_goes_on(make_pack: MakePack) -> None:
    pack = make_pack(max_steps=100_000, save_steps=100_000)
    process = start(pack)
    first = runs_of(pack)[0]
    deadline = time.monotonic() + 120
    while doing(read_activity(PackDir(pack.parent)), read_lease(first)) not in {"importing", "loading"}:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    while not any("loss" in line for line in read_lines(first.journal)):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "preempted: SIGTERM" in out
    (line,) = read_lines(first.attempts)
    assert line["cause"] == "preempted"
    assert line["last_step"] == read_lines(first.journal)[-1]["step"] > 0
    assert first.checkpoint(line["last_step"]).exists()
    assert not first.lease.exists()


def test_a_signal_during_loading_ends_the_job_before_training(make_pack: MakePack) -> None:
    pack = make_pack()
    process = start(pack)
    assert process.stdout is not None
    assert "importing torch" in process.stdout.readline()
    process.send_signal(signal.SIGUSR2)
    process.communicate(timeout=60)
    assert causes(pack) == [["preempted"], ["preempted"]]
    assert not any(run.journal.exists() for run in runs_of(pack))


def test_a_cancelled_run_leaves_and_the_others_go_on(make_pack: MakePack) -> None:
    pack = make_pack(max_steps=100_000, save_steps=100_000)
    cancelled, other = runs_of(pack)
    write_json(cancelled.cancel_request, {"time": 0})
    process = start(pack)
    deadline = time.monotonic() + 120
    while not cancelled.attempts.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    before = len(read_lines(other.journal))
    while len(read_lines(other.journal)) == before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert causes(pack) == [["cancelled"], ["preempted"]]


def test_data_that_changed_since_the_plan_are_refused(make_pack: MakePack, tmp_path: Path) -> None:
    pack = make_pack()
    (tmp_path / "rows.json").write_text('[{"instruction": "Say 1.", "output": "2"}]')
    out, _ = run_job(pack)
    assert "ended: bad_input" in out
    assert "rows.json changed since this run was planned" in out
    assert causes(pack) == [["bad_input"], ["bad_input"]]


@pytest.mark.parametrize("file", ["a log", "a checkpoint"])
def test_a_full_disk_ends_the_run_that_met_it_and_no_other(make_pack: MakePack, file: str) -> None:
    """/dev/full answers every write as a full disk does; a disk of one page is full when a checkpoint comes."""
    pack = make_pack()
    first, second = runs_of(pack)
    command = [sys.executable, "-m", "train.job", str(pack)]
    if file == "a log":
        os.symlink("/dev/full", first.pace)
    else:
        mount = 'mount -t tmpfs -o size=4k,mode=700 none "$0" && "$@"'
        folder = str(make_folder(first.checkpoints))
        command = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, folder, *command]
    job = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "ends: storage" in job.stdout
    assert "the disk is full" in job.stdout
    assert causes(pack) == [["storage"], ["done"]]
    assert not first.result.exists()
    assert second.result.exists()
    assert not first.lease.exists()


def test_a_folder_that_is_gone_before_the_job_begins_stops_no_other(make_pack: MakePack) -> None:
    pack = make_pack()
    first, second = runs_of(pack)
    shutil.rmtree(first.path)
    out, _ = run_job(pack)
    assert "its folder is gone" in out
    assert second.result.exists()
    assert not first.path.exists()


def test_a_run_that_another_process_trains_is_left_alone(make_pack: MakePack) -> None:
    pack = make_pack(max_steps=100_000)
    owner = start(pack)
    deadline = time.monotonic() + 120
    while not runs_of(pack)[1].lease.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    out, _ = run_job(pack)
    assert f"is being trained by process {owner.pid}" in out
    assert owner.poll() is None
    owner.send_signal(signal.SIGTERM)
    owner.communicate(timeout=60)


def test_two_processes_share_a_job_and_one_of_them_writes(make_pack: MakePack) -> None:
    pack = make_pack()
    (out, _), (other, _) = [process.communicate(timeout=240) for process in start_two(pack, "first")]
    assert "trainable params: " in out
    assert other == "done\n"
    assert causes(pack) == [["done"], ["done"]]
    journals = [run.journal.read_text() for run in runs_of(pack)]
    (again, _), (other, _) = [process.communicate(timeout=240) for process in start_two(pack, "second")]
    assert "nothing to train" in again
    assert other == "nothing to train\n"
    assert [run.journal.read_text() for run in runs_of(pack)] == journals


def test_two_processes_end_together_whatever_ends_one(make_pack: MakePack, tmp_path: Path) -> None:
    pack = make_pack()
    (tmp_path / "rows.json").write_text('[{"instruction": "Say 1.", "output": "2"}]')
    (out, _), (other, _) = [process.communicate(timeout=240) for process in start_two(pack, "first")]
    assert "ended: bad_input" in out
    assert other.startswith("bad_input")
    assert causes(pack) == [["bad_input"], ["bad_input"]]


def test_a_job_that_slurm_stops_while_it_waits_for_a_run_is_queued_again(
    make_pack: MakePack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost node leaves leases that look alive for a while. What ends while it is preempted, Slurm does not queue again."""
    pack = make_pack()
    for name in read_json(pack)["runs"]:
        lease = {
            "token": "t",
            "host": "lost",
            "pid": 1,
            "pid_started": 1,
            "job": "12",
            "attempt": 1,
            "started": time.time(),
        }
        write_json(RunDir(tmp_path / "sweep" / name).lease, lease)
    scontrol = make_folder(tmp_path / "bin") / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    for variable in ("SUBMITIT_LOCAL_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(variable, raising=False)
    job = start(pack)
    assert job.stdout is not None
    assert "trained by process 1 on lost" in job.stdout.readline()
    job.send_signal(signal.SIGTERM)
    assert "put back into the queue" in job.communicate(timeout=60)[0]
    assert (tmp_path / "asked").read_text().splitlines()[-1] == "requeue 13"


@pytest.mark.parametrize("name", ["attempts.jsonl", "config.yaml"])
def test_a_run_with_a_damaged_file_is_left_alone(make_pack: MakePack, name: str) -> None:
    pack = make_pack()
    first, second = runs_of(pack)
    (first.path / name).write_text("[]\n")
    out, _ = run_job(pack)
    assert f"{first.path.name} is left alone: {first.path / name} is damaged" in out
    assert second.result.exists()
    assert not first.result.exists()
    assert not first.lease.exists()
