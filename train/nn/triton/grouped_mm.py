"""Each run's flat tokens times its own small matrices, one kernel for all runs: the adapters' products.

Adapters are thin: a product reads or writes [T, features] once and everything else is small, so these kernels are bound by memory,
and general grouped products (made for thick matrices; torch's waits for the host before sm_90, pytorch #161407) take two to three
times as long.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

NARROWEST = 16  # what a matrix instruction takes
MOST_COLUMNS = 128  # of a matrix that a program holds at once
LEAST_GROUPS = 64  # that a program looks through for its own: kernels do not depend on how many there are
PROGRAMS = 264  # two for each multiprocessor of a large GPU
LEAST_TOKENS_OF_A_PART = 512  # below that, adding parts up costs more than it saves


@triton.jit
def _find_group(bounds, groups, place, BLOCK: tl.constexpr, GROUPS: tl.constexpr):
    """The group that block number `place` belongs to, when every group's tokens are cut in blocks of their own; its row bounds."""
    group = tl.arange(0, GROUPS)
    is_group = group < groups
    start = tl.load(bounds + group, mask=is_group, other=0)
    end = tl.load(bounds + groups + group, mask=is_group, other=0)
    blocks = tl.where(is_group, (end - start + BLOCK - 1) // BLOCK, 0)
    found = tl.sum((tl.cumsum(blocks, 0) <= place).to(tl.int32), 0)
    before = tl.sum(tl.where(group < found, blocks, 0), 0)
    first = tl.sum(tl.where(group == found, start, 0), 0) + (place - before) * BLOCK
    return found, first, tl.sum(tl.where(group == found, end, 0), 0)


@triton.jit(do_not_specialize=["groups"])
def _times(
    x, stack, out, bounds, groups, K, N, x_row, stack_group, stack_k, stack_n,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """out [T, N] = x [T, K] stack[group of the row] [K, N], a block of tokens and columns."""
    group, first, end = _find_group(bounds, groups, tl.program_id(0), TOKENS, GROUPS)
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
        total = tl.dot(left, right, total, input_precision="ieee")
    tl.store(
        out + rows[:, None] * N + columns[None, :],
        total.to(out.dtype.element_ty),
        mask=is_row[:, None] & is_column[None, :],
    )


@triton.jit(do_not_specialize=["groups", "parts"])
def _outer(
    left, right, out, bounds, groups, M, N, left_row, right_row, parts,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """out [parts, G, M, N] = left [T, M] and right [T, N] summed over a part of each group's tokens, a block of rows and columns."""
    group, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    start, end = tl.load(bounds + group), tl.load(bounds + groups + group)
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
        total = tl.dot(a, b, total, input_precision="ieee")
    place = (part * groups + group).to(tl.int64) * M
    tl.store(out + (place + rows)[:, None] * N + columns[None, :], total, mask=is_row[:, None] & is_column[None, :])


def times(x: torch.Tensor, stack: torch.Tensor, bounds: torch.Tensor, *, is_everything: bool) -> torch.Tensor:
    """Rows of x [T, K] times their group's matrix of `stack` [G, K, N]: [T, N] in x's dtype, zeros for rows of no group.

    Args:
        bounds: [2, G] int32, where each group of rows begins and where it ends; groups follow one another, with or without gaps.
        is_everything: that there are no gaps.
    """
    x = _with_whole_rows(x)
    (total, K), (groups, _, N) = x.shape, stack.shape
    out = x.new_empty(total, N) if is_everything else x.new_zeros(total, N)
    blocks = times_blocks(K, N)
    _times[triton.cdiv(total, blocks["TOKENS"]) + groups, triton.cdiv(N, blocks["COLUMNS"])](
        x, stack, out, bounds, groups, K, N, x.stride(0), *stack.stride(), GROUPS=_power(groups, LEAST_GROUPS), **blocks
    )  # fmt: skip
    return out


def outer(left: torch.Tensor, right: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """The sum over each group's rows of left [T, M] and right [T, N]: [G, M, N] in float32; `bounds` as for `times`."""
    left, right = _with_whole_rows(left), _with_whole_rows(right)
    (total, M), N, groups = left.shape, right.shape[1], bounds.shape[1]
    blocks = outer_blocks(M, N)
    grid = triton.cdiv(M, blocks["ROWS"]), triton.cdiv(N, blocks["COLUMNS"])
    parts = max(1, min(PROGRAMS // (groups * grid[0] * grid[1]), total // (groups * LEAST_TOKENS_OF_A_PART)))
    out = torch.empty(parts, groups, M, N, dtype=torch.float32, device=left.device)
    _outer[(groups * parts, *grid)](
        left, right, out, bounds, groups, M, N, left.stride(0), right.stride(0), parts, **blocks
    )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0)


def times_blocks(K: int, N: int) -> dict[str, int]:
    """What a program of `_times` takes at once, for matrices [K, N]."""
    columns = _power(min(N, MOST_COLUMNS))
    if N <= MOST_COLUMNS:  # bound by reading x: many bytes in flight
        tokens, stages, inner = 32, 4, _power(min(K, 4096 // columns))
    else:  # bound by writing
        tokens, stages, inner = 64, 2, _power(min(K, 64))
    return {"TOKENS": tokens, "COLUMNS": columns, "INNER": inner, "num_warps": 4, "num_stages": stages}


def outer_blocks(M: int, N: int) -> dict[str, int]:
    """What a program of `_outer` takes at once, for sums [M, N]."""
    rows, columns = (_power(min(own, MOST_COLUMNS if own >= other else 64)) for own, other in ((M, N), (N, M)))
    return {"ROWS": rows, "COLUMNS": columns, "TOKENS": 64, "num_warps": 4, "num_stages": 3}


class GroupedMatmul:
    """`train.nn.grouped_mm.RunMatmul` of runs that lie one after another, with the bounds of each: no copies, no padding."""

    def __init__(self, bounds: torch.Tensor, is_everything: bool) -> None:
        self._bounds, self._is_everything = bounds, is_everything

    def to_grouped(self, flat: torch.Tensor) -> torch.Tensor:
        """Flat tokens stay as they are."""
        return flat

    to_grouped_zeroed = from_grouped = to_grouped

    def times(self, laid: torch.Tensor, stack: torch.Tensor) -> torch.Tensor:
        """See `times`."""
        return times(laid, stack, self._bounds, is_everything=self._is_everything)

    def outer(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """See `outer`."""
        return outer(left, right, self._bounds)


def _with_whole_rows(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix whose rows lie in one piece each."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _power(number: int, least: int = NARROWEST) -> int:
    """The next power of two, and no less than `least`."""
    return max(least, 1 << (number - 1).bit_length())
