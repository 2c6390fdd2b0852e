"""Which rows a run sees at which optimizer step, and how the step is cut into micro-batches."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from train.config import TrainConfig
from train.data.token_table import TokenTable

IGNORED_LABEL = -100


@lru_cache(maxsize=64)
def epoch_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    """The permutation of `rows` rows in one epoch [rows]."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def rows_of_step(train: TrainConfig, rows: int, step: int) -> np.ndarray:
    """The rows of optimizer step `step` (from 0) of a run over `rows` rows; an epoch's last batch may be smaller."""
    epoch, index = divmod(step, train.steps_per_epoch(rows))
    return epoch_order(train.seed, epoch, rows)[index * train.batch_size : (index + 1) * train.batch_size]


@dataclass(frozen=True)
class TokenSequence:
    """One row of one run. `run` is the run's index in the pack, `index` the row's place in the run's batch (a dropout counter).

    `start` is the position of its first token: how many tokens before it a cache holds.
    """

    run: int
    index: int
    tokens: np.ndarray
    labels: np.ndarray
    start: int = 0

    @property
    def targets(self) -> int:
        """How many tokens are predicted; the first never is."""
        return int((self.labels[1:] != IGNORED_LABEL).sum())


def sequences_of(run: int, table: TokenTable, rows: np.ndarray) -> list[TokenSequence]:
    """The sequences of `rows` of a table, for one run of the pack."""
    return [TokenSequence(run, index, *table.row(int(row))) for index, row in enumerate(rows)]


def cut(sequences: list[TokenSequence], max_tokens: int) -> Iterator[list[TokenSequence]]:
    """Cut one step's sequences into micro-batches of at most `max_tokens` tokens (but at least one sequence).

    As few as that takes, and none larger than it has to be: a remainder of a few sequences would leave a GPU half idle. Sequences
    are dealt in turn to the runs, so that every micro-batch holds all runs while they last.
    """
    dealt = sorted(sequences, key=lambda s: (s.index, s.run))
    lengths = [len(sequence.tokens) for sequence in dealt]
    fewest = len(_filled(lengths, max_tokens))
    most = bisect_left(range(max_tokens), True, key=lambda limit: len(_filled(lengths, limit)) <= fewest)
    for start, end in _filled(lengths, most):
        yield dealt[start:end]


def _filled(lengths: list[int], max_tokens: int) -> list[tuple[int, int]]:
    """Bounds of the batches when each takes what fits before the next begins."""
    bounds, start, tokens = [], 0, 0
    for at, length in enumerate(lengths):
        if at > start and tokens + length > max_tokens:
            bounds.append((start, at))
            start, tokens = at, 0
        tokens += length
    return [*bounds, (start, len(lengths))] if lengths else []
