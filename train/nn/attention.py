"""Causal attention over flat packs: each sequence attends to itself.

From sm_80 on kernels of our own, or FlashAttention, take flat sequences and their bounds. Everywhere else q, k and v alone are
scattered to right-padded sequences: real tokens precede the fillers, so causality alone hides them and no mask is needed.

`ATTENTION` is its name in transformers' registry, so every decoder that supports the attention interface runs on flat tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from train.data.micro_batch import MicroBatch, Padding
from train.nn.forward_context import ForwardContext

ATTENTION = "lorapack"
SPLITS_KEYS = {"ScaledDotProductEfficientAttentionBackward0"}
BLOCK_HEAD_DIMS = (32, 64, 128)  # features of a head that `train.nn.triton.attention` takes
LONGEST_MULTIPLE = 128  # FlashAttention's blocks: a larger bound only starts blocks that end at once


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


class _Varlen(torch.autograd.Function):
    """FlashAttention-2 (arXiv 2307.08691) on flat q [T, H, D] and k, v [T, K, D].

    The operators behind `torch.nn.attention.varlen`, called here because the backward has to be told to add up in a fixed order:
    a resumed run repeats the very same bits.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int, scale: float
    ) -> torch.Tensor:
        out, log_sums, random, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, starts, starts, longest, longest, 0.0, True, False, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, log_sums, starts, random, unused)
        ctx.longest, ctx.scale = longest, scale
        attended: torch.Tensor = out
        return attended

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, log_sums, starts, random, unused = ctx.saved_tensors
        with _fixed_order():
            of_q, of_k, of_v = torch.ops.aten._flash_attention_backward(
                gradients[0].contiguous(), q, k, v, out, log_sums, starts, starts, ctx.longest, ctx.longest, 0.0, True,
                random, unused, scale=ctx.scale,
            )  # fmt: skip
        return of_q, of_k, of_v, None, None, None


class _InBlocks(torch.autograd.Function):
    """`train.nn.triton.attention` on flat q [T, H, D] and k, v [T, K, D]."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int, scale: float
    ) -> torch.Tensor:
        from train.nn.triton import attention  # Triton is not everywhere

        out, log_sums = attention.forward(q, k, v, starts, longest, scale)
        ctx.save_for_backward(q, k, v, out, log_sums, starts)
        ctx.longest, ctx.scale = longest, scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from train.nn.triton import attention

        q, k, v, out, log_sums, starts = ctx.saved_tensors
        found = attention.backward(gradients[0], q, k, v, out, log_sums, starts, ctx.longest, ctx.scale)
        return *found, None, None, None


class _fixed_order:  # noqa: N801 - used as a statement
    """Let torch choose deterministic kernels in here.

    In earnest: told to warn only, torch's FlashAttention adds up in any order. Nor is fresh memory filled, which torch does besides
    and which no result needs: the kernels write all of it.
    """

    def __enter__(self) -> None:
        self._before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        self._filled = torch._C._get_deterministic_fill_uninitialized_memory()
        torch._C._set_deterministic_algorithms(True, warn_only=False)
        torch._C._set_deterministic_fill_uninitialized_memory(False)

    def __exit__(self, *_exc: object) -> None:
        torch._C._set_deterministic_algorithms(self._before[0], warn_only=self._before[1])
        torch._C._set_deterministic_fill_uninitialized_memory(self._filled)


def _go_back_in_fixed_order(attended: torch.Tensor) -> None:
    """Let the backward of the memory-efficient kernel, which a T4 takes, add up in a fixed order: it splits the keys of few heads.

    Other kernels are left alone: they have a fixed order, or, like a plain product on GPUs, ask cuBLAS for settings of the process.
    """
    node = attended.grad_fn
    if node is None or node.name() not in SPLITS_KEYS:
        return
    order = _fixed_order()
    node.register_prehook(lambda _gradients: order.__enter__())
    node.register_hook(lambda _of_inputs, _gradients: order.__exit__())


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, current: ForwardContext, scale: float) -> torch.Tensor:
    """Attention of flat tokens, each within its own sequence.

    Args:
        q: [T, heads, dim]; `k` and `v` [T, key-value heads, dim].
        current: the micro-batch that the tokens are, and what a cache holds of their sequences.
        scale: of the products of q and k.

    Returns:
        [T, heads, dim].
    """
    batch, cache = current.require(), current.cache
    if cache is not None and cache.is_filled:
        return cache.attend(q, k, v, scale)
    if cache is not None:
        cache.fill(k, v, batch.attention)
    if current.kernels.varlen:
        longest = -(-batch.longest // LONGEST_MULTIPLE) * LONGEST_MULTIPLE
        in_blocks = current.kernels.blocks and q.shape[-1] == v.shape[-1] in BLOCK_HEAD_DIMS
        attention = _InBlocks if in_blocks else _Varlen
        out: torch.Tensor = attention.apply(q, k, v, batch.sequence_starts, longest, scale)
        return out
    return _attend_padded(q, k, v, batch, scale)


def _attend_padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: MicroBatch, scale: float) -> torch.Tensor:
    """`attend` through padded sequences."""
    dtype = q.dtype
    q, k, v = (_Pad.apply(x, batch.attention).transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu":
        # In half precision torch's CPU kernel takes three times as long as in float32 (measured with 2.13 and AVX512-BF16).
        q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    _go_back_in_fixed_order(out)
    out = out.to(dtype)
    flat: torch.Tensor = _Unpad.apply(out.transpose(1, 2), batch.attention, batch.total)
    return flat


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - transformers' signature; causality needs no mask
    scaling: float | None = None,
    **_others: Any,
) -> tuple[torch.Tensor, None]:
    """`attend` as transformers calls it.

    Args:
        module: the decoder's attention module; `current_batch` was attached to it by `train.nn.packed_model`.
        query: [1, heads, T, dim]; `key` and `value` [1, key-value heads, T, dim].

    Returns:
        [1, T, heads, dim], and None for the weights.
    """
    current: ForwardContext = module.current_batch  # type: ignore[assignment]  # attached by train.nn.packed_model
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(q, k, v, current, scale).unsqueeze(0), None


AttentionInterface.register(ATTENTION, packed_attention)
