"""How a pack uses a device: dtype, residency of the base, recomputation and the size of a micro-batch.

Every choice is a function of the device's size and of the pack, never of what happens to be free, so that a resumed job makes the
same one and repeats the same bits.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from train.base import Residency
from train.config import QuantConfig, TrainConfig

RESIDENT_SHARE = 0.35  # of the device that a base in full width may take
ACTIVATION_SHARE = 0.5  # of the device that activations of a micro-batch may take
CPU_MICRO_BATCH_TOKENS = 2048  # beyond this a CPU is no faster
LARGEST_MICRO_BATCH_TOKENS = 16384


@dataclass(frozen=True)
class Fit:
    """The choices for one pack; `micro_batch_tokens` counts the tokens of all runs together."""

    residency: Residency
    checkpoint_activations: bool
    micro_batch_tokens: int

    def __str__(self) -> str:
        kept = "recomputed" if self.checkpoint_activations else "kept"
        return f"base {self.residency}, activations {kept}, micro-batches of at most {self.micro_batch_tokens:,} tokens"


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
    train: TrainConfig,
    quant: QuantConfig,
    config: Any,
    parameters: int,
    dtype: torch.dtype,
    device: torch.device,
    step_tokens: int,
) -> Fit:
    """Choose for a base of `parameters` weights with transformers' `config`, and at most `step_tokens` tokens in a step of the pack."""
    total = device_bytes(device)
    dense = parameters * dtype.itemsize
    residency: Residency = "resident" if not quant.load_in_4bit or dense <= RESIDENT_SHARE * total else "nf4"
    if train.residency != "auto":
        residency = train.residency
    room = ACTIVATION_SHARE * (total - (dense if residency == "resident" else dense / 4))
    fits = step_tokens * activation_bytes_per_token(config, dtype, recomputed=False) <= room
    recompute = train.gradient_checkpointing
    if recompute == "auto":
        recompute = device.type == "cuda" and not fits
    if train.micro_batch_tokens != "auto":
        return Fit(residency, recompute, train.micro_batch_tokens)
    tokens = int(room / activation_bytes_per_token(config, dtype, recomputed=recompute))
    largest = LARGEST_MICRO_BATCH_TOKENS if device.type == "cuda" else CPU_MICRO_BATCH_TOKENS
    return Fit(residency, recompute, max(1, min(tokens, largest)))


def activation_bytes_per_token(config: Any, dtype: torch.dtype, *, recomputed: bool) -> int:
    """What the backward needs of one token: about 12 hidden-sized and 4 MLP-sized values a layer, or the layer's input alone."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    layer = 12 * hidden + 4 * getattr(config, "intermediate_size", 4 * hidden)
    values = layers * hidden + layer if recomputed else layers * layer
    return int(values * dtype.itemsize)
