"""transformers' own decoder as a path of a pack: on flat tokens, or on right-padded sequences.

    flat     [1, T]  all tokens of all runs in one row; `train.nn.attention` keeps sequences apart. Right where nothing but attention
                     mixes tokens.
    padded   [S, L]  a sequence per row, pads at its end. Right for every causal decoder, whatever mixes its tokens: no token sees
                     what comes after it, so pads change nothing before them, and no loss reads what they compute.

Tokens 11 12 13 and 21 are [[11 12 13 21]] with positions 0 1 2 0 on the flat path, and [[11 12 13] [21 21 21]] on the padded one, where
a pad repeats its own sequence's first token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from train.data.micro_batch import MicroBatch
from train.data.sampling import TokenSequence
from train.model.anatomy import decoder_layers, text_decoder
from train.nn.forward_context import ForwardContext
from train.nn.padding import unpad
from train.nn.stock_attention import StockAttention
from train.nn.windows import measure_windows

# Around a layer's forward, and around its repetition in the backward.
CheckpointContexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


class Decoder(Protocol):
    """Embedding, layers and the last norm of a packed model, by one of the paths."""

    def __call__(self, batch: MicroBatch) -> torch.Tensor:
        """The last hidden state [T, hidden] of every token."""

    def checkpoint_activations(self) -> None:
        """Keep only the layers' inputs in the forward and compute the rest again in the backward (arXiv 1604.06174)."""


class FlatDecoder:
    """transformers' decoder on flat tokens."""

    def __init__(self, model: PreTrainedModel, context: ForwardContext, longest: int) -> None:
        self._layers = decoder_layers(model)
        self._decoder = text_decoder(model)
        self._context = context
        context.windows = measure_windows(model, self._probe, longest)
        # transformers gives the attention function its module, and nothing of ours.
        for module in context.windows:
            module.forward_context = context  # type: ignore[assignment]

    def _probe(self, tokens: torch.Tensor) -> None:
        """A forward of one sequence [1, n]."""
        row = tokens[0].cpu().numpy()
        self._context.set(MicroBatch([TokenSequence(0, 0, row, row)], 1, tokens.device), None)
        self(self._context.batch)

    def __call__(self, batch: MicroBatch) -> torch.Tensor:
        """The last hidden state [T, hidden] of every token."""
        output = self._decoder(batch.tokens[None], position_ids=batch.positions[None], use_cache=False)
        hidden: torch.Tensor = output[0][0]
        return hidden

    def checkpoint_activations(self) -> None:
        """As `Decoder.checkpoint_activations`."""
        _checkpoint_layers(self._layers, self._context.checkpoint_contexts)


class PaddedDecoder:
    """transformers' decoder on right-padded sequences, with a fresh state for each; sequences of similar length together."""

    def __init__(self, model: PreTrainedModel, context: ForwardContext) -> None:
        self._layers = decoder_layers(model)
        self._decoder = text_decoder(model)
        self._context = context
        self._attention = StockAttention()

    def __call__(self, batch: MicroBatch) -> torch.Tensor:
        """The last hidden state [T, hidden] of every token."""
        buckets, places = batch.buckets
        hidden = [self._decode(bucket) for bucket in buckets]
        return hidden[0] if places is None else torch.cat(hidden).index_select(0, places)

    def _decode(self, bucket: MicroBatch) -> torch.Tensor:
        """The last hidden state of each token of one bucket, flat."""
        self._context.narrow(bucket, bucket.attention)
        with self._attention.watched():
            output = self._decoder(bucket.attention.pad(bucket.tokens), use_cache=False)
        self._attention.settle()
        return unpad(output[0], bucket.attention, bucket.total)

    def checkpoint_activations(self) -> None:
        """As `Decoder.checkpoint_activations`."""
        _checkpoint_layers(self._layers, self._checkpoint_contexts)

    def _checkpoint_contexts(self) -> CheckpointContexts:
        _, again = self._context.checkpoint_contexts()
        return nullcontext(), _both(again, self._attention.watched())


@contextmanager
def _both(first: AbstractContextManager[Any], second: AbstractContextManager[Any]) -> Iterator[None]:
    with first, second:
        yield


def _checkpoint_layers(layers: torch.nn.ModuleList, contexts: Callable[[], CheckpointContexts]) -> None:
    # A list may have a layer several times.
    for layer in dict.fromkeys(layers):
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )
