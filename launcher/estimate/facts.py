"""What forecasts are made from, looked up once for a whole sweep: shapes of models, counts of data, sizes of adapters."""

from __future__ import annotations

from launcher.estimate.shapes import ModelShape, model_shape
from launcher.estimate.workload import Adapter, DataFacts, Workload, adapter_of, data_facts, workload
from train.config import DataConfig, LoraConfig, ModelConfig, RunConfig
from train.model.architecture import check_architecture
from train.model.source import staged_model
from train.store.layout import CacheDir


class Facts:
    """Answers from the cache folder, each looked up once."""

    def __init__(self, cache: CacheDir) -> None:
        self._cache = cache
        self._shapes: dict[ModelConfig, ModelShape] = {}
        self._data: dict[tuple[ModelConfig, DataConfig], DataFacts] = {}
        self._adapters: dict[tuple[ModelConfig, str], Adapter] = {}
        self._checked: set[tuple[ModelConfig, int]] = set()

    def shape(self, model: ModelConfig) -> ModelShape:
        """The base model's shape, real or assumed."""
        if model not in self._shapes:
            self._shapes[model] = model_shape(model, self._cache)
        return self._shapes[model]

    def work(self, config: RunConfig, done_steps: int = 0) -> Workload:
        """What is left of a run.

        Raises:
            BadInput: the model cannot be trained, or has no module that the adapter targets.
        """
        self._check(config.model, config.data.max_length)
        key = (config.model, config.data)
        if key not in self._data:
            self._data[key] = data_facts(config, self._cache)
        return workload(config.train, self._data[key], self._adapter(config.model, config.lora), done_steps)

    def _check(self, model: ModelConfig, longest: int) -> None:
        """Refuse an architecture by its ``config.json``, once that is at hand."""
        if (model, longest) not in self._checked:
            self._checked.add((model, longest))
            folder = staged_model(model, self._cache)
            if folder is not None:
                check_architecture(folder, longest)

    def _adapter(self, model: ModelConfig, lora: LoraConfig) -> Adapter:
        """The adapter of a run; a thousand runs have few different ones."""
        decisive = lora.model_dump(exclude={"lora_alpha", "lora_dropout", "use_rslora", "loraplus_lr_ratio"})
        key = (model, repr(decisive))
        if key not in self._adapters:
            self._adapters[key] = adapter_of(lora, self.shape(model))
        return self._adapters[key]
