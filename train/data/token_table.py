"""Tokenized rows as flat arrays, and their folder in the cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.store.layout import TokensDir
from train.store.storage import read_json, write_folder, write_json

IGNORED_LABEL = -100  # of tokens that are read but not learnt
PARTS = ("tokens", "labels", "offsets")


@dataclass(frozen=True)
class TokenTable:
    """Rows one after the other.

    Attributes:
        tokens: [T] int32.
        labels: [T] int32; the token itself where it is learnt, `IGNORED_LABEL` where not. Not shifted.
        offsets: [rows + 1] int64; row i is ``offsets[i]:offsets[i + 1]``.
    """

    tokens: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels of row `i`, both [length]."""
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[span], self.labels[span]

    def lengths(self) -> np.ndarray:
        """Tokens per row [rows]."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class TokenizedData:
    """What a run learns, what it is evaluated on, and the facts that the user reads about both."""

    train: TokenTable
    eval: TokenTable
    facts: dict[str, Any]


def read_tokenized(folder: Path) -> TokenizedData | None:
    """Tokenized data from its folder in the cache, memory-mapped; None if there is none."""
    files = TokensDir(folder)
    facts = read_json(files.facts)
    return None if facts is None else TokenizedData(_read_table(files, "train"), _read_table(files, "eval"), facts)


def write_tokenized(folder: Path, data: TokenizedData) -> None:
    """Write `data` to its folder in the cache, complete or not at all.

    Raises:
        StorageError: the disk is full, read-only or gone.
    """
    try:
        with write_folder(folder) as beside:
            files = TokensDir(beside)
            for name, table in (("train", data.train), ("eval", data.eval)):
                for part in PARTS:
                    np.save(files.array(name, part), getattr(table, part), allow_pickle=False)
            write_json(files.facts, data.facts)
    except OSError:
        if not TokensDir(folder).facts.exists():  # otherwise another process came first, with the same content
            raise


def _read_table(files: TokensDir, name: str) -> TokenTable:
    return TokenTable(*(np.load(files.array(name, part), mmap_mode="r") for part in PARTS))
