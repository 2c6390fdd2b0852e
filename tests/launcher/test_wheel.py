"""The wheel, installed into an environment of its own: everything works in any folder, as it does in the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from launcher.installation import SOURCE_DIR
from train.store.layout import SweepDir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.xdist_group("wheel")]

FOLDERS = ("launcher", "train", "conf")
BUILD_FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
DECOY = "raise SystemExit('a decoy was imported')\n"
TINY = "name: mine\nsource: builtin:tiny\n"
SINFO = "#!/bin/sh\necho 't4*|up|1-00:00:00|2|idle|gpu:t4:4|(null)'\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the checkout, since a build leaves folders behind where it happens.

    An earlier build left some too, with a file that the checkout no longer has.
    """
    source, target = tmp_path_factory.mktemp("a checkout"), tmp_path_factory.mktemp("dist")
    for name in FOLDERS:
        shutil.copytree(SOURCE_DIR / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in BUILD_FILES:
        shutil.copy(SOURCE_DIR / name, source / name)
    stale = source / "build" / "lib" / "launcher" / "conf" / "sweep"
    stale.mkdir(parents=True)
    (stale / "removed.yaml").write_text("grid: {}\n")
    pip("wheel", str(source), "--no-build-isolation", "--wheel-dir", str(target))
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, which finds the packages that it needs where this process does."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    shared = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
    (packages / "shared.pth").write_text("\n".join(shared))
    pip("--python", str(folder / "bin" / "python"), "install", str(wheel))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The user's folder: own options, and files with the names of this project's packages."""
    folder = tmp_path / "my sweeps"
    (folder / "conf" / "model").mkdir(parents=True)
    (folder / "conf" / "model" / "mine.yaml").write_text(TINY)
    for decoy in ("train.py", "conf.py", "launcher.py"):
        (folder / decoy).write_text(DECOY)
    return folder


def pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *words, "--no-deps", "--no-index"]
    subprocess.run(command, check=True)


def run(folder: Path, program: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A program of the environment, started in `folder`; it has to end well."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(program), *words], cwd=folder, env=kept | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def installed_files(environment: Path) -> set[Path]:
    return {path for path in environment.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def test_the_wheel_has_every_file(wheel: Path) -> None:
    expected = set()
    for name in FOLDERS:
        for path in (SOURCE_DIR / name).rglob("*"):
            parts = path.relative_to(SOURCE_DIR).parts
            if path.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in parts):
                expected.add("/".join(("launcher", *parts) if name == "conf" else parts))
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_a_sweep_runs_to_its_report_in_any_folder(environment: Path, folder: Path) -> None:
    lorapack, before = environment / "bin" / "lorapack", installed_files(environment)
    quick = ["model=mine", "lora.r=4,8", "train.max_steps=1", "data.eval_rows=4", "cluster=local", "tracking=off"]
    assert "mine|" in run(folder, lorapack, "-h").stdout
    plan = json.loads(run(folder, lorapack, "plan", "sweep=rank", "model=mine", "--json").stdout)
    assert [planned["name"] for planned in plan["runs"]] == ["r4", "r8", "r16", "r32"]
    # Model and data are prepared by a child process. No PYTHONPATH tells it where to look.
    run(folder, lorapack, "stage", *quick)
    # A decoy on PYTHONPATH is in the way of the program, its jobs and the report. None can help against one called launcher.
    (folder / "launcher.py").unlink()
    run(folder, environment / "bin" / "python", "-m", "launcher", *quick, PYTHONPATH=str(folder))
    sweep = SweepDir(folder / "runs" / "r-mine-tasks")
    assert len(sweep.runs()) == 2
    assert all(result.result.exists() for result in sweep.runs())
    assert sweep.report.exists()
    (code,) = sweep.code.iterdir()
    assert {path.name for path in code.iterdir()} == {"launcher", "train", "conf"}
    assert (code / "conf" / "sweep" / "rank.yaml").exists()
    assert not (code / "launcher" / "conf").exists()
    assert installed_files(environment) == before


def test_the_doctor_writes_into_the_users_folder(environment: Path, folder: Path) -> None:
    lorapack, before = environment / "bin" / "lorapack", installed_files(environment)
    (folder / "bin").mkdir()
    (folder / "bin" / "sinfo").write_text(SINFO)
    (folder / "bin" / "sinfo").chmod(0o755)
    path = f"{folder / 'bin'}:/usr/bin:/bin"
    written = json.loads(run(folder, lorapack, "doctor", "write=site", "--json", PATH=path).stdout)["written"]
    assert Path(written) == folder / "conf" / "cluster" / "site.yaml"
    assert list(yaml.safe_load(Path(written).read_text())["partitions"]) == ["t4"]
    plan = json.loads(run(folder, lorapack, "plan", "model=mine", "cluster=site", "--json", PATH=path).stdout)
    assert [pack["partition"] for pack in plan["packs"]] == ["t4"]
    assert installed_files(environment) == before
