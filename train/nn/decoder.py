"""Llama's decoder on flat tokens, written for packs: layers that read the same input run together, residuals are added inside of the
products, and nothing is kept for the backward that can be computed from what is kept anyway. A layer computes

    n    = rms_norm(x)                            x [T, hidden]: the residual stream
    x    = x + o_proj(attend(rotary(q_proj n), rotary(k_proj n), v_proj n))
    m    = rms_norm(x)
    x    = x + down_proj(silu(gate_proj m) * up_proj m)

Whether a model computes just that is judged by its result: `llama_decoder` compares both on random tokens. A model that computes
anything else keeps transformers' own code (Qwen3's norms, Granite's multipliers, fused projections).
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
from train.nn.backends import EAGER
from train.nn.forward_context import ForwardContext
from train.nn.functional import rms_norm_residual, swiglu_autograd
from train.nn.heads import rotary_autograd
from train.nn.linear import PackedLinear, apply_linears

ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PARTS = ("gate_proj", "up_proj", "down_proj")
PROBE_TOKENS = 12
# Relative, over all layers; in 16 bits another formula is off by far more than rounding.
PROBE_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
HALF_TOLERANCE = 0.05

# cos and sin [T, dim] of each token's rotation.
CosSin = tuple[torch.Tensor, torch.Tensor]


class DecoderLayer:
    """One decoder layer, around transformers' module of the same layer."""

    def __init__(self, layer: Any, context: ForwardContext) -> None:
        attention = layer.self_attn
        mlp = layer.mlp
        self._qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        self._out = [attention.o_proj]
        self._gate_up = [mlp.gate_proj, mlp.up_proj]
        self._down = [mlp.down_proj]
        self._norms = [
            (norm.weight, float(norm.eps)) for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        self._head_dim = int(attention.head_dim)
        self._scale = float(attention.scaling)
        self._context = context

    def __call__(self, hidden: torch.Tensor, cos_sin: CosSin) -> torch.Tensor:
        """[T, hidden] -> [T, hidden]."""
        fused = self._context.kernels.fused_elementwise
        # `hidden` comes back unchanged, through autograd, so that its two gradients are added in the norm's backward.
        normed, hidden = rms_norm_residual(hidden, *self._norms[0], fused)
        hidden = apply_linears(self._attention(normed, cos_sin), self._out, hidden)[0]
        normed, hidden = rms_norm_residual(hidden, *self._norms[1], fused)
        gate, up = apply_linears(normed, self._gate_up, None)
        return apply_linears(swiglu_autograd(gate, up, fused), self._down, hidden)[0]

    def _attention(self, normed: torch.Tensor, cos_sin: CosSin) -> torch.Tensor:
        """[T, hidden] -> [T, heads * dim], before the output projection."""
        # Each projection [T, heads * dim] as heads; with grouped-query attention k and v have fewer.
        q, k, v = (y.view(len(y), -1, self._head_dim) for y in apply_linears(normed, self._qkv, None))
        q, k = (rotary_autograd(x, *cos_sin, self._context.kernels.fused_elementwise) for x in (q, k))
        out = attend(q, k, v, self._context, self._scale)
        return out.reshape(len(normed), -1)


class LlamaDecoder:
    """Embedding, layers and the last norm."""

    def __init__(self, model: Any, context: ForwardContext) -> None:
        decoder = model.base_model
        self._embed = decoder.embed_tokens
        self._rotary = decoder.rotary_emb
        self._norm = decoder.norm
        self._context = context
        self._layers: list[Callable[[torch.Tensor, CosSin], torch.Tensor]] = [
            DecoderLayer(layer, context) for layer in decoder.layers
        ]

    def __call__(self, batch: MicroBatch) -> torch.Tensor:
        """The last hidden state [T, hidden] of every token."""
        hidden = self._embed(batch.tokens)
        cos, sin = self._rotary(hidden[None], batch.positions[None])
        for layer in self._layers:
            hidden = layer(hidden, (cos[0], sin[0]))
        fused = self._context.kernels.fused_elementwise
        normed: torch.Tensor = rms_norm_residual(hidden, self._norm.weight, self._norm.eps, fused)[0]
        return normed

    def checkpoint_activations(self) -> None:
        """Keep only the layers' inputs in the forward and compute the rest again in the backward (arXiv 1604.06174)."""
        self._layers = [
            partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False) for layer in self._layers
        ]


def llama_decoder(model: Any, context: ForwardContext) -> LlamaDecoder | None:
    """The decoder of a packed `model`, None if the model computes something else; `model` stays as it is.

    First with PyTorch's own operations, where shapes that do not match raise an error and mean another architecture. Only then with
    the chosen kernels, whose errors are real errors.
    """
    if not _has_the_parts(model):
        return None
    ours = LlamaDecoder(model, context)
    # Two sequences, of 5 and 7 tokens: a decoder that mixes them up is found out too.
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (PROBE_TOKENS,), generator=random).int().numpy()
    device = model.get_input_embeddings().weight.device
    batch = MicroBatch(
        [TokenSequence(0, 0, tokens[:5], tokens[:5]), TokenSequence(0, 1, tokens[5:], tokens[5:])], 1, device
    )
    chosen = context.kernels
    # Attention stays as chosen, since transformers' decoder uses it too.
    eager = replace(EAGER, flash_varlen=chosen.flash_varlen)
    context.set(batch, None)
    with torch.no_grad():
        theirs = model.base_model(batch.tokens[None], position_ids=batch.positions[None], use_cache=False)[0][0]
        context.kernels = eager
        try:
            is_llama = _is_close(ours(batch), theirs)
        # Shapes that do not match, as with rotations of a part of each head.
        except RuntimeError:
            return None
        finally:
            context.kernels = chosen
        if is_llama and chosen != eager:
            is_llama = _is_close(ours(batch), theirs)
    return ours if is_llama else None


def _is_close(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two decoders computed the same hidden states [T, hidden], but for rounding."""
    difference = (mine - theirs).norm() / theirs.norm()
    return float(difference) < PROBE_TOLERANCE.get(theirs.dtype, HALF_TOLERANCE)


def _has_the_parts(model: Any) -> bool:
    """Whether the model's modules have the names and kinds that `DecoderLayer` needs."""
    decoder = model.base_model
    if not all(hasattr(decoder, name) for name in ("embed_tokens", "rotary_emb", "norm", "layers")):
        return False
    return hasattr(decoder.norm, "eps") and all(_is_llama_layer(layer) for layer in decoder.layers)


def _is_llama_layer(layer: nn.Module) -> bool:
    """Whether a layer has Llama's projections, two norms and what attention needs to know."""
    attention = getattr(layer, "self_attn", None)
    mlp = getattr(layer, "mlp", None)
    norms = [getattr(layer, name, None) for name in ("input_layernorm", "post_attention_layernorm")]
    return (
        all(isinstance(getattr(attention, name, None), PackedLinear) for name in ATTENTION_PARTS)
        and all(isinstance(getattr(mlp, name, None), PackedLinear) for name in MLP_PARTS)
        and all(hasattr(norm, "eps") for norm in norms)
        and hasattr(attention, "head_dim")
        and hasattr(attention, "scaling")
    )
