"""The data of one run: reads, splits and tokenizes it, or takes it from the cache.

    file or hub -> rows -> train and held-out rows -> text -> tokens and labels -> arrays in the cache

The key in the cache is a hash of everything that decides the tokens, so the runs of a sweep tokenize once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from train.config import DataConfig, ModelConfig
from train.data.reading import read_split
from train.data.source import TokenizedStats, tokens_key
from train.data.token_table import TokenizedData, TokenTable, read_tokenized, write_tokenized
from train.data.tokenizing import Advance, RowTokenizer
from train.errors import BadInput
from train.model.folder import vocabulary
from train.store.layout import CacheDir

log = logging.getLogger("lorapack.data")

QUANTILES = (0.5, 0.9, 0.99)
# Between lines in a log.
LINE_SECONDS = 10.0


def load_tokenized(
    data: DataConfig, model: ModelConfig, model_dir: Path, cache: CacheDir, stop: Callable[[], None] = lambda: None
) -> TokenizedData:
    """The tokenized data from the cache; if it is missing there, it is tokenized now. `stop` may raise, between batches of rows.

    Raises:
        BadInput: the data cannot be read, or has nothing to learn.
        StorageError: the cache cannot be written.
    """
    folder = cache.tokens(tokens_key(data, model))
    cached = read_tokenized(folder)
    if cached is not None:
        return cached
    tokenized = tokenize(data, model, model_dir, stop)
    write_tokenized(folder, tokenized)
    # Read back, so that the arrays are memory-mapped also in the process that wrote them.
    return read_tokenized(folder) or tokenized


def summary(stats: TokenizedStats) -> str:
    """One line for the terminal: how many rows there are, how many were truncated, how many were dropped and why."""
    reasons = ", ".join(f"{count:,} because {reason}" for reason, count in stats["dropped"].items())
    return (
        f"{stats['train_rows']:,} rows to train on, {stats['eval_rows']:,} held out; "
        f"{stats['cut']:,} truncated to {stats['max_length']:,} tokens, "
        f"{sum(stats['dropped'].values()):,} dropped{f' ({reasons})' if reasons else ''}; "
        f"{stats['train_tokens'] / stats['train_rows']:.0f} tokens per row"
    )


def tokenize(data: DataConfig, model: ModelConfig, model_dir: Path, stop: Callable[[], None]) -> TokenizedData:
    """Read, split and tokenize, with a progress bar on a terminal, or a line now and then in a log."""
    # Heavy: transformers.
    from train.model.loading import load_tokenizer

    train_rows, eval_rows, dropped = read_split(data)
    tokenizer = RowTokenizer(load_tokenizer(model_dir, model), data)
    with _progress(f"tokenizing {data.name}", len(train_rows) + len(eval_rows)) as advance:
        train, held_out = (
            tokenizer.tokenize(rows, stop, advance, called)
            for rows, called in ((train_rows, "rows"), (eval_rows, "held-out rows"))
        )
    _refuse_foreign_tokens(model_dir, train, held_out)
    losses = {
        "max_length": data.max_length,
        "cut": tokenizer.tally.truncated,
        "dropped": dict(dropped + tokenizer.tally.dropped),
    }
    return TokenizedData(train, held_out, _count(train, held_out) | losses)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Advance]:
    """Show how many of `total` rows are done: a bar on a terminal, elsewhere a line in the log every `LINE_SECONDS`."""
    console = Console(stderr=True)
    done = 0
    last_line = time.monotonic()

    def log_progress(count: int) -> None:
        nonlocal done, last_line
        done += count
        if time.monotonic() - last_line >= LINE_SECONDS:
            last_line = time.monotonic()
            log.info(f"{what}: {done:,} of {total:,} rows")

    if not console.is_terminal:
        yield log_progress
        return
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task(what, total=total)
        yield lambda count: progress.advance(bar, count)


def _refuse_foreign_tokens(model_dir: Path, *tables: TokenTable) -> None:
    """Reject a tokenizer with tokens that the model does not have: its embedding would be read out of bounds."""
    vocab_size = vocabulary(model_dir)
    largest = max(int(table.tokens.max()) for table in tables)
    if vocab_size is not None and largest >= vocab_size:
        raise BadInput(
            f"the tokenizer in {model_dir} gives token {largest}, but the model has a vocabulary of {vocab_size}; use the "
            "tokenizer that belongs to the model."
        )


def _count(train: TokenTable, held_out: TokenTable) -> TokenizedStats:
    """The stats that follow from the arrays."""
    lengths = train.lengths()
    return {
        "train_rows": len(train),
        "eval_rows": len(held_out),
        "train_tokens": len(train.tokens),
        "train_label_tokens": train.num_targets(),
        "eval_tokens": len(held_out.tokens),
        "longest": int(max(lengths.max(), held_out.lengths().max())),
        "length_quantiles": {str(q): int(np.quantile(lengths, q)) for q in QUANTILES},
    }
