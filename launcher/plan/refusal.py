"""A run that fits nowhere is refused before anything is queued, with the mildest change of its settings that does fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

from launcher.estimate.devices import Partition
from launcher.estimate.forecaster import Forecaster
from launcher.estimate.workload import SizingInputs
from launcher.records import Run
from train.config import RunConfig
from train.errors import BadInput

SMALLEST_RANK = 4
SMALLEST_LENGTH = 128
# Those of the LoRA paper (arXiv 2106.09685, 7.1).
FEW_TARGETS = ["q_proj", "v_proj"]

# Full keys to new values.
Change = dict[str, Any]


def refuse(run: Run, forecasters: dict[Partition, Forecaster], inputs: SizingInputs) -> NoReturn:
    """Say by how much a run is too large, and what would fit.

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
    """The first change that fits some partition. Changes that affect the result least are tried first."""
    by_size = sorted(forecasters, key=lambda partition: partition.device.memory_gib)
    for change in changes(config):
        changed = changed_config(config, change)
        work = [inputs.work(changed)]
        for partition in by_size:
            if forecasters[partition].holds(changed, work):
                needed = forecasters[partition].forecast(changed, work).vram_gib
                overrides = " ".join(_as_override(key, value) for key, value in change.items())
                return f"With {overrides} it would take {needed:.1f} GiB and fit {partition.name}."
    return "No usual change makes it fit; take a smaller model, or a cluster with larger GPUs."


def changes(config: RunConfig) -> Iterator[Change]:
    """Changes that save memory, the mildest first.

    First each change of how the run is computed, then all of them together. Then each change of what is computed on top of them,
    and last the strongest of each key together.
    """
    how = _how_changes(config)
    yield from ({key: value} for key, value in how.items())
    if how:
        yield how
    what = list(_what_changes(config))
    # `dict(what)` keeps the last value of each key, which is the strongest.
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
    """What saves memory and affects only the time."""
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
    """What saves memory and changes the result, the mildest value of each key first."""
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
