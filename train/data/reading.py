"""Reads a run's rows, from local files or from the hub, and splits them into those to train on and those held out.

Light for local files: the launcher calls `read_split` to reject bad data before anything is submitted.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

from train.config import DataConfig
from train.data.row_files import read_rows
from train.data.rows import EmptyAnswer, Row, parse_row
from train.data.source import data_path
from train.errors import BadInput

Dropped = Counter[str]


def read_split(data: DataConfig) -> tuple[list[Row], list[Row], Dropped]:
    """The rows to train on, the held-out rows, and how many were dropped, by reason.

    Raises:
        BadInput: a source cannot be read, or has fewer rows than requested.
    """
    rows, dropped = read_source(data.source, data)
    if data.eval_source is None:
        train, held_out = _split(rows, data)
    else:
        train = rows
        eval_rows, eval_dropped = read_source(data.eval_source, data)
        held_out = eval_rows[: data.eval_rows]
        dropped += eval_dropped
    if data.train_rows is not None and data.train_rows > len(train):
        raise BadInput(
            f"data.train_rows={data.train_rows} asks for more rows than {data.source} has to train on ({len(train):,}); "
            "lower it, or set it to null for all."
        )
    return train[: data.train_rows], held_out, dropped


def read_source(source: str, data: DataConfig) -> tuple[list[Row], Dropped]:
    """Every row of one source, and how many of its rows were dropped, by reason."""
    path = data_path(source)
    return (read_rows(path, data.format), Counter()) if path else read_hub(source, data)


def read_hub(source: str, data: DataConfig) -> tuple[list[Row], Dropped]:
    """Every row of a data set on the hub. Rows with an empty answer are dropped and counted, since the user cannot fix them there.

    Raises:
        BadInput: the hub cannot be reached, has no such data set, or a row is malformed.
    """
    import datasets

    from train.model.hub import hub_unreachable, offline

    trouble = hub_unreachable()
    try:
        # Offline, `datasets` uses what was downloaded earlier into the user's own cache.
        with offline() if trouble else nullcontext():
            table = datasets.load_dataset(source, revision=data.revision, split=data.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as exc:
        raise BadInput(
            f"data set {source!r} (data.revision={data.revision}, data.split={data.split}) could not be loaded: {trouble or exc}. "
            "Check the name; or run 'python -m launcher stage' with the same cache= where the hub can be reached; or set HF_HOME to a "
            "cache that holds it; or use a local file."
        ) from exc
    rows: list[Row] = []
    dropped: Dropped = Counter()
    for number, values in enumerate(table, 1):
        try:
            rows.append(parse_row(values, data.format, f"{source} row {number}"))
        except EmptyAnswer:
            dropped["the answer is empty"] += 1
    if not rows:
        raise BadInput(
            f"data set {source!r} has no rows with an answer in its split {data.split!r}; choose another split or data set."
        )
    return rows, dropped


def _split(rows: list[Row], data: DataConfig) -> tuple[list[Row], list[Row]]:
    """Hold out `eval_rows` rows, chosen by `split_seed`; both parts keep the order of the source."""
    # Imported here so that the launcher starts fast: it mostly reads stats from the cache and never splits.
    import numpy as np

    if data.eval_rows >= len(rows):
        raise BadInput(
            f"data.eval_rows={data.eval_rows} would hold out all of the {len(rows):,} rows of {data.source}; lower it, or put "
            "held-out rows into a file of their own and set data.eval_source."
        )
    # The first `eval_rows` of a permutation: of 5 rows in the order 3 0 4 1 2, two are held out, rows 3 and 0.
    order = np.random.default_rng(data.split_seed).permutation(len(rows))
    held_out = set(order[: data.eval_rows].tolist())
    train = [row for i, row in enumerate(rows) if i not in held_out]
    return train, [row for i, row in enumerate(rows) if i in held_out]
