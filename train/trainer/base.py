"""The frozen base of a pack on this process's device: how it fits, how it is opened, and what results say of it."""

from __future__ import annotations

import importlib.metadata
import logging
from pathlib import Path
from typing import TypedDict

import torch

from train.config import RunConfig
from train.model.base_cache import BaseCache, BaseSpec
from train.model.facts import ModelFacts
from train.nn.backends import choose_kernels, fit_pack, missing_compiler, resolve_dtype
from train.nn.base import load_base
from train.nn.packed_model import PackedModel
from train.sizing import Fit

log = logging.getLogger("lorapack.trainer")

VERSIONED = ("torch", "transformers", "peft", "bitsandbytes", "lorapack")


def this_device() -> torch.device:
    """This process's own: with its number, since libraries take a plain ``cuda`` for the first GPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def fit_to_device(config: RunConfig, facts: ModelFacts, longest: int) -> Fit:
    """How packs over the base of `config` use this device, for rows of at most `longest` tokens."""
    device = this_device()
    return fit_pack(config, facts.size(), resolve_dtype(config.train, device), device, longest)


def open_base(
    config: RunConfig, model_dir: Path, fit: Fit, longest: int, bases: BaseCache, facts: ModelFacts | None = None
) -> PackedModel:
    """The base of `config` on this device, as `fit` wants it; what is not known of the model yet is measured."""
    device = this_device()
    dtype = resolve_dtype(config.train, device)
    log.info(f"loading {config.model.source} on {device_name(device)} in {str(dtype).removeprefix('torch.')}: {fit}")
    missing = missing_compiler(device, config.train)
    if missing is not None:
        log.warning(f"kernels are not compiled, which is slower: {missing}")
    compiles = config.train.compile is not False and missing is None
    kernels = choose_kernels(device, dtype, compiles=compiles, graphs=fit.graphs)
    spec = BaseSpec(model_dir, config.model, config.quant, dtype, device)
    base = load_base(spec, fit.residency, longest, bases, kernels, facts)
    log.info(f"computed by the path {base.path}, relative differences from transformers: {'; '.join(base.attempts)}")
    if fit.checkpoint_activations:
        base.checkpoint_activations()
    return base


class Software(TypedDict):
    """What a result says about where it was computed."""

    device: str
    dtype: str
    path: str
    versions: dict[str, str]


class Environment(Software):
    """The same, with the most memory that was in use, which is known at the end."""

    peak_memory_gib: float


def environment_info(base: PackedModel) -> Software:
    """Device, dtype, path and the versions of what computes."""
    versions = {}
    for name in VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        # Run from a copy of the source, lorapack itself is not installed.
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": device_name(base.device),
        "dtype": str(base.dtype).removeprefix("torch."),
        "path": base.path,
        "versions": versions,
    }


def device_name(device: torch.device) -> str:
    """The name of the GPU, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
