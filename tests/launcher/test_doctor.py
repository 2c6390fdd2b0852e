"""What the doctor says of clusters with other settings, and of a machine without Slurm."""

import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launcher.cluster.inventory import Inventory
from launcher.cluster.parsing import LivePartition, Qos, Settings, parse_associations
from launcher.config import ClusterConfig
from launcher.doctor.advice import cluster_advice
from launcher.doctor.examine import NO_SLURM, examine
from launcher.doctor.machine import look_at_disk, look_at_machine, machine_advice
from launcher.doctor.site import site_text, write_site
from stand_in import put_command
from train.errors import BadInput
from train.section import parse_section

SETTINGS = Settings("22.05.8", "box", True, "partition_prio", "REQUEUE", 5, 501, True, False)
T4 = LivePartition("t4", True, True, 1440, {"t4": 4}, frozenset(), preempt_mode="REQUEUE", grace=10)
MIXED = LivePartition("gpu", True, False, None, {"a100": 4, "v100": 2}, frozenset())


def warnings(
    settings: Settings | None = SETTINGS, partition: LivePartition = T4, limits: str = "lab|normal||\n"
) -> str:
    advice = cluster_advice(Inventory([partition], settings, parse_associations(limits), []))
    return " ".join(item.text for item in advice if item.level == "warning")


def texts(settings: Settings, limits: str = "lab|normal||\n", qos: list[Qos] | None = None) -> str:
    return " ".join(item.text for item in cluster_advice(Inventory([T4], settings, parse_associations(limits), qos)))


def test_a_kind_cluster_has_no_warning() -> None:
    assert warnings() == ""
    assert "10 s" in texts(SETTINGS)
    assert "continues from its last checkpoint" in texts(SETTINGS)


@pytest.mark.parametrize(
    ("settings", "partition", "words"),
    [
        (SETTINGS, replace(T4, grace=0), ["GraceTime=0", "5 s (KillWait)", "train.save_steps"]),
        (
            replace(SETTINGS, preempt_mode="CANCEL"),
            replace(T4, preempt_mode="CANCEL"),
            [
                "PreemptMode=CANCEL",
                "asks to be requeued once it has saved",
                "If it has no time to ask",
                "launcher resume",
            ],
        ),
        (None, T4, ["unknown"]),
        (SETTINGS, replace(T4, up=False), ["no job would start"]),
        (SETTINGS, replace(T4, gpus={}), ["no job would start"]),
    ],
)
def test_a_setting_that_costs_work_is_a_warning(
    settings: Settings | None, partition: LivePartition, words: list[str]
) -> None:
    assert all(word in warnings(settings, partition) for word in words)


def test_a_user_without_account_is_warned() -> None:
    assert "no account" in warnings(limits="")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"requeue": False}, "JobRequeue=0"),
        ({"accounting": False}, "no accounting"),
        ({"user_signal": True}, "send_user_signal"),
        ({"preempt_type": "none"}, "Jobs are not preempted"),
        ({"max_array_size": 1001}, "more than 1,001 jobs"),
        ({"max_array_size": 0}, "no job arrays"),
    ],
)
def test_every_setting_has_its_sentence(change: dict[str, object], words: str) -> None:
    assert words not in texts(SETTINGS)
    assert words in texts(replace(SETTINGS, **change))


def test_limits_are_shown_with_their_account() -> None:
    assert "Account lab lets you have 5 jobs in the queue and 2 running jobs" in texts(SETTINGS, "lab|normal|2|5\n")


def test_grace_times_of_a_quality_of_service() -> None:
    text = texts(replace(SETTINGS, preempt_type="qos"), qos=[Qos("low", 60, (), None)])
    assert "low 60 s" in text


