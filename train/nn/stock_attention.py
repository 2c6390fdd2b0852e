"""PyTorch's fused attention as transformers' own decoders call it on padded sequences, with what they leave out.

- Its backward adds up in a fixed order, since a resumed run repeats the same bits.
- Models whose heads share one key (Falcon) let PyTorch broadcast it, which no fused kernel does: all scores [S, heads, L, L] would be
  in memory, forward and backward. Expanded by a view it is the same product, and the kernels take it.
- Falcon takes the last two of its heads by lists, `heads[..., [-2], :]`: each waits for a copy from the host, and its backward sorts.
  A slice has the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from train.nn.attention import make_backward_deterministic


class StockAttention:
    """The calls of one model. Python sees every operation while it watches, so it only does where there is something to do."""

    def __init__(self) -> None:
        self._mode: _AttentionMode | None = _AttentionMode()

    def watched(self) -> AbstractContextManager[Any]:
        """Within this, attention is called as the module says."""
        return nullcontext() if self._mode is None else self._mode

    def settle(self) -> None:
        """After a forward: where it called no such attention, watch no more."""
        if self._mode is not None and not self._mode.is_needed:
            self._mode = None


class _AttentionMode(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.is_needed = False

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__getitem__ and (index := _as_slices(args[1])) is not None:
            self.is_needed = True
            # Indexing by a list gives a copy, which a model may change.
            return func(args[0], index).clone()
        if func is not scaled_dot_product_attention or len(args) < 3:
            return func(*args, **kwargs)
        query, key, value, *others = args
        if key.shape[1] == value.shape[1] == 1 < query.shape[1]:
            self.is_needed = True
            key, value = (x.expand(-1, query.shape[1], -1, -1) for x in (key, value))
        attended: torch.Tensor = func(query, key, value, *others, **kwargs)
        # On a CPU the order is fixed.
        self.is_needed = self.is_needed or attended.is_cuda
        make_backward_deterministic(attended)
        return attended


def _as_slices(index: object) -> tuple[object, ...] | None:
    """An index whose only list is a single number, with slices alone; None for others. [..., [-2], :] is [..., -2:-1, :]."""
    if not isinstance(index, tuple):
        return None
    lists = [each for each in index if isinstance(each, list)]
    plain = all(isinstance(each, (list, slice)) or each is Ellipsis for each in index)
    if not plain or len(lists) != 1 or len(lists[0]) != 1 or type(lists[0][0]) is not int:
        return None
    place = lists[0][0]
    return tuple(slice(place, place + 1 or None) if isinstance(each, list) else each for each in index)
