"""Each run's flat tokens times its own small matrices, one kernel for all runs: the adapters' products on GPUs from sm_80 on.

Adapters are thin: a product reads or writes [T, features] once and everything else is small, so these kernels are bound by memory,
and general grouped products (made for thick matrices; torch's waits for the host before sm_90, pytorch #161407) take two to three
times as long. Sums run in a fixed order, without atomics: the same bits every time.

Triton comes with torch where there is a GPU; this module is imported there alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MOST_COLUMNS = 128  # of the thin side that a program holds at once
PROGRAMS = 264  # two for each multiprocessor of a large GPU
NARROWEST = 16  # what a matrix instruction takes


@triton.jit
def _find_group(ends, groups, place, BLOCK: tl.constexpr, GROUPS: tl.constexpr):  # noqa: N803
    """The group that block number `place` belongs to, when every group's tokens are cut in blocks of their own; its row bounds."""
    group = tl.arange(0, GROUPS)
    is_group = group < groups
    end = tl.load(ends + group, mask=is_group, other=0)
    start = tl.load(ends + group - 1, mask=is_group & (group > 0), other=0)
    blocks = tl.where(is_group, (end - start + BLOCK - 1) // BLOCK, 0)
    found = tl.sum((tl.cumsum(blocks, 0) <= place).to(tl.int32), 0)
    before = tl.sum(tl.where(group < found, blocks, 0), 0)
    first = tl.sum(tl.where(group == found, start, 0), 0) + (place - before) * BLOCK
    return found, first, tl.sum(tl.where(group == found, end, 0), 0)


@triton.jit
def _times(
    x, stack, out, ends, groups, K, N, x_row, stack_group, stack_k, stack_n,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """out [T, N] = x [T, K] stack[group of the row] [K, N], a block of tokens and columns."""
    group, first, end = _find_group(ends, groups, tl.program_id(0), TOKENS, GROUPS)
    if group >= groups:
        return
    rows = first + tl.arange(0, TOKENS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    is_row, is_column = rows < end, columns < N
    rows, group = rows.to(tl.int64), group.to(tl.int64)
    total = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for at in range(0, K, INNER):
        is_inner = inner + at < K
        left = tl.load(
            x + rows[:, None] * x_row + (inner + at)[None, :], mask=is_row[:, None] & is_inner[None, :], other=0.0
        )
        right = tl.load(
            stack + group * stack_group + (inner + at)[:, None] * stack_k + columns[None, :] * stack_n,
            mask=is_inner[:, None] & is_column[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot(left, right, total)
    tl.store(
        out + rows[:, None] * N + columns[None, :],
        total.to(out.dtype.element_ty),
        mask=is_row[:, None] & is_column[None, :],
    )


@triton.jit
def _outer(
    left, right, out, ends, groups, M, N, left_row, right_row, parts,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """out [parts, G, M, N] = left [T, M] and right [T, N] summed over a part of each group's tokens, a block of rows and columns."""
    group, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    end = tl.load(ends + group)
    start = tl.load(ends + group - 1, mask=group > 0, other=0)
    share = tl.cdiv(tl.cdiv(end - start, parts), TOKENS) * TOKENS
    first = start + part * share
    end = tl.minimum(end, first + share)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = rows < M, columns < N
    tokens = tl.arange(0, TOKENS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for at in range(first, end, TOKENS):
        is_token = tokens + at < end
        token = (tokens + at).to(tl.int64)
        a = tl.load(
            left + token[None, :] * left_row + rows[:, None], mask=is_token[None, :] & is_row[:, None], other=0.0
        )
        b = tl.load(
            right + token[:, None] * right_row + columns[None, :],
            mask=is_token[:, None] & is_column[None, :],
            other=0.0,
        )
        total = tl.dot(a, b, total)
    place = (part * groups + group).to(tl.int64) * M
    tl.store(out + (place + rows)[:, None] * N + columns[None, :], total, mask=is_row[:, None] & is_column[None, :])


def times(x: torch.Tensor, stack: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows of x [T, K] times their group's matrix of `stack` [G, K, N]: [T, N] in x's dtype.

    Args:
        ends: [G] int32, ascending: group g is the rows from ends[g - 1] (0 for the first) up to ends[g], and the last is T.
    """
    (total, K), (groups, _, N) = x.shape, stack.shape
    out = x.new_empty(total, N)
    thin = N <= MOST_COLUMNS
    columns = _power(min(N, MOST_COLUMNS))
    inner = 128 if thin and K > MOST_COLUMNS else _power(min(K, 64))
    tokens = (16 if total <= 2048 else 32) if thin else 64
    grid = (triton.cdiv(total, tokens) + groups, triton.cdiv(N, columns))
    _times[grid](
        x, stack, out, ends, groups, K, N, x.stride(0), *stack.stride(),
        TOKENS=tokens, COLUMNS=columns, INNER=inner, GROUPS=_power(groups, 1), num_warps=4, num_stages=4,
    )  # fmt: skip
    return out


def outer(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The sum over each group's rows of left [T, M] and right [T, N]: [G, M, N] in float32; `ends` as for `times`."""
    M, N, groups = left.shape[1], right.shape[1], len(ends)
    rows, columns = _power(min(M, 128 if M > N else 64)), _power(min(N, 128 if N >= M else 64))
    blocks = triton.cdiv(M, rows), triton.cdiv(N, columns)
    parts = max(1, PROGRAMS // (groups * blocks[0] * blocks[1]))
    out = torch.empty(parts, groups, M, N, dtype=torch.float32, device=left.device)
    _outer[(groups * parts, *blocks)](
        left, right, out, ends, groups, M, N, left.stride(0), right.stride(0), parts,
        ROWS=rows, COLUMNS=columns, TOKENS=64, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0)


def _power(number: int, least: int = NARROWEST) -> int:
    """The next power of two, and no less than `least`."""
    return max(least, triton.next_power_of_2(number))
