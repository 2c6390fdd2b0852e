"""Formulas as kernels of one launch each: those of `train.nn.functional`, `train.nn.loss` and `train.trainer.optim`, by the same names.

`torch.compile` made such kernels before, as fast ones; but it traces every formula anew in every process, which took 4 of the 15
seconds from the start of a job to its first step (an H200, torch 2.11, all its caches on the disk). Triton only looks the finished
kernel up. Rows are a program each, or cut in blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024  # numbers of a row that a program takes where rows are cut
VOCABULARY_BLOCK = 4096  # words that a program looks at at once


@triton.jit
def _rms_norm(x, weight, out, eps, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """A row."""
    columns = tl.arange(0, BLOCK)
    is_column, row = columns < DIM, tl.program_id(0).to(tl.int64) * DIM
    wide = tl.load(x + row + columns, mask=is_column, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / DIM + eps)
    factors = tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)
    tl.store(out + row + columns, (wide * scale * factors).to(out.dtype.element_ty), mask=is_column)


@triton.jit
def _rms_norm_gradient(gradient, passed, x, weight, out, eps, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """A row."""
    columns = tl.arange(0, BLOCK)
    is_column, row = columns < DIM, tl.program_id(0).to(tl.int64) * DIM
    wide = tl.load(x + row + columns, mask=is_column, other=0.0).to(tl.float32)
    weighted = tl.load(gradient + row + columns, mask=is_column, other=0.0).to(tl.float32)
    weighted *= tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / DIM + eps)
    along = tl.sum(weighted * wide, 0) / DIM
    found = tl.load(passed + row + columns, mask=is_column, other=0.0).to(tl.float32)
    found += scale * (weighted - wide * (scale * scale * along))
    tl.store(out + row + columns, found.to(out.dtype.element_ty), mask=is_column)


@triton.jit
def _swiglu(gate, up, out, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """A block of a row."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column, row = columns < DIM, tl.program_id(0).to(tl.int64) * DIM
    wide = tl.load(gate + row + columns, mask=is_column, other=0.0).to(tl.float32)
    factor = tl.load(up + row + columns, mask=is_column, other=0.0).to(tl.float32)
    tl.store(out + row + columns, (wide * tl.sigmoid(wide) * factor).to(out.dtype.element_ty), mask=is_column)


