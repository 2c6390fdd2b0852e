"""Causal attention over flat packs: each sequence attends to itself alone.

Four implementations, by `Kernels` and the size of the heads:

    varlen.Triton     kernels of our own (`train.nn.triton.attention`), from sm_80 on; takes flat tokens and where sequences start
    varlen.Flash      PyTorch's FlashAttention-2, from sm_80 on; takes the same
    varlen.Efficient  PyTorch's memory-efficient kernel, on every GPU; takes the same, but no windows
    _attend_padded    everywhere: q, k and v are padded to [S, heads, L, dim]. Real tokens precede the fillers, so causality alone
                      hides them and no mask is needed for them

`ATTENTION` is the name in transformers' registry, so every decoder that supports the attention interface runs on flat tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from train.data.micro_batch import MicroBatch
from train.nn.forward_context import ForwardContext
from train.nn.functional import masked_attention
from train.nn.heads import CosSin, HeadTransform, heads_autograd
from train.nn.padding import pad, unpad
from train.nn.varlen import (
    Efficient,
    Flash,
    Preparation,
    Scores,
    Triton,
    VarlenKernel,
    WithSinks,
    attend_varlen,
    attend_varlen_raw,
    deterministic_algorithms,
    split_heads,
)

ATTENTION = "lorapack"
# Autograd nodes whose backward adds up in any order unless told otherwise; see `make_backward_deterministic`.
UNORDERED_BACKWARDS = {"ScaledDotProductEfficientAttentionBackward0", "ScaledDotProductFlashAttentionBackward0"}
# Features of a head that `train.nn.triton.attention` takes, of queries as of values, and the most that FlashAttention takes.
TRITON_HEAD_DIMS = range(32, 513)
FLASH_HEAD_DIM = 256
# What the memory-efficient kernel reads at once, as 16 bytes.
EFFICIENT_MULTIPLE = 8
# FlashAttention's blocks: a larger bound only starts blocks that end at once.
LONGEST_MULTIPLE = 128


def make_backward_deterministic(attended: torch.Tensor) -> None:
    """Let the backward of PyTorch's fused attention add up in a fixed order.

    The memory-efficient kernel, which a T4 uses, splits the keys of few heads; FlashAttention adds to a query's gradient as keys come.

    Other kernels are left alone. They have a fixed order, or, like a plain product on GPUs, would ask cuBLAS for settings of the
    whole process.
    """
    node = attended.grad_fn
    if node is None or node.name() not in UNORDERED_BACKWARDS:
        return
    # The hooks run around this node's backward alone, so the setting does not reach what comes before or after it.
    setting = deterministic_algorithms()
    node.register_prehook(lambda _gradients: setting.__enter__())
    node.register_hook(lambda _input_grads, _gradients: setting.__exit__())


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    context: ForwardContext,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of flat tokens, each within its own sequence.

    Args:
        q: [T, heads, dim]; `k` [T, key-value heads, dim] and `v` [T, key-value heads, its own dim].
        context: the micro-batch of these tokens, and the cache that may hold earlier tokens of their sequences.
        scale: the factor of the products of q and k.
        window: the token at position i sees positions j with i - window < j <= i; None for all up to i.
        softcap: scores s become softcap * tanh(s / softcap) before the softmax; None for s itself.
        sinks: [heads] a score more in each token's softmax, without a value (GPT-OSS); None for none.

    Returns:
        [T, heads, dim of v].
    """
    batch = context.batch
    cache = context.cache
    # A generation's first pass fills the cache and attends as usual; later passes bring one token per sequence.
    if cache is not None and cache.is_filled:
        return cache.attend(q, k, v, scale, window, softcap, sinks)
    if cache is not None:
        cache.fill(k, v, batch.attention)
    kernel = _varlen_kernel(context, q, v, window, softcap, sinks)
    if kernel is None:
        return _attend_padded(q, k, v, batch, scale, window, softcap, sinks)
    if sinks is not None:
        kernel = WithSinks(kernel, sinks)
    return attend_varlen(q, k, v, kernel, _scores(batch, scale, window, softcap))


