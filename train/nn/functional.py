"""Norms, and how the formulas between a decoder's matrix products are computed, each with its gradient written out.

    formula            kept for its backward   autograd function
    normalize          x                       norm_residual
    add_normed         y                       add_normed_autograd
    renorm             y, the sum              renorm_autograd

Plain functions of tensors compute them in at least float32 and round once. On GPUs from sm_80 on `train.nn.triton.functional` has a
kernel of the same name for each. The autograd functions choose by `fused`, through `dispatch`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

Formula = Callable[..., Any]

# Numbers of a matrix that a formula with copies in float32 computes at once: what fits a CPU's cache, and what keeps a GPU busy for
# longer than a launch takes.
CHUNK_NUMEL = {"cpu": 2**20, "cuda": 2**21}


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm over the last dimension: root-mean-square (arXiv 1910.07467), or layer norm (arXiv 1607.06450) where `centered`.

    Attributes:
        weight: [dim], [heads, dim] where each head has its own, or None. It may be wider than what is normed: Gemma's 1 + w loses
            bits in bfloat16.
        eps: what is added to the mean square.
        bias: like `weight`.
        centered: the mean is subtracted first.
    """

    weight: torch.Tensor | None
    eps: float
    bias: torch.Tensor | None = None
    centered: bool = False