@triton.jit
def _swiglu_gradient(gradient, gate, up, of_gate, of_up, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """A block of a row."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column, row = columns < DIM, tl.program_id(0).to(tl.int64) * DIM
    wide = tl.load(gate + row + columns, mask=is_column, other=0.0).to(tl.float32)
    factor = tl.load(up + row + columns, mask=is_column, other=0.0).to(tl.float32)
    given = tl.load(gradient + row + columns, mask=is_column, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(wide)
    silu = wide * sigmoid
    found = given * factor * (sigmoid + silu * (1 - sigmoid))
    tl.store(of_gate + row + columns, found.to(of_gate.dtype.element_ty), mask=is_column)
    tl.store(of_up + row + columns, (given * silu).to(of_up.dtype.element_ty), mask=is_column)


@triton.jit
def _rotate(
    x, cos, sin, out, x_row, HEADS: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """All heads of a token; `BACK` turns the other way round."""
    token, head, feature = tl.program_id(0).to(tl.int64), tl.arange(0, HEAD_BLOCK), tl.arange(0, HALF_BLOCK)
    is_feature = feature < HALF
    turn = token * 2 * HALF + feature
    cos_a = tl.load(cos + turn, mask=is_feature, other=0.0).to(tl.float32)[None, :]
    cos_b = tl.load(cos + turn + HALF, mask=is_feature, other=0.0).to(tl.float32)[None, :]
    sin_a = tl.load(sin + turn, mask=is_feature, other=0.0).to(tl.float32)[None, :]
    sin_b = tl.load(sin + turn + HALF, mask=is_feature, other=0.0).to(tl.float32)[None, :]
    place = head[:, None] * 2 * HALF + feature[None, :]
    is_place = (head < HEADS)[:, None] & is_feature[None, :]
    a = tl.load(x + token * x_row + place, mask=is_place, other=0.0).to(tl.float32)
    b = tl.load(x + token * x_row + place + HALF, mask=is_place, other=0.0).to(tl.float32)
    if BACK:
        first, second = a * cos_a + b * sin_b, b * cos_b - a * sin_a
    else:
        first, second = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    out += token * HEADS * 2 * HALF
    tl.store(out + place, first.to(out.dtype.element_ty), mask=is_place)
    tl.store(out + place + HALF, second.to(out.dtype.element_ty), mask=is_place)


@triton.jit
def _softmax(logits, targets, weights, losses, correct, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """A target: its loss, whether it is the first of the largest logits, and the gradient in the place of the logits."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * WORDS
    words = tl.arange(0, BLOCK)
    largest, norm, best = -float("inf"), 0.0, 0
    for at in range(0, WORDS, BLOCK):
        is_word = words + at < WORDS
        wide = tl.load(logits + at + words, mask=is_word, other=-float("inf")).to(tl.float32)
        highest, place = tl.max(wide, 0, return_indices=True)
        best = tl.where(highest > largest, place + at, best)
        larger = tl.maximum(largest, highest)
        finite = tl.where(larger == -float("inf"), 0.0, larger)
        norm = norm * tl.exp(largest - finite) + tl.sum(tl.exp(wide - finite), 0)
        largest = larger
    log_normalizer = largest + tl.log(norm)
    target, weight = tl.load(targets + row), tl.load(weights + row)
    wanted = tl.load(logits + target).to(tl.float32)
    tl.debug_barrier()  # every warp has read what others overwrite from here on
    tl.store(losses + row, log_normalizer - wanted)
    tl.store(correct + row, best == target)
    for at in range(0, WORDS, BLOCK):
        is_word = words + at < WORDS
        wide = tl.load(logits + at + words, mask=is_word, other=-float("inf")).to(tl.float32)
        probability = tl.exp(wide - log_normalizer)
        found = (probability - (words + at == target).to(tl.float32)) * weight
        tl.store(logits + at + words, found.to(logits.dtype.element_ty), mask=is_word)


@triton.jit
def _adamw(
    theta, exp_avg, exp_avg_sq, gradient, applies, rate, decay, clip, beta1, beta2, correction1, root_correction2, eps,
    columns, row_stride, gradient_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of a run's numbers. Blocks come first in the grid: the other dimensions end at 65,535."""
    run = tl.program_id(1)
    if tl.load(applies + run) == 0:
        return
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_column, place = column < columns, run.to(tl.int64) * row_stride + column
    given = tl.load(gradient + run.to(tl.int64) * gradient_stride + column, mask=is_column, other=0.0)
    given *= tl.load(clip + run)
    first, second = tl.load(beta1 + run), tl.load(beta2 + run)
    mean = tl.load(exp_avg + place, mask=is_column, other=0.0) * first + given * (1 - first)
    square = tl.load(exp_avg_sq + place, mask=is_column, other=0.0) * second + given * given * (1 - second)
    root = tl.sqrt_rn(square)
    denominator = tl.div_rn(root, tl.load(root_correction2 + run) + tl.zeros_like(root)) + tl.load(eps + run)
    step = tl.load(rate + run) / tl.load(correction1 + run)
    value = tl.load(theta + place, mask=is_column, other=0.0) * (1 - tl.load(decay + run))
    tl.store(theta + place, value - step * tl.div_rn(mean, denominator), mask=is_column)
    tl.store(exp_avg + place, mean, mask=is_column)
    tl.store(exp_avg_sq + place, square, mask=is_column)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`train.nn.functional.rms_norm` of [T, dim]."""
    x, (rows, dim) = x.contiguous(), x.shape
    out = torch.empty_like(x)
    _rms_norm[(rows,)](x, weight, out, eps, DIM=dim, **_whole_row(dim))
    return out


def rms_norm_gradient(
    gradient: torch.Tensor, passed: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """`train.nn.functional.rms_norm_gradient` of [T, dim]."""
    gradient, passed, x = gradient.contiguous(), passed.contiguous(), x.contiguous()
    rows, dim = x.shape
    out = torch.empty_like(x)
    _rms_norm_gradient[(rows,)](gradient, passed, x, weight, out, eps, DIM=dim, **_whole_row(dim))
    return out


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`train.nn.functional.swiglu` of [T, dim]."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _swiglu[_blocks(gate)](gate, up, out, DIM=gate.shape[1], BLOCK=BLOCK)
    return out


def swiglu_gradient(gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`train.nn.functional.swiglu_gradient` of [T, dim]."""
    gradient, gate, up = gradient.contiguous(), gate.contiguous(), up.contiguous()
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    _swiglu_gradient[_blocks(gate)](gradient, gate, up, of_gate, of_up, DIM=gate.shape[1], BLOCK=BLOCK)
    return of_gate, of_up


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`train.nn.functional.rotate` of [T, heads, dim]."""
    return _turned(x, cos, sin, back=False)


def rotate_back(gradient: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`train.nn.functional.rotate_back` of [T, heads, dim]."""
    return _turned(gradient, cos, sin, back=True)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: bool) -> torch.Tensor:
    tokens, heads, dim = x.shape
    if cos.shape != (tokens, dim) or sin.shape != (tokens, dim):
        raise ValueError(f"heads {tuple(x.shape)} cannot be turned by {tuple(cos.shape)}: every feature of a head is")
    x = x if x.stride()[1:] == (dim, 1) else x.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    blocks = {"HEAD_BLOCK": triton.next_power_of_2(heads), "HALF_BLOCK": triton.next_power_of_2(dim // 2)}
    _rotate[(tokens,)](
        x, cos.contiguous(), sin.contiguous(), out, x.stride(0), HEADS=heads, HALF=dim // 2, BACK=back, **blocks
    )
    return out


def softmax(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`train.nn.loss.softmax` of [n, words]; the gradient takes the place of the logits."""
    rows, words = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    correct = logits.new_empty(rows, dtype=torch.bool)
    block = min(VOCABULARY_BLOCK, triton.next_power_of_2(words))
    _softmax[(rows,)](logits, targets, weights, losses, correct, WORDS=words, BLOCK=block, num_warps=8)
    return losses, correct, logits


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
    """A program's size for rows of `dim` numbers: some 16 of them for every thread."""
    block = triton.next_power_of_2(dim)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def _blocks(matrix: torch.Tensor) -> tuple[int, int]:
    rows, dim = matrix.shape
    return rows, triton.cdiv(dim, BLOCK)
