"""The rows that everyone trains on: lengths like Alpaca's, the same for all, in the order in which lorapack takes them."""

from __future__ import annotations

import numpy as np

from train.data.sampling import epoch_order
from train.data.token_table import TokenizedData, TokenTable

ROWS = 4096
MEAN_TOKENS, SPREAD = 130.0, 0.6  # of a log-normal
SHORTEST, LONGEST = 40, 512


def table(vocabulary: int, rows: int = ROWS, seed: int = 0) -> TokenTable:
    """Random tokens, all of them learnt: peers compute the logits of every token, so lorapack shall too."""
    random = np.random.default_rng(seed)
    lengths = random.lognormal(np.log(MEAN_TOKENS) - SPREAD**2 / 2, SPREAD, rows)
    lengths = np.clip(lengths.round(), SHORTEST, LONGEST).astype(np.int64)
    tokens = random.integers(0, 256, int(lengths.sum())).astype(np.int32) * (vocabulary // 256)
    return TokenTable(tokens, tokens.copy(), np.concatenate([[0], np.cumsum(lengths)]))


def data(vocabulary: int) -> TokenizedData:
    """The rows as the trainer takes them; the evaluation is one row, since it is not measured."""
    return TokenizedData(table(vocabulary), table(vocabulary, rows=1, seed=1), {})


def in_order_of(seed: int, vocabulary: int) -> list[dict[str, list[int]]]:
    """The rows as a run with `seed` takes them, for a peer that walks them in order."""
    rows = table(vocabulary)
    found = []
    for i in epoch_order(seed, 0, len(rows)):
        tokens = rows.example(int(i))[0].tolist()
        found.append({"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": tokens})
    return found
