"""Each run's flat tokens times its own small matrices, one kernel for all runs: the adapters' products.

Adapters are thin: a product reads or writes [T, features] once and everything else is small, so these kernels are bound by memory.
General grouped products (made for thick matrices; PyTorch's waits for the host before sm_90, pytorch #161407) take two to three
times as long.

Each run's tokens are cut into blocks of their own, so no block holds tokens of two runs. With blocks of 32 tokens and runs of 70, 5
and 40 tokens (bounds 0 70 75 / 70 75 115):

    program   0       1       2       3       4       5         6, 7 ...
    run       0       0       0       1       2       2         none
    tokens    0..32   32..64  64..70  70..75  75..107 107..115
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# The smallest dimension of a matrix instruction.
NARROWEST = 16
# Columns of a matrix that a program holds at once.
MAX_COLUMNS = 128
# Groups that a program searches for its own, rounded up to this: the compiled kernel does not depend on how many there are.
LEAST_GROUPS = 64
# Two programs for each multiprocessor of a large GPU.
PROGRAMS = 264
# Below this, adding parts up costs more than it saves.
LEAST_TOKENS_OF_A_PART = 512


@triton.jit
def _find_group(bounds, groups, block, BLOCK: tl.constexpr, GROUPS: tl.constexpr):
    """The group that block number `block` belongs to, the block's first row, and where the group's rows end.

    In the module's example block 4 gives (2, 75, 115). A block past the last one gives a number from `groups` on.
    """
    group = tl.arange(0, GROUPS)
    is_group = group < groups
    start = tl.load(bounds + group, mask=is_group, other=0)
    end = tl.load(bounds + groups + group, mask=is_group, other=0)
    # Blocks per group 3 1 2, counted up 3 4 6: block 4 is past the first two groups, so it belongs to group 2.
    blocks = tl.where(is_group, (end - start + BLOCK - 1) // BLOCK, 0)
    found = tl.sum((tl.cumsum(blocks, 0) <= block).to(tl.int32), 0)
    # Triton cannot index a tensor by a number; a sum over one entry does the same. Group 2 has 4 blocks before it and starts at 75.
    before = tl.sum(tl.where(group < found, blocks, 0), 0)
    first = tl.sum(tl.where(group == found, start, 0), 0) + (block - before) * BLOCK
    return found, first, tl.sum(tl.where(group == found, end, 0), 0)


@triton.jit(do_not_specialize=["groups"])
def _bmm(
    x, stack, out, bounds, groups, K, N, x_row, stack_group, stack_k, stack_n,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """out [T, N] = x [T, K] stack[the row's group] [K, N], for a block of tokens and columns."""
    group, first, end = _find_group(bounds, groups, tl.program_id(0), TOKENS, GROUPS)
    # The grid has room for every way to cut the tokens into groups, so some programs have nothing to do.
    if group >= groups:
        return
    rows = first + tl.arange(0, TOKENS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    is_row = rows < end
    is_column = columns < N
    # 64 bits, since tokens * features may exceed 32.
    rows = rows.to(tl.int64)
    group = group.to(tl.int64)
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
        # "ieee": not TF32, for float32 inputs.
        total = tl.dot(left, right, total, input_precision="ieee")
    tl.store(
        out + rows[:, None] * N + columns[None, :],
        total.to(out.dtype.element_ty),
        mask=is_row[:, None] & is_column[None, :],
    )


@triton.jit(do_not_specialize=["groups", "parts"])
def _outer_grad(
    left, right, out, bounds, groups, M, N, left_row, right_row, parts,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """out [parts, G, M, N] = left^T right, summed over one part of each group's tokens, for a block of rows and columns.

    A group of 1,200 tokens in 2 parts, with blocks of 64 tokens: 600 tokens are 10 blocks, so part 0 sums 640 and part 1 sums 560.
    """
    group = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    start = tl.load(bounds + group)
    end = tl.load(bounds + groups + group)
    share = tl.cdiv(tl.cdiv(end - start, parts), TOKENS) * TOKENS
    first = start + part * share
    end = tl.minimum(end, first + share)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    is_row = rows < M
    is_column = columns < N
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
    # Row 0 of matrix `group` in part `part`; an empty part stores zeros, so the sum over parts needs no mask.
    place = (part * groups + group).to(tl.int64) * M
    tl.store(out + (place + rows)[:, None] * N + columns[None, :], total, mask=is_row[:, None] & is_column[None, :])


def bmm(x: torch.Tensor, stack: torch.Tensor, bounds: torch.Tensor, *, covers_all: bool) -> torch.Tensor:
    """Rows of x [T, K] times their group's matrix of `stack` [G, K, N]: [T, N] in x's dtype, zeros for rows of no group.

    Args:
        bounds: [2, G] int32, where each group of rows begins and where it ends; groups ascend, with or without gaps.
        covers_all: whether there are no gaps, so that every row of the result is written.
    """
    x = _with_whole_rows(x)
    total, K = x.shape
    groups, _, N = stack.shape
    out = x.new_empty(total, N) if covers_all else x.new_zeros(total, N)
    blocks = bmm_blocks(K, N)
    # Each group wastes less than one block, so cdiv(T, TOKENS) + G blocks are enough for any bounds: in the example 4 + 3 >= 6.
    _bmm[triton.cdiv(total, blocks["TOKENS"]) + groups, triton.cdiv(N, blocks["COLUMNS"])](
        x, stack, out, bounds, groups, K, N, x.stride(0), *stack.stride(), GROUPS=_power(groups, LEAST_GROUPS), **blocks
    )  # fmt: skip
    return out


def outer_grad(left: torch.Tensor, right: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """The sum over each group's rows of left [T, M] and right [T, N]: [G, M, N] in float32; `bounds` as for `bmm`."""
    left = _with_whole_rows(left)
    right = _with_whole_rows(right)
    total, M = left.shape
    N = right.shape[1]
    groups = bounds.shape[1]
    blocks = outer_grad_blocks(M, N)
    grid = triton.cdiv(M, blocks["ROWS"]), triton.cdiv(N, blocks["COLUMNS"])
    # Enough parts to keep the GPU busy where matrices are few and small, each long enough to be worth a second sum.
    parts = max(1, min(PROGRAMS // (groups * grid[0] * grid[1]), total // (groups * LEAST_TOKENS_OF_A_PART)))
    out = torch.empty(parts, groups, M, N, dtype=torch.float32, device=left.device)
    _outer_grad[(groups * parts, *grid)](
        left, right, out, bounds, groups, M, N, left.stride(0), right.stride(0), parts, **blocks
    )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0)


def bmm_blocks(K: int, N: int) -> dict[str, int]:
    """How much a program of `_bmm` computes at once, for matrices [K, N]."""
    columns = _power(min(N, MAX_COLUMNS))
    if N <= MAX_COLUMNS:
        # To a small rank, as x A^T: bound by reading x, so many bytes are in flight.
        tokens, stages, inner = 32, 4, _power(min(K, 4096 // columns))
    else:
        # To many features, as h B^T: bound by writing the result.
        tokens, stages, inner = 64, 2, _power(min(K, 64))
    return {"TOKENS": tokens, "COLUMNS": columns, "INNER": inner, "num_warps": 4, "num_stages": stages}


def outer_grad_blocks(M: int, N: int) -> dict[str, int]:
    """How much a program of `_outer_grad` computes at once, for sums [M, N]: wide along the longer side, so that both fit registers."""
    rows, columns = (_power(min(own, MAX_COLUMNS if own >= other else 64)) for own, other in ((M, N), (N, M)))
    return {"ROWS": rows, "COLUMNS": columns, "TOKENS": 64, "num_warps": 4, "num_stages": 3}


class GroupedMatmul:
    """`train.nn.grouped_mm.RunMatmul` of runs whose tokens are contiguous, with the bounds of each: no copies, no padding."""

    def __init__(self, bounds: torch.Tensor, covers_all: bool) -> None:
        self._bounds = bounds
        self._covers_all = covers_all

    def to_grouped(self, flat: torch.Tensor) -> torch.Tensor:
        """Flat tokens stay as they are."""
        return flat

    def to_grouped_zeroed(self, flat: torch.Tensor) -> torch.Tensor:
        """Flat tokens have no fillers."""
        return flat

    def from_grouped(self, grouped: torch.Tensor) -> torch.Tensor:
        """Flat tokens, zeros for those of no group, as `bmm` left them."""
        return grouped

    def bmm(self, grouped: torch.Tensor, stack: torch.Tensor) -> torch.Tensor:
        """[T, k] with [G, k, n] -> [T, n]."""
        return bmm(grouped, stack, self._bounds, covers_all=self._covers_all)

    def outer_grad(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """[T, m] and [T, n] -> [G, m, n]."""
        return outer_grad(left, right, self._bounds)


def _with_whole_rows(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix whose rows are contiguous each; rows may be apart."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _power(number: int, least: int = NARROWEST) -> int:
    """The next power of two, but at least `least`: 16 for 8, 64 for 40."""
    return max(least, 1 << (number - 1).bit_length())
