"""Causal attention of flat sequences, forward and backward, with sums in a fixed order: FlashAttention-2 (arXiv 2307.08691).

Forward, for one block of queries Q of one head. Over the blocks of keys K_j and values V_j of the same sequence, up to the queries
themselves, the softmax is computed without its normalizer, which is known only at the end:

    S     = scale * Q K_j^T                     -inf where a key comes after its query
    m'    = max(m, rowmax(S))                   running maximum, from -inf
    P     = exp(S - m')
    l'    = l * exp(m - m') + rowsum(P)         running sum, from 0; exp(m - m') rescales what was summed under the smaller maximum
    acc'  = acc * exp(m - m') + P V_j           from 0
    out   = acc / l,  log_sums = m + log(l)     at the end

For scores 1, 2 in the first block and 3 in the second: m = 2, l = exp(-1) + exp(0) = 1.37; then m' = 3, exp(m - m') = 0.37 and
l' = 1.37 * 0.37 + exp(0) = 1.50, which is exp(1 - 3) + exp(2 - 3) + exp(3 - 3).

Backward, with dO the gradient of the output (its section 3.1.2). P needs no second pass of the recurrence, since log_sums is known:

    P     = exp(S - log_sums)
    D     = rowsum(dO * out)                    `deltas`, one number per query
    dV    = P^T dO
    dP    = dO V^T
    dS    = P * (dP - D)
    dQ    = scale * dS K,   dK = scale * dS^T Q

A window bounds the blocks on both sides and masks within them: a query at position i sees keys j with i - window < j <= i. With a
soft cap c the scores become c * t with t = tanh(S / c), and dS is multiplied by the slope 1 - t^2. Heads whose features are no power of
two are padded with zeros in registers, which changes no product.

Exponentials are powers of two, one instruction: scores are multiplied by scale * log2(e), and log_sums is a logarithm to base two.

PyTorch's FlashAttention-2 is made for long sequences, and where its backward has to add up in a fixed order it takes the keys of a
sequence one after another. These kernels use blocks of 64, of which an instruction and its answer have two or three, and a program
for every block in the backward too: each block of queries sums its own gradient, each block of keys theirs. On an H200
(tests/bench/README.md) they take 0.62 of PyTorch's time for sequences of 130 tokens, 0.65 for one of 4,096.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

# By the padded features of a head: how many queries a program takes (BLOCK), and how many keys they meet at once (STEP); in the last
# kernel the keys are taken and meet queries. Those of 128 features and less are the fastest on an H200 among those that fit small GPUs.
# More features take smaller blocks, to fit the 99 KiB of shared memory of sm_86 and sm_120.
Launch = dict[str, int]
FORWARD: dict[int, Launch] = {
    128: {"BLOCK": 64, "STEP": 64, "num_warps": 4, "num_stages": 3},
    256: {"BLOCK": 32, "STEP": 32, "num_warps": 4, "num_stages": 2},
    512: {"BLOCK": 16, "STEP": 16, "num_warps": 8, "num_stages": 1},
}
QUERIES: dict[int, Launch] = {
    128: {"BLOCK": 64, "STEP": 64, "num_warps": 4, "num_stages": 2},
    256: {"BLOCK": 32, "STEP": 32, "num_warps": 4, "num_stages": 2},
    512: {"BLOCK": 16, "STEP": 16, "num_warps": 8, "num_stages": 1},
}
KEYS: dict[int, Launch] = {
    128: {"BLOCK": 64, "STEP": 64, "num_warps": 4, "num_stages": 2},
    256: {"BLOCK": 32, "STEP": 32, "num_warps": 8, "num_stages": 2},
    512: {"BLOCK": 16, "STEP": 16, "num_warps": 8, "num_stages": 1},
}
LOG2_E = 1 / math.log(2)


@triton.jit
def _own_block(starts, BLOCK: tl.constexpr):
    """Where this program's sequence starts, where its own block would, and where the sequence ends.

    Blocks are counted from the start of their sequence, so other sequences change no bit. Sequences of 4, 2 and 3 tokens have starts
    0 4 6 9: program 0 of sequence 1 gets (4, 4, 6), and program 1, which has nothing to do, (4, 68, 6).
    """
    start = tl.load(starts + tl.program_id(1))
    end = tl.load(starts + tl.program_id(1) + 1)
    return start, start + tl.program_id(0) * BLOCK, end


@triton.jit
def _load_rows(pointer, tokens, end, row, head_start, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Features [BLOCK, WIDTH] of a head for flat `tokens`, zeros from `end` and DIM on; `row` is the stride between tokens."""
    features = tl.arange(0, WIDTH)
    is_real = (tokens < end)[:, None]
    if DIM != WIDTH:
        is_real = is_real & (features < DIM)[None, :]
    # 64 bits: token * row exceeds 32 bits from 2^31 numbers on, which 2^19 tokens of 4,096 features are.
    return tl.load(
        pointer + tokens.to(tl.int64)[:, None] * row + head_start + features[None, :], mask=is_real, other=0.0
    )


