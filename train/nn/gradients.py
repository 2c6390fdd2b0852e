"""Forward and backward of one micro-batch: from tokens to losses, with every adapter's gradient added to the pack's matrix.

Eagerly, each operation is a launch by the host. A small pack's kernels take less time than their launches, so on GPUs whole
micro-batches are captured as CUDA graphs and replayed: the host then fills the inputs and launches once. Only what has the same shape
can be replayed, so micro-batches are padded to a multiple of `token_multiple` tokens by fillers of zero weight:

    300 real tokens -> 320 tokens, 310 -> 320: one graph, if sequences, runs and dropout agree;  321 -> 352: another
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from train.data.micro_batch import MicroBatch
from train.data.sampling import TokenSequence
from train.nn.loss import sums_per_run, target_losses
from train.nn.packed_model import PackedModel
from train.sizing import LARGEST_GRAPH_TOKENS

# Fillers cost as much as tokens, and every multiple another graph. On an H200 Qwen3-8B trains 1 x 4 (527 tokens) at 14,136 tok/s in
# multiples of 128, at 14,495 in those of 64 and at 14,862 in those of 32; with eight times the tokens they do not differ.
TOKEN_MULTIPLES = (32, 128)
MULTIPLES_PER_BATCH = 16
# Each graph keeps some megabytes of launch records.
MAX_GRAPHS = 48

# Tokens and sequences of a micro-batch, its runs, and whether anything is dropped.
GraphKey = tuple[int, int, tuple[int, ...], bool]


class Gradients(Protocol):
    """A way to compute the gradients of micro-batches."""

    def add(
        self, sequences: list[TokenSequence], weights: torch.Tensor, dropout_keys: torch.Tensor | None
    ) -> torch.Tensor:
        """Add the gradients of a micro-batch.

        Args:
            weights: [runs + 1] the factor of each run's target losses in the sum whose gradient is wanted; the last is the
                fillers', zero.
            dropout_keys: [runs] random keys of this step, None where nothing is dropped.

        Returns:
            The sum of each run's target losses [runs], in float64.
        """


def token_multiple(tokens: int) -> int:
    """To a multiple of what a micro-batch of `tokens` is padded: the power of two that adds about a sixteenth at most.

    500 tokens give 32, 1,500 give 64, and from 2,048 on it is 128.
    """
    smallest, largest = TOKEN_MULTIPLES
    # 1,500 // 16 = 93, which has 7 bits: 2^6 = 64 is the largest power of two in it.
    sixteenth = max(tokens // MULTIPLES_PER_BATCH, smallest)
    return min(largest, 1 << (sixteenth.bit_length() - 1))


def choose_gradients(base: PackedModel, pack_size: int) -> Gradients:
    """The way to compute the gradients of a pack on its base's device."""
    eager = EagerGradients(base, pack_size)
    return GraphedGradients(base, pack_size, eager) if base.supports_cuda_graphs else eager


def add_gradients(
    base: PackedModel, batch: MicroBatch, weights: torch.Tensor, dropout_keys: torch.Tensor | None
) -> torch.Tensor:
    """Forward and backward of a micro-batch; the loss of every target [N], fillers included."""
    hidden = base.hidden_states(batch, dropout_keys)
    # Detached: the head and the loss compute their own gradient, so autograd only has to go back from the hidden states.
    target_hidden = hidden.detach().index_select(0, batch.target_positions)
    fused = base.context.kernels.fused_elementwise
    found = target_losses(target_hidden, base.head, batch.targets, weights[batch.run_of_target], fused)
    if hidden.requires_grad and found.gradient is not None:
        # A copy, not a sum: every real position occurs once, and fillers repeat one position, all with zeros.
        hidden.backward(torch.zeros_like(hidden).index_copy_(0, batch.target_positions, found.gradient))
    return found.losses


