"""Forecasts for the packs of one sweep: looks up shapes and data once, and learns from the sweep's finished packs."""

from __future__ import annotations

from launcher.estimate.arithmetic import Correction, fits, forecast, memory_bytes, training_seconds
from launcher.estimate.devices import GIB, DeviceFacts
from launcher.estimate.history import Measured, measured_packs, median_ratio
from launcher.estimate.shapes import ModelShape, model_shape
from launcher.estimate.workload import Adapter, DataFacts, Workload, adapter_of, data_facts, workload
from launcher.plan.packing import BaseKey, base_key
from launcher.records import Forecast, Run, Sweep
from train.config import DataConfig, LoraConfig, ModelConfig, RunConfig
from train.rundir import CacheDir


class Forecaster:
    """Answers what a pack of the sweep's runs would take on `device`, and remembers what it looked up."""

    def __init__(self, sweep: Sweep, device: DeviceFacts) -> None:
        self._cache = CacheDir(sweep.cache)
        self._device = device
        self._shapes: dict[ModelConfig, ModelShape] = {}
        self._data: dict[tuple[ModelConfig, DataConfig], DataFacts] = {}
        self._adapters: dict[tuple[ModelConfig, str], Adapter] = {}
        self._corrections: dict[BaseKey, Correction] = {}
        self._measured = measured_packs(sweep.dir, device)

    def shape(self, model: ModelConfig) -> ModelShape:
        """The base model's shape, real or assumed."""
        if model not in self._shapes:
            self._shapes[model] = model_shape(model, self._cache)
        return self._shapes[model]

    def work(self, config: RunConfig, done_steps: int = 0) -> Workload:
        """What is left of a run.

        Raises:
            BadInput: the model has no module that the adapter targets.
        """
        key = (config.model, config.data)
        if key not in self._data:
            self._data[key] = data_facts(config, self._cache)
        return workload(config.train, self._data[key], self._adapter(config.model, config.lora), done_steps)

    def forecast(self, runs: list[Run], work: list[Workload]) -> Forecast:
        """The forecast for one pack."""
        config = runs[0].config
        return forecast(config, work, self.shape(config.model), self._device, self._correction(config))

    def fits(self, runs: list[Run], work: list[Workload]) -> bool:
        """Whether the device holds the pack."""
        return fits(self.forecast(runs, work), self._device)

    def _adapter(self, model: ModelConfig, lora: LoraConfig) -> Adapter:
        """The adapter of a run; a thousand runs have few different ones."""
        decisive = lora.model_dump(exclude={"lora_alpha", "lora_dropout", "use_rslora", "loraplus_lr_ratio"})
        key = (model, repr(decisive))
        if key not in self._adapters:
            self._adapters[key] = adapter_of(lora, self.shape(model))
        return self._adapters[key]

    def _correction(self, config: RunConfig) -> Correction:
        """What finished packs over the same base measured, over what is forecast for them."""
        key = base_key(config)
        if key not in self._corrections:
            alike = [pack for pack in self._measured if pack.key == key]
            self._corrections[key] = self._learn(alike)
        return self._corrections[key]

    def _learn(self, packs: list[Measured]) -> Correction:
        """The median ratios of seconds and of memory."""
        seconds, memory = [], []
        for pack in packs:
            config, work = pack.configs[0], [self.work(config) for config in pack.configs]
            shape = self.shape(config.model)
            seconds.append(pack.seconds / training_seconds(config, work, shape, self._device))
            memory.append(pack.memory_gib * GIB / memory_bytes(config, work, shape, self._device))
        return Correction(median_ratio(seconds), median_ratio(memory))
