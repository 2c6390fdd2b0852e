"""Turns rows into examples: tokens and labels, truncated to `data.max_length`, with a count of what was lost.

No pad token is needed, since training never pads. The tokenizer has to be a fast one, because labels need its offset mapping: which
characters of the text each token covers. The end of `train.data.rendering`'s example, where the answer is characters 58 to 69:

    token                 assistant   ⏎        3        <|im_end|>
    offsets               48, 57      57, 58   58, 59   59, 69
    overlaps the answer   no          no       yes      yes
    label                 -100        -100     token    token
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from train.config import DataConfig
from train.data.rendering import Rendered, render, special_tokens
from train.data.rows import Row
from train.data.token_table import IGNORED_LABEL, TokenTable
from train.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_ROWS = 256

Advance = Callable[[int], None]


@dataclass
class Tally:
    """What happened to the rows.

    Attributes:
        truncated: how many rows were longer than `data.max_length` and kept their beginning.
        dropped: how many rows were left out, by reason.
        min_lengths: for each row that lost its whole answer, the `data.max_length` that would keep the answer's first token.
        full_lengths: tokens of each row before truncation.
    """

    truncated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    min_lengths: list[int] = field(default_factory=list)
    full_lengths: list[int] = field(default_factory=list)


class RowTokenizer:
    """Turns rows into a `TokenTable` and keeps the `Tally`.

    Raises:
        BadInput: the tokenizer has no offset mapping, so it cannot say where an answer begins or ends.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> None:
        self.tokenizer = tokenizer
        self.data = data
        self.tally = Tally()
        if not tokenizer.is_fast:
            raise BadInput(
                f"the tokenizer of {tokenizer.name_or_path} does not say where its tokens are in the text (it is not a fast "
                "tokenizer), so prompts cannot be masked; choose a model with a tokenizer.json."
            )

    def tokenize(
        self, rows: Sequence[Row], stop: Callable[[], None], advance: Advance, called: str = "rows"
    ) -> TokenTable:
        """The examples of `rows`, in order, without those that have nothing to learn.

        Args:
            rows: data rows.
            stop: called before each batch of rows; it may raise.
            advance: called after each batch with its number of rows.
            called: what messages call the rows.

        Raises:
            BadInput: no row has anything to learn within `data.max_length`, or the chat template rejects a row (naming it).
        """
        kept: list[tuple[np.ndarray, np.ndarray]] = []
        for start in range(0, len(rows), BATCH_ROWS):
            stop()
            batch = rows[start : start + BATCH_ROWS]
            examples = map(self._truncate, *self._encode(batch, start + 1))
            kept += [example for example in examples if example is not None]
            advance(len(batch))
        if not kept:
            raise self._nothing_left(f"{len(rows):,} {called}")
        # Examples of 4 and 2 tokens begin at 0 and 4; the last offset, 6, is where the last one ends.
        offsets = np.cumsum([0, *(len(tokens) for tokens, _ in kept)], dtype=np.int64)
        return TokenTable(np.concatenate([t for t, _ in kept]), np.concatenate([label for _, label in kept]), offsets)

    def _rendered(self, row: Row, number: int) -> Rendered:
        try:
            return render(row, self.tokenizer, mark_answers=self.data.response_only)
        except BadInput as exc:
            raise BadInput(f"row {number:,}: {exc}") from exc

    def _encode(self, rows: Sequence[Row], first: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Tokens and labels of each row, both [length], not truncated. `first` is the number of the first row, for messages."""
        rendered = [self._rendered(row, number) for number, row in enumerate(rows, first)]
        encoding = self.tokenizer(
            [row.text for row in rendered],
            return_offsets_mapping=True,
            return_attention_mask=False,
            # Without it transformers warns about every row that is longer than the model's context; those are truncated below.
            verbose=False,
            **special_tokens(self.tokenizer),
        )
        tokens = [np.array(ids, np.int32) for ids in encoding["input_ids"]]
        # [length, 2] each; the reshape gives a text without tokens, [], that shape too.
        offsets = [np.array(spans, np.int64).reshape(-1, 2) for spans in encoding["offset_mapping"]]
        labels = [self._labels(*parts) for parts in zip(rendered, tokens, offsets, strict=True)]
        closed = [self._close(*parts) for parts in zip(rendered, tokens, labels, strict=True)]
        return [tokens for tokens, _ in closed], [labels for _, labels in closed]

    def _labels(self, row: Rendered, tokens: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Labels [length]: the token itself where it overlaps an answer, -100 elsewhere; see the module's example."""
        if not self.data.response_only:
            return tokens.copy()
        labels = np.full_like(tokens, IGNORED_LABEL)
        for start, end in row.answers:
            # Overlap, not containment: in Llama's vocabularies the token " Ho" begins with the space before the answer.
            overlapping = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < end))
            if len(overlapping):
                # From the first to the last, since tokens between them can be empty: some tokenizers put one before a word.
                span = slice(overlapping[0], overlapping[-1] + 1)
                labels[span] = tokens[span]
        return labels

    def _close(self, row: Rendered, tokens: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Append the end-of-text token, to be learned, where the text does not close the answer itself."""
        if row.closed:
            return tokens, labels
        end = self.tokenizer.eos_token_id
        if end is None:
            raise BadInput(
                f"the tokenizer of {self.tokenizer.name_or_path} has neither an end-of-text token nor a chat template that "
                "closes an answer, so a model could never learn to stop; set eos_token in its tokenizer_config.json."
            )
        # Some tokenizers have appended it already, outside of the answer's span and so with the label -100: it is replaced.
        if len(tokens) and tokens[-1] == end:
            tokens = tokens[:-1]
            labels = labels[:-1]
        return np.append(tokens, np.int32(end)), np.append(labels, np.int32(end))

    def _truncate(self, tokens: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """The first `max_length` tokens and labels. None, counted with its reason, if nothing would be learned from them."""
        self.tally.full_lengths.append(len(tokens))
        limit = self.data.max_length
        # From the second token on: no token comes before the first, so nothing predicts it.
        learned = np.flatnonzero(labels[1:] != IGNORED_LABEL) + 1
        if not len(learned):
            self.tally.dropped["nothing to learn"] += 1
            return None
        if learned[0] >= limit:
            self.tally.dropped[f"the answer begins after {limit:,} tokens"] += 1
            # Token 40 is the 41st, so it takes 41 tokens to keep it.
            self.tally.min_lengths.append(int(learned[0]) + 1)
            return None
        self.tally.truncated += len(tokens) > limit
        return tokens[:limit], labels[:limit]

    def _nothing_left(self, rows: str) -> BadInput:
        """The error for rows of which none is left."""
        tally = self.tally
        if not tally.min_lengths:
            return BadInput(f"none of the {rows} has a token to learn; check the answers in {self.data.source}.")
        return BadInput(
            f"data.max_length={self.data.max_length} cuts off the whole answer of each of the {rows}, so there is nothing to learn; "
            f"data.max_length={max(tally.full_lengths)} would keep every row whole, "
            f"{min(tally.min_lengths)} is the smallest that keeps anything."
        )
