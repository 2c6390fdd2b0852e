"""Where configuration files are found, and that nothing in the user's folder is imported instead of this program."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from launcher import installation
from launcher.cli import main
from launcher.compose.composer import compose
from launcher.installation import SOURCE_DIR, child_environment, conf_folders, find_groups, shipped_conf
from launcher.submit.freeze import freeze_code
from train.errors import BadInput
from train.store.layout import SweepDir

DECOY = "raise SystemExit('a decoy was imported')\n"
CHILD = """
import subprocess, sys
from launcher.installation import child_environment
subprocess.run([sys.executable, "-m", "train.mirror"], env=child_environment())
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_option(folder: Path, option: str, text: str) -> None:
    path = folder / "conf" / f"{option}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_checkout_has_its_configuration_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SOURCE_DIR)
    assert conf_folders() == (SOURCE_DIR / "conf",)


def test_a_link_to_the_shipped_folder_doubles_nothing(folder: Path) -> None:
    (folder / "conf").symlink_to(shipped_conf())
    assert conf_folders() == (shipped_conf(),)


def test_a_wheel_has_its_configuration_in_the_launcher(tmp_path: Path) -> None:
    (tmp_path / "launcher" / "conf").mkdir(parents=True)
    # Another package's.
    (tmp_path / "conf").mkdir()
    assert shipped_conf(tmp_path) == tmp_path / "launcher" / "conf"


def test_options_of_the_user_stand_beside_the_shipped_ones(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shipped = find_groups(conf_folders())
    write_option(folder, "model/mine", "name: mine\nsource: builtin:tiny\n")
    write_option(folder, "model/.ipynb_checkpoints/old", "name: old\n")
    # Another program's.
    write_option(folder, "optimizer/adam", "lr: 1\n")
    write_option(folder, "sweep/ours", "grid:\n  lora.r: [2, 3]\n")
    found = find_groups(conf_folders())
    assert {group for group in found if found[group] != shipped[group]} == {"model", "sweep"}
    assert set(found["model"]) - set(shipped["model"]) == {"mine"}
    assert found.keys() == shipped.keys()
    sweep = compose(["model=mine", "sweep=ours"])
    assert sweep.name == "ours-mine-tasks"
    assert [run.config.lora.r for run in sweep.runs] == [2, 3]
    assert main(["-h"]) == 0
    assert "mine|" in capsys.readouterr().out
    with pytest.raises(BadInput, match="mine"):
        compose(["model=nosuch"])


def test_a_file_of_the_user_wins_over_a_shipped_one(folder: Path) -> None:
    write_option(folder, "model/tiny", "name: other\nsource: builtin:tiny\n")
    assert [run.config.model.name for run in compose(["model=tiny"]).runs] == ["other"]


def test_the_files_of_another_program_are_named_when_they_do_not_fit(folder: Path) -> None:
    write_option(folder, "config", "defaults:\n  - optimizer: adam\n")
    assert compose([]).name == "single-smollm2-tasks"
    write_option(folder, "train/default", "devices: 8\n")
    with pytest.raises(BadInput, match=r"train\.devices.*conf/train/default\.yaml"):
        compose([])


def test_a_file_of_the_user_that_is_not_utf8_is_named(folder: Path) -> None:
    write_option(folder, "sweep/odd", "grid:\n")
    (folder / "conf" / "sweep" / "odd.yaml").write_bytes("# größer".encode("latin-1"))
    with pytest.raises(BadInput, match=r"conf/sweep/odd\.yaml is not UTF-8"):
        compose(["sweep=odd"])


def test_frozen_code_of_a_wheel_is_laid_out_like_a_checkout(tmp_path: Path) -> None:
    for file in ("launcher/cli.py", "launcher/conf/model/tiny.yaml", "train/job.py", "conf/another_package.py"):
        (tmp_path / "site" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / file).write_text(file)
    frozen = freeze_code(SweepDir(tmp_path / "sweep"), tmp_path / "site")
    files = {str(path.relative_to(frozen)) for path in frozen.rglob("*") if path.is_file()}
    assert files == {"launcher/cli.py", "train/job.py", "conf/model/tiny.yaml"}


@pytest.mark.parametrize("pythonpath", ["", ":", "{folder}", "/nowhere:{folder}/lib"])
def test_a_train_of_the_user_is_not_imported(folder: Path, pythonpath: str) -> None:
    """Neither by the program nor by a child process of it."""
    (folder / "lib").mkdir()
    for decoy in ("train.py", "lib/train.py", "conf.py"):
        (folder / decoy).write_text(DECOY)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PYTHONPATH"] = pythonpath.format(folder=folder)
    listed = run([sys.executable, "-m", "launcher", "list"], environment)
    assert listed.returncode == 0, listed.stderr
    child = run([sys.executable, "-P", "-c", CHILD], environment)
    assert "train.mirror follow" in child.stderr


def test_the_current_folder_shadows_no_library(folder: Path) -> None:
    (folder / "yaml.py").write_text(DECOY)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    for pythonpath in ("", "/nowhere:"):
        planned = run(
            [sys.executable, "-m", "launcher", "plan", "model=tiny"], environment | {"PYTHONPATH": pythonpath}
        )
        assert planned.returncode == 0, planned.stderr


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def test_site_packages_do_not_come_before_the_standard_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "SOURCE_DIR", Path(sysconfig.get_path("purelib")).resolve())
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert child_environment()["PYTHONPATH"] == ""
    monkeypatch.setenv("PYTHONPATH", "/home/ada")
    assert child_environment()["PYTHONPATH"] == f"{installation.SOURCE_DIR}:/home/ada"
