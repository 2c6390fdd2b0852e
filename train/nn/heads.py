"""The heads of queries and keys between their projection and their products: normed, rotated, or both.

    formula         kept for its backward   autograd function
    apply_rotary    cos, sin                rotary_autograd
    prepare_heads   x, cos, sin             heads_autograd

x [T, heads, dim] is normed by the head's own numbers (Qwen3, Gemma 3; Cohere with a weight for each head) or by those of all heads
(OLMo 2), and the first features of each head are rotated (all of them, a part, or none). `train.nn.attention.attend_heads` keeps
neither normed nor rotated heads for the backward. Kernels of the same names are in `train.nn.triton.heads`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from train.nn.functional import Norm, dispatch, normalize, normalize_backward

# cos and sin [T, R] of each token's rotation.
CosSin = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class HeadTransform:
    """What becomes of the heads of a projection; by default they are rotated as Llama's.

    Attributes:
        norm: of each head; None if they are not normed. Its weight is [dim], or [heads, dim] where each head has its own.
        over_all_heads: the norm is one of all heads' features; its weight is [heads * dim].
        interleaved: which features are rotated together, see `apply_rotary`.
        rotate_first: the norm comes after the rotation (Hunyuan), not before it.
    """

    norm: Norm | None = None
    over_all_heads: bool = False
    interleaved: bool = False
    rotate_first: bool = False


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Rotary position embedding (arXiv 2104.09864) of [T, heads, dim] by cos and sin [T, R]: of the first R features of each head.

    Feature i of the first half of R turns with feature i of the second half, as in transformers' `apply_rotary_pos_emb` for Llama,
    or each even feature with the next one where `interleaved`. In both, cos[:, i] belongs to feature i, so an interleaved rotation
    takes angles that are repeated in pairs, as Cohere's are; GLM's, which are repeated as halves, have to be reordered before.
    """
    return _turned(x, cos, sin, interleaved, 1)


def apply_rotary_backward(
    gradient: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """The gradient of the input of `apply_rotary`: the transposed rotation, where each feature takes its partner's sine, negated."""
    return _turned(gradient, cos, sin, interleaved, -1)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, direction: int) -> torch.Tensor:
    """a * cos_a - b * sin_a and b * cos_b + a * sin_b of each rotated pair a, b; transposed where `direction` is -1.

    In x's dtype: each of the two steps computes in no less than float32 and rounds, which is one rounding less than transformers'.
    """
    rotated = cos.shape[-1]
    # cos and sin [T, 1, R] are the same for all heads of a token.
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    a, b = _pairs(x[..., :rotated], interleaved)
    sin_a, sin_b = _pairs(sin, interleaved)[::direction]
    if rotated == x.shape[-1]:
        found = x * cos
    else:
        found = x.clone(memory_format=torch.contiguous_format)
        found[..., :rotated].mul_(cos)
    found_a, found_b = _pairs(found[..., :rotated], interleaved)
    found_a.addcmul_(b, sin_a, value=-direction)
    found_b.addcmul_(a, sin_b, value=direction)
    return found


def _pairs(x: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The two coordinates of each rotated pair of features [..., R] -> 2 x [..., R / 2], as views."""
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def prepare_heads(
    x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, transform: HeadTransform
) -> torch.Tensor:
    """x [T, heads, dim] normed and rotated by cos and sin [T, R], None for no rotation."""
    if transform.rotate_first:
        return _normed_heads(_rotated(x, cos, sin, transform), transform)
    return _rotated(_normed_heads(x, transform), cos, sin, transform)


def prepare_heads_backward(
    gradient: torch.Tensor,
    x: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    transform: HeadTransform,
) -> torch.Tensor:
    """The gradient of x from that of `prepare_heads`: its two steps backwards. Only a norm reads x, else it may be None."""
    if transform.norm is None or x is None:
        return _turned_back(gradient, cos, sin, transform)
    if transform.rotate_first:
        given = _rotated(x, cos, sin, transform)
        return _turned_back(_normed_heads_backward(gradient, given, transform), cos, sin, transform)
    return _normed_heads_backward(_turned_back(gradient, cos, sin, transform), x, transform)


def _normed_heads(x: torch.Tensor, transform: HeadTransform) -> torch.Tensor:
    if transform.norm is None:
        return x
    if transform.over_all_heads:
        return normalize(x.flatten(1), transform.norm).view(x.shape)
    return normalize(x, transform.norm)


def _normed_heads_backward(gradient: torch.Tensor, x: torch.Tensor, transform: HeadTransform) -> torch.Tensor:
    if transform.norm is None:
        return gradient
    if transform.over_all_heads:
        return normalize_backward(gradient.flatten(1), None, x.flatten(1), transform.norm).view(x.shape)
    return normalize_backward(gradient, None, x, transform.norm)


def _rotated(
    x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, transform: HeadTransform
) -> torch.Tensor:
    return x if cos is None or sin is None else apply_rotary(x, cos, sin, transform.interleaved)


def _turned_back(
    gradient: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, transform: HeadTransform
) -> torch.Tensor:
    if cos is None or sin is None:
        return gradient
    return apply_rotary_backward(gradient, cos, sin, transform.interleaved)


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


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        transform: HeadTransform,
        fused: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(None if transform.norm is None else x, cos, sin)
        ctx.transform = transform
        ctx.fused = fused
        prepared: torch.Tensor = dispatch(prepare_heads, fused, x, cos, sin, transform)
        return prepared

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_grad = dispatch(prepare_heads_backward, ctx.fused, gradients[0], *ctx.saved_tensors, ctx.transform)
        return x_grad, None, None, None, None


def heads_autograd(x: torch.Tensor, cos_sin: CosSin | None, transform: HeadTransform, fused: bool) -> torch.Tensor:
    """`prepare_heads` with autograd."""
    cos, sin = cos_sin or (None, None)
    if transform.norm is None and not transform.interleaved:
        if cos is None or sin is None:
            return x
        if cos.shape[-1] == x.shape[-1]:
            return rotary_autograd(x, cos, sin, fused)
    prepared: torch.Tensor = _Heads.apply(x, cos, sin, transform, fused)
    return prepared
