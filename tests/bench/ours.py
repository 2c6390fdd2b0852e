"""lorapack, measured through its own parts: `fit_to_device`, `open_base`, `build_loop` and the loop's optimizer step with its recorder.

One process (`bench.start`); the base is loaded again only when a setting needs another residency, or changes checkpointing.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig

from bench.measuring import (
    ALPHA,
    GIB,
    RANK,
    Measured,
    Setting,
    StepClock,
    append,
    attempt,
    ceiling_flops,
    forget_memory,
    note_result,
    result,
)
from bench.rows import LONGEST, ROWS, data, table
from bench.shapes import quantized_base
from bench.start import bench_cache
from launcher.estimate.arithmetic import memory_bytes, training_seconds
from launcher.estimate.devices import gpu_device, local_device
from launcher.estimate.shapes import shape_of
from launcher.estimate.workload import DatasetStats, adapter_of, workload
from train.config import RunConfig, parse_run_config
from train.data.token_table import TokenizedData
from train.log import log_to
from train.lora.peft_forms import StockPeft
from train.lora.targets import adapted_modules
from train.model.base_cache import BaseCache, BaseSpec
from train.model.folder import WEIGHTS_INDEX
from train.model.loading import stock_skeleton
from train.nn.backends import resolve_dtype
from train.nn.facts import known_facts
from train.nn.packed_model import PackedModel
from train.runtime.attempts import open_attempt
from train.sizing import Fit
from train.store.layout import CacheDir, RunDir
from train.store.storage import make_folder
from train.trainer.base import fit_to_device, open_base, this_device
from train.trainer.context import JobContext
from train.trainer.loop import PackLoop
from train.trainer.pack import build_loop
from train.trainer.run_writer import RunWriter
from train.trainer.session import RunSession

NAME = "lorapack"
# What a T4 leaves to a process, and its compute capability.
T4_GIB = 15.0
T4_CAPABILITY = (7, 5)


@contextmanager
def profile(name: str) -> Iterator[None]:
    """This GPU as it is, or as a stand-in for a T4: memory is capped, and torch reports a T4's compute capability."""
    if name != "t4" or not torch.cuda.is_available():
        yield
        return
    device_bytes = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(T4_GIB * GIB / device_bytes)
    capability = mock.patch("torch.cuda.get_device_capability", return_value=T4_CAPABILITY)
    memory = mock.patch("train.nn.backends.device_bytes", return_value=int(T4_GIB * GIB))
    forecast_for = mock.patch("bench.ours.local_device", return_value=gpu_device("T4", T4_GIB))
    # What torch has below sm_80.
    attention = sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    with capability, memory, forecast_for, attention:
        yield


def run_config(folder: Path, setting: Setting, seed: int) -> RunConfig:
    """One run of a setting, by the configuration's own keys and defaults."""
    return parse_run_config(
        {
            "model": {"name": "bench", "source": str(folder), "fingerprint": f"bench-{folder.name}"},
            "data": {"name": "bench", "source": "bench", "fingerprint": "bench"},
            "lora": {"r": RANK, "lora_alpha": ALPHA, "target_modules": setting.targets_in(folder)},
            "quant": {"load_in_4bit": True},
            "train": {
                "learning_rate": 2e-4,
                "lr_scheduler_type": "constant",
                "batch_size": setting.batch,
                "max_steps": 100_000,
                "seed": seed,
                "residency": setting.residency,
                "gradient_checkpointing": setting.checkpointing,
            },
        }
    )


