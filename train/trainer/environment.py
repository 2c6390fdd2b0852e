"""What a result says about where it was computed."""

from __future__ import annotations

import importlib.metadata

import torch

from train.nn.packed_model import PackedModel
from train.store.storage import Record

VERSIONED = ("torch", "transformers", "peft", "bitsandbytes", "lorapack")


def environment_info(base: PackedModel) -> Record:
    """Device, dtype and the versions of what computes."""
    versions = {}
    for name in VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        # Run from a copy of the source, lorapack itself is not installed.
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"device": device_name(base.device), "dtype": str(base.dtype).removeprefix("torch."), "versions": versions}


def device_name(device: torch.device) -> str:
    """The name of the GPU, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