def attend_heads(
    raw: tuple[torch.Tensor, ...],
    heads: tuple[int, int],
    transforms: tuple[HeadTransform, HeadTransform],
    cos_sin: CosSin | None,
    context: ForwardContext,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """`attend` of projections whose heads are still to be normed and rotated; no more is kept than for Llama's.

    Args:
        raw: q [T, H, D], k and v [T, K, D]; or one [T, H + 2 K, D], the output of one matrix.
        heads: H and K.
        transforms: of q and of k.
        cos_sin: cos and sin [T, R] that rotate the first R features of q's and k's heads; None for no rotation.
        context, scale, window, softcap, sinks: as `attend` takes them.

    Returns:
        [T, H, D].
    """
    fused = context.kernels.fused_elementwise
    q, k, v = split_heads(raw, heads)
    kernel = None if context.cache is not None else _varlen_kernel(context, q, v, window, softcap, sinks)
    # A norm needs what came into it again, and a part of one output stays in memory with the whole of it: then q and k are kept as
    # they came. Else only what comes out of the rotation is kept.
    if kernel is not None and (len(raw) == 1 or any(transform.norm is not None for transform in transforms)):
        if sinks is not None:
            kernel = WithSinks(kernel, sinks)
        preparation = Preparation(*transforms, cos_sin, fused)
        return attend_varlen_raw(raw, heads, preparation, kernel, _scores(context.batch, scale, window, softcap))
    q, k = (heads_autograd(x, cos_sin, transform, fused) for x, transform in zip((q, k), transforms, strict=True))
    return attend(q, k, v, context, scale, window, softcap, sinks)


def _varlen_kernel(
    context: ForwardContext,
    q: torch.Tensor,
    v: torch.Tensor,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> VarlenKernel | None:
    """The kernel for flat sequences that takes heads like these; None if none does."""
    kernels = context.kernels
    dims = q.shape[-1], v.shape[-1]
    if kernels.flash_varlen:
        if kernels.triton_attention and all(dim in TRITON_HEAD_DIMS for dim in dims):
            return Triton()
        if dims[0] == dims[1] <= FLASH_HEAD_DIM and dims[0] % 8 == 0 and softcap is None:
            return Flash()
    sees_all = window is None or window >= context.batch.longest
    is_plain = sees_all and softcap is None and sinks is None
    takes_dims = all(dim % EFFICIENT_MULTIPLE == 0 for dim in dims)
    return Efficient() if kernels.efficient_varlen and is_plain and takes_dims else None


def _scores(batch: MicroBatch, scale: float, window: int | None, softcap: float | None) -> Scores:
    # Rounded up, 130 to 256, so that few launch sizes occur.
    longest = -(-batch.longest // LONGEST_MULTIPLE) * LONGEST_MULTIPLE
    # A window that no sequence reaches beyond costs nothing, and leaves the bits as without one.
    window = None if window is None or window >= batch.longest else window
    return Scores(batch.sequence_starts, longest, scale, window, softcap)


def _attend_padded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: MicroBatch,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`attend` by padded sequences."""
    # [T, heads, dim] -> [S, L, heads, dim] -> [S, heads, L, dim], as PyTorch's attention takes it.
    dtype = q.dtype
    q, k, v = (pad(x, batch.attention).transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu":
        # In half precision PyTorch's CPU kernel takes three times as long as in float32 (measured with 2.13 and AVX512-BF16).
        q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    elif softcap is None and sinks is None:
        # Where FlashAttention cannot run, as on a T4, grouped heads would leave only the kernel that writes all scores to memory.
        k, v = (_repeated(x, q.shape[1]) for x in (k, v))
    if softcap is not None or sinks is not None or (window is not None and window < q.shape[2]):
        out = masked_attention(q, k, v, _seen(q.shape[2], window, q.device), scale, softcap, sinks)
    else:
        grouped = q.shape[1] != k.shape[1]
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    make_backward_deterministic(out)
    out = out.to(dtype)
    return unpad(out.transpose(1, 2), batch.attention, batch.total)


def _repeated(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values [S, K, L, dim] again for each of the `heads` / K queries that share them: [S, heads, L, dim]."""
    of_keys = x.shape[1]
    return x if of_keys == heads else x.unsqueeze(2).expand(-1, -1, heads // of_keys, -1, -1).flatten(1, 2)


def _seen(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[L, L], whether the query of a row sees the key of a column: for 4 tokens and a window of 2, 1000 1100 0110 0011."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return seen if window is None else seen.triu(1 - window)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - transformers' signature; causality needs no mask
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_others: Any,
) -> tuple[torch.Tensor, None]:
    """`attend` as transformers calls it.

    Args:
        module: the decoder's attention module; `forward_context` was attached to it by `FlatDecoder`.
        query: [1, heads, T, dim]; `key` and `value` [1, key-value heads, T, dim].
        scaling, sliding_window, softcap, s_aux: `attend`'s scale, window, soft cap and sinks, for this layer.

    Returns:
        [1, T, heads, dim], and None for the weights.
    """
    context: ForwardContext = module.forward_context  # type: ignore[assignment]  # attached by FlatDecoder
    # Transformers' batch has one row, the flat tokens: [1, heads, T, dim] -> [T, heads, dim].
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Some models have their window in the mask alone, and some name one that their mask does not have.
    window = context.windows.get(module, sliding_window)
    return attend(q, k, v, context, scale, window, softcap, s_aux).unsqueeze(0), None


AttentionInterface.register(ATTENTION, packed_attention)
