"""Which of a device's faster ways a pack takes: decided once, by device and precision, so that a resumed job decides alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from train.config import TrainConfig
from train.errors import BadInput

FIRST_CAPABILITY = (8, 0)  # of FlashAttention-2, and of Triton's matrix instructions


@dataclass(frozen=True)
class Kernels:
    """The ways that exist besides the plain one, which runs everywhere.

    Attributes:
        varlen: attention takes flat sequences, by FlashAttention; else q, k and v are padded.
        blocks: by `train.gpu.attention` instead, for the heads that it is made for.
        grouped: adapters take flat runs (`train.gpu.grouped`); else runs are padded for batched products.
        fused: formulas are a kernel each (`train.gpu.formulas`).
        graphs: the steps of small packs are replayed as CUDA graphs (`train.graphs`).
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
