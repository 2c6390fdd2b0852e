"""The project's own instruction set is what its generator writes, and is fair to learn from."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from train.tasks import generate
from train.tasks.kinds import KINDS, roman

TRAIN, HELDOUT = generate.make_rows()


def test_files_are_what_the_generator_writes() -> None:
    assert (generate.FOLDER / "train.jsonl").read_bytes() == generate.as_jsonl(TRAIN)
    assert (generate.FOLDER / "heldout.jsonl").read_bytes() == generate.as_jsonl(HELDOUT)


def test_there_are_enough_rows_and_none_twice() -> None:
    questions = [(row["instruction"], row["input"]) for row in TRAIN + HELDOUT]
    assert len(TRAIN) >= 4000
    assert len(HELDOUT) == 400
    assert len(set(questions)) == len(questions)


@pytest.mark.parametrize("rows", [TRAIN, HELDOUT], ids=["train", "heldout"])
@pytest.mark.parametrize("count", [64, 200])
def test_first_rows_are_a_fair_sample_of_the_kinds(rows: list[generate.Row], count: int) -> None:
    kinds = Counter(row["kind"] for row in rows[:count])
    assert set(kinds) == set(KINDS)
    assert max(kinds.values()) <= 2.2 * count / len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_question_always_has_the_same_answer(kind: str) -> None:
    random = Random(1)
    answers: dict[tuple[str, str], str] = {}
    for _ in range(3000):
        task = KINDS[kind](random)
        assert answers.setdefault((task.instruction, task.input), task.output) == task.output


def test_no_answer_wins_by_guessing() -> None:
    answers = Counter(row["output"] for row in HELDOUT)
    assert answers.most_common(1)[0][1] / len(HELDOUT) < 0.1


def test_answers_are_right() -> None:
    rows = {kind: [row for row in HELDOUT if row["kind"] == kind] for kind in KINDS}
    for row in rows["sort_numbers"]:
        numbers = [int(number) for number in row["input"].split(", ")]
        assert [int(number) for number in row["output"].split(", ")] == sorted(numbers)
    for row in rows["json"]:
        person = json.loads(row["output"])
        assert set(person) == {"name", "city"}
        assert all(value in row["input"] for value in person.values())
    for row in rows["count"]:
        assert int(row["output"]) == row["input"].count(",") + 1
    assert [roman(number) for number in (1, 4, 9, 14, 40, 49)] == ["I", "IV", "IX", "XIV", "XL", "XLIX"]


def test_the_generator_writes_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "FOLDER", tmp_path)
    generate.main()
    assert {path.name for path in tmp_path.iterdir()} == {"train.jsonl", "heldout.jsonl"}
