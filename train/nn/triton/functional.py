"""Each formula as one kernel: those of `train.nn` (functional, experts, loss) and `train.trainer.optim`, by the same names.

`torch.compile` made kernels that were as fast. But it traces every formula again in every process, which took 4 of the 15 seconds from
the start of a job to its first step (an H200, torch 2.11, all caches on disk). Triton only looks the finished kernel up.

A program computes one row of a matrix, or a block of `BLOCK` numbers of it. All compute in float32 and round once, at the store.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from train.nn.functional import Norm

# Numbers of a row that a program computes, where rows are cut into blocks.
BLOCK = 1024
# Logits that a program of `_cross_entropy` holds at once.
VOCAB_BLOCK = 4096


@triton.jit
def _loaded_row(x, row, columns, is_column, CENTERED: tl.constexpr, DIM: tl.constexpr):
    """A row in float32, zeros past its end, less its mean where CENTERED."""
    wide = tl.load(x + row + columns, mask=is_column, other=0.0).to(tl.float32)
    if CENTERED:
        wide = tl.where(is_column, wide - tl.sum(wide, 0) / DIM, 0.0)
    return wide


@triton.jit
def _normed_row(wide, weight, bias, eps, columns, is_column, DIM: tl.constexpr):
    """The norm of a row, with weight and bias where there are."""
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / DIM + eps)
    if weight is not None:
        normed *= tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)
    if bias is not None:
        normed += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)
    return normed


@triton.jit
def _normalize(x, weight, bias, out, eps, CENTERED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """One row; BLOCK is the power of two that holds DIM."""
    columns = tl.arange(0, BLOCK)
    is_column = columns < DIM
    # 64 bits, since rows * DIM may exceed 32.
    row = tl.program_id(0).to(tl.int64) * DIM
    wide = _loaded_row(x, row, columns, is_column, CENTERED, DIM)
    normed = _normed_row(wide, weight, bias, eps, columns, is_column, DIM)
    tl.store(out + row + columns, normed.to(out.dtype.element_ty), mask=is_column)


@triton.jit
def _add_normed(
    residual, y, weight, bias, out, eps, multiplier,
    NORMED: tl.constexpr, CENTERED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of residual + multiplier * norm(y), or of residual + multiplier * y."""
    columns = tl.arange(0, BLOCK)
    is_column = columns < DIM
    row = tl.program_id(0).to(tl.int64) * DIM
    branch = _loaded_row(y, row, columns, is_column, CENTERED, DIM)
    if NORMED:
        branch = _normed_row(branch, weight, bias, eps, columns, is_column, DIM)
    found = tl.load(residual + row + columns, mask=is_column, other=0.0).to(tl.float32) + multiplier * branch
    tl.store(out + row + columns, found.to(out.dtype.element_ty), mask=is_column)


@triton.jit
def _rounded(wide, like):
    """What is left of float32 numbers in the dtype of the pointer `like`, in float32 again."""
    return wide.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _renorm(
    residual, y, weight, bias, next_weight, next_bias, hidden, normed, eps, next_eps, multiplier,
    CENTERED: tl.constexpr, NEXT_CENTERED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of `_add_normed` into `hidden`, and of its `_normalize` into `normed`."""
    columns = tl.arange(0, BLOCK)
    is_column = columns < DIM
    row = tl.program_id(0).to(tl.int64) * DIM
    branch = _loaded_row(y, row, columns, is_column, CENTERED, DIM)
    branch = _normed_row(branch, weight, bias, eps, columns, is_column, DIM)
    found = tl.load(residual + row + columns, mask=is_column, other=0.0).to(tl.float32) + multiplier * branch
    tl.store(hidden + row + columns, found.to(hidden.dtype.element_ty), mask=is_column)
    # What the backward will read.
    wide = tl.where(is_column, _rounded(found, hidden), 0.0)
    if NEXT_CENTERED:
        wide = tl.where(is_column, wide - tl.sum(wide, 0) / DIM, 0.0)
    found = _normed_row(wide, next_weight, next_bias, next_eps, columns, is_column, DIM)
    tl.store(normed + row + columns, found.to(normed.dtype.element_ty), mask=is_column)


@triton.jit
def _norm_grad(weighted, wide, eps, CENTERED: tl.constexpr, DIM: tl.constexpr):
    """A row's gradient from `weighted`, the norm's gradient times its weight, and `wide`, which was normed."""
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / DIM + eps)
    along = tl.sum(weighted * wide, 0) / DIM
    found = scale * (weighted - wide * (scale * scale * along))
    if CENTERED:
        found -= scale * (tl.sum(weighted, 0) / DIM)
    return found


@triton.jit
def _renorm_backward(
    gradient, passed, hidden, y, weight, next_weight, hidden_grad, y_grad, eps, next_eps, multiplier,
    CENTERED: tl.constexpr, NEXT_CENTERED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of `_normalize_backward` by the next norm, whose result goes on through `_add_normed`'s."""
    columns = tl.arange(0, BLOCK)
    is_column = columns < DIM
    row = tl.program_id(0).to(tl.int64) * DIM
    wide = _loaded_row(hidden, row, columns, is_column, NEXT_CENTERED, DIM)
    weighted = tl.load(gradient + row + columns, mask=is_column, other=0.0).to(tl.float32)
    if next_weight is not None:
        weighted *= tl.load(next_weight + columns, mask=is_column, other=0.0).to(tl.float32)
    found = _norm_grad(weighted, wide, next_eps, NEXT_CENTERED, DIM)
    found = tl.load(passed + row + columns, mask=is_column, other=0.0).to(tl.float32) + found
    tl.store(hidden_grad + row + columns, found.to(hidden_grad.dtype.element_ty), mask=is_column)
    wide = _loaded_row(y, row, columns, is_column, CENTERED, DIM)
    weighted = tl.where(is_column, _rounded(found, hidden_grad), 0.0)
    if weight is not None:
        weighted *= tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)
    found = _norm_grad(weighted, wide, eps, CENTERED, DIM) * multiplier
    tl.store(y_grad + row + columns, found.to(y_grad.dtype.element_ty), mask=is_column)


