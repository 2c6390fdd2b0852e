"""Greedy answers of many runs at once, each through its own adapter: the prompts in one pass, then one token of every answer per pass.

Prompts of 3 and 5 tokens are one micro-batch of 8 flat tokens, whose last tokens are numbers 2 and 7. Their hidden states give the
first token of each answer. The next micro-batch has 2 tokens, at positions 3 and 5, and attention reads the rest from the cache.

On padded sequences transformers' own mixers compute, whose states nobody keeps for us. There the next micro-batch is the sequences of
4 and 6 tokens once more: slow, but right for every causal model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from train.data.micro_batch import MicroBatch
from train.data.sampling import TokenSequence, split_by_tokens
from train.data.token_table import IGNORED_LABEL
from train.nn.forward_context import KeyValueCache
from train.nn.packed_model import PackedModel
from train.runtime.signals import StopFlag


@dataclass(frozen=True)
class GenerationLimits:
    """When an answer ends, and how many prompts share a batch.

    Attributes:
        max_new_tokens: tokens of the longest answer.
        eos_token_ids: an answer ends with the first of these, which is part of it.
        micro_batch_tokens: as many prompts share a batch as have this many tokens together, but at least one.
    """

    max_new_tokens: int
    eos_token_ids: Collection[int]
    micro_batch_tokens: int

    def are_reached(self, answer: list[int]) -> bool:
        """Whether `answer` is complete."""
        return len(answer) >= self.max_new_tokens or (len(answer) > 0 and answer[-1] in self.eos_token_ids)


@torch.no_grad()
def generate(
    base: PackedModel,
    prompts: Mapping[int, Sequence[np.ndarray]],
    pack_size: int,
    limits: GenerationLimits,
    stop: StopFlag,
    advance: Callable[[int], None] = lambda _count: None,
) -> dict[int, list[list[int]]]:
    """Each run's answers to its `prompts`, by the run's index in the pack: always the most likely next token.

    `advance` is called with the number of answers that have become complete since its last call.

    Raises:
        Stopped: the job was asked to stop; nothing has changed.
    """
    answers: dict[int, list[list[int]]] = {run: [[] for _ in asked] for run, asked in prompts.items()}
    asked = [_without_targets(run, index, tokens) for run, own in prompts.items() for index, tokens in enumerate(own)]
    for chunk in split_by_tokens(asked, limits.micro_batch_tokens):
        # The order in which a micro-batch lists them, so that its last tokens can be told apart.
        ordered = sorted(chunk, key=lambda s: s.run_index)
        found = _answer(base, ordered, pack_size, limits, stop, advance)
        for sequence, answer in zip(ordered, found, strict=True):
            answers[sequence.run_index][sequence.index] = answer
    return answers


def _answer(
    base: PackedModel,
    prompts: list[TokenSequence],
    pack_size: int,
    limits: GenerationLimits,
    stop: StopFlag,
    advance: Callable[[int], None],
) -> list[list[int]]:
    """The answers to prompts that fit in one batch."""
    answers: list[list[int]] = [[] for _ in prompts]
    complete = 0
    passes = (_CachedPasses if base.takes_cache else _WholePasses)(base, prompts, pack_size, limits.max_new_tokens)
    while True:
        stop.check()
        likeliest = base.head.logits(passes.last_states()).argmax(dim=-1).tolist()
        # A complete answer's sequence runs on until all are complete; its further tokens are dropped here.
        for answer, token in zip(answers, likeliest, strict=True):
            if not limits.are_reached(answer):
                answer.append(token)
        before, complete = complete, sum(map(limits.are_reached, answers))
        advance(complete - before)
        if complete == len(answers):
            return answers
        passes.append(likeliest)


class _CachedPasses:
    """The prompts in the first pass, one token of each sequence in every other one."""

    def __init__(self, base: PackedModel, prompts: list[TokenSequence], pack_size: int, room: int) -> None:
        lengths = torch.tensor([len(prompt.tokens) for prompt in prompts], device=base.device)
        self._base = base
        self._pack_size = pack_size
        self._cache = KeyValueCache(lengths, room)
        self._new = prompts

    def last_states(self) -> torch.Tensor:
        """The hidden state [S, dim] of every sequence's last token."""
        return _last_states(self._base, self._new, self._pack_size, self._cache)

    def append(self, tokens: list[int]) -> None:
        """Put one token behind every sequence."""
        self._cache.advance()
        self._new = [
            _without_targets(old.run_index, old.index, np.array([token]), start=length)
            for old, token, length in zip(self._new, tokens, self._cache.lengths.tolist(), strict=True)
        ]


class _WholePasses:
    """All of each sequence in every pass."""

    def __init__(self, base: PackedModel, prompts: list[TokenSequence], pack_size: int, _room: int) -> None:
        self._base = base
        self._pack_size = pack_size
        self._sequences = prompts

    def last_states(self) -> torch.Tensor:
        """The hidden state [S, dim] of every sequence's last token."""
        return _last_states(self._base, self._sequences, self._pack_size)

    def append(self, tokens: list[int]) -> None:
        """Put one token behind every sequence."""
        self._sequences = [
            _without_targets(old.run_index, old.index, np.append(old.tokens, token))
            for old, token in zip(self._sequences, tokens, strict=True)
        ]


def _last_states(
    base: PackedModel, sequences: list[TokenSequence], pack_size: int, cache: KeyValueCache | None = None
) -> torch.Tensor:
    # Lengths 3 and 5 end at flat tokens 2 and 7.
    ends = np.cumsum([len(sequence.tokens) for sequence in sequences]) - 1
    hidden = base.hidden_states(MicroBatch(sequences, pack_size, base.device), cache=cache)
    return hidden[torch.from_numpy(ends).to(base.device)]


def _without_targets(run: int, index: int, tokens: np.ndarray, start: int = 0) -> TokenSequence:
    """A sequence of which no token is to be predicted."""
    return TokenSequence(run, index, tokens, np.full(len(tokens), IGNORED_LABEL), start)
