"""What attention and adapters look up during a forward: the micro-batch that flows through the base now."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import torch

from train.data.micro_batch import MicroBatch
from train.nn.backends import Kernels

if TYPE_CHECKING:
    from train.nn.kv_cache import KeyValueCache


class ForwardContext:
    """The micro-batch that flows through the base now; attention and adapters look here for their indices.

    `dropout_keys` [runs] are the runs' random keys of this step, None while evaluating. `kernels` says which of the device's faster
    ways to take. `cache` holds the tokens before, while answers are generated.
    """

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.batch: MicroBatch | None = None
        self.dropout_keys: torch.Tensor | None = None
        self.cache: KeyValueCache | None = None
        self._made: dict[Hashable, torch.Tensor] = {}
        self._anchor: torch.Tensor | None = None

    def begin(self, batch: MicroBatch, dropout_keys: torch.Tensor | None, cache: KeyValueCache | None = None) -> None:
        """Start a pass through the base."""
        self.batch, self.dropout_keys, self.cache = batch, dropout_keys, cache
        self._made.clear()

    def require(self) -> MicroBatch:
        """The micro-batch in flight."""
        if self.batch is None:
            raise RuntimeError("the packed base was called outside of PackedModel.hidden_states")
        return self.batch

    def once(self, key: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `make` gives, made once in a pass."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def anchor_like(self, x: torch.Tensor) -> torch.Tensor:
        """A scalar that requires a gradient, so that autograd asks for a backward where x needs none."""
        if self._anchor is None:
            self._anchor = x.new_zeros((), requires_grad=True)
        return self._anchor
