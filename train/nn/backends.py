"""What a device offers a pack: its kernels, the dtype to compute in and its memory. Decided once, so that a resumed job decides alike.

                    CPU      T4 (sm_75)   sm_80 and later
dtype=auto          fp32     fp16         bf16
flash_varlen        no       no           16 bit
efficient_varlen    no       16, 32 bit   16, 32 bit
triton_attention    no       no           16 bit, if kernels can be compiled
grouped_lora        no       no           16 bit, if kernels can be compiled
grouped_experts     no       no           bf16, on sm_90 to sm_100
fused_elementwise   no       no           16 bit and fp32, if kernels can be compiled
cuda_graphs         no       no           bf16, if kernels can be compiled and there is memory for graphs
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from train.config import RunConfig, TrainConfig
from train.errors import BadInput
from train.sizing import BaseSize, Device, Fit, choose_fit

# What FlashAttention-2, Triton's matrix instructions and bfloat16 need.
FIRST_CAPABILITY = (8, 0)
# Where torch 2.11 has a kernel for `grouped_mm`. Elsewhere it loops over groups, and asks the host three times a layer.
GROUPED_MM_MAJORS = (9, 10)
MAX_ERROR_CHARS = 300


@dataclass(frozen=True)
class Kernels:
    """The faster implementations that a pack uses; without one, PyTorch's own operations do the same on every device.

    Attributes:
        flash_varlen: attention takes flat sequences, by FlashAttention.
        efficient_varlen: where that cannot, by PyTorch's memory-efficient kernel; without either, q, k and v are padded.
        triton_attention: attention by `train.nn.triton.attention` instead, for the head sizes that it supports.
        grouped_lora: adapters take flat runs (`train.nn.triton.grouped_mm`); else runs are padded for batched products.
        grouped_experts: one launch multiplies the tokens of all experts of a layer (`torch.nn.functional.grouped_mm`).
        fused_elementwise: each formula is one kernel (`train.nn.triton`).
        cuda_graphs: the steps of small packs are replayed as CUDA graphs (`train.nn.gradients`).
    """

    flash_varlen: bool = False
    efficient_varlen: bool = False
    triton_attention: bool = False
    grouped_lora: bool = False
    grouped_experts: bool = False
    fused_elementwise: bool = False
    cuda_graphs: bool = False


EAGER = Kernels()


def choose_kernels(device: torch.device, dtype: torch.dtype, *, compiles: bool = True, graphs: bool = True) -> Kernels:
    """The kernels for `device` in `dtype`; `compiles` and `graphs` say whether a compiler, and memory for CUDA graphs, are there."""
    sixteen_bit = dtype in (torch.float16, torch.bfloat16)
    efficient = device.type == "cuda" and (sixteen_bit or dtype == torch.float32)
    if not _supports_kernels(device):
        return Kernels(efficient_varlen=efficient)
    triton = sixteen_bit and compiles
    return Kernels(
        flash_varlen=sixteen_bit,
        efficient_varlen=efficient,
        triton_attention=triton,
        grouped_lora=triton,
        grouped_experts=dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] in GROUPED_MM_MAJORS,
        # These compute in float32, which is too little for float64.
        fused_elementwise=triton or (compiles and dtype == torch.float32),
        # Not float16: the fillers that complete a graph's shape could overflow a delicate base there.
        cuda_graphs=graphs and triton and dtype == torch.bfloat16,
    )


def missing_compiler(device: torch.device, train: TrainConfig) -> str | None:
    """What is missing here to compile kernels for `device`; None if they can be compiled, or are not wanted.

    Raises:
        BadInput: `train.compile` insists on them.
    """
    missing = _triton_error() if _supports_kernels(device) and train.compile is not False else None
    if missing is not None and train.compile is True:
        raise BadInput(
            f"train.compile=true, but {missing}. Fix this on the machine that trains, or set train.compile=auto."
        )
    return missing


def _supports_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY


def _triton_error() -> str | None:
    """Why nothing can be compiled here; None if it can. Triton builds its driver now instead of at the first kernel, and keeps it."""
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    # Whatever Triton, a C compiler, a linker or CUDA raises.
    except Exception as exc:
        reason = f"{type(exc).__name__}: {' '.join(str(exc).split())[:MAX_ERROR_CHARS]}"
        return (
            f"Triton cannot build here ({reason}); it needs a C compiler (module load gcc, or CC) and Python's headers"
        )
    return None


def resolve_dtype(train: TrainConfig, device: torch.device) -> torch.dtype:
    """`train.dtype`, where ``auto`` is bfloat16 from sm_80 on, float16 on older GPUs (T4) and float32 on a CPU."""
    if train.dtype != "auto":
        chosen: torch.dtype = getattr(torch, train.dtype)
        return chosen
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY else torch.float16


def device_bytes(device: torch.device) -> int:
    """The memory of a device, in use or not."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fit_pack(shared: RunConfig, base: BaseSize, dtype: torch.dtype, device: torch.device, longest: int) -> Fit:
    """How packs over the base of `shared` use the device's memory (`train.sizing`); `longest` is the longest sequence's tokens."""
    size = Device("cuda" if device.type == "cuda" else "cpu", device_bytes(device))
    return choose_fit(shared.train, shared.quant, base, dtype.itemsize, size, longest)
