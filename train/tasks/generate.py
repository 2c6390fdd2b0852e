"""Writes the instruction set of this project: ``python -m train.tasks.generate``.

There are equally many rows of each kind, drawn with a fixed seed. No instruction with the same input occurs twice, so no held-out row
is among those to train on. Both files are shuffled, so the first n rows of either are a fair sample of the kinds.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from train.tasks.kinds import KINDS, Task

SEED = 2024
TRAIN_ROWS_PER_KIND = 420
HELDOUT_ROWS_PER_KIND = 40
FOLDER = Path(__file__).parent

Row = dict[str, str]


def make_rows() -> tuple[list[Row], list[Row]]:
    """The rows to train on and the held-out rows; the same every time."""
    random = Random(SEED)
    train: list[Row] = []
    heldout: list[Row] = []
    for kind in KINDS:
        rows = draw(kind, TRAIN_ROWS_PER_KIND + HELDOUT_ROWS_PER_KIND, random)
        train += rows[:TRAIN_ROWS_PER_KIND]
        heldout += rows[TRAIN_ROWS_PER_KIND:]
    random.shuffle(train)
    random.shuffle(heldout)
    return train, heldout


def draw(kind: str, count: int, random: Random) -> list[Row]:
    """`count` rows of one kind; no two have the same instruction and input."""
    tasks: dict[tuple[str, str], Task] = {}
    while len(tasks) < count:
        task = KINDS[kind](random)
        tasks.setdefault((task.instruction, task.input), task)
    return [vars(task) | {"kind": kind} for task in tasks.values()]


def as_jsonl(rows: list[Row]) -> bytes:
    """Rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def main() -> None:
    """Write both files to this module's folder."""
    for name, rows in zip(("train", "heldout"), make_rows(), strict=True):
        (FOLDER / f"{name}.jsonl").write_bytes(as_jsonl(rows))


if __name__ == "__main__":
    main()
