"""What a job sets before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
JOB = """
import json, sys
from pathlib import Path
from train.runtime.environment import prepare_torch
prepare_torch(Path(sys.argv[1]))
import torch
print(json.dumps([sys.pycache_prefix, sys.dont_write_bytecode]))
"""


def start_job(folder: Path, compiled: Path, **variables: str) -> str:
    """What a process says that prepares for the `torch` in `folder` and imports it."""
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": path} | variables
    command = [sys.executable, "-c", JOB, str(compiled)]
    return subprocess.check_output(command, env=environment, text=True).strip()


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A folder with a package called torch, without bytecode."""
    package = tmp_path / "site" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    return package


def bytecode(folder: Path) -> list[str]:
    """The modules of which there is bytecode below `folder`."""
    return sorted(file.parent.name for file in folder.rglob("__init__*.pyc"))


def test_where_an_image_has_no_bytecode_it_is_kept_in_the_cache(stand_in: Path, tmp_path: Path) -> None:
    compiled = tmp_path / "cache" / "compiled"
    start_job(stand_in.parent, compiled, PYTHONDONTWRITEBYTECODE="1")
    assert "torch" in bytecode(compiled / "python")
    assert not (stand_in / "__pycache__").exists()


def test_where_the_user_keeps_bytecode_is_his_choice(stand_in: Path, tmp_path: Path) -> None:
    own = str(tmp_path / "own")
    said = start_job(stand_in.parent, tmp_path / "compiled", PYTHONDONTWRITEBYTECODE="1", PYTHONPYCACHEPREFIX=own)
    assert said == f'["{own}", true]'


@pytest.mark.parametrize("compiled_before", [False, True], ids=["may be written", "is there"])
def test_bytecode_beside_its_source_is_left_to_python(stand_in: Path, tmp_path: Path, compiled_before: bool) -> None:
    variables = {}
    if compiled_before:
        subprocess.check_call([sys.executable, "-m", "compileall", "-q", str(stand_in)])
        variables = {"PYTHONDONTWRITEBYTECODE": "1"}
    compiled = tmp_path / "compiled"
    said = start_job(stand_in.parent, compiled, **variables)
    assert said == f"[null, {str(compiled_before).lower()}]"
    assert (stand_in / "__pycache__").exists()
    assert not (compiled / "python").exists()


def test_modules_are_out_of_the_collectors_sight_until_python_ends() -> None:
    script = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count()))
from train.runtime.environment import heavy_imports
with heavy_imports():
    print(gc.isenabled())
print(gc.isenabled(), gc.get_freeze_count() > 1000)
"""
    said = subprocess.check_output([sys.executable, "-c", script], env={"PYTHONPATH": str(ROOT)}, text=True)
    assert said.split() == ["False", "True", "True", "0"]
