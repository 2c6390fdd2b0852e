"""Which of a device's faster ways a pack takes: decided once, by device and precision, so that a resumed job decides alike."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train.config import RunConfig, TrainConfig
from train.errors import BadInput
from train.model.folder import linear_shapes, parameter_count
from train.sizing import BaseSize, Device, Fit, choose_fit

FIRST_CAPABILITY = (8, 0)  # of FlashAttention-2, and of Triton's matrix instructions


@dataclass(frozen=True)
class Kernels:
    """The ways that exist besides the plain one, which runs everywhere.

    Attributes:
        varlen: attention takes flat sequences, by FlashAttention; else q, k and v are padded.
        blocks: by `train.nn.triton.attention` instead, for the heads that it is made for.
        grouped: adapters take flat runs (`train.nn.triton.grouped_mm`); else runs are padded for batched products.
        fused: formulas are a kernel each (`train.nn.triton.functional`).
        graphs: the steps of small packs are replayed as CUDA graphs (`train.nn.gradients`).
    """

    varlen: bool = False
    blocks: bool = False
    grouped: bool = False
    fused: bool = False
    graphs: bool = False


PLAIN = Kernels()
MOST_LETTERS = 300  # of another program's error


def choose_kernels(device: torch.device, dtype: torch.dtype, *, compiles: bool = True, graphs: bool = True) -> Kernels:
    """The ways that `device` has in `dtype`, without what needs a compiler or the memory of CUDA graphs if those are not there."""
    if not _takes_kernels(device):
        return PLAIN
    sixteen_bit = dtype in (torch.float16, torch.bfloat16)
    grouped = sixteen_bit and compiles
    fused = grouped or (compiles and dtype == torch.float32)  # the kernels compute in float32, too little for float64
    return Kernels(sixteen_bit, grouped, grouped, fused, graphs=graphs and grouped and dtype == torch.bfloat16)


def lacks_a_compiler(device: torch.device, train: TrainConfig) -> str | None:
    """What is missing here to compile kernels for `device`, None if they can be compiled, or nobody wants them.

    Raises:
        BadInput: `train.compile` insists on them.
    """
    missing = _missing() if _takes_kernels(device) and train.compile is not False else None
    if missing is not None and train.compile is True:
        raise BadInput(
            f"train.compile=true, but {missing}. Mend that on the machine that trains, or leave train.compile=auto."
        )
    return missing


def _takes_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY


def _missing() -> str | None:
    """Why nothing can be compiled here, None if it can: Triton builds its driver now instead of at the first kernel, and keeps it."""
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as exc:  # of Triton, a C compiler, a linker, or CUDA
        words = f"{type(exc).__name__}: {' '.join(str(exc).split())[:MOST_LETTERS]}"
        return (
            f"Triton cannot build here ({words}); it takes a C compiler (module load gcc, or CC) and Python's headers"
        )
    return None


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