class EagerGradients:
    """One operation after another, of any shape."""

    def __init__(self, base: PackedModel, pack_size: int) -> None:
        self._base = base
        self._pack_size = pack_size

    def add(
        self, sequences: list[TokenSequence], weights: torch.Tensor, dropout_keys: torch.Tensor | None
    ) -> torch.Tensor:
        """Add the gradients of a micro-batch, as `Gradients.add` says."""
        batch = MicroBatch(sequences, self._pack_size, self._base.device)
        return sums_per_run(add_gradients(self._base, batch, weights, dropout_keys), batch)


@dataclass
class _CapturedGraph:
    """A captured micro-batch: copy the inputs into these tensors, replay, read `losses`."""

    batch: MicroBatch
    weights: torch.Tensor
    dropout_keys: torch.Tensor | None
    graph: torch.cuda.CUDAGraph
    losses: torch.Tensor


class GraphedGradients:
    """Replays micro-batches whose shape was captured, and computes the rest eagerly."""

    def __init__(self, base: PackedModel, pack_size: int, eager: EagerGradients) -> None:
        self._base = base
        self._pack_size = pack_size
        self._eager = eager
        self._warmed_up: set[tuple[tuple[int, ...], bool]] = set()
        self._captured: dict[GraphKey, _CapturedGraph] = {}
        self._pool: Any = None

    def add(
        self, sequences: list[TokenSequence], weights: torch.Tensor, dropout_keys: torch.Tensor | None
    ) -> torch.Tensor:
        """Add the gradients of a micro-batch, as `Gradients.add` says."""
        tokens = sum(len(s.tokens) for s in sequences)
        if tokens > LARGEST_GRAPH_TOKENS:
            return self._eager.add(sequences, weights, dropout_keys)
        batch = MicroBatch(sequences, self._pack_size, self._base.device, token_multiple(tokens))
        runs_and_dropout = tuple(int(run) for run in batch.runs), dropout_keys is not None
        key = (batch.total, batch.sequences, *runs_and_dropout)
        batch.prefetch_routes(self._base.members())
        captured = self._captured.get(key)
        if captured is None and runs_and_dropout in self._warmed_up and len(self._captured) < MAX_GRAPHS:
            captured = self._captured[key] = self._capture(batch, weights, dropout_keys)
        # A capture can neither compile nor load a kernel. Which ones these runs need does not depend on the shape, so after their
        # first micro-batch, computed eagerly, everything is there.
        self._warmed_up.add(runs_and_dropout)
        if captured is None:
            losses = add_gradients(self._base, batch, weights, dropout_keys)
        else:
            losses = self._replay(captured, batch, weights, dropout_keys)
        return sums_per_run(losses[: batch.num_targets], batch)

    def _capture(self, batch: MicroBatch, weights: torch.Tensor, dropout_keys: torch.Tensor | None) -> _CapturedGraph:
        """Capture one micro-batch without executing it."""
        # The graph reads its inputs from these very tensors at every replay, so they must be its own.
        weights = weights.clone()
        dropout_keys = None if dropout_keys is None else dropout_keys.clone()
        # A launch's size is captured too, and attention's follows the longest sequence: take the longest that any replay can have.
        batch.longest = min(self._base.longest, batch.total)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        # The graphs' pool needs the memory that eager passes leave cached.
        torch.cuda.empty_cache()
        with torch.cuda.graph(graph, pool=self._pool):
            losses = add_gradients(self._base, batch, weights, dropout_keys)
        return _CapturedGraph(batch, weights, dropout_keys, graph, losses)

    def _replay(
        self, captured: _CapturedGraph, batch: MicroBatch, weights: torch.Tensor, dropout_keys: torch.Tensor | None
    ) -> torch.Tensor:
        """Run the captured kernels on another micro-batch of the same shape."""
        if batch is not captured.batch:
            captured.batch.copy_indices_from(batch)
        captured.weights.copy_(weights)
        if captured.dropout_keys is not None and dropout_keys is not None:
            captured.dropout_keys.copy_(dropout_keys)
        captured.graph.replay()
        return captured.losses