@triton.jit
def _normalize_backward(
    gradient, passed, x, weight, out, eps, multiplier, CENTERED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """One row, by the formula in `train.nn.functional.normalize_backward`; `passed` and `multiplier` may be None."""
    columns = tl.arange(0, BLOCK)
    is_column = columns < DIM
    # 64 bits, since rows * DIM may exceed 32.
    row = tl.program_id(0).to(tl.int64) * DIM
    wide = _loaded_row(x, row, columns, is_column, CENTERED, DIM)
    weighted = tl.load(gradient + row + columns, mask=is_column, other=0.0).to(tl.float32)
    if weight is not None:
        weighted *= tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)
    found = _norm_grad(weighted, wide, eps, CENTERED, DIM)
    if multiplier is not None:
        found *= multiplier
    if passed is not None:
        found = tl.load(passed + row + columns, mask=is_column, other=0.0).to(tl.float32) + found
    tl.store(out + row + columns, found.to(out.dtype.element_ty), mask=is_column)


@triton.jit
def _soft_cap(z, CAP: tl.constexpr):
    """`train.nn.head.soft_cap`: cap * tanh(z / cap), where tanh(x) = 2 sigmoid(2 x) - 1; -inf stays, a word that there is not."""
    return tl.where(z == -float("inf"), z, CAP * (2 * tl.sigmoid(2 * z / CAP) - 1))


@triton.jit
def _cross_entropy(
    logits, targets, weights, losses, correct, VOCAB: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr
):
    """One target: its loss, whether it is the first of the largest logits, and the gradient, which overwrites the logits.

    Two passes over the row. The first finds log(sum(exp)) with a running maximum (arXiv 1805.02867), the second writes the gradient.
    With `CAP` above 0 the row has the numbers before the soft cap, and gets their gradient.
    """
    row = tl.program_id(0)
    logits += row.to(tl.int64) * VOCAB
    offsets = tl.arange(0, BLOCK)
    running_max, running_sum, best = -float("inf"), 0.0, 0
    for at in range(0, VOCAB, BLOCK):
        is_word = offsets + at < VOCAB
        wide = tl.load(logits + at + offsets, mask=is_word, other=-float("inf")).to(tl.float32)
        if CAP > 0:
            wide = _soft_cap(wide, CAP)
        block_max, place = tl.max(wide, 0, return_indices=True)
        # Only a strictly larger logit replaces the best one: the first of equals wins, as in torch.argmax.
        best = tl.where(block_max > running_max, place + at, best)
        new_max = tl.maximum(running_max, block_max)
        # -inf - -inf is NaN: while all logits are -inf, subtract 0 instead.
        finite = tl.where(new_max == -float("inf"), 0.0, new_max)
        running_sum = running_sum * tl.exp(running_max - finite) + tl.sum(tl.exp(wide - finite), 0)
        running_max = new_max
    log_normalizer = running_max + tl.log(running_sum)
    target = tl.load(targets + row)
    weight = tl.load(weights + row)
    target_logit = tl.load(logits + target).to(tl.float32)
    if CAP > 0:
        target_logit = _soft_cap(target_logit, CAP)
    # Every warp has to have read the target's logit before any warp overwrites it below.
    tl.debug_barrier()
    tl.store(losses + row, log_normalizer - target_logit)
    tl.store(correct + row, best == target)
    for at in range(0, VOCAB, BLOCK):
        is_word = offsets + at < VOCAB
        z = tl.load(logits + at + offsets, mask=is_word, other=-float("inf")).to(tl.float32)
        wide = z
        if CAP > 0:
            wide = _soft_cap(z, CAP)
        probability = tl.exp(wide - log_normalizer)
        found = (probability - (offsets + at == target).to(tl.float32)) * weight
        if CAP > 0:
            # 1 - tanh(x)^2 = 4 s (1 - s) with s = sigmoid(2 x), and 1 - s = sigmoid(-2 x); zero at -inf.
            found *= 4 * tl.sigmoid(2 * z / CAP) * tl.sigmoid(-2 * z / CAP)
        tl.store(logits + at + offsets, found.to(logits.dtype.element_ty), mask=is_word)


