"""A folder of version 0.1.0 is read as that version read it, with the same run ids."""

import json
from pathlib import Path
from typing import Any

import pytest

from old_sweep import FIXTURES, OldSweep, copied
from train.config import read_run_config
from train.store.journal import AttemptLine, DivergenceLine, EvaluationLine, JournalHeader, StepLine, append_journal
from train.store.layout import RunDir
from train.store.line_file import append_records, read_records
from train.store.record_file import LineRecord

# What depends on the clock of whoever asks.
VOLATILE = {"reason"}


@pytest.fixture
def sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> OldSweep:
    return copied(tmp_path, capsys, monkeypatch)


def said_then(name: str) -> Any:
    return json.loads((FIXTURES / f"{name}-0.1.0.json").read_bytes())


def test_status_says_what_0_1_0_said(sweep: OldSweep) -> None:
    now, then = sweep.status().document, said_then("status-empty-queue")
    assert [run["id"] for run in now["runs"]] == [run["id"] for run in then["runs"]]
    for mine, theirs in zip(now["runs"], then["runs"], strict=True):
        assert {key: mine[key] for key in theirs if key not in VOLATILE} == {
            key: value for key, value in theirs.items() if key not in VOLATILE
        }


def test_report_says_what_0_1_0_said(sweep: OldSweep) -> None:
    now, then = sweep.report().document, said_then("report")
    # 0.1.0 did not say by which path a run was computed.
    assert [row.pop("path") for row in now["rows"]] == [None] * len(then["rows"])
    assert now["rows"] == then["rows"]
    assert [run["id"] for run in now["unfinished"]] == [run["id"] for run in then["unfinished"]]
    assert [run["step"] for run in now["unfinished"]] == [run["step"] for run in then["unfinished"]]
    assert now["best"] == then["best"]


def test_plan_knows_every_run_that_0_1_0_trained(sweep: OldSweep) -> None:
    now, then = sweep.plan().document, said_then("plan")
    said = [[(run["id"], run["name"], run["verdict"]) for run in plan["runs"]] for plan in (now, then)]
    assert said[0] == said[1]


def test_every_configuration_has_the_id_of_its_folder(sweep: OldSweep) -> None:
    assert {run.id: read_run_config(run.config).run_id() for run in sweep.dir.runs()} == {
        run.id: run.id for run in sweep.dir.runs()
    }


def kind_of(line: dict[str, Any]) -> type[LineRecord]:
    kinds = {"max_steps": JournalHeader, "diverged": DivergenceLine, "eval_loss": EvaluationLine}
    return next((kind for key, kind in kinds.items() if key in line), StepLine)


def test_journals_have_the_same_bytes_through_their_models(sweep: OldSweep, tmp_path: Path) -> None:
    for run in sweep.dir.runs():
        lines = [json.loads(line) for line in run.journal.read_bytes().splitlines()]
        append_journal(tmp_path / run.id, [kind_of(line)(**line) for line in lines])
        assert (tmp_path / run.id).read_bytes() == run.journal.read_bytes()


def test_a_line_more_in_an_old_file_says_no_format(sweep: OldSweep) -> None:
    run = RunDir(next(path.parent for path in sweep.dir.path.glob("r2-a4-*/attempts.jsonl")))
    (before,) = read_records(run.attempts, AttemptLine)
    append_records(run.attempts, [before])
    assert read_records(run.attempts, AttemptLine) == [before, before]
    assert b"format" not in run.attempts.read_bytes()
