"""Sample answers reach W&B as a table per evaluation, with the row of their step."""

import json
from pathlib import Path

import pytest

from mirrored import EVAL_STEPS, WrittenPack, use_server, without_pace
from train.store.layout import RunDir
from train.store.storage import append_lines
from wandb_server import WandbServer

STEPS = (0, EVAL_STEPS, 2 * EVAL_STEPS)


def answer(run: RunDir, *steps: int) -> None:
    """What the trainer writes before an evaluation's line."""
    for step in steps:
        sample = {"row": 3, "prompt": "2 + 2", "expected": "4", "answer": f"about {step}", "whole": True}
        append_lines(run.samples, [{"step": step, "samples": [sample]}])


@pytest.mark.slow
def test_each_evaluation_has_its_table_once_also_after_a_rollback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with WandbServer() as server:
        use_server(server, tmp_path, monkeypatch)
        pack = WrittenPack(tmp_path, 1, max_steps=STEPS[-1])
        (run,) = pack.runs
        answer(run, *STEPS[:2])
        with pack.job(cause="preempted"):
            pack.train(EVAL_STEPS + 3)
        with pack.job(cause="done"):
            pack.roll_back(EVAL_STEPS - 2)
            run.samples.unlink()
            answer(run, *STEPS)
            pack.train(STEPS[-1])
    stored = server.runs[run.id]
    assert stored.steps == list(range(STEPS[-1] + 1))
    assert without_pace(stored.history) == pack.expected(run)
    tables = {row["_step"]: row["eval/samples"] for row in stored.history if "eval/samples" in row}
    assert tuple(tables) == STEPS
    for table in tables.values():
        assert (table["_type"], table["nrows"], table["ncols"]) == ("table-file", 1, 4)
        assert stored.files.count(table["path"]) == 1


def test_offline_they_lie_in_the_folder_that_wandb_sync_sends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    pack = WrittenPack(tmp_path, 1, max_steps=STEPS[-1], mode="offline")
    answer(pack.runs[0], *STEPS)
    with pack.job(cause="done"):
        pack.train(STEPS[-1])
    tables = list(pack.sweep.wandb.glob("offline-run-*/files/media/table/eval/samples_*.table.json"))
    assert len(tables) == len(STEPS)
    contents = {tuple(json.loads(table.read_text())["data"][0]) for table in tables}
    assert contents == {("2 + 2", "4", "about 0", f"about {step}") for step in STEPS}
