"""Which of a device's faster ways a pack takes: decided once, by device and precision, so that a resumed job decides alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FIRST_CAPABILITY = (8, 0)  # of FlashAttention-2, and of Triton's matrix instructions


@dataclass(frozen=True)
class Kernels:
    """The ways that exist besides the plain one, which runs everywhere.

    Attributes:
        varlen: attention takes flat sequences; else q, k and v are padded.
        grouped: adapters take flat runs in kernels of our own (`train.grouped`); else runs are padded for batched products.
        fused: elementwise formulas (`train.elementwise`) are compiled, a kernel each.
        graphs: the steps of small packs are replayed as CUDA graphs (`train.graphs`).
    """

    varlen: bool = False
    grouped: bool = False
    fused: bool = False
    graphs: bool = False


PLAIN = Kernels()


def choose_kernels(device: torch.device, dtype: torch.dtype, *, compiles: bool = True, graphs: bool = True) -> Kernels:
    """The ways that `device` has in `dtype`, without what needs a compiler or the memory of CUDA graphs if those are not there."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FIRST_CAPABILITY:
        return PLAIN
    sixteen_bit = dtype in (torch.float16, torch.bfloat16)
    grouped = sixteen_bit and compiles
    return Kernels(sixteen_bit, grouped, fused=compiles, graphs=graphs and grouped)
