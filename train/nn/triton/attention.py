"""Causal attention of flat sequences in a fixed order, forward and backward.

Torch's FlashAttention-2 is made for long sequences, and where its backward has to add up in a fixed order it takes the keys of a
sequence one after another. These kernels follow the same paper (arXiv 2307.08691) with blocks of 64, of which an instruction and its
answer have two or three, and a program for every block in the backward too: each block of queries adds up its own gradient, each block
of keys theirs. Beside it on an H200 (tests/bench/README.md) they take 0.62 of its time for sequences of 130 tokens, 0.65 for one of
4,096. Blocks begin where their sequence begins.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

# Of queries and keys that a program takes at once, as measured best on an H200 and as small GPUs have the memory for.
FORWARD = {"BLOCK": 64, "num_warps": 4, "num_stages": 3}
QUERIES = {"BLOCK": 64, "num_warps": 4, "num_stages": 2}
KEYS = {"BLOCK": 64, "num_warps": 4, "num_stages": 2}
LOG2_E = 1 / math.log(2)  # exponentials are powers of two: one instruction


@triton.jit
def _own_block(starts, BLOCK: tl.constexpr):
    """Where this program's sequence begins, where its own block would, and where the sequence ends."""
    start, end = tl.load(starts + tl.program_id(1)), tl.load(starts + tl.program_id(1) + 1)
    return start, start + tl.program_id(0) * BLOCK, end


@triton.jit
def _rows(pointer, tokens, end, row, head_start, DIM: tl.constexpr):
    """Features [BLOCK, DIM] of a head for flat `tokens`, zeros from `end` on."""
    features = tl.arange(0, DIM)
    return tl.load(
        pointer + tokens.to(tl.int64)[:, None] * row + head_start + features[None, :],
        mask=(tokens < end)[:, None], other=0.0,
    )  # fmt: skip


@triton.jit
def _keep_rows(pointer, values, tokens, end, row, head_start, DIM: tl.constexpr):
    """Write what `_rows` reads."""
    features = tl.arange(0, DIM)
    tl.store(
        pointer + tokens.to(tl.int64)[:, None] * row + head_start + features[None, :],
        values.to(pointer.dtype.element_ty), mask=(tokens < end)[:, None],
    )  # fmt: skip


