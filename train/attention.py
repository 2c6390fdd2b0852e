"""Causal attention over flat packs: q, k and v alone are scattered to right-padded sequences.

Registered with transformers under the name `ATTENTION`, so every decoder that supports its attention interface runs on flat
tokens unchanged. Real tokens precede the fillers, so causality alone hides them and no mask is needed: the same call serves T4,
CPU and H200.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from train.batches import CurrentBatch, Padding

ATTENTION = "lorapack"


class _Pad(torch.autograd.Function):
    """[T, H, D] -> [S, L, H, D]. Both directions are plain gathers: no atomics, so the same bits every time."""

    @staticmethod
    def forward(ctx: Any, flat: torch.Tensor, padding: Padding) -> torch.Tensor:
        ctx.padding, ctx.total = padding, flat.shape[0]
        return padding.pad(flat)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.padding.unpad(gradients[0], ctx.total), None


class _Unpad(torch.autograd.Function):
    """[S, L, H, D] -> [T, H, D]."""

    @staticmethod
    def forward(ctx: Any, padded: torch.Tensor, padding: Padding, total: int) -> torch.Tensor:
        ctx.padding = padding
        return padding.unpad(padded, total)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.padding.pad_with_zeros(gradients[0]), None, None


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - transformers' signature; causality needs no mask
    scaling: float | None = None,
    **_others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of flat tokens, each within its own sequence.

    Args:
        module: the decoder's attention module; `current_batch` was attached to it by `train.base`.
        query: [1, heads, T, dim]; `key` and `value` [1, key-value heads, T, dim].

    Returns:
        [1, T, heads, dim], and None for the weights.
    """
    current: CurrentBatch = module.current_batch  # type: ignore[assignment]  # attached by train.base
    batch = current.require()
    q, k, v = (_Pad.apply(x[0].transpose(0, 1), batch.attention).transpose(1, 2) for x in (query, key, value))
    if q.device.type == "cpu":
        # In half precision torch's CPU kernel takes three times as long as in float32 (measured with 2.13 and AVX512-BF16).
        q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped).to(query.dtype)
    return _Unpad.apply(out.transpose(1, 2), batch.attention, batch.total).unsqueeze(0), None


AttentionInterface.register(ATTENTION, packed_attention)
