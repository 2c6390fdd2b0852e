"""4-bit NormalFloat (QLoRA, arXiv 2305.14314): the one place that knows bitsandbytes.

It is imported at the first use. Its four `torch.compile` decorators would import all of inductor, which takes a second on a fast disk
and many on a busy network file system, for fallbacks that nobody calls here. Where compiling fails it uses the plain functions.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch.nn import functional

from train.config import QuantConfig

# Weights that share a scale, as with transformers' `BitsAndBytesConfig`.
BLOCK_SIZE = 64
# Scales of blocks that share a second scale (double quantization), as in bitsandbytes.
NESTED_BLOCK_SIZE = 256
# Numbers that are quantized in one call: on a CPU bitsandbytes needs 20 bytes for each.
QUANTIZED_AT_ONCE = 2**24
# A warning about a kernel that only `Linear4bit` would call.
CPU_KERNEL = "Failed to load CPU gemm_4bit_forward"


def quantize(weight: torch.Tensor, quant: QuantConfig) -> tuple[torch.Tensor, Any]:
    """The packed values of a weight [out, in] and their `QuantState`."""
    packed, state = _functional().quantize_4bit(
        weight.contiguous(),
        blocksize=BLOCK_SIZE,
        compress_statistics=quant.bnb_4bit_use_double_quant,
        quant_type=quant.bnb_4bit_quant_type,
    )
    return packed, state


def dequantize(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """The values [out, in] that the packed weight stands for, in the dtype that it was quantized from."""
    flat = copy.copy(state)
    # bitsandbytes' CPU kernel starts a block of its own in each row, which blocks of 64 values in rows of 48 do not (0.50: the
    # values of all other rows were scaled wrongly, without an error). Of one row it computes the right values.
    if packed.device.type == "cpu" and state.shape[-1] % BLOCK_SIZE:
        flat.shape = torch.Size([state.shape.numel()])
    dense: torch.Tensor = _functional().dequantize_4bit(packed, flat)
    return dense.view(state.shape)


def state_from(parts: Mapping[str, torch.Tensor], device: torch.device) -> Any:
    """The `QuantState` from its own serialized parts."""
    return _functional().QuantState.from_dict(dict(parts), device)


@dataclass(frozen=True)
class NF4Stack:
    """The matrices of E experts in 4-bit NormalFloat, each quantized for itself: its blocks and all scales are its own.

    An expert whose values fill no whole number of blocks is padded with zeros, which no scale depends on.

    Attributes:
        shape: of one expert's matrix.
        dtype: that it was quantized from, and is dequantized to.
        packed: [E, blocks x 32] two values per byte.
        absmax: [E, blocks] scales, in float32, or in 8 bits with double quantization.
        nested: [E, blocks / 256] the scales of `absmax`, rounded up; empty [E, 0] without double quantization.
        offset: [E] the mean that `absmax` is relative to; zero without double quantization.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    packed: torch.Tensor
    absmax: torch.Tensor
    nested: torch.Tensor
    offset: torch.Tensor

    PARTS = ("packed", "absmax", "nested", "offset")

    def __len__(self) -> int:
        return len(self.packed)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file has to hold; the constructor takes them back."""
        return {part: getattr(self, part) for part in self.PARTS}

    def dense(self, experts: slice | torch.Tensor) -> torch.Tensor:
        """The matrices [e, rows, columns] of some experts, by their indices [e]."""
        packed = self.packed[experts]
        values = math.prod(self.shape)
        scales = self._scales(experts).flatten()
        state = _functional().QuantState(
            absmax=scales,
            shape=torch.Size((len(packed), packed.shape[1] * 2)),
            dtype=self.dtype,
            blocksize=BLOCK_SIZE,
            quant_type="nf4",
        )
        dense: torch.Tensor = _functional().dequantize_4bit(packed.reshape(-1, 1), state)
        # Without the padding, if there is any.
        return dense.view(len(packed), -1)[:, :values].reshape(len(packed), *self.shape)

    def _scales(self, experts: slice | torch.Tensor) -> torch.Tensor:
        """[e, blocks] in float32."""
        absmax: torch.Tensor = self.absmax[experts]
        if absmax.dtype == torch.float32:
            return absmax
        fine = _nested_code(absmax.device)[absmax.int()].view(*self.nested[experts].shape, NESTED_BLOCK_SIZE)
        scales = (fine * self.nested[experts][..., None]).flatten(1) + self.offset[experts][:, None]
        blocks = self.packed.shape[1] * 2 // BLOCK_SIZE
        return scales[:, :blocks].contiguous()


def quantize_stack(weight: torch.Tensor, quant: QuantConfig) -> NF4Stack:
    """Quantize matrices [E, rows, columns], each for itself."""
    experts, rows, columns = weight.shape
    # Experts know nothing of each other, so any number of them may go together.
    chunk = max(1, QUANTIZED_AT_ONCE // (rows * columns))
    parts = [_quantize_experts(some, quant) for some in torch.split(weight.reshape(experts, -1), chunk)]
    packed, absmax, nested, offset = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return NF4Stack((rows, columns), weight.dtype, packed, absmax, nested, offset)


def _quantize_experts(flat: torch.Tensor, quant: QuantConfig) -> tuple[torch.Tensor, ...]:
    """The parts of an `NF4Stack` from the values [E, n] of some experts."""
    packed, state = _functional().quantize_4bit(
        _padded(flat, BLOCK_SIZE).contiguous(),
        blocksize=BLOCK_SIZE,
        compress_statistics=False,
        quant_type=quant.bnb_4bit_quant_type,
    )
    packed, absmax = packed.view(len(flat), -1), state.absmax.view(len(flat), -1)
    if not quant.bnb_4bit_use_double_quant:
        return packed, absmax, absmax.new_empty(len(flat), 0), absmax.new_zeros(len(flat))
    offset = absmax.mean(1)
    fine, second = _functional().quantize_blockwise(
        _padded(absmax - offset[:, None], NESTED_BLOCK_SIZE).contiguous(), blocksize=NESTED_BLOCK_SIZE
    )
    return packed, fine.view(len(flat), -1), second.absmax.view(len(flat), -1), offset


def _padded(rows: torch.Tensor, multiple: int) -> torch.Tensor:
    """Rows with zeros at their end, up to a multiple of columns."""
    return functional.pad(rows, (0, -rows.shape[1] % multiple))


@functools.cache
def _nested_code(device: torch.device) -> torch.Tensor:
    """The 256 values of bitsandbytes' signed 8-bit data type."""
    code: torch.Tensor = _functional().create_dynamic_map()
    return code.to(device)


@functools.cache
def _functional() -> ModuleType:
    def refuse(*_args: object, **_options: object) -> NoReturn:
        raise RuntimeError("not while bitsandbytes is imported")

    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: CPU_KERNEL not in str(record.msg))
    compiler = torch.compile
    torch.compile = refuse
    try:
        import bitsandbytes.functional
    finally:
        torch.compile = compiler
    functional: ModuleType = bitsandbytes.functional
    return functional