def test_a_written_site_composes_and_describes_the_cluster(tmp_path: Path) -> None:
    values = yaml.safe_load(site_text("site", [T4, MIXED]))
    cluster = parse_section(ClusterConfig, values, "cluster")
    t4 = cluster.partitions["t4"]
    assert (cluster.kind, t4.gpu, t4.memory_gib, t4.gpus, t4.max_minutes) == ("slurm", "t4", 15.0, 4, 1440)
    assert cluster.partitions["gpu"].gpu is None
    assert t4.tier == 1
    (tmp_path / "cluster").mkdir()
    inventory = Inventory([T4], SETTINGS, None, None)
    path = write_site("site", inventory, tmp_path)
    assert yaml.safe_load(path.read_text()) == yaml.safe_load(site_text("site", [T4]))
    with pytest.raises(BadInput, match="exists already"):
        write_site("site", inventory, tmp_path)


@pytest.mark.parametrize(
    ("name", "inventory"),
    [("../x", Inventory([T4], None, None, None)), ("site", None), ("site", Inventory([], None, None, None))],
)
def test_a_site_that_cannot_be_written_is_refused(tmp_path: Path, name: str, inventory: Inventory | None) -> None:
    with pytest.raises(BadInput, match="write"):
        write_site(name, inventory, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_is_described_before_its_folder_exists(tmp_path: Path) -> None:
    disk = look_at_disk(tmp_path / "not" / "yet")
    assert disk.writable
    assert disk.free_gib > 0
    assert disk.kind != "unknown"
    assert look_at_disk(Path("/proc/sys")).kind == "proc"


@pytest.mark.parametrize(
    ("torch", "slurm", "warned"), [("2.13.0+cpu", True, True), ("2.13.0+cpu", False, False), ("2.13.0", True, False)]
)
def test_a_torch_that_cannot_use_the_clusters_gpus_is_warned_of(
    tmp_path: Path, torch: str, slurm: bool, warned: bool
) -> None:
    machine = look_at_machine(tmp_path, tmp_path)
    machine = replace(machine, packages=machine.packages | {"torch": torch})
    advice = [item.level for item in machine_advice(machine, slurm=slurm) if "cannot use GPUs" in item.text]
    assert advice == ["warning"] * warned


def test_a_machine_without_slurm_is_reported(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher", "doctor", "--json", f"root={tmp_path}/runs", f"cache={tmp_path}/cache"]
    environment = {"PATH": "/nowhere", "HOME": str(tmp_path)}
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=environment)
    document = json.loads(found.stdout)
    assert document["slurm"] is None
    assert document["machine"]["device"]["kind"] == "cpu"
    assert document["machine"]["packages"]["torch"]
    assert document["wandb"]["key_found"] is False
    assert any("No Slurm answers" in advice["text"] for advice in document["advice"])
    assert list(tmp_path.iterdir()) == []


def test_the_key_of_wandb_is_used_and_never_shown(tmp_path: Path) -> None:
    # Takes the connection and never answers.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        key = "k" * 40
        environment = {
            "PATH": "/nowhere", "HOME": str(tmp_path), "WANDB_API_KEY": key,
            "WANDB_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
        }  # fmt: skip
        command = [sys.executable, "-m", "launcher", "doctor", "--json", f"root={tmp_path}/runs", f"cache={tmp_path}/c"]
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=environment)
    wandb = json.loads(found.stdout)["wandb"]
    assert wandb["key_found"]
    assert "did not answer" in wandb["trouble"] or "timed out" in wandb["trouble"]
    assert key not in found.stdout + found.stderr


def test_an_unknown_word_is_refused() -> None:
    command = [sys.executable, "-m", "launcher", "doctor", "wirte=site"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (refused.returncode, "wirte=site" in refused.stderr) == (2, True)


def test_the_doctor_says_of_a_silent_controller_what_a_sweep_would_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_command(tmp_path, "sinfo", "echo 'Unable to contact slurm controller' >&2; exit 1", monkeypatch)
    found = [advice for advice in examine(tmp_path, tmp_path).advice if "controller" in advice.text]
    assert [advice.level for advice in found] == ["warning"]
    put_command(tmp_path, "sinfo", "echo 'Could not establish a configuration source' >&2; exit 1", monkeypatch)
    assert any(advice.text == NO_SLURM for advice in examine(tmp_path, tmp_path).advice)
