"""Tokenized examples as flat arrays, and their folder in the cache.

A data row becomes an example here: its tokens, and a label per token. Two examples of 4 and 2 tokens, the prompts' labels masked:

    tokens   11 12   13 14 | 21   22
    labels -100 -100 13 14 | -100 22
    offsets   0              4         6        example i is offsets[i]:offsets[i + 1]

Labels are not shifted: label t is token t itself. `train.data.micro_batch` moves them to the token that predicts them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.data.source import TokenizedStats
from train.store.layout import TokensDir
from train.store.storage import read_json, write_folder, write_json

# The label of tokens that are read but not learned; torch's cross_entropy and transformers ignore the same value.
IGNORED_LABEL = -100
ARRAYS = ("tokens", "labels", "offsets")


@dataclass(frozen=True)
class TokenTable:
    """Examples one after the other; see the module's example.

    Attributes:
        tokens: [T] int32, the tokens of all examples.
        labels: [T] int32; the token itself where it is learned, `IGNORED_LABEL` elsewhere.
        offsets: [examples + 1] int64, where each example begins; the last is T.
    """

    tokens: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def example(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels of example `i`, both [length]."""
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[span], self.labels[span]

    def lengths(self) -> np.ndarray:
        """Tokens per example [examples]."""
        return np.diff(self.offsets)

    def num_targets(self) -> int:
        """How many tokens are predicted: those with a label, except first tokens, which have no token before them."""
        learned = self.labels != IGNORED_LABEL
        return int(learned.sum() - learned[self.offsets[:-1]].sum())


@dataclass(frozen=True)
class TokenizedData:
    """The examples that a run trains on, those it is evaluated on, and counts of both."""

    train: TokenTable
    eval: TokenTable
    stats: TokenizedStats


def read_tokenized(folder: Path) -> TokenizedData | None:
    """Tokenized data from its folder in the cache, memory-mapped; None if the cache does not have it."""
    files = TokensDir(folder)
    stats = read_json(files.stats)
    return None if stats is None else TokenizedData(_read_table(files, "train"), _read_table(files, "eval"), stats)


def write_tokenized(folder: Path, data: TokenizedData) -> None:
    """Write `data` to its folder in the cache, complete or not at all.

    Raises:
        StorageError: the disk is full, read-only or gone.
    """
    try:
        with write_folder(folder) as unfinished:
            files = TokensDir(unfinished)
            for name, table in (("train", data.train), ("eval", data.eval)):
                for array in ARRAYS:
                    np.save(files.array(name, array), getattr(table, array), allow_pickle=False)
            write_json(files.stats, data.stats)
    except OSError:
        # If the folder is complete now, another process wrote it first. The key is a hash of all inputs, so its content is the same.
        if not TokensDir(folder).stats.exists():
            raise


def _read_table(files: TokensDir, name: str) -> TokenTable:
    return TokenTable(*(np.load(files.array(name, array), mmap_mode="r") for array in ARRAYS))
