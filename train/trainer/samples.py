"""Sample answers: at every evaluation each run answers the same few held-out prompts, for people to read."""

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
    # Imported here, since runs without samples need no tokenizer.
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
    """Asks the runs of a pack their questions. Lines that all prompts share, such as a system prompt, are left out of the text."""

    def __init__(self, decoder: AnswerDecoder, micro_batch_tokens: int, job: JobContext) -> None:
        self._decoder = decoder
        self._micro_batch_tokens = micro_batch_tokens
        self._activity = job.activity
        # The main process answers alone. If it stopped here, the others would wait for it: processes agree on a stop between
        # micro-batches. So with several processes it gets a flag that is never set.
        self._stop = job.stop if job.group.size == 1 else StopFlag()
        # By table and number of prompts, which several runs may share.
        self._questions: dict[tuple[int, int], list[Question]] = {}

    def ask(self, base: PackedModel, sessions: Sequence[RunSession], pack_size: int) -> dict[int, list[SampleAnswer]]:
        """Every session's questions with its answers, by run index, from `base` with the adapters that it carries now.

        Raises:
            Stopped: the job was asked to stop; nothing has changed.
        """
        asked = {session.run_index: self.questions(session) for session in sessions}
        prompts = {run: [question.tokens for question in questions] for run, questions in asked.items() if questions}
        if not prompts:
            return {}
        self._activity.begin("answering", sum(map(len, prompts.values())))
        # All runs generate together, as long as the longest needs; each answer is then cut to its own run's limit.
        tokens_of_run = {session.run_index: session.config.train.sample_tokens for session in sessions}
        limits = GenerationLimits(max(tokens_of_run.values()), self._decoder.ends, self._micro_batch_tokens)
        answers = generate(base, prompts, pack_size, limits, self._stop, self._activity.advance)
        return {
            run: [
                self._sample(question, answer[: tokens_of_run[run]])
                for question, answer in zip(asked[run], answers_of_run, strict=True)
            ]
            for run, answers_of_run in answers.items()
        }

    def ask_untrained(
        self, base: PackedModel, sessions: Sequence[RunSession], pack_size: int
    ) -> dict[int, list[SampleAnswer]]:
        """`ask` for runs whose B is still zero, with the base alone: once for all runs with the same questions."""
        # Reversed, so that the first session with these questions is the one that stays.
        first = {_same_questions(session): session for session in reversed(sessions)}
        answers = self.ask(base, list(first.values()), pack_size)
        asked_as = {session.run_index: first[_same_questions(session)].run_index for session in sessions}
        return {run: answers[other] for run, other in asked_as.items() if other in answers}

    def questions(self, session: RunSession) -> list[Question]:
        """The questions of a run: as many as it wants, spread evenly over its held-out rows (3 of 9 rows: 0, 4 and 8)."""
        table = session.data.eval
        count = session.config.train.sample_prompts
        # Tables are shared by runs and live as long as the job, so their identity will do.
        key = (id(table), count)
        if key not in self._questions:
            rows = sorted({int(row) for row in np.linspace(0, len(table) - 1, min(count, len(table)))})
            self._questions[key] = self._without_shared_lines([self._question(table, row) for row in rows])
        return self._questions[key]

    def _question(self, table: TokenTable, row: int) -> Question:
        tokens, labels = table.example(row)
        start = answer_start(labels)
        return Question(row, tokens[:start], self._decoder.decode(tokens[:start]), self._decoder.decode(tokens[start:]))

    def _without_shared_lines(self, questions: list[Question]) -> list[Question]:
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
    """Index of the first token of the last trained part of a row, at least 1. If nothing is masked, half of the row is the prompt."""
    trained = labels != IGNORED_LABEL
    if trained.all():
        return max(1, len(labels) // 2)
    # A part begins where a trained token follows a masked one. A conversation with two answers:
    #   labels   -100 -100   5    6  -100   7    8    2
    #   trained     0    0   1    1     0   1    1    1
    #   begins = [1, 4] + 1 = [2, 5], so the prompt is the first 5 tokens.
    begins = np.flatnonzero(trained[1:] & ~trained[:-1]) + 1
    return int(begins[-1]) if len(begins) else 1


def without_shared_lines(texts: list[str]) -> list[str]:
    """`texts` without the lines that all of them begin with, and those that all end with; a single text stays whole."""
    if len(texts) < 2:
        return texts
    lines_of = [text.splitlines() for text in texts]
    before = _shared(lines_of)
    # Only of what is left, so that no line is counted from both ends.
    after = _shared([lines[before:][::-1] for lines in lines_of])
    kept = ["\n".join(lines[before : len(lines) - after]).strip() for lines in lines_of]
    # One text may be the beginning of the others: nothing of it would be left.
    return kept if all(kept) else texts


def _shared(lists: list[list[str]]) -> int:
    """How many items all lists begin with."""
    count = 0
    for items in zip(*lists, strict=False):
        if len(set(items)) > 1:
            break
        count += 1
    return count