def normalize(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """The norm of [T, ..., dim] over the last dimension."""
    return _normalized(x, norm).to(x.dtype)


def normalize_backward(
    gradient: torch.Tensor, passed: torch.Tensor | None, x: torch.Tensor, norm: Norm
) -> torch.Tensor:
    """The gradient of x [T, ..., dim] from the gradient of its norm, plus `passed`, the gradient of x itself (the residual stream).

    With c = x, or x - mean(x) where centered, s = 1 / sqrt(mean(c^2) + eps) and g = gradient * weight:

        dx = s * (g - c * s^2 * mean(g * c)) + passed             and - s * mean(g) where centered
    """
    found = _normalized_backward(gradient, x, norm)
    # In place: `passed` is promoted to what `found` is wide.
    return (found if passed is None else found.add_(passed)).to(x.dtype)


def add_normed(residual: torch.Tensor, y: torch.Tensor, norm: Norm | None, multiplier: float) -> torch.Tensor:
    """residual + multiplier * norm(y), all [T, dim]; y itself without a norm."""
    branch = y if norm is None else _normalized(y, norm)
    return torch.add(residual, branch, alpha=multiplier).to(residual.dtype)


def add_normed_backward(gradient: torch.Tensor, y: torch.Tensor, norm: Norm, multiplier: float) -> torch.Tensor:
    """The gradient of y [T, dim] in `add_normed`; that of the residual is the gradient itself."""
    return (_normalized_backward(gradient, y, norm) * multiplier).to(y.dtype)


def renorm(
    residual: torch.Tensor, y: torch.Tensor, behind: Norm, multiplier: float, before: Norm
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_normed` of one branch and the norm before the next one, both [T, dim]: the sum is read from memory once less."""
    hidden = add_normed(residual, y, behind, multiplier)
    return normalize(hidden, before), hidden


def renorm_backward(
    gradient: torch.Tensor,
    passed: torch.Tensor,
    hidden: torch.Tensor,
    y: torch.Tensor,
    behind: Norm,
    multiplier: float,
    before: Norm,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of residual and y, from those of the norm and of the sum `hidden`, which `passed` is."""
    hidden_grad = normalize_backward(gradient, passed, hidden, before)
    return hidden_grad, add_normed_backward(hidden_grad, y, behind, multiplier)


def _normalized(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """`normalize` before it is rounded, but by PyTorch's fused norms."""
    if _is_fused(x, norm):
        return _fused_norm(x, norm)[0]
    wide = widened(x)
    if norm.centered:
        wide = wide - wide.mean(-1, keepdim=True)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    if norm.weight is not None:
        normed = normed * widened(norm.weight)
    return normed if norm.bias is None else normed + widened(norm.bias)


def _normalized_backward(gradient: torch.Tensor, x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """`normalize_backward` without `passed`, before it is rounded, but by PyTorch's fused norms."""
    if _is_fused(x, norm):
        return _fused_norm_backward(gradient, x, norm)
    wide = widened(x)
    if norm.centered:
        wide = wide - wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    weighted = widened(gradient) if norm.weight is None else widened(gradient) * widened(norm.weight)
    along = (weighted * wide).mean(-1, keepdim=True)
    found = scale * (weighted - wide * (scale.square() * along))
    return found - scale * weighted.mean(-1, keepdim=True) if norm.centered else found


def _is_fused(x: torch.Tensor, norm: Norm) -> bool:
    """Whether PyTorch's kernels take this norm: on GPUs, by one weight for all heads. On CPUs they keep statistics in 16 bits."""
    return x.device.type != "cpu" and (norm.weight is None or norm.weight.dim() == 1)


def _fused_operands(x: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """x, weight and bias in one dtype, as the kernels take them: x's own, where the weight is no wider."""
    weights = [each for each in (norm.weight, norm.bias) if each is not None]
    dtype = x.dtype if all(each.dtype == x.dtype for each in weights) else torch.promote_types(x.dtype, torch.float32)
    weight, bias = (each if each is None else each.to(dtype) for each in (norm.weight, norm.bias))
    return x.to(dtype), weight, bias


def _fused_norm(x: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, ...]:
    """The norm and its statistics, which are no narrower than float32: [mean,] 1 / root of the mean square."""
    x, weight, bias = _fused_operands(x, norm)
    if norm.centered:
        found: tuple[torch.Tensor, ...] = torch.native_layer_norm(x, x.shape[-1:], weight, bias, norm.eps)
        return found
    normed, scale = torch.ops.aten._fused_rms_norm(x, x.shape[-1:], weight, norm.eps)
    return (normed if bias is None else normed + bias), scale


def _fused_norm_backward(gradient: torch.Tensor, x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """The gradient of x. The norm is computed again, for its statistics."""
    _, *statistics = _fused_norm(x, norm)
    x, weight, bias = _fused_operands(x, norm)
    gradient = gradient.to(x.dtype)
    # Of x alone: weights are frozen.
    if norm.centered:
        found = torch.ops.aten.native_layer_norm_backward(
            gradient, x, x.shape[-1:], *statistics, weight, bias, [True, False, False]
        )
    else:
        found = torch.ops.aten._fused_rms_norm_backward(gradient, x, x.shape[-1:], *statistics, weight, [True, False])
    x_grad: torch.Tensor = found[0]
    return x_grad


def masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of q [S, heads, L, dim] to k and v [S, key-value heads, M, dim], with autograd.

    `seen` masks the scores [S, heads, L, M] or all that broadcasts to them; `softcap` and `sinks` are as `train.nn.attention.attend`
    takes them.
    """
    of_keys = k.shape[1]
    if softcap is None and sinks is None:
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scale, enable_gqa=q.shape[1] != of_keys
        )
    # [S, K, H / K, L, dim] and [S, K, 1, M, dim]: grouped-query attention without copies of the keys.
    grouped, k, v = q.unflatten(1, (of_keys, -1)), k.unsqueeze(2), v.unsqueeze(2)
    # Scaled before the product, which would exceed float16's range sooner.
    scores = widened((grouped * scale) @ k.transpose(-1, -2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen.unsqueeze(-3), -math.inf)
    if sinks is not None:
        # A score more in every row [S, K, H / K, L, M + 1].
        column = sinks.to(scores.dtype).view(1, of_keys, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, column), -1)
    weights = torch.softmax(scores, -1)[..., : k.shape[-2]]
    return (weights.to(v.dtype) @ v).flatten(1, 2)


def widened(x: torch.Tensor) -> torch.Tensor:
    """x in no less than float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def triton_kernel(formula: Formula) -> Formula:
    """The Triton kernel with a formula's name."""
    # Here, since Triton is not installed everywhere.
    from train.nn.triton import activations, heads
    from train.nn.triton import functional as others

    kernels = {"train.nn.activations": activations, "train.nn.heads": heads}.get(formula.__module__, others)
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
    """Compute a formula of the decoder: by its Triton kernel where `fused`, else by torch.

    On GPUs all rows at once: torch's fused operations make few copies there, and each further part is as many launches again.
    """
    if fused:
        return triton_kernel(formula)(*arguments)
    on_cpu = any(isinstance(argument, torch.Tensor) and argument.device.type == "cpu" for argument in arguments)
    return map_row_chunks(formula, *arguments) if on_cpu else formula(*arguments)


class _NormResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm: Norm, fused: bool) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x)
        ctx.norm = norm
        ctx.fused = fused
        return dispatch(normalize, fused, x, norm), x

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        # The gradients of both outputs: the norm's, and that of x in the residual stream.
        gradient, passed = gradients
        return dispatch(normalize_backward, ctx.fused, gradient, passed, *ctx.saved_tensors, ctx.norm), None, None


def norm_residual(x: torch.Tensor, norm: Norm, fused: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, dim] -> its norm, and x itself for the residual stream, so that one kernel adds their gradients."""
    both: tuple[torch.Tensor, torch.Tensor] = _NormResidual.apply(x, norm, fused)
    return both


class _AddNormed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual: torch.Tensor, y: torch.Tensor, norm: Norm | None, multiplier: float, fused: bool
    ) -> torch.Tensor:
        # Without a norm y's gradient needs no y.
        ctx.save_for_backward(*([] if norm is None else [y]))
        ctx.norm = norm
        ctx.multiplier = multiplier
        ctx.fused = fused
        added: torch.Tensor = dispatch(add_normed, fused, residual, y, norm, multiplier)
        return added

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient = gradients[0]
        if ctx.norm is None:
            y_grad = gradient if ctx.multiplier == 1 else gradient * ctx.multiplier
        else:
            y_grad = dispatch(add_normed_backward, ctx.fused, gradient, *ctx.saved_tensors, ctx.norm, ctx.multiplier)
        return gradient, y_grad, None, None, None


def add_normed_autograd(
    residual: torch.Tensor, y: torch.Tensor, norm: Norm | None, multiplier: float, fused: bool
) -> torch.Tensor:
    """`add_normed` with autograd: what norms behind a branch (OLMo 2, Gemma 2) and multipliers of it (Granite) take."""
    added: torch.Tensor = _AddNormed.apply(residual, y, norm, multiplier, fused)
    return added


class _Renorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: torch.Tensor,
        y: torch.Tensor,
        behind: Norm,
        multiplier: float,
        before: Norm,
        fused: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, hidden = dispatch(renorm, fused, residual, y, behind, multiplier, before)
        ctx.save_for_backward(hidden, y)
        ctx.arguments = behind, multiplier, before
        ctx.fused = fused
        return normed, hidden

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        found = dispatch(renorm_backward, ctx.fused, *gradients, *ctx.saved_tensors, *ctx.arguments)
        return *found, None, None, None, None


def renorm_autograd(
    residual: torch.Tensor, y: torch.Tensor, behind: Norm, multiplier: float, before: Norm, fused: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`renorm` with autograd: between attention and MLP of models that norm a branch before and behind (Gemma 2 and 3)."""
    both: tuple[torch.Tensor, torch.Tensor] = _Renorm.apply(residual, y, behind, multiplier, before, fused)
    return both
