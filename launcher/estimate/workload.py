"""How much work a run is: its adapter's parameters, its steps and its tokens.

`SizingInputs` is the way in: it looks up models, data sets and adapters in the cache folder, each once for a whole sweep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from launcher.estimate.checking import checked_facts
from launcher.estimate.shapes import ModelShape, expected_shape, shape_of
from train.config import DataConfig, LoraConfig, ModelConfig, RunConfig, TrainConfig
from train.data.reading import read_split
from train.data.rows import AlpacaRow, Row
from train.data.source import data_path, read_dataset_stats
from train.errors import BadInput
from train.lora.targets import adapted_modules, trainable_parameters
from train.model.facts import ModelFacts
from train.model.folder import check_weights
from train.model.source import staged_model
from train.store.layout import CacheDir

# English text with vocabularies of 32,000 and more.
CHARACTERS_PER_TOKEN = 4.0
# A chat template's marks and system prompt.
TEMPLATE_TOKENS = 25
# A hub's data set that is not fetched yet is taken for Stanford Alpaca, by far the usual one.
HUB_ROWS = 52_002
HUB_TOKENS_PER_ROW = 130.0


@dataclass(frozen=True)
class DatasetStats:
    """Rows, mean tokens of a row, and the tokens of the longest row."""

    train_rows: int
    eval_rows: int
    tokens_per_row: float
    longest: int


@dataclass(frozen=True)
class Workload:
    """One run's work from its next step on. Tokens are counted without padding, over all these steps and evaluations.

    adapted: the names of the layers with an adapter, empty if the model is not known yet.
    """

    adapter_parameters: int
    steps: int
    batch_size: int
    step_tokens: float
    longest: int
    train_tokens: float
    eval_tokens: float
    adapted: frozenset[str] = frozenset()


def dataset_stats(config: RunConfig, cache: CacheDir) -> DatasetStats:
    """Counts if the data is tokenized already, otherwise estimates from its rows.

    Raises:
        BadInput: a local file has a malformed row, or fewer rows than asked for.
    """
    stats = read_dataset_stats(config.data, config.model, cache)
    if stats is not None:
        mean = stats["train_tokens"] / stats["train_rows"]
        return DatasetStats(stats["train_rows"], stats["eval_rows"], mean, stats["longest"])
    return _guessed_stats(config.data)


@dataclass(frozen=True)
class Adapter:
    """An adapter's parameters, and the full names of the layers that it adapts."""

    parameters: int
    layers: frozenset[str]


def workload(train: TrainConfig, data: DatasetStats, adapter: Adapter, done_steps: int) -> Workload:
    """What is left of a run with that adapter after `done_steps`."""
    steps = max(0, train.total_steps(data.train_rows) - done_steps)
    step_tokens = train.batch_size * data.tokens_per_row
    # One before the first step, one after the last, and those in between.
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
    """What one of `gpus` computes of a run. They share the sequences of every step (`train.trainer.process_group`)."""
    return replace(
        work,
        batch_size=math.ceil(work.batch_size / gpus),
        step_tokens=work.step_tokens / gpus,
        train_tokens=work.train_tokens / gpus,
        eval_tokens=work.eval_tokens / gpus,
    )


def adapter_of(lora: LoraConfig, shape: ModelShape) -> Adapter:
    """The adapter that `lora` describes for a base of this shape.

    Raises:
        BadInput: the model has no module that the adapter targets. Of a model that is neither fetched nor in the catalogue only the
            size is known, so nothing is refused then.
    """
    try:
        targets = adapted_modules(lora, list(shape.size.linears))
        return Adapter(trainable_parameters(lora, shape.size.linears), frozenset(targets))
    except BadInput:
        if shape.origin != "size":
            raise
        # Assumed: two square projections per layer, each with A and B of r * hidden parameters.
        return Adapter(shape.size.layers * 2 * lora.r * 2 * shape.size.hidden, frozenset())


def _guessed_stats(data: DataConfig) -> DatasetStats:
    """Rows as the files have them, tokens by characters; a hub's data set is taken for one like Alpaca."""
    if any(data_path(source) is None for source in (data.source, data.eval_source or data.source)):
        rows = min(HUB_ROWS, data.train_rows or HUB_ROWS)
        return DatasetStats(rows, data.eval_rows, min(HUB_TOKENS_PER_ROW, data.max_length), data.max_length)
    train_rows, held_out, _ = read_split(data)
    tokens = TEMPLATE_TOKENS + sum(map(_characters, train_rows)) / CHARACTERS_PER_TOKEN / len(train_rows)
    return DatasetStats(len(train_rows), len(held_out), min(tokens, data.max_length), data.max_length)


def _characters(row: Row) -> int:
    """Characters of all text in a row."""
    if isinstance(row, AlpacaRow):
        return len(row.instruction) + len(row.input) + len(row.output)
    return sum(len(message["content"]) for message in row.messages)


BaseKey = tuple[str, ...]


def base_key(config: RunConfig) -> BaseKey:
    """What the runs of one pack have in common: the base, its precision, and how it is held and computed."""
    train = config.train
    shared = (config.model.fingerprint, config.quant, train.dtype, train.residency)
    return tuple(repr(value) for value in (*shared, train.gradient_checkpointing, train.micro_batch_tokens))


class SizingInputs:
    """What forecasts are made from, read from the cache folder: shapes of models, counts of data, sizes of adapters."""

    def __init__(self, cache: CacheDir) -> None:
        self._cache = cache
        self._shapes: dict[ModelConfig, ModelShape] = {}
        self._data: dict[tuple[ModelConfig, DataConfig], DatasetStats] = {}
        self._adapters: dict[tuple[ModelConfig, str], Adapter] = {}
        self._facts: dict[ModelConfig, ModelFacts | None] = {}

    def facts(self, model: ModelConfig) -> ModelFacts | None:
        """What is known of the base model; None if it is not fetched, or could not be measured.

        Raises:
            BadInput: it cannot be trained, or its files are damaged.
        """
        if model not in self._facts:
            folder = staged_model(model, self._cache)
            if folder is not None:
                check_weights(folder)
            self._facts[model] = checked_facts(model, self._cache)
        return self._facts[model]

    def is_fetched(self, model: ModelConfig) -> bool:
        """Whether the model's files are in the cache, so that it could be measured if there is time."""
        return staged_model(model, self._cache) is not None

    def shape(self, model: ModelConfig) -> ModelShape:
        """The base model's shape, real or assumed.

        Raises:
            BadInput: see `facts`.
        """
        if model not in self._shapes:
            facts = self.facts(model)
            self._shapes[model] = expected_shape(model.source) if facts is None else shape_of(facts)
        return self._shapes[model]

    def work(self, config: RunConfig, done_steps: int = 0) -> Workload:
        """What is left of a run.

        Raises:
            BadInput: the model cannot be trained, or has no module that the adapter targets.
        """
        facts = self.facts(config.model)
        if facts is not None:
            facts.check(config.data.max_length)
        key = (config.model, config.data)
        if key not in self._data:
            self._data[key] = dataset_stats(config, self._cache)
        return workload(config.train, self._data[key], self._adapter(config.model, config.lora), done_steps)

    def _adapter(self, model: ModelConfig, lora: LoraConfig) -> Adapter:
        """The adapter of a run. A thousand runs have few different ones, and only these keys decide about its size."""
        decisive = lora.model_dump(exclude={"lora_alpha", "lora_dropout", "use_rslora", "loraplus_lr_ratio"})
        key = (model, repr(decisive))
        if key not in self._adapters:
            self._adapters[key] = adapter_of(lora, self.shape(model))
        return self._adapters[key]
