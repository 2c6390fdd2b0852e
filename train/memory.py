"""How a pack uses the device at hand: its dtype, and what `train.sizing` chooses for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from train.config import RunConfig, TrainConfig
from train.model.folder import linear_shapes, parameter_count
from train.sizing import BaseSize, Device, Fit, choose_fit


def device_bytes(device: torch.device) -> int:
    """The memory of a device, whatever is in use of it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resolve_dtype(train: TrainConfig, device: torch.device) -> torch.dtype:
    """`train.dtype`, where ``auto`` is bfloat16 from sm_80 on, float16 on older GPUs (T4) and float32 on a CPU."""
    if train.dtype != "auto":
        chosen: torch.dtype = getattr(torch, train.dtype)
        return chosen
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def fit_pack(
    shared: RunConfig, architecture: Any, model_dir: Path, dtype: torch.dtype, device: torch.device, longest: int
) -> Fit:
    """Choose for packs over the base of `shared`: transformers' `architecture`, with its weights in `model_dir`."""
    base = BaseSize(
        architecture.num_hidden_layers, architecture.hidden_size, parameter_count(model_dir), linear_shapes(model_dir)
    )
    size = Device("cuda" if device.type == "cuda" else "cpu", device_bytes(device))
    return choose_fit(shared.train, shared.quant, base, dtype.itemsize, size, longest)
