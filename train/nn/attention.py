"""Causal attention over flat packs: each sequence attends to itself alone.

Three implementations, by `Kernels` and the size of the heads:

    _TritonAttention  kernels of our own (`train.nn.triton.attention`), from sm_80 on; takes flat tokens and where sequences start
    _FlashVarlen      PyTorch's FlashAttention-2, from sm_80 on; takes the same
    _attend_padded    everywhere: q, k and v are padded to [S, heads, L, dim]. Real tokens precede the fillers, so causality alone
                      hides them and no mask is needed

`ATTENTION` is the name in transformers' registry, so every decoder that supports the attention interface runs on flat tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from train.data.micro_batch import MicroBatch
from train.nn.forward_context import ForwardContext
from train.nn.padding import pad, unpad

ATTENTION = "lorapack"
# Autograd nodes whose backward adds up in any order unless told otherwise; see `_make_backward_deterministic`.
SPLIT_KEY_BACKWARDS = {"ScaledDotProductEfficientAttentionBackward0"}
# Features of a head that `train.nn.triton.attention` takes.
TRITON_HEAD_DIMS = (32, 64, 128)
# FlashAttention's blocks: a larger bound only starts blocks that end at once.
LONGEST_MULTIPLE = 128


class _FlashVarlen(torch.autograd.Function):
    """FlashAttention-2 (arXiv 2307.08691) on flat q [T, H, D] and k, v [T, K, D].

    These are the operators behind `torch.nn.attention.varlen`, called here because the backward has to add up in a fixed order for
    a resumed run to repeat the same bits.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int, scale: float
    ) -> torch.Tensor:
        out, log_sums, random, unused, _ = torch.ops.aten._flash_attention_forward(
            # Bounds and longest sequence of queries, then of keys; no dropout, causal, no debug mask.
            q, k, v, starts, starts, longest, longest, 0.0, True, False, scale=scale,
        )  # fmt: skip
        # log_sums [H, T] let the backward compute the softmax again, block by block; the random state is for a dropout that is off.
        ctx.save_for_backward(q, k, v, out, log_sums, starts, random, unused)
        ctx.longest = longest
        ctx.scale = scale
        attended: torch.Tensor = out
        return attended

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, log_sums, starts, random, unused = ctx.saved_tensors
        with deterministic_algorithms():
            q_grad, k_grad, v_grad = torch.ops.aten._flash_attention_backward(
                gradients[0].contiguous(), q, k, v, out, log_sums, starts, starts, ctx.longest, ctx.longest, 0.0, True,
                random, unused, scale=ctx.scale,
            )  # fmt: skip
        return q_grad, k_grad, v_grad, None, None, None


class _TritonAttention(torch.autograd.Function):
    """`train.nn.triton.attention` on flat q [T, H, D] and k, v [T, K, D]."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int, scale: float
    ) -> torch.Tensor:
        # Here, since Triton is not installed everywhere.
        from train.nn.triton import attention

        out, log_sums = attention.forward(q, k, v, starts, longest, scale)
        ctx.save_for_backward(q, k, v, out, log_sums, starts)
        ctx.longest = longest
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from train.nn.triton import attention

        q, k, v, out, log_sums, starts = ctx.saved_tensors
        q_grad, k_grad, v_grad = attention.backward(
            gradients[0], q, k, v, out, log_sums, starts, ctx.longest, ctx.scale
        )
        return q_grad, k_grad, v_grad, None, None, None


class deterministic_algorithms:  # noqa: N801 - used as a statement
    """Let PyTorch choose deterministic kernels within this block, and restore its settings afterwards.

    With `warn_only`, PyTorch's FlashAttention would still add up in any order, so it is off. PyTorch would also fill fresh memory,
    which no result needs since the kernels write all of it, so that is off too.
    """

    def __enter__(self) -> None:
        self._enabled = torch.are_deterministic_algorithms_enabled()
        self._warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        self._fill = torch._C._get_deterministic_fill_uninitialized_memory()
        torch._C._set_deterministic_algorithms(True, warn_only=False)
        torch._C._set_deterministic_fill_uninitialized_memory(False)

    def __exit__(self, *_exc: object) -> None:
        torch._C._set_deterministic_algorithms(self._enabled, warn_only=self._warn_only)
        torch._C._set_deterministic_fill_uninitialized_memory(self._fill)


def _make_backward_deterministic(attended: torch.Tensor) -> None:
    """Let the backward of the memory-efficient kernel, which a T4 uses, add up in a fixed order: it splits the keys of few heads.

    Other kernels are left alone. They have a fixed order, or, like a plain product on GPUs, would ask cuBLAS for settings of the
    whole process.
    """
    node = attended.grad_fn
    if node is None or node.name() not in SPLIT_KEY_BACKWARDS:
        return
    # The hooks run around this node's backward alone, so the setting does not reach what comes before or after it.
    setting = deterministic_algorithms()
    node.register_prehook(lambda _gradients: setting.__enter__())
    node.register_hook(lambda _input_grads, _gradients: setting.__exit__())


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: ForwardContext, scale: float) -> torch.Tensor:
    """Attention of flat tokens, each within its own sequence.

    Args:
        q: [T, heads, dim]; `k` and `v` [T, key-value heads, dim].
        context: the micro-batch of these tokens, and the cache that may hold earlier tokens of their sequences.
        scale: the factor of the products of q and k.

    Returns:
        [T, heads, dim].
    """
    batch = context.batch
    cache = context.cache
    # A generation's first pass fills the cache and attends as usual; later passes bring one token per sequence.
    if cache is not None and cache.is_filled:
        return cache.attend(q, k, v, scale)
    if cache is not None:
        cache.fill(k, v, batch.attention)
    if context.kernels.flash_varlen:
        # Rounded up, 130 to 256, so that few launch sizes occur.
        longest = -(-batch.longest // LONGEST_MULTIPLE) * LONGEST_MULTIPLE
        use_triton = context.kernels.triton_attention and q.shape[-1] == v.shape[-1] in TRITON_HEAD_DIMS
        attention = _TritonAttention if use_triton else _FlashVarlen
        out: torch.Tensor = attention.apply(q, k, v, batch.sequence_starts, longest, scale)
        return out
    return _attend_padded(q, k, v, batch, scale)


def _attend_padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: MicroBatch, scale: float) -> torch.Tensor:
    """`attend` by padded sequences."""
    # [T, heads, dim] -> [S, L, heads, dim] -> [S, heads, L, dim], as PyTorch's attention takes it.
    dtype = q.dtype
    q, k, v = (pad(x, batch.attention).transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu":
        # In half precision PyTorch's CPU kernel takes three times as long as in float32 (measured with 2.13 and AVX512-BF16).
        q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    _make_backward_deterministic(out)
    out = out.to(dtype)
    return unpad(out.transpose(1, 2), batch.attention, batch.total)


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
        module: the decoder's attention module; `forward_context` was attached to it by `train.nn.packed_model`.
        query: [1, heads, T, dim]; `key` and `value` [1, key-value heads, T, dim].

    Returns:
        [1, T, heads, dim], and None for the weights.
    """
    context: ForwardContext = module.forward_context  # type: ignore[assignment]  # attached by train.nn.packed_model
    # Transformers' batch has one row, the flat tokens: [1, heads, T, dim] -> [T, heads, dim].
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(q, k, v, context, scale).unsqueeze(0), None


AttentionInterface.register(ATTENTION, packed_attention)
