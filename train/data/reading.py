"""Which rows a run learns and which are held out, from local files and from the hub.

Light for local files: the launcher calls `read_split` to refuse bad data before anything is submitted.
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
    """The rows to learn, the held-out rows, and how many were dropped by reason.

    Raises:
        BadInput: the source cannot be read, or has not as many rows as asked for.
    """
    rows, dropped = read_source(data.source, data)
    if data.eval_source is None:
        train, held_out = _split(rows, data)
    else:
        train, (held_out, more_dropped) = rows, read_source(data.eval_source, data)
        held_out, dropped = held_out[: data.eval_rows], dropped + more_dropped
    if data.train_rows is not None and data.train_rows > len(train):
        raise BadInput(
            f"data.train_rows={data.train_rows} asks for more rows than there are to learn in {data.source} ({len(train):,}); "
            "lower it, or leave it null for all."
        )
    return train[: data.train_rows], held_out, dropped


def read_source(source: str, data: DataConfig) -> tuple[list[Row], Dropped]:
    """Every row of one source, and how many rows of it were dropped by reason."""
    path = data_path(source)
    return (read_rows(path, data.format), Counter()) if path else read_hub(source, data)


def read_hub(source: str, data: DataConfig) -> tuple[list[Row], Dropped]:
    """Every row of a hub's data set; rows with an empty answer, which the user cannot mend there, are dropped and counted.

    Raises:
        BadInput: the hub is out of reach, has no such data set, or a row is malformed.
    """
    import datasets

    from train.model.hub import hub_unreachable, offline

    trouble = hub_unreachable()
    try:
        with offline() if trouble else nullcontext():  # what was fetched before lies in the user's own cache
            table = datasets.load_dataset(source, revision=data.revision, split=data.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as exc:
        raise BadInput(
            f"data set {source!r} (data.revision={data.revision}, data.split={data.split}) could not be loaded: {trouble or exc}. "
            "Check the name, fetch it with 'python -m launcher stage' and the same cache= where the hub can be reached, let HF_HOME "
            "name a cache that holds it, or give a local file."
        ) from exc
    rows: list[Row] = []
    dropped: Dropped = Counter()
    for number, values in enumerate(table, 1):
        try:
            rows.append(parse_row(values, data.format, f"{source} row {number}"))
        except EmptyAnswer:
            dropped["the answer is empty"] += 1
    if not rows:
        raise BadInput(f"data set {source!r} has no rows with an answer in its split {data.split!r}; choose another.")
    return rows, dropped


def _split(rows: list[Row], data: DataConfig) -> tuple[list[Row], list[Row]]:
    """Hold `eval_rows` rows out, chosen by `split_seed`; both parts keep the order of the source."""
    import numpy as np  # here, since the launcher mostly reads what was counted before

    if data.eval_rows >= len(rows):
        raise BadInput(
            f"data.eval_rows={data.eval_rows} would hold out all of the {len(rows):,} rows of {data.source}; lower it, or name "
            "another file in data.eval_source."
        )
    chosen = np.zeros(len(rows), bool)
    chosen[np.random.default_rng(data.split_seed).permutation(len(rows))[: data.eval_rows]] = True
    parts: dict[bool, list[Row]] = {True: [], False: []}
    for row, held_out in zip(rows, chosen, strict=True):
        parts[bool(held_out)].append(row)
    return parts[False], parts[True]
