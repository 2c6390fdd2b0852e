"""Forecasts for the packs of one sweep on one kind of device, corrected by the sweep's finished packs there.

If two finished packs took 90 s and 120 s in training where 60 s and 100 s were forecast, the next forecasts of the same base are
multiplied by the median of 1.5 and 1.2, which is 1.35.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from functools import partial

from launcher.estimate.arithmetic import Correction, fits, forecast, memory_bytes, slowdown, training_seconds
from launcher.estimate.devices import GIB, DeviceSpec, Partition
from launcher.estimate.gpus import known_gpu
from launcher.estimate.workload import BaseKey, SizingInputs, Workload, base_key, share
from launcher.records import Forecast, Run
from train.config import RunConfig, read_run_config
from train.store.layout import PackDir, RunDir, SweepDir
from train.store.record_file import DamageLog, read_record
from train.store.records import PackRecord, ResultRecord

# How many packs to look at: the newest say most about the code and the device in use now.
NEWEST_PACKS = 5
# Bounds of a correction, so that a strange measurement cannot make all forecasts useless.
SMALLEST_RATIO = 0.2
LARGEST_RATIO = 100.0


class Forecaster:
    """Forecasts what a pack of the sweep's runs would take in `partition`."""

    def __init__(self, sweep: SweepDir, partition: Partition, inputs: SizingInputs) -> None:
        self._partition = partition
        self._device = partition.device
        self._inputs = inputs
        self._corrections: dict[BaseKey, Correction] = {}
        self._measured = measured_packs(sweep, partition.device)

    def forecast(self, config: RunConfig, work: list[Workload]) -> Forecast:
        """The forecast for one pack of runs that share the base of `config`."""
        shape = self._inputs.shape(config.model)
        gpus, price = self._partition.gpus_per_job, self._partition.usd_per_gpu_hour
        expected = forecast(config, work, shape, self._device, self._correction(config), gpus)
        return expected if price is None else replace(expected, usd=price * expected.gpu_hours)

    def slowdown(self, config: RunConfig, work: list[Workload]) -> float:
        """How many times as long a pack takes by its path as by our own decoder."""
        return slowdown(config, work, self._inputs.shape(config.model), self._device, self._partition.gpus_per_job)

    def fits(self, runs: list[Run], work: list[Workload]) -> bool:
        """Whether the device holds the pack."""
        return self.holds(runs[0].config, work)

    def holds(self, config: RunConfig, work: list[Workload]) -> bool:
        """Whether the device holds a pack of runs with this base and this work."""
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
            config = pack.configs[0]
            work = [share(self._inputs.work(config), pack.gpus) for config in pack.configs]
            shape = self._inputs.shape(config.model)
            seconds.append(pack.seconds / training_seconds(config, work, shape, self._device))
            memory.append(pack.memory_gib * GIB / memory_bytes(config, work, shape, self._device))
        return Correction(median_ratio(seconds), median_ratio(memory))


@dataclass(frozen=True)
class Measured:
    """A pack whose runs have all finished.

    seconds: in training. memory_gib: its peak on one GPU. gpus: 1 on a CPU.
    """

    key: BaseKey
    configs: list[RunConfig]
    seconds: float
    memory_gib: float
    gpus: int


def measured_packs(sweep: SweepDir, device: DeviceSpec) -> list[Measured]:
    """The newest packs that trained on such a device without interruption."""
    folders = sorted(sweep.jobs.glob("*/"), key=lambda folder: folder.stat().st_mtime, reverse=True)
    read = (partial(_measured, sweep, PackDir(folder), device) for folder in folders[:NEWEST_PACKS])
    # A pack with a damaged file corrects nothing; who names it is `status`.
    packs = (DamageLog().read(pack, None) for pack in read)
    return [pack for pack in packs if pack is not None]


def median_ratio(ratios: list[float]) -> float:
    """A correction factor that one odd pack cannot spoil; 1 if nothing was measured.

    It may be far from 1: a tiny model on a CPU spends its time in Python, which the arithmetic does not count.
    """
    return min(LARGEST_RATIO, max(SMALLEST_RATIO, statistics.median(ratios))) if ratios else 1.0


def _measured(sweep: SweepDir, pack: PackDir, device: DeviceSpec) -> Measured | None:
    """What the pack measured, if all of its runs finished at the first attempt on this kind of device.

    Raises:
        DamagedFile: one of its files is.
    """
    record = read_record(pack.pack, PackRecord)
    runs = [RunDir(sweep.path / name) for name in record.runs] if record else []
    results = [result for result in (read_record(run.result, ResultRecord) for run in runs) if result is not None]
    if not results or len(results) < len(runs) or not all(_is_comparable(result, device) for result in results):
        return None
    configs = [read_run_config(run.config) for run in runs]
    seconds = max(result.seconds or 0.0 for result in results)
    memory = max(result.peak_memory_gib or 0.0 for result in results)
    # GPU-hours are shared out among the runs, so their sum over the pack's hours is its number of GPUs.
    gpus = round(3600 * sum(result.gpu_hours or 0.0 for result in results) / seconds) if seconds else 1
    return Measured(base_key(configs[0]), configs, seconds, memory, max(1, gpus))


def _is_comparable(result: ResultRecord, device: DeviceSpec) -> bool:
    """Whether a result comes from one attempt on such a device."""
    if result.attempts != 1 or result.device is None or result.peak_memory_gib is None:
        return False
    return _same_kind(result.device, "cpu" if device.kind == "cpu" else device.name)


def _same_kind(name: str, other: str) -> bool:
    """Whether two names mean the same GPU: clusters say ``a100``, the trainer writes ``NVIDIA A100-SXM4-40GB``."""
    models = known_gpu(name), known_gpu(other)
    return name == other or (models[0] is not None and models[1] is not None and models[0].name == models[1].name)