@dataclass
class DeviceModel:
    """The model on the device: the base that is loaded, and the fit that it was loaded for."""

    folder: Path
    rows: TokenizedData
    cache: CacheDir
    first_step: int
    fit: Fit | None = None
    base: PackedModel | None = None

    def base_for(self, setting: Setting) -> tuple[PackedModel, Fit]:
        """The base as `setting` needs it; loaded again only if the fit changed."""
        config = run_config(self.folder, setting, seed=0)
        fit = fit_to_device(config, known_facts(self.folder, config.model, self.cache), LONGEST)
        if self.base is None or fit != self.fit:
            self.base = None
            forget_memory()
            self._quantize(config)
            self.base = open_base(config, self.folder, fit, LONGEST, BaseCache(self.cache, nothing))
            self.fit = fit
        return self.base, fit

    def _quantize(self, config: RunConfig) -> None:
        """Make the quantized base of a folder whose weights are a hole."""
        if not (self.folder / WEIGHTS_INDEX).exists():
            device = this_device()
            dtype = resolve_dtype(config.train, device)
            quantized_base(self.folder, BaseSpec(self.folder, config.model, config.quant, dtype, device), self.cache)

    def measure(self, setting: Setting, clock: StepClock) -> Measured:
        """Build the pack, warm up, time."""
        base, fit = self.base_for(setting)
        with tempfile.TemporaryDirectory() as folder, built_loop(self, setting, Path(folder)) as loop:
            tokens = time_steps(loop, clock, self.first_step)
        base.attach(None)
        gib, milliseconds = forecast(self.folder, setting)
        measured = result(NAME, setting, clock, tokens, note=f"{base.path}: {fit}")
        return replace(measured, forecast_gib=gib, forecast_ms=milliseconds)


def forecast(model: Path, setting: Setting) -> tuple[float, float]:
    """Peak in GiB and milliseconds of a step, as the plan of such a pack gives them on this machine."""
    facts = known_facts(model, run_config(model, setting, 0).model, bench_cache(model))
    shape, device = shape_of(facts), local_device()
    rows = DatasetStats(ROWS, eval_rows=0, tokens_per_row=float(table(256).lengths().mean()), longest=LONGEST)
    configs = [run_config(model, setting, seed) for seed in range(setting.runs)]
    work = [workload(config.train, rows, adapter_of(config.lora, shape), done_steps=0) for config in configs]
    seconds = training_seconds(configs[0], work, shape, device)
    return memory_bytes(configs[0], work, shape, device) / GIB, 1000 * seconds / work[0].steps


@contextmanager
def built_loop(bench: DeviceModel, setting: Setting, folder: Path) -> Iterator[PackLoop]:
    """A pack of new runs over the bench's base, in run folders below `folder`."""
    base, fit = bench.base_for(setting)
    sessions = []
    model = run_config(bench.folder, setting, seed=0).model
    peft = StockPeft(model, partial(stock_skeleton, bench.folder, model))
    for i in range(setting.runs):
        run, config = RunDir(make_folder(folder / f"run{i}-x")), run_config(bench.folder, setting, seed=i)
        targets = adapted_modules(config.lora, list(base.shapes))
        sessions.append(RunSession(config, bench.rows, targets, RunWriter(run, open_attempt(run), peft)))
    loop = build_loop(base, sessions, fit.micro_batch_tokens, None, JobContext())
    try:
        yield loop
    finally:
        for session in sessions:
            session.end("cancelled", "measured")


def time_steps(loop: PackLoop, clock: StepClock, first: int) -> list[int]:
    """Time the optimizer steps from step `first` on; the real tokens of each.

    The warm-up takes all steps up to the last timed one, and then the runs go back to step `first`. So the same rows are timed as for
    the peers, and in shapes whose CUDA graphs exist already, as in a sweep of hundreds of steps.
    """
    totals = []
    while not clock.done:
        loop._train_step()
        clock.tick()
        if clock.warmed:
            for session in loop.sessions:
                session.step = first
        totals.append(sum(session.tokens for session in loop.sessions))
    return [after - before for before, after in pairwise(totals[clock.warm - 1 :])]


def nothing() -> None:
    """Nobody asks a benchmark to stop."""


def measure_all(model: Path, settings: list[Setting], out: Path, warm: int, timed: int, as_on: str) -> None:
    """The matrix ceiling, then every setting."""
    log_to(sys.stdout)
    append(out, {"ceiling_flops": ceiling_flops()})
    vocabulary = AutoConfig.from_pretrained(model).vocab_size
    bench = DeviceModel(model, data(vocabulary), bench_cache(model), first_step=warm)
    with profile(as_on):
        for index, setting in enumerate(settings):
            clock = StepClock(warm + timed, timed)
            note_result(out, index, attempt(NAME, setting, partial(bench.measure, setting, clock)))