@triton.jit(do_not_specialize=["total"])
def _forward(
    q, k, v, out, log_sums, starts, total, q_row, k_row, v_row, out_row, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [T, H, DIM] and log_sums [H, T], to the base of two, of one block of queries of one head."""
    start, first, end = _own_block(starts, BLOCK)
    if first >= end:
        return
    head = tl.program_id(2)
    of_keys = head // GROUP * DIM
    queries = first + tl.arange(0, BLOCK)
    of_queries = _rows(q, queries, end, q_row, head * DIM, DIM)
    largest = tl.full((BLOCK,), -float("inf"), tl.float32)
    norm = tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((BLOCK, DIM), tl.float32)
    for at in range(start, first + BLOCK, BLOCK):
        keys = at + tl.arange(0, BLOCK)
        scores = tl.dot(of_queries, tl.trans(_rows(k, keys, end, k_row, of_keys, DIM))) * scale
        scores = tl.where(keys[None, :] <= queries[:, None], scores, -float("inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - larger[:, None])
        shrink = tl.exp2(largest - larger)
        norm = norm * shrink + tl.sum(weights, 1)
        values = _rows(v, keys, end, v_row, of_keys, DIM)
        sums = tl.dot(weights.to(values.dtype), values, sums * shrink[:, None])
        largest = larger
    _keep_rows(out, sums / norm[:, None], queries, end, out_row, head * DIM, DIM)
    tl.store(log_sums + head.to(tl.int64) * total + queries, largest + tl.log2(norm), mask=queries < end)


@triton.jit(do_not_specialize=["total"])
def _backward_queries(
    q, k, v, out, gradient, of_q, log_sums, products, starts, total,
    q_row, k_row, v_row, out_row, gradient_row, of_q_row, scale, factor,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of queries; `products` [H, T] of the output and its gradient are kept for the keys."""
    start, first, end = _own_block(starts, BLOCK)
    if first >= end:
        return
    head = tl.program_id(2)
    of_keys = head // GROUP * DIM
    queries = first + tl.arange(0, BLOCK)
    of_queries = _rows(q, queries, end, q_row, head * DIM, DIM)
    of_out = _rows(gradient, queries, end, gradient_row, head * DIM, DIM)
    product = tl.sum(_rows(out, queries, end, out_row, head * DIM, DIM).to(tl.float32) * of_out.to(tl.float32), 1)
    place = head.to(tl.int64) * total + queries
    tl.store(products + place, product, mask=queries < end)
    log_sum = tl.load(log_sums + place, mask=queries < end, other=0.0)
    found = tl.zeros((BLOCK, DIM), tl.float32)
    for at in range(start, first + BLOCK, BLOCK):
        keys = at + tl.arange(0, BLOCK)
        key = _rows(k, keys, end, k_row, of_keys, DIM)
        scores = tl.dot(of_queries, tl.trans(key)) * scale
        weights = tl.where(keys[None, :] <= queries[:, None], tl.exp2(scores - log_sum[:, None]), 0.0)
        of_weights = tl.dot(of_out, tl.trans(_rows(v, keys, end, v_row, of_keys, DIM)))
        of_scores = weights * (of_weights - product[:, None])
        found = tl.dot(of_scores.to(key.dtype), key, found)
    _keep_rows(of_q, found * factor, queries, end, of_q_row, head * DIM, DIM)


@triton.jit(do_not_specialize=["total"])
def _backward_keys(
    q, k, v, gradient, of_k, of_v, log_sums, products, starts, total,
    q_row, k_row, v_row, gradient_row, of_k_row, of_v_row, scale, factor,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of one block of keys and values of one key-value head, from all queries of its group of heads."""
    _start, first, end = _own_block(starts, BLOCK)
    if first >= end:
        return
    own = tl.program_id(2)
    keys = first + tl.arange(0, BLOCK)
    key = _rows(k, keys, end, k_row, own * DIM, DIM)
    value = _rows(v, keys, end, v_row, own * DIM, DIM)
    key_sums = tl.zeros((BLOCK, DIM), tl.float32)
    value_sums = tl.zeros((BLOCK, DIM), tl.float32)
    for member in range(GROUP):
        head = own * GROUP + member
        for at in range(first, end, BLOCK):
            queries = at + tl.arange(0, BLOCK)
            place = head.to(tl.int64) * total + queries
            of_queries = _rows(q, queries, end, q_row, head * DIM, DIM)
            log_sum = tl.load(log_sums + place, mask=queries < end, other=0.0)
            scores = tl.dot(key, tl.trans(of_queries)) * scale
            is_seen = (keys[:, None] <= queries[None, :]) & (queries < end)[None, :]
            weights = tl.where(is_seen, tl.exp2(scores - log_sum[None, :]), 0.0)
            of_out = _rows(gradient, queries, end, gradient_row, head * DIM, DIM)
            value_sums = tl.dot(weights.to(of_out.dtype), of_out, value_sums)
            product = tl.load(products + place, mask=queries < end, other=0.0)
            of_weights = tl.dot(value, tl.trans(of_out))
            of_scores = weights * (of_weights - product[None, :])
            key_sums = tl.dot(of_scores.to(of_queries.dtype), of_queries, key_sums)
    _keep_rows(of_k, key_sums * factor, keys, end, of_k_row, own * DIM, DIM)
    _keep_rows(of_v, value_sums, keys, end, of_v_row, own * DIM, DIM)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q [T, H, D] to k and v [T, K, D] of the same sequence, no later than itself.

    Args:
        starts: [S + 1] int32, where each sequence begins; the last is T.
        longest: no sequence has more tokens.
        scale: of the products of q and k.

    Returns:
        [T, H, D] in q's dtype, and log2 of the sums of exponentials [H, T] in float32.
    """
    q, k, v = (_with_whole_heads(x) for x in (q, k, v))
    total, heads, dim = q.shape
    out, log_sums = torch.empty_like(q), q.new_empty(heads, total, dtype=torch.float32)
    _forward[_grid(longest, starts, heads, FORWARD)](
        q, k, v, out, log_sums, starts, total, q.stride(0), k.stride(0), v.stride(0), out.stride(0), scale * LOG2_E,
        GROUP=heads // k.shape[1], DIM=dim, **FORWARD,
    )  # fmt: skip
    return out, log_sums


def backward(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    log_sums: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v from that of `out` [T, H, D]; see `forward`."""
    gradient, q, k, v = (_with_whole_heads(x) for x in (gradient, q, k, v))
    total, heads, dim = q.shape
    of_q, of_k, of_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    products = torch.empty_like(log_sums)
    group = heads // k.shape[1]
    _backward_queries[_grid(longest, starts, heads, QUERIES)](
        q, k, v, out, gradient, of_q, log_sums, products, starts, total,
        q.stride(0), k.stride(0), v.stride(0), out.stride(0), gradient.stride(0), of_q.stride(0), scale * LOG2_E, scale,
        GROUP=group, DIM=dim, **QUERIES,
    )  # fmt: skip
    _backward_keys[_grid(longest, starts, k.shape[1], KEYS)](
        q, k, v, gradient, of_k, of_v, log_sums, products, starts, total,
        q.stride(0), k.stride(0), v.stride(0), gradient.stride(0), of_k.stride(0), of_v.stride(0), scale * LOG2_E, scale,
        GROUP=group, DIM=dim, **KEYS,
    )  # fmt: skip
    return of_q, of_k, of_v


def _grid(longest: int, starts: torch.Tensor, heads: int, launch: dict[str, int]) -> tuple[int, int, int]:
    """A program for every block that the longest sequence could have, of every sequence and head."""
    return triton.cdiv(longest, launch["BLOCK"]), len(starts) - 1, heads


def _with_whole_heads(x: torch.Tensor) -> torch.Tensor:
    """A tensor [T, heads, dim] whose heads lie in one piece, one after another; rows may be apart."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
