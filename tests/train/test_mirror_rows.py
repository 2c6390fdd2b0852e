"""From a journal that grows, is cut back and is read while it is written, to rows that are complete."""

from pathlib import Path

import pytest

from json_lines import read_lines
from mirrored import EVAL_STEPS, WrittenPack, without_pace
from train.config import read_run_config
from train.errors import StorageError
from train.mirror.rows import RunRows
from train.store.storage import append_lines


@pytest.fixture
def pack(tmp_path: Path) -> WrittenPack:
    pack = WrittenPack(tmp_path, 1, max_steps=40)
    pack.begin()
    return pack


def rows_of(pack: WrittenPack, given: int = -1) -> RunRows:
    return RunRows(pack.runs[0], read_run_config(pack.runs[0].config).train, given)


def steps(rows: RunRows, *, ended: bool = False, final: bool = False) -> list[int]:
    return [row.step for row in rows.take(ended=ended, final=final)]


def test_every_step_is_given_once_with_its_evaluation_and_pace(pack: WrittenPack) -> None:
    rows = rows_of(pack)
    pack.train(15)
    taken = rows.take(ended=False, final=False)
    assert without_pace([{"_step": row.step} | row.values for row in taken]) == pack.expected(pack.runs[0])
    assert taken[3].values["perf/tokens_per_second"] == 115.0
    assert steps(rows) == []


def test_a_step_waits_for_the_evaluation_that_is_due(pack: WrittenPack) -> None:
    rows = rows_of(pack)
    pack.train(EVAL_STEPS - 1)
    journal = pack.runs[0].journal
    append_lines(journal, [{"step": EVAL_STEPS, "loss": 1.0}])
    append_lines(pack.runs[0].pace, [pack.pace(EVAL_STEPS)])
    assert steps(rows)[-1] == EVAL_STEPS - 1
    assert steps(rows, ended=True) == [], "the next attempt will evaluate it"
    append_lines(journal, [{"step": EVAL_STEPS, "eval_loss": 0.5}])
    (row,) = rows.take(ended=False, final=False)
    assert (row.values["train/loss"], row.values["eval/loss"]) == (1.0, 0.5)


def test_a_step_waits_for_its_pace_while_somebody_trains(pack: WrittenPack) -> None:
    rows = rows_of(pack)
    pack.train(4)
    append_lines(pack.runs[0].journal, [{"step": 5, "loss": 1.0}])
    assert steps(rows)[-1] == 4
    assert steps(rows, ended=True) == [5]


@pytest.mark.parametrize("seen", [33, 40])
def test_what_is_said_again_after_a_rollback_is_not_given_again(pack: WrittenPack, seen: int) -> None:
    rows = rows_of(pack)
    pack.train(seen)
    assert steps(rows) == list(range(seen + 1))
    pack.roll_back(26)
    assert steps(rows) == []
    pack.train(40)
    assert steps(rows) == list(range(seen + 1, 41))


def test_a_rollback_that_nobody_saw(pack: WrittenPack) -> None:
    """Between two looks the journal is cut back, to lines of another length, and grows past the place where reading stopped."""
    rows = rows_of(pack)
    pack.train(10)
    steps(rows)
    pack.roll_back(7)
    append_lines(pack.runs[0].journal, [{"step": step, "loss": 2.0, "remark": "x" * step} for step in range(8, 25)])
    append_lines(pack.runs[0].pace, [pack.pace(25)])
    assert steps(rows) == list(range(11, 25))


def test_a_torn_line_is_read_once_it_is_whole(pack: WrittenPack) -> None:
    rows = rows_of(pack)
    pack.train(5)
    whole = pack.runs[0].journal.read_bytes()
    pack.runs[0].journal.write_bytes(whole[:-20])
    assert steps(rows)[-1] == 4
    pack.runs[0].journal.write_bytes(whole)
    assert steps(rows) == [5]


def test_nothing_but_numbers_reaches_a_row(pack: WrittenPack) -> None:
    rows = rows_of(pack)
    pack.train(2)
    append_lines(pack.runs[0].journal, [{"step": 3, "loss": 1.0, "grad_norm": None}, {"step": 4, "diverged": "nan"}])
    row = rows.take(ended=True, final=True)[-1]
    assert row.step == 3, "the divergence's reason is not a row"
    assert "train/grad_norm" not in row.values
    assert rows.diverged == "nan"
    assert len(read_lines(pack.runs[0].journal)) == 6


def test_a_damaged_journal_is_named(pack: WrittenPack) -> None:
    append_lines(pack.runs[0].pace, [pack.pace(1)])
    pack.runs[0].journal.write_bytes(b"\0\n" + pack.runs[0].journal.read_bytes())
    with pytest.raises(StorageError, match=r"journal\.jsonl is damaged"):
        steps(rows_of(pack))
