"""What attention and adapters look up during a forward: the micro-batch in flight, and the key-value cache of a generation.

The layers of a decoder pass each other hidden states alone. Which token belongs to which sequence and run reaches attention and the
linear layers through the one `ForwardContext` that all of them hold (vLLM's forward context does the same).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary

from train.data.micro_batch import MicroBatch, Padding
from train.nn.backends import Kernels
from train.nn.functional import masked_attention


class KeyValueCache:
    """Keys and values of tokens that went through the base before: an answer costs one token per step, not its whole prompt.

    Each layer has right-padded keys and values [S, heads, L + room, dim]. The pass of the prompts fills them, layer after layer;
    after `advance`, each pass brings one token of every sequence. Transformers' own caches do not know the flat tokens of several
    sequences.

    Args:
        lengths: [S] tokens of each sequence that are cached.
        room: how many more tokens each sequence may get.
    """

    def __init__(self, lengths: torch.Tensor, room: int) -> None:
        self.lengths = lengths
        self.is_filled = False
        self._room = room
        self._sequences = torch.arange(len(lengths), device=lengths.device)
        self._positions = torch.arange(int(lengths.max()) + room, device=lengths.device)
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        # The layer whose turn it is in this pass: layers call in order, and do not know their own numbers.
        self._layer = 0

    def fill(self, key: torch.Tensor, value: torch.Tensor, padding: Padding) -> None:
        """Add the next layer's keys and values [T, heads, dim] of the flat prompts."""
        self._layers.append((self._spread(key, padding), self._spread(value, padding)))

    def advance(self) -> None:
        """Count what has gone through all layers: first the prompts, then one token more of each sequence."""
        if self.is_filled:
            self.lengths = self.lengths + 1
        self.is_filled = True
        self._layer = 0

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one new token of each sequence [S, heads, dim] to its sequence and itself, in the next layer.

        `window`, `softcap` and `sinks` are those of `train.nn.attention.attend`.
        """
        keys, values = self._layers[self._layer]
        self._layer += 1
        # Sequence s has lengths[s] cached tokens, at positions 0 to lengths[s] - 1, so its new token goes to position lengths[s].
        keys[self._sequences, :, self.lengths] = key
        values[self._sequences, :, self.lengths] = value
        seen = self._positions <= self.lengths[:, None]
        if window is not None:
            seen &= self._positions > self.lengths[:, None] - window
        out = masked_attention(query.unsqueeze(2), keys, values, seen[:, None, None], scale, softcap, sinks)
        return out.squeeze(2)

    def _spread(self, flat: torch.Tensor, padding: Padding) -> torch.Tensor:
        """[T, heads, dim] -> [S, heads, L + room, dim]; places without a token yet are zero, and masked."""
        return pad(padding.pad_with_zeros(flat).transpose(1, 2), (0, 0, 0, self._room))


@dataclass
class _Forward:
    """What changes from forward to forward."""

    batch: MicroBatch | None = None
    dropout_keys: torch.Tensor | None = None
    cache: KeyValueCache | None = None
    padding: Padding | None = None
    made: dict[Hashable, torch.Tensor] = field(default_factory=dict)
    # Of padded tensors that are still in use: their version, and their real tokens.
    unpadded: MutableMapping[torch.Tensor, tuple[tuple[int, bool], torch.Tensor]] = field(
        default_factory=WeakTensorKeyDictionary
    )


class ForwardContext:
    """The micro-batch in flight, and how to compute it.

    Attributes:
        kernels: which of the device's faster implementations to use.
        windows: of transformers' attention modules, how many tokens each sees (`train.nn.windows`); None or missing for all.
    """

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.windows: dict[nn.Module, int | None] = {}
        self._forward = _Forward()
        self._anchor: torch.Tensor | None = None

    def set(self, batch: MicroBatch, dropout_keys: torch.Tensor | None, cache: KeyValueCache | None = None) -> None:
        """Start a forward of `batch`."""
        self._forward = _Forward(batch, dropout_keys, cache)

    def narrow(self, bucket: MicroBatch, padding: Padding) -> None:
        """Go on with some sequences of the micro-batch, right-padded."""
        self._forward = _Forward(bucket, self.dropout_keys, self.cache, padding)

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For `torch.utils.checkpoint`: what is computed again is computed within the forward that it was computed in first."""
        return nullcontext(), self._again(self._forward)

    @contextmanager
    def _again(self, forward: _Forward) -> Iterator[None]:
        before, self._forward = self._forward, forward
        try:
            yield
        finally:
            self._forward = before

    @property
    def batch(self) -> MicroBatch:
        """The micro-batch in flight."""
        if self._forward.batch is None:
            raise RuntimeError("the packed base was called outside of PackedModel.hidden_states")
        return self._forward.batch

    @property
    def dropout_keys(self) -> torch.Tensor | None:
        """[runs] the runs' random keys of this step, None while evaluating."""
        return self._forward.dropout_keys

    @property
    def cache(self) -> KeyValueCache | None:
        """The tokens before, while answers are generated."""
        return self._forward.cache

    @property
    def padding(self) -> Padding | None:
        """How the sequences are padded while transformers' decoder runs on padded ones, else None."""
        return self._forward.padding

    def cached(self, key: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `make` returns, made once per forward."""
        if key not in self._forward.made:
            self._forward.made[key] = make()
        return self._forward.made[key]

    def cached_for(self, x: torch.Tensor, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `make` returns, made once while x lives unchanged: layers that read the same x share it, and its gradient."""
        known = self._forward.unpadded.get(x)
        # Autograd makes no graph in evaluations, and none may be missing after them.
        state = x._version, torch.is_grad_enabled()
        if known is None or known[0] != state:
            known = self._forward.unpadded[x] = (state, make())
        return known[1]

    def anchor_like(self, x: torch.Tensor) -> torch.Tensor:
        """A scalar that requires a gradient, so that autograd calls a layer's backward even where its input needs no gradient."""
        if self._anchor is None:
            self._anchor = x.new_zeros((), requires_grad=True)
        return self._anchor
