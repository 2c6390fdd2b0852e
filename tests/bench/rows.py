"""The rows that everyone trains on: lengths like Alpaca's, the same for all, in the order in which lorapack takes them."""

from __future__ import annotations

import numpy as np

from train.data.sampling import epoch_order
from train.data.token_table import TokenizedData, TokenTable

ROWS = 4096
# Of a log-normal distribution, clipped to SHORTEST and LONGEST tokens.
MEAN_TOKENS = 130.0
SPREAD = 0.6
SHORTEST = 40
LONGEST = 512


def table(vocabulary: int, rows: int = ROWS, seed: int = 0) -> TokenTable:
    """Examples of random tokens. All tokens are learned: peers compute the logits of every token, so lorapack has to as well."""
    random = np.random.default_rng(seed)
    # A log-normal's mean is exp(mu + sigma^2 / 2), so this mu gives MEAN_TOKENS.
    lengths = random.lognormal(np.log(MEAN_TOKENS) - SPREAD**2 / 2, SPREAD, rows)
    lengths = np.clip(lengths.round(), SHORTEST, LONGEST).astype(np.int64)
    # 256 different tokens, spread over the whole vocabulary.
    tokens = random.integers(0, 256, int(lengths.sum())).astype(np.int32) * (vocabulary // 256)
    return TokenTable(tokens, tokens.copy(), np.concatenate([[0], np.cumsum(lengths)]))


def data(vocabulary: int) -> TokenizedData:
    """The rows as the trainer takes them; the evaluation is one row, since it is not measured."""
    return TokenizedData(table(vocabulary), table(vocabulary, rows=1, seed=1), {})


def in_order_of(seed: int, vocabulary: int) -> list[dict[str, list[int]]]:
    """The rows in the order of a run with `seed`, in the form of a `Trainer`'s data set."""
    examples = table(vocabulary)
    features = []
    for i in epoch_order(seed, 0, len(examples)):
        tokens = examples.example(int(i))[0].tolist()
        features.append({"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": tokens})
    return features
