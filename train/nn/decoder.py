"""The Llama decoder on flat tokens, written for packs: layers that read the same input together, residuals inside of the products,
and nothing kept for the backward that can be told from what is kept anyway.

Whether a model is one of these is judged by its result: `llama_decoder` compares both on random tokens, and a model that
computes anything else keeps transformers' own code (Qwen3's norms, Granite's multipliers, fused projections…).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from train.data.micro_batch import MicroBatch
from train.data.sampling import TokenSequence
from train.nn.attention import attend
from train.nn.backends import PLAIN
from train.nn.forward_context import ForwardContext
from train.nn.functional import gated, norm_and_pass, rotated
from train.nn.linear import PackedLinear, linears

ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PARTS = ("gate_proj", "up_proj", "down_proj")
PROBE_TOKENS = 12
PROBE_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
HALF_TOLERANCE = 0.05  # relative, over all layers in 16 bit; another formula is off by far more

Cosines = tuple[torch.Tensor, torch.Tensor]


class Block:
    """One decoder layer."""

    def __init__(self, layer: Any, current: ForwardContext) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        self._out, self._gate_up, self._down = [attention.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]
        self._norms = [
            (norm.weight, float(norm.eps)) for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        self._head_dim, self._scale = int(attention.head_dim), float(attention.scaling)
        self._current = current

    def __call__(self, hidden: torch.Tensor, cosines: Cosines) -> torch.Tensor:
        """[T, dim] -> [T, dim]."""
        fused = self._current.kernels.fused
        normed, hidden = norm_and_pass(hidden, *self._norms[0], fused)
        hidden = linears(self._attended(normed, cosines), self._out, hidden)[0]
        normed, hidden = norm_and_pass(hidden, *self._norms[1], fused)
        gate, up = linears(normed, self._gate_up, None)
        return linears(gated(gate, up, fused), self._down, hidden)[0]

    def _attended(self, normed: torch.Tensor, cosines: Cosines) -> torch.Tensor:
        q, k, v = (y.view(len(y), -1, self._head_dim) for y in linears(normed, self._qkv, None))
        q, k = (rotated(x, *cosines, self._current.kernels.fused) for x in (q, k))
        out = attend(q, k, v, self._current, self._scale)
        return out.reshape(len(normed), -1)


class LlamaDecoder:
    """Embedding, blocks and the last norm."""

    def __init__(self, model: Any, current: ForwardContext) -> None:
        decoder = model.base_model
        self._embed, self._rotary, self._norm = decoder.embed_tokens, decoder.rotary_emb, decoder.norm
        self._current = current
        self._blocks: list[Callable[[torch.Tensor, Cosines], torch.Tensor]] = [
            Block(layer, current) for layer in decoder.layers
        ]

    def __call__(self, batch: MicroBatch) -> torch.Tensor:
        """The last hidden state [T, dim] of every token."""
        hidden = self._embed(batch.tokens)
        cos, sin = self._rotary(hidden[None], batch.positions[None])
        for block in self._blocks:
            hidden = block(hidden, (cos[0], sin[0]))
        normed: torch.Tensor = norm_and_pass(hidden, self._norm.weight, self._norm.eps, self._current.kernels.fused)[0]
        return normed

    def checkpoint_activations(self) -> None:
        """Keep only the blocks' inputs in the forward and compute the rest again in the backward (arXiv 1604.06174)."""
        self._blocks = [
            partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False) for block in self._blocks
        ]


def llama_decoder(model: Any, current: ForwardContext) -> LlamaDecoder | None:
    """The decoder of a packed `model`, None if it computes something else; `model` is left as it is.

    Shapes that do not meet are found by torch's own operations; our kernels come after that, and an error of theirs is an error.
    """
    if not _has_the_parts(model):
        return None
    ours = LlamaDecoder(model, current)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (PROBE_TOKENS,), generator=random).int().numpy()
    device = model.get_input_embeddings().weight.device
    batch = MicroBatch(
        [TokenSequence(0, 0, tokens[:5], tokens[:5]), TokenSequence(0, 1, tokens[5:], tokens[5:])], 1, device
    )
    chosen, plain = current.kernels, replace(PLAIN, varlen=current.kernels.varlen)
    current.begin(batch, None)
    with torch.no_grad():
        theirs = model.base_model(batch.tokens[None], position_ids=batch.positions[None], use_cache=False)[0][0]
        current.kernels = plain
        try:
            is_alike = _alike(ours(batch), theirs)
        except RuntimeError:  # shapes that do not meet, as with rotations of a part of each head
            return None
        finally:
            current.kernels = chosen
        if is_alike and chosen != plain:
            is_alike = _alike(ours(batch), theirs)
    return ours if is_alike else None


def _alike(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two ways computed the same hidden states [T, dim], but for rounding."""
    difference = (mine - theirs).norm() / theirs.norm()
    return float(difference) < PROBE_TOLERANCE.get(theirs.dtype, HALF_TOLERANCE)


def _has_the_parts(model: Any) -> bool:
    """Whether the model's modules have the names and kinds that the blocks ask for."""
    decoder = model.base_model
    if not all(hasattr(decoder, name) for name in ("embed_tokens", "rotary_emb", "norm", "layers")):
        return False
    return hasattr(decoder.norm, "eps") and all(_is_block(layer) for layer in decoder.layers)


def _is_block(layer: nn.Module) -> bool:
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    norms = [getattr(layer, name, None) for name in ("input_layernorm", "post_attention_layernorm")]
    return (
        all(isinstance(getattr(attention, name, None), PackedLinear) for name in ATTENTION_PARTS)
        and all(isinstance(getattr(mlp, name, None), PackedLinear) for name in MLP_PARTS)
        and all(hasattr(norm, "eps") for norm in norms)
        and hasattr(attention, "head_dim")
        and hasattr(attention, "scaling")
    )
