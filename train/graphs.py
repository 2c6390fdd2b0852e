"""CUDA graphs: a GPU finishes a step's kernels sooner than the host can launch them one by one.

Measured on an H200 with a 7B shape: launching takes 156 ms whatever the step; the kernels of 525 tokens take 35 ms, those of 4,081
tokens 174 ms, which launches stretched to 206 ms. So a micro-batch is filled up to a multiple of `TOKEN_MULTIPLE`, which leaves a
handful of shapes; each is captured when first met (but for the first of its runs), and from then on only indices are copied and the
graph is replayed, in one launch. All graphs share one memory pool, since one of them runs at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from train.base import PackedBase
from train.batches import MicroBatch, Sequence
from train.gradients import DirectGradients, Gradients, add_gradients
from train.loss import sums_per_run
from train.sizing import LARGEST_GRAPH_TOKENS

TOKEN_MULTIPLE = 128
MOST_GRAPHS = 32  # each keeps some megabytes of launch records

Shape = tuple[int, int, tuple[int, ...], bool]


def gradients_of(base: PackedBase, pack_size: int) -> Gradients:
    """The way to compute the gradients of a pack on its base's device."""
    direct = DirectGradients(base, pack_size)
    return GraphedGradients(base, pack_size, direct) if base.repeats_alike else direct


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

    def __init__(self, base: PackedBase, pack_size: int, direct: DirectGradients) -> None:
        self._base, self._pack_size, self._direct = base, pack_size, direct
        self._warm: set[tuple[tuple[int, ...], bool]] = set()
        self._recorded: dict[Shape, _Recorded] = {}
        self._pool: Any = None

    def add(self, sequences: list[Sequence], weights: torch.Tensor, dropout_keys: torch.Tensor | None) -> torch.Tensor:
        """See `Gradients`."""
        if sum(len(s.tokens) for s in sequences) > LARGEST_GRAPH_TOKENS:
            return self._direct.add(sequences, weights, dropout_keys)
        batch = MicroBatch(sequences, self._pack_size, self._base.device, TOKEN_MULTIPLE)
        runs_and_dropout = tuple(int(run) for run in batch.runs), dropout_keys is not None
        shape = (batch.total, batch.sequences, *runs_and_dropout)
        batch.make_routes(self._base.members())
        recorded = self._recorded.get(shape)
        if recorded is None and runs_and_dropout in self._warm and len(self._recorded) < MOST_GRAPHS:
            recorded = self._recorded[shape] = self._record(batch, weights, dropout_keys)
        # Whatever is compiled, loaded or allocated once is there after these runs' first micro-batch.
        self._warm.add(runs_and_dropout)
        if recorded is None:
            losses = add_gradients(self._base, batch, weights, dropout_keys)
        else:
            losses = self._replay(recorded, batch, weights, dropout_keys)
        return sums_per_run(losses[: batch.real_targets], batch)

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
            recorded.batch.become(batch)
        recorded.weights.copy_(weights)
        if recorded.dropout_keys is not None and dropout_keys is not None:
            recorded.dropout_keys.copy_(dropout_keys)
        recorded.graph.replay()
        return recorded.losses
