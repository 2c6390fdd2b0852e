"""Sample answers: at every evaluation each run answers the same few held-out prompts, for people to read beside the numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.config import ModelConfig
from train.data.rendering import closing_tokens
from train.data.token_table import IGNORED_LABEL, TokenTable
from train.nn.generation import GenerationLimits, generate
from train.nn.packed_model import PackedModel
from train.runtime.signals import StopFlag
from train.store.journal import SampleAnswer
from train.trainer.context import JobContext
from train.trainer.session import RunSession


@dataclass(frozen=True)
class AnswerDecoder:
    """The tokenizer's part: tokens as text, without special ones, and the tokens that close an answer."""

    decode: Callable[[Iterable[int]], str]
    ends: frozenset[int]


def load_answer_decoder(model: ModelConfig, model_dir: Path) -> AnswerDecoder:
    """The tokenizer of a staged model, as far as answers need it."""
    # Here, since runs without samples need no tokenizer.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=model.trust_remote_code)

    def decode(tokens: Iterable[int]) -> str:
        text: str = tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)
        return text.strip()

    return AnswerDecoder(decode, closing_tokens(tokenizer))


@dataclass(frozen=True)
class Question:
    """A held-out row: the tokens of its prompt, and prompt and right answer as text."""

    row: int
    tokens: np.ndarray
    prompt: str
    expected: str


class Sampler:
    """Asks the runs of a pack. What all prompts of a table begin or end with, such as a system prompt, is left off their text."""

    def __init__(self, decoder: AnswerDecoder, micro_batch_tokens: int, job: JobContext) -> None:
        self._decoder = decoder
        self._micro_batch_tokens = micro_batch_tokens
        self._activity = job.activity
        # The main process answers alone. If it stopped here, it would leave the others waiting; they agree on a stop with it
        # between micro-batches.
        self._stop = job.stop if job.group.size == 1 else StopFlag()
        self._questions: dict[tuple[int, int], list[Question]] = {}

    def ask(self, base: PackedModel, sessions: Sequence[RunSession], pack_size: int) -> dict[int, list[SampleAnswer]]:
        """Every session's questions with its answers, by row of the pack, from `base` with the adapters that it carries now.

        Raises:
            Stopped: the job was asked to stop; nothing has changed.
        """
        asked = {session.run_index: self.questions(session) for session in sessions}
        prompts = {row: [question.tokens for question in own] for row, own in asked.items() if own}
        if not prompts:
            return {}
        most = max(session.config.train.sample_tokens for session in sessions)
        self._activity.begin("answering", sum(map(len, prompts.values())))
        bounds = GenerationLimits(most, self._decoder.ends, self._micro_batch_tokens)
        answers = generate(base, prompts, pack_size, bounds, self._stop, self._activity.advance)
        limits = {session.run_index: session.config.train.sample_tokens for session in sessions}
        return {
            row: [
                self._sample(question, answer[: limits[row]]) for question, answer in zip(asked[row], own, strict=True)
            ]
            for row, own in answers.items()
        }

    def ask_untrained(
        self, base: PackedModel, sessions: Sequence[RunSession], pack_size: int
    ) -> dict[int, list[SampleAnswer]]:
        """`ask` for runs whose B is still zero: the bare base answers, once for all with the same questions."""
        first = {_same_questions(session): session for session in reversed(sessions)}
        found = self.ask(base, list(first.values()), pack_size)
        rows = {session.run_index: first[_same_questions(session)].run_index for session in sessions}
        return {row: found[other] for row, other in rows.items() if other in found}

    def questions(self, session: RunSession) -> list[Question]:
        """The rows that the run is asked: as many as it wants, spread evenly over its held-out rows."""
        table, count = session.data.eval, session.config.train.sample_prompts
        key = (id(table), count)
        if key not in self._questions:
            rows = sorted({int(row) for row in np.linspace(0, len(table) - 1, min(count, len(table)))})
            self._questions[key] = self._without_what_all_share([self._question(table, row) for row in rows])
        return self._questions[key]

    def _question(self, table: TokenTable, row: int) -> Question:
        tokens, labels = table.example(row)
        start = answer_start(labels)
        return Question(row, tokens[:start], self._decoder.decode(tokens[:start]), self._decoder.decode(tokens[start:]))

    def _without_what_all_share(self, questions: list[Question]) -> list[Question]:
        texts = without_shared_lines([question.prompt for question in questions])
        return [Question(q.row, q.tokens, text, q.expected) for q, text in zip(questions, texts, strict=True)]

    def _sample(self, question: Question, answer: list[int]) -> SampleAnswer:
        """A line's entry. `whole` is false where the answer was cut off."""
        return SampleAnswer(
            row=question.row,
            prompt=question.prompt,
            expected=question.expected,
            answer=self._decoder.decode(answer),
            whole=answer[-1] in self._decoder.ends,
        )


def _same_questions(session: RunSession) -> tuple[int, int, int]:
    train = session.config.train
    return id(session.data.eval), train.sample_prompts, train.sample_tokens


def answer_start(labels: np.ndarray) -> int:
    """Where the last learnt stretch of a row begins, from the second token on; where nothing is masked, half of the row asks."""
    learnt = labels != IGNORED_LABEL
    if learnt.all():
        return max(1, len(labels) // 2)
    begins = np.flatnonzero(learnt[1:] & ~learnt[:-1]) + 1
    return int(begins[-1]) if len(begins) else 1


def without_shared_lines(texts: list[str]) -> list[str]:
    """`texts` without the lines that all of them begin with, and those that all end with; a single text stays whole."""
    lines = [text.splitlines() for text in texts]
    if len(texts) < 2:
        return texts
    before = _shared(lines)
    after = _shared([own[before:][::-1] for own in lines])
    kept = ["\n".join(own[before : len(own) - after]).strip() for own in lines]
    return kept if all(kept) else texts


def _shared(lists: list[list[str]]) -> int:
    """How many items all lists begin with."""
    count = 0
    for items in zip(*lists, strict=False):
        if len(set(items)) > 1:
            break
        count += 1
    return count
