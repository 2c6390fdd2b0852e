"""4-bit NormalFloat (QLoRA, arXiv 2305.14314): the one place that knows bitsandbytes.

It is imported at the first use. Its four `torch.compile` decorators would import all of inductor, which takes a second on a fast disk
and many on a busy network file system, for fallbacks that nobody calls here. Where compiling fails it uses the plain functions.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NoReturn

import torch

from train.config import QuantConfig

# Weights that share a scale, as with transformers' `BitsAndBytesConfig`.
BLOCK_SIZE = 64
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
    dense: torch.Tensor = _functional().dequantize_4bit(packed, state)
    return dense


def state_from(parts: Mapping[str, torch.Tensor], device: torch.device) -> Any:
    """The `QuantState` from its own serialized parts."""
    return _functional().QuantState.from_dict(dict(parts), device)


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
