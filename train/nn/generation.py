"""Greedy answers of many runs at once, each through its own adapter: the prompts together, then a token of every answer per step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch

from train.data.micro_batch import MicroBatch
from train.data.sampling import IGNORED_LABEL, TokenSequence, cut
from train.nn.kv_cache import KeyValueCache
from train.nn.packed_model import PackedModel
from train.runtime.signals import StopFlag


@torch.no_grad()
def generate(
    base: PackedModel,
    prompts: Mapping[int, Sequence[np.ndarray]],
    pack_size: int,
    micro_batch_tokens: int,
    max_tokens: int,
    ends: Collection[int],
    stop: StopFlag,
    advance: Callable[[int], None] = lambda _count: None,
) -> dict[int, list[list[int]]]:
    """Each run's answers to its `prompts`, by row of the pack: the likeliest token after the other, at most `max_tokens` of them.

    An answer ends with the first of `ends`, which is part of it. As many prompts share a batch as have `micro_batch_tokens`. `advance`
    is told how many answers are whole since the last time.

    Raises:
        Stopped: the job was asked to stop; nothing has changed.
    """
    answers: dict[int, list[list[int]]] = {run: [[] for _ in asked] for run, asked in prompts.items()}
    asked = [_unlearnt(run, index, tokens) for run, own in prompts.items() for index, tokens in enumerate(own)]
    for chunk in cut(asked, micro_batch_tokens):
        in_memory = sorted(chunk, key=lambda s: s.run)  # the order in which a batch lays them down
        found = _answer(base, in_memory, pack_size, max_tokens, ends, stop, advance)
        for sequence, answer in zip(in_memory, found, strict=True):
            answers[sequence.run][sequence.index] = answer
    return answers


def _answer(
    base: PackedModel,
    prompts: list[TokenSequence],
    pack_size: int,
    max_tokens: int,
    ends: Collection[int],
    stop: StopFlag,
    advance: Callable[[int], None],
) -> list[list[int]]:
    """The answers to prompts that fit in one batch."""
    lengths = np.array([len(prompt.tokens) for prompt in prompts])
    cache = KeyValueCache(torch.from_numpy(lengths).to(base.device), room=max_tokens)
    last_places = torch.from_numpy(np.cumsum(lengths) - 1).to(base.device)
    stop.check()
    hidden = base.hidden_states(MicroBatch(prompts, pack_size, base.device), cache=cache)[last_places]
    answers: list[list[int]] = [[] for _ in prompts]
    whole = 0
    while True:
        likeliest = base.head.logits(hidden).argmax(dim=-1).tolist()
        for answer, token in zip(answers, likeliest, strict=True):
            if not _is_over(answer, max_tokens, ends):
                answer.append(token)
        before, whole = whole, sum(_is_over(answer, max_tokens, ends) for answer in answers)
        advance(whole - before)
        if whole == len(answers):
            return answers
        stop.check()
        cache.advance()
        follow = [
            _unlearnt(prompt.run, prompt.index, np.array([token]), start=length)
            for prompt, token, length in zip(prompts, likeliest, cache.lengths.tolist(), strict=True)
        ]
        hidden = base.hidden_states(MicroBatch(follow, pack_size, base.device), cache=cache)


def _is_over(answer: list[int], max_tokens: int, ends: Collection[int]) -> bool:
    return len(answer) >= max_tokens or (len(answer) > 0 and answer[-1] in ends)


def _unlearnt(run: int, index: int, tokens: np.ndarray, start: int = 0) -> TokenSequence:
    return TokenSequence(run, index, tokens, np.full(len(tokens), IGNORED_LABEL), start)
