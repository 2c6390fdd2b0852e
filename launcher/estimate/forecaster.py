"""Forecasts for the packs of one sweep on one kind of device, corrected by the sweep's finished packs there."""

from __future__ import annotations

from dataclasses import replace

from launcher.estimate.arithmetic import Correction, fits, forecast, memory_bytes, training_seconds
from launcher.estimate.devices import GIB
from launcher.estimate.facts import Facts
from launcher.estimate.history import Measured, measured_packs, median_ratio
from launcher.estimate.partition import Partition
from launcher.estimate.workload import BaseKey, Workload, base_key, share
from launcher.records import Forecast, Run
from train.config import RunConfig
from train.store.layout import SweepDir


class Forecaster:
    """Answers what a pack of the sweep's runs would take in `partition`."""

    def __init__(self, sweep: SweepDir, partition: Partition, facts: Facts) -> None:
        self._partition, self._device, self._facts = partition, partition.device, facts
        self._corrections: dict[BaseKey, Correction] = {}
        self._measured = measured_packs(sweep, partition.device)

    def forecast(self, config: RunConfig, work: list[Workload]) -> Forecast:
        """The forecast for one pack of runs that share the base of `config`."""
        shape = self._facts.shape(config.model)
        gpus, price = self._partition.gpus_per_job, self._partition.usd_per_gpu_hour
        expected = forecast(config, work, shape, self._device, self._correction(config), gpus)
        return expected if price is None else replace(expected, usd=price * expected.gpu_hours)

    def fits(self, runs: list[Run], work: list[Workload]) -> bool:
        """Whether the device holds the pack."""
        return self.holds(runs[0].config, work)

    def holds(self, config: RunConfig, work: list[Workload]) -> bool:
        """The same for runs that exist as configurations alone."""
        return fits(self.forecast(config, work), self._device)

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
            config, work = pack.configs[0], [share(self._facts.work(config), pack.gpus) for config in pack.configs]
            shape = self._facts.shape(config.model)
            seconds.append(pack.seconds / training_seconds(config, work, shape, self._device))
            memory.append(pack.memory_gib * GIB / memory_bytes(config, work, shape, self._device))
        return Correction(median_ratio(seconds), median_ratio(memory))
