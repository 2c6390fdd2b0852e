"""LoRA dropout whose mask is a pure function of (seed, step, module, sequence, position, feature).

A counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) has no state, so a mask is the same
in a pack and alone, in any micro-batch, on any device, when checkpointing recomputes it and after a resume. The mixing
function is Wellons' `lowbias32` (hash-prospector), two multiplications on 32-bit integers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from train.data.micro_batch import MicroBatch

# 2^32 / golden ratio, as a signed number: it spreads consecutive features over all bits.
_GOLDEN = 0x9E3779B9 - 2**32


def step_key(seed: int, step: int) -> int:
    """The signed 32-bit random key of one run's step."""
    return int.from_bytes(hashlib.sha256(f"dropout/{seed}/{step}".encode()).digest()[:4], "little", signed=True)


@dataclass(frozen=True)
class Dropout:
    """The dropout of one module in one step. `probabilities` [runs] in float64; `step_keys` [runs] as int32."""

    probabilities: torch.Tensor
    step_keys: torch.Tensor
    module_key: int

    def apply(self, x: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """Drop features of the tokens `x` [T, in] and scale the others by 1 / (1 - p), each run by its own p."""
        probabilities = self.probabilities[batch.run_of_token][:, None]
        # Uniform over -2^31 .. 2^31 - 1, so a share p of all numbers lies below p * 2^32 - 2^31: for p = 0.25, below -2^30.
        keep = self._random(batch, x.shape[-1]) >= (probabilities * 2.0**32 - 2.0**31)
        return x * (keep / (1 - probabilities)).to(x.dtype)

    def _random(self, batch: MicroBatch, features: int) -> torch.Tensor:
        """Uniform signed 32-bit integers [T, features]."""
        # Hash run and module, then add the token's counter and hash, then mix in the feature and hash.
        per_run = (self.step_keys ^ _signed(self.module_key))[batch.run_of_token]
        per_token = _lowbias32(batch.counters.to(torch.int32) + _lowbias32(per_run))
        per_feature = torch.arange(features, dtype=torch.int32, device=per_token.device) * _GOLDEN
        return _lowbias32(per_token[:, None] ^ per_feature)


def _lowbias32(x: torch.Tensor) -> torch.Tensor:
    """Mix the bits of int32 values; the masks make the arithmetic right shifts logical ones."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def _signed(value: int) -> int:
    """An unsigned 32-bit number as the signed one with the same bits."""
    return value - 2**32 if value >= 2**31 else value
