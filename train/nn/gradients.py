"""Forward and backward of one micro-batch: from tokens to losses, with every adapter's gradient left in the pack's matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from train.data.micro_batch import MicroBatch
from train.data.sampling import TokenSequence
from train.nn.loss import sums_per_run, target_losses
from train.nn.packed_model import PackedModel
from train.sizing import LARGEST_GRAPH_TOKENS


class Gradients(Protocol):
    """A way to compute the gradients of micro-batches."""

    def add(
        self, sequences: list[TokenSequence], weights: torch.Tensor, dropout_keys: torch.Tensor | None
    ) -> torch.Tensor:
        """Add the gradients of a micro-batch.

        Args:
            weights: [runs + 1] of each run's target losses in the sum whose gradient is wanted; the last is the fillers', zero.
            dropout_keys: [runs] random keys of this step, None where nothing is dropped.

        Returns:
            The sum of each run's target losses [runs], in float64.
        """


class DirectGradients:
    """One operation after another, of any shape."""

    def __init__(self, base: PackedModel, pack_size: int) -> None:
        self._base, self._pack_size = base, pack_size

    def add(
        self, sequences: list[TokenSequence], weights: torch.Tensor, dropout_keys: torch.Tensor | None
    ) -> torch.Tensor:
        """See `Gradients`."""
        batch = MicroBatch(sequences, self._pack_size, self._base.device)
        return sums_per_run(add_gradients(self._base, batch, weights, dropout_keys), batch)


def add_gradients(
    base: PackedModel, batch: MicroBatch, weights: torch.Tensor, dropout_keys: torch.Tensor | None
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


TOKEN_MULTIPLE = 128
MOST_GRAPHS = 32  # each keeps some megabytes of launch records

Shape = tuple[int, int, tuple[int, ...], bool]


def gradients_of(base: PackedModel, pack_size: int) -> Gradients:
    """The way to compute the gradients of a pack on its base's device."""
    direct = DirectGradients(base, pack_size)
    return GraphedGradients(base, pack_size, direct) if base.supports_cuda_graphs else direct


@dataclass
class _Recorded:
    """A captured micro-batch: fill the inputs, replay, read `losses`."""

    batch: MicroBatch
    weights: torch.Tensor
    dropout_keys: torch.Tensor | None
    graph: torch.cuda.CUDAGraph
    losses: torch.Tensor


class GraphedGradients:
    """Replays what repeats and computes the rest directly."""

    def __init__(self, base: PackedModel, pack_size: int, direct: DirectGradients) -> None:
        self._base, self._pack_size, self._direct = base, pack_size, direct
        self._warm: set[tuple[tuple[int, ...], bool]] = set()
        self._recorded: dict[Shape, _Recorded] = {}
        self._pool: Any = None

    def add(
        self, sequences: list[TokenSequence], weights: torch.Tensor, dropout_keys: torch.Tensor | None
    ) -> torch.Tensor:
        """See `Gradients`."""
        if sum(len(s.tokens) for s in sequences) > LARGEST_GRAPH_TOKENS:
            return self._direct.add(sequences, weights, dropout_keys)
        batch = MicroBatch(sequences, self._pack_size, self._base.device, TOKEN_MULTIPLE)
        runs_and_dropout = tuple(int(run) for run in batch.runs), dropout_keys is not None
        shape = (batch.total, batch.sequences, *runs_and_dropout)
        batch.prefetch_routes(self._base.members())
        recorded = self._recorded.get(shape)
        if recorded is None and runs_and_dropout in self._warm and len(self._recorded) < MOST_GRAPHS:
            recorded = self._recorded[shape] = self._record(batch, weights, dropout_keys)
        # Whatever is compiled, loaded or allocated once is there after these runs' first micro-batch.
        self._warm.add(runs_and_dropout)
        if recorded is None:
            losses = add_gradients(self._base, batch, weights, dropout_keys)
        else:
            losses = self._replay(recorded, batch, weights, dropout_keys)
        return sums_per_run(losses[: batch.num_targets], batch)

    def _record(self, batch: MicroBatch, weights: torch.Tensor, dropout_keys: torch.Tensor | None) -> _Recorded:
        """Capture one micro-batch without executing it."""
        weights = weights.clone()
        dropout_keys = None if dropout_keys is None else dropout_keys.clone()
        batch.longest = min(self._base.longest, batch.total)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what direct passes used, for the graphs' pool
        with torch.cuda.graph(graph, pool=self._pool):
            losses = add_gradients(self._base, batch, weights, dropout_keys)
        return _Recorded(batch, weights, dropout_keys, graph, losses)

    def _replay(
        self, recorded: _Recorded, batch: MicroBatch, weights: torch.Tensor, dropout_keys: torch.Tensor | None
    ) -> torch.Tensor:
        """Run the captured kernels on another micro-batch of the same shape."""
        if batch is not recorded.batch:
            recorded.batch.copy_indices_from(batch)
        recorded.weights.copy_(weights)
        if recorded.dropout_keys is not None and dropout_keys is not None:
            recorded.dropout_keys.copy_(dropout_keys)
        recorded.graph.replay()
        return recorded.losses
