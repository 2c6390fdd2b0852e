"""Data for one run: read, split, tokenize, cache.

    source file or hub -> rows -> train and held-out rows -> text -> tokens and labels -> arrays in the cache

The cache's key is a fingerprint of everything that decides the tokens, so the runs of a sweep tokenize once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from train.config import DataConfig, ModelConfig
from train.data.reading import read_split
from train.data.stats import tokens_key
from train.data.token_table import IGNORED_LABEL, TokenizedData, TokenTable, read_tokenized, write_tokenized
from train.data.tokenizing import Advance, RowTokenizer
from train.errors import BadInput
from train.model.folder import decoder_numbers
from train.store.layout import CacheDir

QUANTILES = (0.5, 0.9, 0.99)
LINE_SECONDS = 10.0  # between lines in a log


def load_tokenized(
    data: DataConfig, model: ModelConfig, model_dir: Path, cache: CacheDir, stop: Callable[[], None] = lambda: None
) -> TokenizedData:
    """The tokenized data from the cache, made now if it is not there. `stop` may raise, between batches of rows.

    Raises:
        BadInput: the data cannot be read or leave nothing to learn.
        StorageError: the cache cannot be written.
    """
    folder = cache.tokens(tokens_key(data, model))
    cached = read_tokenized(folder)
    if cached is not None:
        return cached
    made = tokenize(data, model, model_dir, stop)
    write_tokenized(folder, made)
    return read_tokenized(folder) or made


def summary(facts: dict[str, Any]) -> str:
    """One line for the terminal: how many rows there are, and how many were cut or dropped and why."""
    reasons = ", ".join(f"{count:,} because {reason}" for reason, count in facts["dropped"].items())
    return (
        f"{facts['train_rows']:,} rows to learn, {facts['eval_rows']:,} held out; "
        f"{facts['cut']:,} cut at {facts['max_length']:,} tokens, "
        f"{sum(facts['dropped'].values()):,} dropped{f' ({reasons})' if reasons else ''}; "
        f"{facts['train_tokens'] / facts['train_rows']:.0f} tokens per row"
    )


def tokenize(data: DataConfig, model: ModelConfig, model_dir: Path, stop: Callable[[], None]) -> TokenizedData:
    """Read, split and tokenize, with a progress bar where somebody watches, and a line now and then in a log."""
    from train.model.loading import load_tokenizer  # heavy

    train_rows, eval_rows, dropped = read_split(data)
    tokenizer = RowTokenizer(load_tokenizer(model_dir, model), data)
    with _watched(f"tokenizing {data.name}", len(train_rows) + len(eval_rows)) as advance:
        train, held_out = (
            tokenizer.tokenize(rows, stop, advance, called)
            for rows, called in ((train_rows, "rows"), (eval_rows, "held-out rows"))
        )
    _refuse_foreign_tokens(model_dir, train, held_out)
    facts = {
        "max_length": data.max_length,
        "cut": tokenizer.tally.cut,
        "dropped": dict(dropped + tokenizer.tally.dropped),
    }
    return TokenizedData(train, held_out, _facts(train, held_out) | facts)


@contextmanager
def _watched(what: str, total: int) -> Iterator[Advance]:
    """Show on stderr how many of `total` rows are done: a bar on a terminal, elsewhere a line every `LINE_SECONDS`."""
    console, done, told = Console(stderr=True), 0, time.monotonic()

    def tell(count: int) -> None:
        nonlocal done, told
        done += count
        if time.monotonic() - told >= LINE_SECONDS:
            told = time.monotonic()
            print(f"{what}: {done:,} of {total:,} rows", file=sys.stderr, flush=True)

    if not console.is_terminal:
        yield tell
        return
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task(what, total=total)
        yield lambda count: progress.advance(bar, count)


def _refuse_foreign_tokens(model_dir: Path, *tables: TokenTable) -> None:
    """Refuse a tokenizer that has tokens which the model does not: its embedding would be read out of bounds."""
    vocabulary = decoder_numbers(model_dir)["vocab_size"]
    largest = max(int(table.tokens.max()) for table in tables)
    if largest >= vocabulary:
        raise BadInput(
            f"the tokenizer in {model_dir} gives token {largest}, but the model has a vocabulary of {vocabulary}; give the "
            "tokenizer that belongs to the model."
        )


def _facts(train: TokenTable, held_out: TokenTable) -> dict[str, Any]:
    lengths = train.lengths()
    firsts = train.labels[train.offsets[:-1]] != IGNORED_LABEL  # never predicted, so not learnt
    return {
        "train_rows": len(train),
        "eval_rows": len(held_out),
        "train_tokens": len(train.tokens),
        "train_label_tokens": int((train.labels != IGNORED_LABEL).sum() - firsts.sum()),
        "eval_tokens": len(held_out.tokens),
        "longest": int(max(lengths.max(), held_out.lengths().max())),
        "length_quantiles": {str(q): int(np.quantile(lengths, q)) for q in QUANTILES},
    }