@triton.jit
def _adamw(
    theta, exp_avg, exp_avg_sq, gradient, applies, rate, decay, clip, beta1, beta2, correction1, root_correction2, eps,
    columns, row_stride, gradient_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of a run's numbers, by the formula in `train.trainer.optim.adamw`.

    Blocks are the grid's first dimension, since CUDA ends the others at 65,535.
    """
    run = tl.program_id(1)
    # A run that does not take this step keeps every bit.
    if tl.load(applies + run) == 0:
        return
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < columns
    place = run.to(tl.int64) * row_stride + column
    given = tl.load(gradient + run.to(tl.int64) * gradient_stride + column, mask=is_column, other=0.0)
    given *= tl.load(clip + run)
    first = tl.load(beta1 + run)
    second = tl.load(beta2 + run)
    # m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
    mean = tl.load(exp_avg + place, mask=is_column, other=0.0) * first + given * (1 - first)
    square = tl.load(exp_avg_sq + place, mask=is_column, other=0.0) * second + given * given * (1 - second)
    # Square root and division rounded to nearest, as PyTorch's; Triton's plain ones approximate.
    root = tl.sqrt_rn(square)
    denominator = tl.div_rn(root, tl.load(root_correction2 + run) + tl.zeros_like(root)) + tl.load(eps + run)
    step = tl.load(rate + run) / tl.load(correction1 + run)
    # theta = theta (1 - rate * decay) - rate / correction1 * m / (sqrt(v) / root_correction2 + eps)
    value = tl.load(theta + place, mask=is_column, other=0.0) * (1 - tl.load(decay + run))
    tl.store(theta + place, value - step * tl.div_rn(mean, denominator), mask=is_column)
    tl.store(exp_avg + place, mean, mask=is_column)
    tl.store(exp_avg_sq + place, square, mask=is_column)


def normalize(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """`train.nn.functional.normalize` of [T, dim]."""
    rows, dim = x.shape
    x = x.contiguous()
    out = torch.empty_like(x)
    _normalize[(rows,)](x, norm.weight, norm.bias, out, norm.eps, CENTERED=norm.centered, DIM=dim, **_whole_row(dim))
    return out


def normalize_backward(
    gradient: torch.Tensor, passed: torch.Tensor | None, x: torch.Tensor, norm: Norm, multiplier: float | None = None
) -> torch.Tensor:
    """`train.nn.functional.normalize_backward` of [T, dim]; the norm's own part is multiplied by `multiplier`."""
    gradient = gradient.contiguous()
    passed = None if passed is None else passed.contiguous()
    x = x.contiguous()
    rows, dim = x.shape
    out = torch.empty_like(x)
    _normalize_backward[(rows,)](
        gradient, passed, x, norm.weight, out, norm.eps, multiplier, CENTERED=norm.centered, DIM=dim, **_whole_row(dim)
    )
    return out


def add_normed(residual: torch.Tensor, y: torch.Tensor, norm: Norm | None, multiplier: float) -> torch.Tensor:
    """`train.nn.functional.add_normed` of [T, dim]."""
    rows, dim = y.shape
    residual = residual.contiguous()
    y = y.contiguous()
    out = torch.empty_like(residual)
    weight, bias, eps, centered = (
        (None, None, 0.0, False) if norm is None else (norm.weight, norm.bias, norm.eps, norm.centered)
    )
    _add_normed[(rows,)](
        residual,
        y,
        weight,
        bias,
        out,
        eps,
        multiplier,
        NORMED=norm is not None,
        CENTERED=centered,
        DIM=dim,
        **_whole_row(dim),
    )
    return out


def add_normed_backward(gradient: torch.Tensor, y: torch.Tensor, norm: Norm, multiplier: float) -> torch.Tensor:
    """`train.nn.functional.add_normed_backward` of [T, dim]."""
    return normalize_backward(gradient, None, y, norm, multiplier)


def renorm(
    residual: torch.Tensor, y: torch.Tensor, behind: Norm, multiplier: float, before: Norm
) -> tuple[torch.Tensor, torch.Tensor]:
    """`train.nn.functional.renorm` of [T, dim]."""
    rows, dim = y.shape
    residual = residual.contiguous()
    y = y.contiguous()
    hidden, normed = torch.empty_like(residual), torch.empty_like(residual)
    _renorm[(rows,)](
        residual, y, behind.weight, behind.bias, before.weight, before.bias, hidden, normed, behind.eps, before.eps, multiplier,
        CENTERED=behind.centered, NEXT_CENTERED=before.centered, DIM=dim, **_whole_row(dim),
    )  # fmt: skip
    return normed, hidden


def renorm_backward(
    gradient: torch.Tensor,
    passed: torch.Tensor,
    hidden: torch.Tensor,
    y: torch.Tensor,
    behind: Norm,
    multiplier: float,
    before: Norm,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`train.nn.functional.renorm_backward` of [T, dim]."""
    rows, dim = y.shape
    gradient, passed, hidden, y = (x.contiguous() for x in (gradient, passed, hidden, y))
    hidden_grad, y_grad = torch.empty_like(hidden), torch.empty_like(y)
    _renorm_backward[(rows,)](
        gradient, passed, hidden, y, behind.weight, before.weight, hidden_grad, y_grad, behind.eps, before.eps, multiplier,
        CENTERED=behind.centered, NEXT_CENTERED=before.centered, DIM=dim, **_whole_row(dim),
    )  # fmt: skip
    return hidden_grad, y_grad


def cross_entropy(
    z: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, cap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`train.nn.loss.cross_entropy` of [n, vocab]; the gradient overwrites z."""
    rows, vocab = z.shape
    losses = z.new_empty(rows, dtype=torch.float32)
    correct = z.new_empty(rows, dtype=torch.bool)
    block = min(VOCAB_BLOCK, triton.next_power_of_2(vocab))
    _cross_entropy[(rows,)](z, targets, weights, losses, correct, VOCAB=vocab, BLOCK=block, CAP=cap or 0.0, num_warps=8)
    return losses, correct, z


@triton.jit
def _sum_by_token(rows, inverse, factors, out, CHOICES: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """One block of a token's sum over its rows; `factors` may be None."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < DIM
    # 64 bits, since rows * DIM may exceed 32.
    token = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for choice in range(CHOICES):
        row = tl.load(inverse + token * CHOICES + choice)
        wide = tl.load(rows + row * DIM + columns, mask=is_column, other=0.0).to(tl.float32)
        if factors is not None:
            wide *= tl.load(factors + token * CHOICES + choice).to(tl.float32)
        total += wide
    tl.store(out + token * DIM + columns, total.to(out.dtype.element_ty), mask=is_column)


def sum_by_token(rows: torch.Tensor, inverse: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
    """`train.nn.experts.sum_by_token` of [S, dim]."""
    out = rows.new_empty(len(inverse), rows.shape[1])
    factors = None if factors is None else factors.contiguous()
    _sum_by_token[(len(out), triton.cdiv(out.shape[1], BLOCK))](
        rows.contiguous(), inverse, factors, out, CHOICES=inverse.shape[1], DIM=rows.shape[1], BLOCK=BLOCK
    )
    return out


def adamw(
    theta: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    gradient: torch.Tensor,
    applies: torch.Tensor,
    *factors: torch.Tensor,
) -> None:
    """`train.trainer.optim.adamw`, in place; float32 [runs, columns], and [runs, 1] from `applies` on. `gradient` is left as it is."""
    runs, columns = theta.shape
    _adamw[(triton.cdiv(columns, BLOCK), runs)](
        theta,
        exp_avg,
        exp_avg_sq,
        gradient,
        applies,
        *factors,
        columns,
        theta.stride(0),
        gradient.stride(0),
        BLOCK=BLOCK,
    )


def _whole_row(dim: int) -> dict[str, int]:
    """The launch of a program per row of `dim` numbers: about 16 numbers for every thread, 4,096 by 8 warps of 32."""
    block = triton.next_power_of_2(dim)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}
