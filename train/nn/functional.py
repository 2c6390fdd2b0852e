"""The formulas between a decoder's matrix products, each with its gradient written out, so that little is kept for the backward.

Plain functions of tensors compute them in at least float32 and round once; on GPUs from sm_80 on `train.nn.triton.functional` has a
kernel of the same name for each. The autograd functions below choose between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Formula = Callable[..., Any]

# Of a matrix that a plain formula takes at once: what fits a CPU's cache, and what keeps a GPU busy for longer than a launch takes.
CHUNK_NUMBERS = {"cpu": 2**20, "cuda": 2**21}


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm (arXiv 1910.07467) of [T, dim] over the last dimension."""
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * _wide(weight)).to(x.dtype)


def rms_norm_gradient(
    gradient: torch.Tensor, passed: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """The gradient of x from that of its norm, plus `passed`, the gradient that x gets past the norm."""
    wide = _wide(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    weighted = _wide(gradient) * _wide(weight)
    along = (weighted * wide).mean(-1, keepdim=True)
    return (_wide(passed) + scale * (weighted - wide * (scale.square() * along))).to(x.dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (arXiv 2002.05202) of [T, dim]."""
    wide = _wide(gate)
    return (wide * torch.sigmoid(wide) * _wide(up)).to(gate.dtype)


def swiglu_gradient(gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up."""
    wide, wide_gradient = _wide(gate), _wide(gradient)
    sigmoid = torch.sigmoid(wide)
    silu = wide * sigmoid
    del wide  # as below: the fewer copies in float32 at once the better
    slope = (1 - sigmoid).mul_(silu).add_(sigmoid)
    del sigmoid
    of_up = silu.mul_(wide_gradient).to(up.dtype)
    del silu
    return slope.mul_(wide_gradient * up).to(gate.dtype), of_up


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (arXiv 2104.09864) of [T, heads, dim] by cos and sin [T, dim], halves as transformers lays them."""
    (a, b), (cos_a, cos_b), (sin_a, sin_b) = _halves(x), _halves(cos[:, None]), _halves(sin[:, None])
    return _joined(a * cos_a - b * sin_a, b * cos_b + a * sin_b).to(x.dtype)


def rotate_back(gradient: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The gradient of what `rotate` turned: the transposed rotation."""
    (a, b), (cos_a, cos_b), (sin_a, sin_b) = _halves(gradient), _halves(cos[:, None]), _halves(sin[:, None])
    return _joined(a * cos_a + b * sin_b, b * cos_b - a * sin_a).to(gradient.dtype)


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The halves of the last dimension, wide."""
    halves: tuple[torch.Tensor, ...] = _wide(x).unflatten(-1, (2, -1)).unbind(-2)
    return halves


def _joined(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Two halves [..., dim / 2] as one [..., dim]."""
    return torch.stack((a, b), -2).flatten(-2)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """In no less than float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def kernel_of(formula: Formula) -> Formula:
    """The kernel of a formula's name."""
    from train.nn.triton import functional as formulas  # Triton is not everywhere

    kernel: Formula = getattr(formulas, formula.__name__)
    return kernel


def some_rows_at_a_time(formula: Formula, *arguments: Any) -> Any:
    """Compute a formula over the rows of its matrices in chunks: what it holds on its way, copies in float32, stays small."""
    matrices = [isinstance(argument, torch.Tensor) and argument.dim() > 1 for argument in arguments]
    first: torch.Tensor = arguments[matrices.index(True)]
    rows, at_once = len(first), max(1, CHUNK_NUMBERS[first.device.type] * len(first) // max(1, first.numel()))
    if rows <= at_once:
        return formula(*arguments)
    results: list[torch.Tensor] = []
    for at in range(0, rows, at_once):
        chunk = slice(at, at + at_once)
        found = formula(*(x[chunk] if is_matrix else x for x, is_matrix in zip(arguments, matrices, strict=True)))
        parts = found if isinstance(found, tuple) else () if found is None else (found,)
        results = results or [part.new_empty(rows, *part.shape[1:]) for part in parts]
        for result, part in zip(results, parts, strict=True):
            result[chunk] = part
    return tuple(results) if len(results) > 1 else results[0] if results else None


def run(formula: Formula, fused: bool, *arguments: Any) -> Any:
    """Compute a formula, by its kernel where `fused`."""
    return kernel_of(formula)(*arguments) if fused else some_rows_at_a_time(formula, *arguments)


class _NormAndPass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, fused: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.fused = eps, fused
        return run(rms_norm, fused, x, weight, eps), x

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        gradient, passed = gradients
        x, weight = ctx.saved_tensors
        return run(rms_norm_gradient, ctx.fused, gradient, passed, x, weight, ctx.eps), None, None, None


def norm_and_pass(x: torch.Tensor, weight: torch.Tensor, eps: float, fused: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, dim] -> its norm, and x itself for the residual stream: their gradients meet in one kernel."""
    both: tuple[torch.Tensor, torch.Tensor] = _NormAndPass.apply(x, weight, eps, fused)
    return both


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, fused: bool) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.fused = fused
        product: torch.Tensor = run(swiglu, fused, gate, up)
        return product

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        of_gate, of_up = run(swiglu_gradient, ctx.fused, gradients[0], *ctx.saved_tensors)
        return of_gate, of_up, None


def gated(gate: torch.Tensor, up: torch.Tensor, fused: bool) -> torch.Tensor:
    """`swiglu` with a gradient."""
    product: torch.Tensor = _SwiGLU.apply(gate, up, fused)
    return product


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, fused: bool) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.fused = fused
        rotated: torch.Tensor = run(rotate, fused, x, cos, sin)
        return rotated

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return run(rotate_back, ctx.fused, gradients[0], *ctx.saved_tensors), None, None, None


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, fused: bool) -> torch.Tensor:
    """`rotate` with a gradient."""
    turned: torch.Tensor = _Rotate.apply(x, cos, sin, fused)
    return turned
