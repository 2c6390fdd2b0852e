"""Which of a device's faster ways a pack takes: decided once, by device and precision, so that a resumed job decides alike."""

from __future__ import annotations

from dataclasses import dataclass

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


def choose_kernels(device: torch.device, dtype: torch.dtype, *, compiles: bool = True, graphs: bool = True) -> Kernels:
    """The ways that `device` has in `dtype`, without what needs a compiler or the memory of CUDA graphs if those are not there."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FIRST_VARLEN_CAPABILITY:
        return PLAIN
    sixteen_bit = dtype in (torch.float16, torch.bfloat16)
    grouped = dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) == FIRST_GROUPED_CAPABILITY
    return Kernels(sixteen_bit, grouped, fused=compiles, graphs=graphs and compiles and grouped)
