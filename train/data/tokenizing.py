"""Rendered rows as tokens and labels, cut at the longest length, with an account of what was lost.

Training never pads, so a tokenizer without a pad token is as good as any.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from train.config import DataConfig
from train.data.rendering import Rendered, render
from train.data.rows import Row
from train.data.token_table import IGNORED_LABEL, TokenTable
from train.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_ROWS = 256

Advance = Callable[[int], None]


@dataclass
class Tally:
    """What happened to the rows on their way.

    Attributes:
        cut: rows that were longer than the longest length and kept their beginning.
        dropped: rows left out, by reason.
        least_lengths: of each row that lost its whole answer, the tokens that would keep the answer's first token.
        whole_lengths: tokens of each row before it was cut.
    """

    cut: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    least_lengths: list[int] = field(default_factory=list)
    whole_lengths: list[int] = field(default_factory=list)


class RowTokenizer:
    """Turns rows into a `TokenTable` and keeps the `Tally`.

    Raises:
        BadInput: the tokenizer cannot say where an answer begins or ends.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> None:
        self.tokenizer, self.data = tokenizer, data
        self.tally = Tally()
        if not tokenizer.is_fast:
            raise BadInput(
                f"the tokenizer of {tokenizer.name_or_path} does not say where its tokens stand in the text (it is no fast "
                "tokenizer), so prompts cannot be masked; choose a model with a tokenizer.json."
            )

    def tokenize(
        self, rows: Sequence[Row], stop: Callable[[], None], advance: Advance, called: str = "rows"
    ) -> TokenTable:
        """The table of `rows`, which are `called` so in messages; `stop` is polled and `advance` told the count between batches.

        Raises:
            BadInput: nothing is left to learn, see `data.max_length`, or the chat template refuses a row (naming it).
        """
        kept: list[tuple[np.ndarray, np.ndarray]] = []
        for start in range(0, len(rows), BATCH_ROWS):
            stop()
            batch = rows[start : start + BATCH_ROWS]
            kept += [row for row in map(self._cut, *self._encode(batch, start + 1)) if row is not None]
            advance(len(batch))
        if not kept:
            raise self._nothing_left(f"{len(rows):,} {called}")
        offsets = np.cumsum([0, *(len(tokens) for tokens, _ in kept)], dtype=np.int64)
        return TokenTable(np.concatenate([t for t, _ in kept]), np.concatenate([label for _, label in kept]), offsets)

    def _rendered(self, row: Row, number: int) -> Rendered:
        try:
            return render(row, self.tokenizer, mark_answers=self.data.response_only)
        except BadInput as exc:
            raise BadInput(f"row {number:,}: {exc}") from exc

    def _encode(self, rows: Sequence[Row], first: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Tokens and labels of each row, in full length; `first` is the number of the first row."""
        rendered = [self._rendered(row, number) for number, row in enumerate(rows, first)]
        encoding = self.tokenizer(
            [row.text for row in rendered],
            add_special_tokens=not self.tokenizer.chat_template,  # a chat template writes them itself
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        tokens = [np.array(ids, np.int32) for ids in encoding["input_ids"]]
        places = [np.array(spans, np.int64).reshape(-1, 2) for spans in encoding["offset_mapping"]]
        labels = [self._labels(*row) for row in zip(rendered, tokens, places, strict=True)]
        closed = [self._close(*row) for row in zip(rendered, tokens, labels, strict=True)]
        return [token for token, _ in closed], [label for _, label in closed]

    def _labels(self, row: Rendered, tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
        """The tokens from the first to the last that touches an answer; -100 elsewhere [length]."""
        if not self.data.response_only:
            return tokens.copy()
        labels = np.full_like(tokens, IGNORED_LABEL)
        for start, end in row.answers:
            touching = np.flatnonzero((places[:, 1] > start) & (places[:, 0] < end))
            if len(touching):
                span = slice(touching[0], touching[-1] + 1)
                labels[span] = tokens[span]
        return labels

    def _close(self, row: Rendered, tokens: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Append the end-of-text token, learnt, where the text does not close the answer itself."""
        if row.closed:
            return tokens, labels
        end = self.tokenizer.eos_token_id
        if end is None:
            raise BadInput(
                f"the tokenizer of {self.tokenizer.name_or_path} has neither an end-of-text token nor a chat template that "
                "closes an answer, so a model could never learn to stop; set eos_token in its tokenizer_config.json."
            )
        if len(tokens) and tokens[-1] == end:  # some tokenizers add it themselves
            tokens, labels = tokens[:-1], labels[:-1]
        return np.append(tokens, np.int32(end)), np.append(labels, np.int32(end))

    def _cut(self, tokens: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """The first `max_length` tokens; None, and a note why, if none of them is learnt."""
        self.tally.whole_lengths.append(len(tokens))
        limit = self.data.max_length
        learnt = np.flatnonzero(labels[1:] != IGNORED_LABEL) + 1  # the first token has no token before it to predict it
        if not len(learnt):
            self.tally.dropped["nothing to learn"] += 1
            return None
        if learnt[0] >= limit:
            self.tally.dropped[f"the answer begins after {limit:,} tokens"] += 1
            self.tally.least_lengths.append(int(learnt[0]) + 1)
            return None
        self.tally.cut += len(tokens) > limit
        return tokens[:limit], labels[:limit]

    def _nothing_left(self, rows: str) -> BadInput:
        tally, limit = self.tally, self.data.max_length
        if not tally.least_lengths:
            return BadInput(f"none of the {rows} has a token to learn; check the answers in {self.data.source}.")
        return BadInput(
            f"data.max_length={limit} cuts the whole answer off each of the {rows}, so there is nothing to learn; "
            f"data.max_length={max(tally.whole_lengths)} would keep every row whole, "
            f"{min(tally.least_lengths)} is the least that leaves anything."
        )
