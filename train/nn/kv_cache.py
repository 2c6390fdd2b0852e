"""Keys and values of tokens that went through the base before, so that an answer costs a token per step, not its whole prompt."""

from __future__ import annotations

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from train.data.micro_batch import Padding


class KeyValueCache:
    """What attention has seen of a batch of sequences: per layer, right-padded keys and values [S, heads, L + room, dim].

    The prompts' pass fills it, layer after layer; after `advance`, each pass brings one token of every sequence. Transformers' own
    caches know nothing of the flat tokens of several sequences.

    Args:
        lengths: [S] tokens of each sequence that are here.
        room: how many more tokens each sequence may get.
    """

    def __init__(self, lengths: torch.Tensor, room: int) -> None:
        self.lengths, self._room = lengths, room
        self._rows = torch.arange(len(lengths), device=lengths.device)
        self._columns = torch.arange(int(lengths.max()) + room, device=lengths.device)
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._layer = 0  # whose turn it is in this pass
        self.is_filled = False

    def fill(self, key: torch.Tensor, value: torch.Tensor, padding: Padding) -> None:
        """Take in the next layer's keys and values [T, heads, dim] of the flat prompts."""
        self._layers.append((self._spread(key, padding), self._spread(value, padding)))

    def advance(self) -> None:
        """Count what has gone through all layers: the prompts at first, then a token more of each sequence."""
        if self.is_filled:
            self.lengths = self.lengths + 1
        self.is_filled, self._layer = True, 0

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        """Attention of one new token of each sequence [S, heads, dim] to its sequence and itself, in the next layer."""
        keys, values = self._layers[self._layer]
        self._layer += 1
        keys[self._rows, :, self.lengths] = key
        values[self._rows, :, self.lengths] = value
        seen = (self._columns <= self.lengths[:, None])[:, None, None]
        grouped = query.shape[1] != key.shape[1]
        out = scaled_dot_product_attention(
            query.unsqueeze(2), keys, values, attn_mask=seen, scale=scale, enable_gqa=grouped
        )
        return out.squeeze(2)

    def _spread(self, flat: torch.Tensor, padding: Padding) -> torch.Tensor:
        """[T, heads, dim] -> [S, heads, L + room, dim]; what is not there yet is zero, and masked."""
        return pad(padding.pad_with_zeros(flat).transpose(1, 2), (0, 0, 0, self._room))
