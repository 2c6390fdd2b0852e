"""Which of a device's faster ways a pack takes: decided once, by device and precision, so that a resumed job decides alike."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

FIRST_VARLEN_CAPABILITY = (8, 0)  # FlashAttention-2, and Triton's matrix instructions
FIRST_GROUPED_CAPABILITY = (9, 0)  # torch's grouped product waits for the host on older GPUs (pytorch #161407)


@dataclass(frozen=True)
class Kernels:
    """The ways that exist besides the plain one, which runs everywhere.

    Attributes:
        varlen: attention takes flat sequences; else q, k and v are padded.
        grouped: adapters take flat runs in one grouped product; else runs are padded for a batched one.
        fused: elementwise formulas (`train.elementwise`) are compiled, a kernel each.
        graphs: the steps of small packs are replayed as CUDA graphs (`train.graphs`).
    """

    varlen: bool = False
    grouped: bool = False
    fused: bool = False
    graphs: bool = False


PLAIN = Kernels()


def choose_kernels(device: torch.device, dtype: torch.dtype, *, compiles: bool = True) -> Kernels:
    """The ways that `device` has in `dtype`; `compiles` false leaves out what needs a compiler or repeats shapes."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FIRST_VARLEN_CAPABILITY:
        return PLAIN
    sixteen_bit = dtype in (torch.float16, torch.bfloat16)
    grouped = dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) == FIRST_GROUPED_CAPABILITY
    return Kernels(sixteen_bit, grouped, fused=compiles, graphs=compiles and sixteen_bit and grouped)


def prepare_torch(compiled: Path) -> None:
    """Settings that torch reads once, when it first needs them; the user's own win.

    What is compiled is kept on the disk below `compiled`, so that a requeued job does not compile again. Memory is taken in
    segments that can grow: packs have tensors of many sizes, and fixed segments would leave gaps.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(compiled / "triton"))
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
