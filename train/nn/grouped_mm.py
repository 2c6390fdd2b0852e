"""RunMatmul of each run's tokens with its own matrix, all runs at once: batched over padded runs, or grouped over flat ones.

Either way no token meets another run's matrix, so that a NaN stays in its run; one wide product with a mask could not promise that,
since 0 x NaN is NaN. Two forms make a LoRA layer, forward and backward (G runs, T tokens of all of them):

    times   x [T, k] with stack [G, k, n] -> [T, n]
    outer   y [T, m] and x [T, n]         -> [G, m, n], a sum over each run's tokens
"""

from __future__ import annotations

from typing import Protocol

import torch

from train.data.micro_batch import Route


class RunMatmul(Protocol):
    """Tokens are brought to groups once, multiplied as often as need be, and brought back flat."""

    def to_grouped(self, flat: torch.Tensor) -> torch.Tensor:
        """Flat tokens [T, ...] in the form that `times` takes; what fills gaps is not defined."""

    def to_grouped_zeroed(self, flat: torch.Tensor) -> torch.Tensor:
        """The same with zeros in the gaps, as one side of `outer` needs it."""

    def from_grouped(self, laid: torch.Tensor) -> torch.Tensor:
        """Back to flat tokens [T, ...]; tokens outside of the route's runs are zero."""

    def times(self, laid: torch.Tensor, stack: torch.Tensor) -> torch.Tensor:
        """Laid tokens of width k with a stack [G, k, n]; laid tokens of width n."""

    def outer(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Laid tokens of widths m and n, the left ones laid with zeros; [G, m, n], on GPUs float32 where tokens are of 16 bit."""


class PaddedMatmul:
    """Runs as the rows of a batch, padded to the longest: everywhere."""

    def __init__(self, route: Route, total: int) -> None:
        self._padding, self._total = route.padding, total

    def to_grouped(self, flat: torch.Tensor) -> torch.Tensor:
        """See `RunMatmul`."""
        return self._padding.pad(flat)

    def to_grouped_zeroed(self, flat: torch.Tensor) -> torch.Tensor:
        """See `RunMatmul`."""
        return self._padding.pad_with_zeros(flat)

    def from_grouped(self, laid: torch.Tensor) -> torch.Tensor:
        """See `RunMatmul`."""
        return self._padding.unpad(laid, self._total)

    def times(self, laid: torch.Tensor, stack: torch.Tensor) -> torch.Tensor:
        """See `RunMatmul`."""
        return torch.bmm(laid, stack)

    def outer(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """See `RunMatmul`."""
        if left.device.type == "cuda" and left.dtype in (torch.float16, torch.bfloat16):
            return torch.bmm(left.transpose(1, 2), right, out_dtype=torch.float32)  # CPUs have no such product
        return torch.bmm(left.transpose(1, 2), right)


def run_matmul(route: Route, total: int, *, grouped: bool) -> RunMatmul:
    """The products for the runs of `route`: `grouped` where the GPU has the kernels."""
    if grouped:
        from train.nn.triton.grouped_mm import GroupedMatmul  # Triton is not everywhere

        return GroupedMatmul(route.bounds, route.is_everything)
    return PaddedMatmul(route, total)
