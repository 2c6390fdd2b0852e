"""How much work a run is: its adapter's parameters, its steps and its tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from launcher.estimate.shapes import ModelShape
from train.config import DataConfig, LoraConfig, RunConfig, TrainConfig
from train.data.reading import read_split
from train.data.rows import AlpacaRow, Row
from train.data.source import data_path
from train.data.stats import read_facts
from train.errors import BadInput
from train.lora.targets import adapted_modules, trainable_parameters
from train.store.layout import CacheDir

CHARACTERS_PER_TOKEN = 4.0  # English text with vocabularies of 32,000 and more
TEMPLATE_TOKENS = 25  # a chat template's marks and system prompt
HUB_ROWS, HUB_TOKENS_PER_ROW = 52_002, 130.0  # Stanford Alpaca, by far the usual one


@dataclass(frozen=True)
class DataFacts:
    """Rows, mean tokens of a row, and the tokens of the longest."""

    train_rows: int
    eval_rows: int
    tokens_per_row: float
    longest: int


@dataclass(frozen=True)
class Workload:
    """One run's work from its next step on. Tokens are real ones, of all these steps and evaluations together.

    `adapted` names the layers that learn, nothing where the model is not known yet.
    """

    adapter_parameters: int
    steps: int
    batch_size: int
    step_tokens: float
    longest: int
    train_tokens: float
    eval_tokens: float
    adapted: frozenset[str] = frozenset()


def data_facts(config: RunConfig, cache: CacheDir) -> DataFacts:
    """Counted where the data is tokenized already, else guessed from its rows.

    Raises:
        BadInput: a local file has a malformed row, or fewer rows than asked for.
    """
    facts = read_facts(config.data, config.model, cache)
    if facts is not None:
        mean = facts["train_tokens"] / facts["train_rows"]
        return DataFacts(facts["train_rows"], facts["eval_rows"], mean, facts["longest"])
    return _guessed_facts(config.data)


@dataclass(frozen=True)
class Adapter:
    """What an adapter weighs, and the full names of the layers that it sits on."""

    parameters: int
    layers: frozenset[str]


def workload(train: TrainConfig, data: DataFacts, adapter: Adapter, done_steps: int) -> Workload:
    """What is left of a run with that adapter after `done_steps`."""
    steps = max(0, train.total_steps(data.train_rows) - done_steps)
    step_tokens = train.batch_size * data.tokens_per_row
    evaluations = 2 + (steps // train.eval_steps if train.eval_steps else 0)
    return Workload(
        adapter_parameters=adapter.parameters,
        steps=steps,
        batch_size=train.batch_size,
        step_tokens=step_tokens,
        longest=data.longest,
        train_tokens=steps * step_tokens,
        eval_tokens=evaluations * data.eval_rows * data.tokens_per_row,
        adapted=adapter.layers,
    )


def share(work: Workload, gpus: int) -> Workload:
    """What one of `gpus` computes of a run, which deal the sequences of every step among them (`train.trainer.process_group`)."""
    return replace(
        work,
        batch_size=math.ceil(work.batch_size / gpus),
        step_tokens=work.step_tokens / gpus,
        train_tokens=work.train_tokens / gpus,
        eval_tokens=work.eval_tokens / gpus,
    )


def adapter_of(lora: LoraConfig, shape: ModelShape) -> Adapter:
    """The adapter that `lora` makes over a base of this shape.

    Raises:
        BadInput: the model has no module that the adapter targets. (Of a model that is not fetched yet only the usual
            modules are known, so nothing is refused.)
    """
    try:
        targets = adapted_modules(lora, list(shape.linears))
        return Adapter(trainable_parameters(lora, shape.linears), frozenset(targets))
    except BadInput:
        if not shape.assumed:
            raise
        return Adapter(shape.layers * 2 * lora.r * 2 * shape.hidden, frozenset())


def _guessed_facts(data: DataConfig) -> DataFacts:
    """Rows as the files have them, tokens by characters; a hub's data set is taken for one like Alpaca."""
    if any(data_path(source) is None for source in (data.source, data.eval_source or data.source)):
        rows = min(HUB_ROWS, data.train_rows or HUB_ROWS)
        return DataFacts(rows, data.eval_rows, min(HUB_TOKENS_PER_ROW, data.max_length), data.max_length)
    learnt, held_out, _ = read_split(data)
    tokens = TEMPLATE_TOKENS + sum(map(_characters, learnt)) / CHARACTERS_PER_TOKEN / len(learnt)
    return DataFacts(len(learnt), len(held_out), min(tokens, data.max_length), data.max_length)


def _characters(row: Row) -> int:
    """Characters of everything that is said in a row."""
    if isinstance(row, AlpacaRow):
        return len(row.instruction) + len(row.input) + len(row.output)
    return sum(len(message["content"]) for message in row.messages)


BaseKey = tuple[str, ...]


def base_key(config: RunConfig) -> BaseKey:
    """What runs of one pack have in common: the base, its precision, and how it is held and computed."""
    train = config.train
    shared = (config.model.fingerprint, config.quant, train.dtype, train.residency)
    return tuple(repr(value) for value in (*shared, train.gradient_checkpointing, train.micro_batch_tokens))
