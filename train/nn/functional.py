"""The formulas between a decoder's matrix products, each with its gradient written out, so that little is kept for the backward.

    formula          kept for its backward   autograd function
    rms_norm         x                       rms_norm_residual
    swiglu           gate, up                swiglu_autograd
    apply_rotary     cos, sin                rotary_autograd

Plain functions of tensors compute them in at least float32 and round once. On GPUs from sm_80 on `train.nn.triton.functional` has a
kernel of the same name for each. The autograd functions choose by `fused`, through `dispatch`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Formula = Callable[..., Any]

# Numbers of a matrix that a plain formula computes at once: what fits a CPU's cache, and what keeps a GPU busy for longer than a
# launch takes.
CHUNK_NUMEL = {"cpu": 2**20, "cuda": 2**21}


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm (arXiv 1910.07467) of [T, dim] over the last dimension."""
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * _wide(weight)).to(x.dtype)


def rms_norm_backward(
    gradient: torch.Tensor, passed: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """The gradient of x [T, dim] from the gradient of its norm, plus `passed`, the gradient of x itself (the residual stream).

    With s = 1 / sqrt(mean(x^2) + eps) and g = gradient * weight:  dx = s * (g - x * s^2 * mean(g * x)) + passed.
    """
    wide = _wide(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    weighted = _wide(gradient) * _wide(weight)
    along = (weighted * wide).mean(-1, keepdim=True)
    return (_wide(passed) + scale * (weighted - wide * (scale.square() * along))).to(x.dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (arXiv 2002.05202) of [T, dim]."""
    wide = _wide(gate)
    return (wide * torch.sigmoid(wide) * _wide(up)).to(gate.dtype)


def swiglu_backward(gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up: silu'(gate) * up * gradient, where silu' = sigmoid + silu * (1 - sigmoid), and silu * gradient.

    Copies in float32 are several times the inputs' size, so each is reused in place or freed as soon as it can be.
    """
    wide = _wide(gate)
    wide_gradient = _wide(gradient)
    sigmoid = torch.sigmoid(wide)
    silu = wide * sigmoid
    del wide
    slope = (1 - sigmoid).mul_(silu).add_(sigmoid)
    del sigmoid
    up_grad = silu.mul_(wide_gradient).to(up.dtype)
    del silu
    return slope.mul_(wide_gradient * up).to(gate.dtype), up_grad


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (arXiv 2104.09864) of [T, heads, dim] by cos and sin [T, dim].

    Feature i of the first half turns with feature i of the second half, as in transformers' `apply_rotary_pos_emb`.
    """
    a, b = _halves(x)
    # cos and sin [T, 1, dim] are the same for all heads of a token.
    cos_a, cos_b = _halves(cos[:, None])
    sin_a, sin_b = _halves(sin[:, None])
    return _joined(a * cos_a - b * sin_a, b * cos_b + a * sin_b).to(x.dtype)


def apply_rotary_backward(gradient: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The gradient of the input of `apply_rotary`: the transposed rotation."""
    a, b = _halves(gradient)
    cos_a, cos_b = _halves(cos[:, None])
    sin_a, sin_b = _halves(sin[:, None])
    return _joined(a * cos_a + b * sin_b, b * cos_b - a * sin_a).to(gradient.dtype)


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The halves of the last dimension, in no less than float32."""
    halves: tuple[torch.Tensor, ...] = _wide(x).unflatten(-1, (2, -1)).unbind(-2)
    return halves


def _joined(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Two halves [..., dim / 2] as one [..., dim]."""
    return torch.stack((a, b), -2).flatten(-2)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """x in no less than float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def triton_kernel(formula: Formula) -> Formula:
    """The Triton kernel with a formula's name."""
    # Here, since Triton is not installed everywhere.
    from train.nn.triton import functional as kernels

    kernel: Formula = getattr(kernels, formula.__name__)
    return kernel


def map_row_chunks(formula: Formula, *arguments: Any) -> Any:
    """Compute a formula over the rows of its matrices, a chunk of rows at a time: its temporary copies in float32 stay small.

    Arguments of more than one dimension are cut, all by the same rows; vectors and numbers are passed whole. With 4,096 features and
    `CHUNK_NUMEL` of 2^20 on a CPU, a matrix of 1,000 rows is computed 256 rows at a time: 256, 256, 256, 232.
    """
    is_matrix = [isinstance(argument, torch.Tensor) and argument.dim() > 1 for argument in arguments]
    first: torch.Tensor = arguments[is_matrix.index(True)]
    rows = len(first)
    chunk_rows = max(1, CHUNK_NUMEL[first.device.type] * rows // max(1, first.numel()))
    if rows <= chunk_rows:
        return formula(*arguments)
    results: list[torch.Tensor] = []
    for start in range(0, rows, chunk_rows):
        chunk = slice(start, start + chunk_rows)
        found = formula(*(x[chunk] if cut else x for x, cut in zip(arguments, is_matrix, strict=True)))
        # A formula returns several tensors, one, or none if it works in place.
        parts = found if isinstance(found, tuple) else () if found is None else (found,)
        results = results or [part.new_empty(rows, *part.shape[1:]) for part in parts]
        for result, part in zip(results, parts, strict=True):
            result[chunk] = part
    return tuple(results) if len(results) > 1 else results[0] if results else None


def dispatch(formula: Formula, fused: bool, *arguments: Any) -> Any:
    """Compute a formula: by its Triton kernel where `fused`, else by torch."""
    return triton_kernel(formula)(*arguments) if fused else map_row_chunks(formula, *arguments)


class _RMSNormResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, fused: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        ctx.fused = fused
        return dispatch(rms_norm, fused, x, weight, eps), x

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        # The gradients of both outputs: the norm's, and that of x in the residual stream.
        gradient, passed = gradients
        x, weight = ctx.saved_tensors
        return dispatch(rms_norm_backward, ctx.fused, gradient, passed, x, weight, ctx.eps), None, None, None


def rms_norm_residual(
    x: torch.Tensor, weight: torch.Tensor, eps: float, fused: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, dim] -> its `rms_norm`, and x itself for the residual stream, so that one kernel adds their gradients."""
    both: tuple[torch.Tensor, torch.Tensor] = _RMSNormResidual.apply(x, weight, eps, fused)
    return both


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, fused: bool) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.fused = fused
        product: torch.Tensor = dispatch(swiglu, fused, gate, up)
        return product

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        gate_grad, up_grad = dispatch(swiglu_backward, ctx.fused, gradients[0], *ctx.saved_tensors)
        return gate_grad, up_grad, None


def swiglu_autograd(gate: torch.Tensor, up: torch.Tensor, fused: bool) -> torch.Tensor:
    """`swiglu` with autograd."""
    product: torch.Tensor = _SwiGLU.apply(gate, up, fused)
    return product


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, fused: bool) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.fused = fused
        rotated: torch.Tensor = dispatch(apply_rotary, fused, x, cos, sin)
        return rotated

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return dispatch(apply_rotary_backward, ctx.fused, gradients[0], *ctx.saved_tensors), None, None, None


def rotary_autograd(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, fused: bool) -> torch.Tensor:
    """`apply_rotary` with autograd."""
    rotated: torch.Tensor = _Rotary.apply(x, cos, sin, fused)
    return rotated
