"""Which examples a run sees at each optimizer step, and how a step's examples are split into micro-batches."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from train.config import TrainConfig
from train.data.token_table import IGNORED_LABEL, TokenTable


@lru_cache(maxsize=64)
def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """The order of one epoch: a permutation of the examples' indices [num_examples]."""
    # A generator per epoch: a resumed run gets epoch 7's order without drawing the first six.
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def examples_of_step(train: TrainConfig, num_examples: int, step: int) -> np.ndarray:
    """Indices of the examples of optimizer step `step` (from 0) [batch_size]; an epoch's last batch may be smaller.

    10 examples in batches of 4 make 3 steps per epoch, so step 5 is the last of epoch 1: places 8 and 9 of that epoch's order.
    """
    epoch, step_of_epoch = divmod(step, train.steps_per_epoch(num_examples))
    start = step_of_epoch * train.batch_size
    return epoch_order(train.seed, epoch, num_examples)[start : start + train.batch_size]


@dataclass(frozen=True)
class TokenSequence:
    """One example in one run's batch, or a part of one while an answer is generated.

    Attributes:
        run_index: the run's index in the pack.
        index: the example's place in the run's batch, from 0. It counts over the whole step, not the micro-batch, since dropout
            depends on it.
        tokens: [length] int32.
        labels: [length] int32, as in `TokenTable`: not shifted.
        start: the position of the first token, which is how many tokens before it a key-value cache holds.
    """

    run_index: int
    index: int
    tokens: np.ndarray
    labels: np.ndarray
    start: int = 0

    @property
    def num_targets(self) -> int:
        """How many tokens are predicted; the first never is."""
        return int((self.labels[1:] != IGNORED_LABEL).sum())


def sequences_of(run_index: int, table: TokenTable, examples: np.ndarray) -> list[TokenSequence]:
    """The sequences of the `examples` (indices into `table`) that are one run's batch, in that order."""
    return [TokenSequence(run_index, place, *table.example(int(i))) for place, i in enumerate(examples)]


def split_by_tokens(sequences: list[TokenSequence], max_tokens: int) -> Iterator[list[TokenSequence]]:
    """Split one step's sequences into micro-batches of at most `max_tokens` tokens (but at least one sequence).

    There are as few micro-batches as filling them in order takes, and the largest of them is as small as that number allows.
    Sequences of lengths 5, 4, 3, 3 and `max_tokens` 8:

        filled up to 8 tokens      5 | 4 3 | 3      three micro-batches, the last one small
        filled up to 6 tokens      5 | 4 | 3 3      still three, and more even: this is the result
        filled up to 5 tokens      5 | 4 | 3 | 3    four

    A small last micro-batch would leave a GPU half idle, and a large first one would need more memory.
    """
    # Runs take turns (each run's first example, then each one's second), so every micro-batch holds all runs while they last.
    interleaved = sorted(sequences, key=lambda s: (s.index, s.run_index))
    lengths = [len(sequence.tokens) for sequence in interleaved]
    fewest = len(_fill_in_order(lengths, max_tokens))
    # A higher limit never needs more micro-batches. So "at most `fewest`" is false, then true as the limit grows, and bisection
    # finds the first true one: 6 of 0..7 in the example. If none is, the result is the end of the range, `max_tokens`.
    smallest_limit = bisect_left(
        range(max_tokens), True, key=lambda limit: len(_fill_in_order(lengths, limit)) <= fewest
    )
    for start, end in _fill_in_order(lengths, smallest_limit):
        yield interleaved[start:end]


def _fill_in_order(lengths: list[int], max_tokens: int) -> list[tuple[int, int]]:
    """Bounds (start, end) of micro-batches, each filled until the next sequence no longer fits.

    Lengths 5, 4, 3, 3 with `max_tokens` 8 give (0, 1), (1, 3), (3, 4).
    """
    if not lengths:
        return []
    bounds = []
    start = 0
    tokens = 0
    for i, length in enumerate(lengths):
        # `i > start`: a sequence longer than `max_tokens` is a micro-batch of its own, since sequences are never divided.
        if i > start and tokens + length > max_tokens:
            bounds.append((start, i))
            start = i
            tokens = 0
        tokens += length
    return [*bounds, (start, len(lengths))]
