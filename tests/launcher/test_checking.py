"""What is known of a model on the login node: measured by a process of its own, once, and never for longer than a plan may take."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from launcher.estimate import checking
from train.config import ModelConfig
from train.errors import BadInput
from train.store.layout import CacheDir

# Before `tests/conftest.py` puts another in its place.
measured_facts = checking.measured_facts
Tiny = tuple[ModelConfig, CacheDir, Path]


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A program in the place of Python, which answers by `script`."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(checking.sys, "executable", str(program))


@pytest.mark.slow
def test_a_process_of_its_own_measures_a_fetched_model(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Importing torch takes five seconds, or thirty beside other tests.
    monkeypatch.setattr(checking, "MOST_SECONDS", 300.0)
    model = tiny_model[0].model_copy(update={"source": str(tiny_model[2])})
    cache = CacheDir(tmp_path)
    facts = measured_facts(model, cache)
    assert facts is not None
    assert (facts.path, facts.layers) == ("own", 4)
    assert checking.checked_facts(model, cache) == facts


def test_a_measurement_that_takes_too_long_is_stopped_and_said_so(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checking, "SILENT_SECONDS", 0.1)
    monkeypatch.setattr(checking, "MOST_SECONDS", 0.3)
    stand_in(tmp_path, monkeypatch, "exec sleep 60")
    began = time.monotonic()
    assert measured_facts(tiny_model[0], CacheDir(tmp_path)) is None
    assert time.monotonic() - began < 10
    said = capsys.readouterr().err
    assert "comparing how tiny is computed" in said
    assert "stopped after 0 s: tiny is checked before it is submitted" in said


@pytest.mark.parametrize(
    "script", ["exit 1", "echo nonsense", 'echo \'{"ok": false, "exit_code": 1, "message": "no"}\'']
)
def test_a_measurement_that_fails_leaves_the_model_unknown(
    script: str, tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, script)
    assert measured_facts(tiny_model[0], CacheDir(tmp_path)) is None


def test_a_model_that_transformers_cannot_build_is_refused(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, 'echo \'{"ok": false, "exit_code": 2, "message": "it is odd"}\'')
    with pytest.raises(BadInput, match="it is odd"):
        measured_facts(tiny_model[0], CacheDir(tmp_path))


def test_a_model_that_is_not_fetched_is_not_measured(tmp_path: Path) -> None:
    model = ModelConfig(name="far", source="org/far", fingerprint="f")
    assert checking.checked_facts(model, CacheDir(tmp_path)) is None