@triton.jit
def _store_rows(pointer, values, tokens, end, row, head_start, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Write what `_load_rows` reads."""
    features = tl.arange(0, WIDTH)
    is_real = (tokens < end)[:, None]
    if DIM != WIDTH:
        is_real = is_real & (features < DIM)[None, :]
    tl.store(
        pointer + tokens.to(tl.int64)[:, None] * row + head_start + features[None, :],
        values.to(pointer.dtype.element_ty), mask=is_real,
    )  # fmt: skip


@triton.jit
def _capped(products, scale, cap):
    """The scores of `products`, to base two, and tanh(S / c) where there is a soft cap; see `_scales`."""
    scores = products * scale
    tanh = scores
    if cap is not None:
        # tanh(x) = 2 sigmoid(2 x) - 1.
        tanh = 2 * tl.sigmoid(2 * scores) - 1
        scores = tanh * cap
    return scores, tanh


@triton.jit
def _is_seen(queries, keys, window):
    """Whether a query sees a key; both broadcast to the block of scores."""
    seen = keys <= queries
    if window is not None:
        seen = seen & (keys > queries - window)
    return seen


@triton.jit
def _first_keys(start, first, window, STEP: tl.constexpr):
    """The start of the first block with a key that a query from `first` on sees.

    A sequence that starts at 10, queries from 138 on, steps of 64 and a window of 70: key 69 is the first, in the block 10 to 73.
    """
    first_keys = start
    if window is not None:
        first_keys += tl.maximum(first - start - window + 1, 0) // STEP * STEP
    return first_keys


@triton.jit(do_not_specialize=["total"])
def _forward(
    q, k, v, out, log_sums, starts, total, q_row, k_row, v_row, out_row, scale, cap, window,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, V_DIM: tl.constexpr, V_WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """out [T, H, V_DIM] and log_sums [H, T], to base two, of one block of queries of one head."""
    start, first, end = _own_block(starts, BLOCK)
    if first >= end:
        return
    head = tl.program_id(2)
    # Grouped-query attention: GROUP heads in a row share one key-value head.
    kv_head = head // GROUP
    queries = first + tl.arange(0, BLOCK)
    q_block = _load_rows(q, queries, end, q_row, head * DIM, DIM, WIDTH)
    running_max = tl.full((BLOCK,), -float("inf"), tl.float32)
    running_sum = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, V_WIDTH), tl.float32)
    # Up to the queries' own block, the last one with keys that any of them sees.
    for at in range(_first_keys(start, first, window, STEP), first + BLOCK, STEP):
        keys = at + tl.arange(0, STEP)
        products = tl.dot(q_block, tl.trans(_load_rows(k, keys, end, k_row, kv_head * DIM, DIM, WIDTH)))
        scores, _tanh = _capped(products, scale, cap)
        # Without a window the first block holds key `start`, which all queries see, so no running maximum stays -inf.
        scores = tl.where(_is_seen(queries[:, None], keys[None, :], window), scores, -float("inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        if window is not None:
            # The last queries of a block may see no key of the first one, and -inf - -inf is NaN. A finite maximum below all scores
            # leaves their sums at zero.
            new_max = tl.maximum(new_max, -1e30)
        p = tl.exp2(scores - new_max[:, None])
        rescale = tl.exp2(running_max - new_max)
        running_sum = running_sum * rescale + tl.sum(p, 1)
        # P is rounded to v's dtype for the matrix unit; the sum stays in float32.
        v_block = _load_rows(v, keys, end, v_row, kv_head * V_DIM, V_DIM, V_WIDTH)
        acc = tl.dot(p.to(v_block.dtype), v_block, acc * rescale[:, None])
        running_max = new_max
    _store_rows(out, acc / running_sum[:, None], queries, end, out_row, head * V_DIM, V_DIM, V_WIDTH)
    # Plus the logarithm of the sum, so that the backward gets P = exp2(S - log_sums) in one step.
    tl.store(log_sums + head.to(tl.int64) * total + queries, running_max + tl.log2(running_sum), mask=queries < end)


@triton.jit(do_not_specialize=["total"])
def _backward_queries(
    q, k, v, out, gradient, q_grad, log_sums, deltas, starts, total,
    q_row, k_row, v_row, out_row, gradient_row, q_grad_row, scale, cap, window, factor,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, V_DIM: tl.constexpr, V_WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """dQ of one block of queries of one head. `deltas` [H, T] are kept for `_backward_keys`, which runs after this kernel."""
    start, first, end = _own_block(starts, BLOCK)
    if first >= end:
        return
    head = tl.program_id(2)
    kv_head = head // GROUP
    queries = first + tl.arange(0, BLOCK)
    q_block = _load_rows(q, queries, end, q_row, head * DIM, DIM, WIDTH)
    out_grad = _load_rows(gradient, queries, end, gradient_row, head * V_DIM, V_DIM, V_WIDTH)
    # D = rowsum(dO * out), in float32 before the sum.
    out_block = _load_rows(out, queries, end, out_row, head * V_DIM, V_DIM, V_WIDTH)
    delta = tl.sum(out_block.to(tl.float32) * out_grad.to(tl.float32), 1)
    place = head.to(tl.int64) * total + queries
    tl.store(deltas + place, delta, mask=queries < end)
    log_sum = tl.load(log_sums + place, mask=queries < end, other=0.0)
    acc = tl.zeros((BLOCK, WIDTH), tl.float32)
    for at in range(_first_keys(start, first, window, STEP), first + BLOCK, STEP):
        keys = at + tl.arange(0, STEP)
        k_block = _load_rows(k, keys, end, k_row, kv_head * DIM, DIM, WIDTH)
        scores, tanh = _capped(tl.dot(q_block, tl.trans(k_block)), scale, cap)
        p = tl.where(_is_seen(queries[:, None], keys[None, :], window), tl.exp2(scores - log_sum[:, None]), 0.0)
        p_grad = tl.dot(out_grad, tl.trans(_load_rows(v, keys, end, v_row, kv_head * V_DIM, V_DIM, V_WIDTH)))
        # dS = P * (dP - D), then dQ += dS K.
        s_grad = p * (p_grad - delta[:, None])
        if cap is not None:
            s_grad *= 1 - tanh * tanh
        acc = tl.dot(s_grad.to(k_block.dtype), k_block, acc)
    # `factor` is the scale without log2(e), which belongs to the exponentials alone.
    _store_rows(q_grad, acc * factor, queries, end, q_grad_row, head * DIM, DIM, WIDTH)


@triton.jit(do_not_specialize=["total"])
def _backward_keys(
    q, k, v, gradient, k_grad, v_grad, log_sums, deltas, starts, total,
    q_row, k_row, v_row, gradient_row, k_grad_row, v_grad_row, scale, cap, window, factor,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, V_DIM: tl.constexpr, V_WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys and values of one key-value head, from all queries of its group of heads.

    All matrices of scores are transposed here: keys are rows, queries are columns.
    """
    _start, first, end = _own_block(starts, BLOCK)
    if first >= end:
        return
    kv_head = tl.program_id(2)
    keys = first + tl.arange(0, BLOCK)
    k_block = _load_rows(k, keys, end, k_row, kv_head * DIM, DIM, WIDTH)
    v_block = _load_rows(v, keys, end, v_row, kv_head * V_DIM, V_DIM, V_WIDTH)
    k_acc = tl.zeros((BLOCK, WIDTH), tl.float32)
    v_acc = tl.zeros((BLOCK, V_WIDTH), tl.float32)
    # The last query that sees a key of this block is window - 1 behind the block's last key.
    last = end
    if window is not None:
        last = tl.minimum(end, first + BLOCK + window - 1)
    # The heads of a group one after another, in one program: a fixed order of the sum, and no atomics.
    for member in range(GROUP):
        head = kv_head * GROUP + member
        # From the keys' own block on: earlier queries see none of these keys.
        for at in range(first, last, STEP):
            queries = at + tl.arange(0, STEP)
            place = head.to(tl.int64) * total + queries
            q_block = _load_rows(q, queries, end, q_row, head * DIM, DIM, WIDTH)
            log_sum = tl.load(log_sums + place, mask=queries < end, other=0.0)
            scores, tanh = _capped(tl.dot(k_block, tl.trans(q_block)), scale, cap)
            # Queries past the end have zeros for scores and log_sum, so P would be 1 without the second mask.
            is_seen = _is_seen(queries[None, :], keys[:, None], window) & (queries < end)[None, :]
            p = tl.where(is_seen, tl.exp2(scores - log_sum[None, :]), 0.0)
            out_grad = _load_rows(gradient, queries, end, gradient_row, head * V_DIM, V_DIM, V_WIDTH)
            v_acc = tl.dot(p.to(out_grad.dtype), out_grad, v_acc)
            delta = tl.load(deltas + place, mask=queries < end, other=0.0)
            p_grad = tl.dot(v_block, tl.trans(out_grad))
            # dS^T, then dK += dS^T Q.
            s_grad = p * (p_grad - delta[None, :])
            if cap is not None:
                s_grad *= 1 - tanh * tanh
            k_acc = tl.dot(s_grad.to(q_block.dtype), q_block, k_acc)
    _store_rows(k_grad, k_acc * factor, keys, end, k_grad_row, kv_head * DIM, DIM, WIDTH)
    _store_rows(v_grad, v_acc, keys, end, v_grad_row, kv_head * V_DIM, V_DIM, V_WIDTH)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q [T, H, D] to k [T, K, D] and v [T, K, E] of the same sequence, up to the query's own position.

    Args:
        starts: [S + 1] int32, where each sequence begins; the last is T.
        longest: no sequence has more tokens.
        scale: the factor of the products of q and k.
        window, softcap: as `train.nn.attention.attend` takes them.

    Returns:
        [T, H, E] in q's dtype, and log2 of the sums of exponentials [H, T] in float32.
    """
    q, k, v = (_with_whole_heads(x) for x in (q, k, v))
    total, heads, _ = q.shape
    out = q.new_empty(total, heads, v.shape[2])
    log_sums = q.new_empty(heads, total, dtype=torch.float32)
    widths = _widths(q, k, v)
    launch = launch_for(FORWARD, max(q.shape[2], v.shape[2]))
    _forward[_grid(longest, starts, heads, launch)](
        q, k, v, out, log_sums, starts, total, q.stride(0), k.stride(0), v.stride(0), out.stride(0),
        *_scales(scale, softcap), window, **widths, **launch,
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
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v from the gradient of `out` [T, H, E]; the other arguments as in `forward`."""
    gradient, q, k, v = (_with_whole_heads(x) for x in (gradient, q, k, v))
    total, heads, _ = q.shape
    q_grad, k_grad, v_grad = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    # Written by the kernel of the queries, read by that of the keys: both run on one stream, one after the other.
    deltas = torch.empty_like(log_sums)
    widths = _widths(q, k, v)
    scales = *_scales(scale, softcap), window, scale
    launch = launch_for(QUERIES, max(q.shape[2], v.shape[2]))
    _backward_queries[_grid(longest, starts, heads, launch)](
        q, k, v, out, gradient, q_grad, log_sums, deltas, starts, total,
        q.stride(0), k.stride(0), v.stride(0), out.stride(0), gradient.stride(0), q_grad.stride(0), *scales,
        **widths, **launch,
    )  # fmt: skip
    launch = launch_for(KEYS, max(q.shape[2], v.shape[2]))
    _backward_keys[_grid(longest, starts, k.shape[1], launch)](
        q, k, v, gradient, k_grad, v_grad, log_sums, deltas, starts, total,
        q.stride(0), k.stride(0), v.stride(0), gradient.stride(0), k_grad.stride(0), v_grad.stride(0), *scales,
        **widths, **launch,
    )  # fmt: skip
    return q_grad, k_grad, v_grad


def _scales(scale: float, softcap: float | None) -> tuple[float, float | None]:
    """What `_capped` multiplies by: scores to base two are S * log2(e), or log2(e) * softcap * tanh(S / softcap)."""
    return (scale * LOG2_E, None) if softcap is None else (scale / softcap, softcap * LOG2_E)


def _widths(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, int]:
    """How heads are grouped, and their features, padded to powers of two: 96 are loaded as 128 of which 32 are zeros."""
    dim, of_values = q.shape[2], v.shape[2]
    widths = {"WIDTH": triton.next_power_of_2(dim), "V_WIDTH": triton.next_power_of_2(of_values)}
    return {"GROUP": q.shape[1] // k.shape[1], "DIM": dim, "V_DIM": of_values} | widths


def launch_for(launches: dict[int, Launch], dim: int) -> Launch:
    """The launch for heads of `dim` features."""
    return next(launch for width, launch in launches.items() if dim <= width)


def _grid(longest: int, starts: torch.Tensor, heads: int, launch: Launch) -> tuple[int, int, int]:
    """A program for every block that the longest sequence could have, of every sequence and head.

    Sequences of 130 and 40 tokens take 3 blocks of 64 each; the last two of the second sequence end at once. The grid depends on no
    sequence's real length, so a captured graph can be replayed with others.
    """
    return triton.cdiv(longest, launch["BLOCK"]), len(starts) - 1, heads


def _with_whole_heads(x: torch.Tensor) -> torch.Tensor:
    """x [T, heads, dim] with each token's features contiguous; tokens may be apart, as in a view of one wide projection."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
