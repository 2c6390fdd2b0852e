"""Forward and backward of one micro-batch: from tokens to losses, with every adapter's gradient left in the pack's matrix."""

from __future__ import annotations

from typing import Protocol

import torch

from train.base import PackedBase
from train.batches import MicroBatch, Sequence
from train.loss import sums_per_run, target_losses


class Gradients(Protocol):
    """A way to compute the gradients of micro-batches."""

    def add(self, sequences: list[Sequence], weights: torch.Tensor, dropout_keys: torch.Tensor | None) -> torch.Tensor:
        """Add the gradients of a micro-batch.

        Args:
            weights: [runs + 1] of each run's target losses in the sum whose gradient is wanted; the last is the fillers', zero.
            dropout_keys: [runs] random keys of this step, None where nothing is dropped.

        Returns:
            The sum of each run's target losses [runs], in float64.
        """


class DirectGradients:
    """One operation after another, of any shape."""

    def __init__(self, base: PackedBase, pack_size: int) -> None:
        self._base, self._pack_size = base, pack_size

    def add(self, sequences: list[Sequence], weights: torch.Tensor, dropout_keys: torch.Tensor | None) -> torch.Tensor:
        """See `Gradients`."""
        batch = MicroBatch(sequences, self._pack_size, self._base.device)
        return sums_per_run(add_gradients(self._base, batch, weights, dropout_keys), batch)


def add_gradients(
    base: PackedBase, batch: MicroBatch, weights: torch.Tensor, dropout_keys: torch.Tensor | None
) -> torch.Tensor:
    """Forward and backward; the loss of every target [N], fillers included."""
    hidden = base.hidden_states(batch, dropout_keys)
    learnt = hidden.detach().index_select(0, batch.learnt)
    fused = base.current.kernels.fused
    found = target_losses(learnt, base.head, batch.targets, weights[batch.run_of_target], fused)
    if hidden.requires_grad and found.gradient is not None:
        # Every learnt position is there once; fillers repeat one position, all with zeros.
        hidden.backward(torch.zeros_like(hidden).index_copy_(0, batch.learnt, found.gradient))
    return found.losses
