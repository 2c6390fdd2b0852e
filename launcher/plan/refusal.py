"""A run that fits nowhere is refused before anything is queued, with the nearest change that has been seen to fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

from launcher.estimate.devices import Partition
from launcher.estimate.forecaster import Forecaster
from launcher.estimate.workload import SizingInputs
from launcher.records import Run
from train.config import RunConfig
from train.errors import BadInput

SMALLEST_RANK, SMALLEST_LENGTH = 4, 128
FEW_TARGETS = ["q_proj", "v_proj"]  # those of the LoRA paper (arXiv 2106.09685, 7.1)

Change = dict[str, Any]  # full keys to new values


def refuse(run: Run, forecasters: dict[Partition, Forecaster], inputs: SizingInputs) -> NoReturn:
    """Say how much too large a run is, and what would fit.

    Raises:
        BadInput: always.
    """
    largest = max(forecasters, key=lambda partition: partition.device.memory_gib)
    needed = forecasters[largest].forecast(run.config, [inputs.work(run.config)]).vram_gib
    hint = _nearest_change(run.config, forecasters, inputs)
    raise BadInput(
        f"run {run.name} needs about {needed:.1f} GiB of GPU memory, more than any partition has room for; the largest GPU is that of "
        f"{largest.name}, {largest.device.name} with {largest.device.memory_gib:.0f} GiB. {hint}"
    )


def _nearest_change(config: RunConfig, forecasters: dict[Partition, Forecaster], inputs: SizingInputs) -> str:
    """The first change that some partition holds, those first that change the result least."""
    by_size = sorted(forecasters, key=lambda partition: partition.device.memory_gib)
    for change in changes(config):
        changed = changed_config(config, change)
        work = [inputs.work(changed)]
        for partition in by_size:
            if forecasters[partition].holds(changed, work):
                needed = forecasters[partition].forecast(changed, work).vram_gib
                words = " ".join(_as_override(key, value) for key, value in change.items())
                return f"With {words} it would take {needed:.1f} GiB and fit {partition.name}."
    return "No usual change makes it fit; take a smaller model, or a cluster with larger GPUs."


def changes(config: RunConfig) -> Iterator[Change]:
    """Changes that save memory: how it is computed, then what; the strongest of each together at the end."""
    how = _how_changes(config)
    yield from ({key: value} for key, value in how.items())
    if how:
        yield how
    what = list(_what_changes(config))
    yield from ({key: value} | how for key, value in what)
    if what:
        yield dict(what) | how


def changed_config(config: RunConfig, change: Change) -> RunConfig:
    """`config` with other values for some full keys."""
    for key, value in change.items():
        section, _, name = key.partition(".")
        part = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: part})
    return config


def _how_changes(config: RunConfig) -> Change:
    """What saves memory and changes nothing but the time."""
    train = config.train
    change: Change = {}
    if train.gradient_checkpointing is False:
        change["train.gradient_checkpointing"] = True
    if train.micro_batch_tokens != "auto":
        change["train.micro_batch_tokens"] = "auto"
    if train.residency == "resident" and config.quant.load_in_4bit:
        change["train.residency"] = "nf4"
    return change


def _what_changes(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """What saves memory and makes another run of it, the mildest value first of each key."""
    if not config.quant.load_in_4bit:
        yield "quant.load_in_4bit", True
    length = config.data.max_length // 2
    while length >= SMALLEST_LENGTH:
        yield "data.max_length", length
        length //= 2
    rank = config.lora.r // 2
    while rank >= SMALLEST_RANK:
        yield "lora.r", rank
        rank //= 2
    if config.lora.target_modules != FEW_TARGETS:
        yield "lora.target_modules", FEW_TARGETS


def _as_override(key: str, value: Any) -> str:
    """A change as it is typed on the command line."""
    if key == "quant.load_in_4bit":
        return "quant=nf4"
    return f"{key}=[{','.join(value)}]" if isinstance(value, list) else f"{key}={value}".lower()
