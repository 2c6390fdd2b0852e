"""Products of each run's tokens with that run's own matrices, all runs at once: batched over padded runs, or grouped over flat ones.

Either way no token meets another run's matrix, so that a NaN stays in its run. One wide product with a mask could not promise that,
since 0 x NaN is NaN. Two forms make a LoRA layer, forward and backward (G runs, T tokens of all of them):

    bmm         x [T, k] with stack [G, k, n] -> [T, n]      each token by its own run's matrix
    outer_grad  y [T, m] and x [T, n]         -> [G, m, n]   y^T x, summed over each run's tokens: a weight's gradient

Example: run 0 has 6 tokens, run 1 has 3, and k = 64. Padded, the tokens are a batch [2, 6, 64] whose second entry has 3 fillers, and
`bmm` is `torch.bmm`. Grouped, they stay flat [9, 64], and a kernel gets the bounds 0..6 and 6..9.
"""

from __future__ import annotations

from typing import Protocol

import torch

from train.data.micro_batch import AdapterRoute


class RunMatmul(Protocol):
    """Tokens are brought into grouped form once, multiplied as often as needed, and brought back to flat tokens."""

    def to_grouped(self, flat: torch.Tensor) -> torch.Tensor:
        """Flat tokens [T, ...] in the form that `bmm` takes; the values of fillers are undefined."""

    def to_grouped_zeroed(self, flat: torch.Tensor) -> torch.Tensor:
        """The same with zeros as fillers, as one side of `outer_grad` needs it."""

    def from_grouped(self, grouped: torch.Tensor) -> torch.Tensor:
        """Back to flat tokens [T, ...]; tokens of runs outside of the route are zero."""

    def bmm(self, grouped: torch.Tensor, stack: torch.Tensor) -> torch.Tensor:
        """Grouped tokens of width k times a stack [G, k, n]; grouped tokens of width n."""

    def outer_grad(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Grouped tokens of widths m and n, the left ones zeroed; [G, m, n], on GPUs in float32 where tokens have 16 bits."""


class PaddedMatmul:
    """`RunMatmul` with runs as the rows of a batch, padded to the longest: on every device."""

    def __init__(self, route: AdapterRoute, total: int) -> None:
        self._padding = route.padding
        self._total = total

    def to_grouped(self, flat: torch.Tensor) -> torch.Tensor:
        """[T, ...] -> [G, L, ...]; a filler repeats its own run's first token."""
        return self._padding.pad(flat)

    def to_grouped_zeroed(self, flat: torch.Tensor) -> torch.Tensor:
        """[T, ...] -> [G, L, ...]; fillers are zero."""
        return self._padding.pad_with_zeros(flat)

    def from_grouped(self, grouped: torch.Tensor) -> torch.Tensor:
        """[G, L, ...] -> [T, ...]."""
        return self._padding.unpad(grouped, self._total)

    def bmm(self, grouped: torch.Tensor, stack: torch.Tensor) -> torch.Tensor:
        """[G, L, k] with [G, k, n] -> [G, L, n]."""
        # Entry g of the batch holds run g's tokens alone, so fillers cost time but mix no runs.
        return torch.bmm(grouped, stack)

    def outer_grad(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """[G, L, m] and [G, L, n] -> [G, m, n]."""
        # A run's gradient sums thousands of tokens. In 16 bits each product would be rounded before micro-batches add up.
        if left.device.type == "cuda" and left.dtype in (torch.float16, torch.bfloat16):
            return torch.bmm(left.transpose(1, 2), right, out_dtype=torch.float32)
        # CPUs have no product with another dtype for its result.
        return torch.bmm(left.transpose(1, 2), right)


def run_matmul(route: AdapterRoute, total: int, *, grouped: bool) -> RunMatmul:
    """The products for the runs of `route` among `total` flat tokens: `grouped` where the GPU has the kernels."""
    if grouped:
        # Here, since Triton is not installed everywhere.
        from train.nn.triton.grouped_mm import GroupedMatmul

        return GroupedMatmul(route.bounds, route.covers_all)
    return PaddedMatmul(route, total)
