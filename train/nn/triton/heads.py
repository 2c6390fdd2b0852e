"""The kernels of `train.nn.heads`, by the same names: a program takes all heads of one token, computes in float32 and rounds once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from train.nn.heads import HeadTransform


@triton.jit
def _rotary(
    x, cos, sin, out, x_row, HEADS: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """All heads of one token; `BACK` rotates the other way, which is the gradient.

    Feature i of the first half and feature HALF + i are the two coordinates that one angle rotates.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEAD_BLOCK)
    feature = tl.arange(0, HALF_BLOCK)
    is_feature = feature < HALF
    turn = token * 2 * HALF + feature
    cos_a = tl.load(cos + turn, mask=is_feature, other=0.0).to(tl.float32)[None, :]
    cos_b = tl.load(cos + turn + HALF, mask=is_feature, other=0.0).to(tl.float32)[None, :]
    sin_a = tl.load(sin + turn, mask=is_feature, other=0.0).to(tl.float32)[None, :]
    sin_b = tl.load(sin + turn + HALF, mask=is_feature, other=0.0).to(tl.float32)[None, :]
    # Where the first half of each head is within the token's row: head h starts at h * 2 * HALF.
    place = head[:, None] * 2 * HALF + feature[None, :]
    is_place = (head < HEADS)[:, None] & is_feature[None, :]
    a = tl.load(x + token * x_row + place, mask=is_place, other=0.0).to(tl.float32)
    b = tl.load(x + token * x_row + place + HALF, mask=is_place, other=0.0).to(tl.float32)
    if BACK:
        first = a * cos_a + b * sin_b
        second = b * cos_b - a * sin_a
    else:
        first = a * cos_a - b * sin_a
        second = b * cos_b + a * sin_b
    out += token * HEADS * 2 * HALF
    tl.store(out + place, first.to(out.dtype.element_ty), mask=is_place)
    tl.store(out + place + HALF, second.to(out.dtype.element_ty), mask=is_place)


@triton.jit
def _partners(features, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The feature that each one is rotated with, and the sign of what that one adds; a feature that is not rotated has itself.

    Of 6 features, 4 of them rotated: 2 3 0 1 4 5 with signs - - + + for halves, 1 0 3 2 4 5 with - + - + for neighbours.
    """
    if INTERLEAVED:
        is_first = features % 2 == 0
        partners = tl.where(is_first, features + 1, features - 1)
    else:
        is_first = features < ROTARY // 2
        partners = tl.where(is_first, features + ROTARY // 2, features - ROTARY // 2)
    return tl.where(features < ROTARY, partners, features), tl.where(is_first, -1.0, 1.0)


@triton.jit
def _turn(angles, token, features, ROTARY: tl.constexpr, other):
    """Cosines or sines [1, features] of a token; `other` for features that are not rotated."""
    loaded = tl.load(angles + token * ROTARY + features, mask=features < ROTARY, other=other)
    return loaded.to(tl.float32)[None, :]


@triton.jit
def _mean(x, OVER_ALL: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr):
    """The means of [heads, features] for each head [heads, 1], or those of all heads again and again; places past the end are zero."""
    sums = tl.sum(x, 1)
    count = DIM
    if OVER_ALL:
        sums = tl.zeros_like(sums) + tl.sum(sums, 0)
        count = HEADS * DIM
    return (sums / count)[:, None]


@triton.jit
def _factors(weight, head, features, is_place, WEIGHT_HEAD: tl.constexpr):
    """A norm's weight or bias, the same [features] for all heads where WEIGHT_HEAD, the stride between heads, is 0."""
    place = head[:, None] * WEIGHT_HEAD + features[None, :]
    return tl.load(weight + place, mask=is_place, other=0.0).to(tl.float32)


@triton.jit
def _prepare_heads(
    x, cos, sin, weight, bias, out, x_row, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, ROTATE_FIRST: tl.constexpr,
    NORMED: tl.constexpr, CENTERED: tl.constexpr, OVER_ALL: tl.constexpr, WEIGHT_HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr,
):  # fmt: skip
    """All heads of one token, by the formulas in `train.nn.heads`.

    A rotated feature is y = x cos + sign x' sin, where x' is its partner's number. Partners are loaded a second time, from the cache,
    instead of being moved between threads.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEAD_BLOCK)
    features = tl.arange(0, DIM_BLOCK)
    is_place = (head < HEADS)[:, None] & (features < DIM)[None, :]
    partners, sign = _partners(features, ROTARY, INTERLEAVED)
    heads = x + token * x_row + head[:, None] * DIM
    own = tl.load(heads + features[None, :], mask=is_place, other=0.0).to(tl.float32)
    other = own
    if ROTARY > 0:
        other = tl.load(heads + partners[None, :], mask=is_place, other=0.0).to(tl.float32)
        cos_own = _turn(cos, token, features, ROTARY, 1.0)
        sin_own = sign[None, :] * _turn(sin, token, features, ROTARY, 0.0)
        if ROTATE_FIRST:
            own = own * cos_own + other * sin_own
    if NORMED:
        if CENTERED:
            mean = _mean(own, OVER_ALL, HEADS, DIM)
            own = tl.where(is_place, own - mean, 0.0)
            other -= mean
        scale = tl.rsqrt(_mean(own * own, OVER_ALL, HEADS, DIM) + eps)
        own *= scale
        other *= scale
        if weight is not None:
            own *= _factors(weight, head, features, is_place, WEIGHT_HEAD)
            other *= _factors(weight, head, partners, is_place, WEIGHT_HEAD)
        if bias is not None:
            own += _factors(bias, head, features, is_place, WEIGHT_HEAD)
            other += _factors(bias, head, partners, is_place, WEIGHT_HEAD)
    if ROTARY > 0 and not ROTATE_FIRST:
        own = own * cos_own + other * sin_own
    place = token * HEADS * DIM + head[:, None] * DIM + features[None, :]
    tl.store(out + place, own.to(out.dtype.element_ty), mask=is_place)


@triton.jit
def _prepare_heads_backward(
    gradient, x, cos, sin, weight, out, gradient_row, x_row, out_row, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, ROTATE_FIRST: tl.constexpr,
    NORMED: tl.constexpr, CENTERED: tl.constexpr, OVER_ALL: tl.constexpr, WEIGHT_HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr,
):  # fmt: skip
    """All heads of one token. The transposed rotation is dx = dy cos - sign dy' sin', where ' is the partner's."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEAD_BLOCK)
    features = tl.arange(0, DIM_BLOCK)
    is_place = (head < HEADS)[:, None] & (features < DIM)[None, :]
    partners, sign = _partners(features, ROTARY, INTERLEAVED)
    given = gradient + token * gradient_row + head[:, None] * DIM
    own_grad = tl.load(given + features[None, :], mask=is_place, other=0.0).to(tl.float32)
    other_grad = own_grad
    if ROTARY > 0:
        other_grad = tl.load(given + partners[None, :], mask=is_place, other=0.0).to(tl.float32)
        cos_own = _turn(cos, token, features, ROTARY, 1.0)
        sin_other = sign[None, :] * _turn(sin, token, partners, ROTARY, 0.0)
        if not ROTATE_FIRST:
            own_grad = own_grad * cos_own - other_grad * sin_other
    if NORMED:
        heads = x + token * x_row + head[:, None] * DIM
        own = tl.load(heads + features[None, :], mask=is_place, other=0.0).to(tl.float32)
        if weight is not None:
            own_grad *= _factors(weight, head, features, is_place, WEIGHT_HEAD)
        if ROTATE_FIRST and ROTARY > 0:
            # What the norm was given: the rotated features and their rotated partners, whose sign is the other one.
            other = tl.load(heads + partners[None, :], mask=is_place, other=0.0).to(tl.float32)
            turned = own * cos_own + other * (sign[None, :] * _turn(sin, token, features, ROTARY, 0.0))
            other = other * _turn(cos, token, partners, ROTARY, 1.0) - own * sin_other
            own = turned
            if weight is not None:
                other_grad *= _factors(weight, head, partners, is_place, WEIGHT_HEAD)
        if CENTERED:
            mean = _mean(own, OVER_ALL, HEADS, DIM)
            own = tl.where(is_place, own - mean, 0.0)
        scale = tl.rsqrt(_mean(own * own, OVER_ALL, HEADS, DIM) + eps)
        along = scale * scale * _mean(own_grad * own, OVER_ALL, HEADS, DIM)
        level = own_grad * 0.0
        if CENTERED:
            level += _mean(own_grad, OVER_ALL, HEADS, DIM)
        if ROTATE_FIRST and ROTARY > 0:
            if CENTERED:
                other -= mean
            other_grad = scale * (other_grad - other * along - level)
        own_grad = scale * (own_grad - own * along - level)
    if ROTATE_FIRST and ROTARY > 0:
        own_grad = own_grad * cos_own - other_grad * sin_other
    place = token * out_row + head[:, None] * DIM + features[None, :]
    tl.store(out + place, own_grad.to(out.dtype.element_ty), mask=is_place)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`train.nn.heads.apply_rotary` of [T, heads, dim]."""
    return _rotate_heads(x, cos, sin, back=False)


def apply_rotary_backward(gradient: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`train.nn.heads.apply_rotary_backward` of [T, heads, dim]."""
    return _rotate_heads(gradient, cos, sin, back=True)


def _rotate_heads(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: bool) -> torch.Tensor:
    """x [T, heads, dim] rotated by cos and sin [T, dim]; tokens may be apart, as in a view of one wide projection."""
    tokens, heads, dim = x.shape
    if cos.shape != (tokens, dim) or sin.shape != (tokens, dim):
        raise ValueError(
            f"heads {tuple(x.shape)} cannot be rotated by cos {tuple(cos.shape)} and sin {tuple(sin.shape)}: the kernel rotates every "
            "feature of a head"
        )
    x = _with_whole_heads(x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    # Triton's ranges are powers of two; masks leave out what is past 9 heads or 48 features.
    blocks = {"HEAD_BLOCK": triton.next_power_of_2(heads), "HALF_BLOCK": triton.next_power_of_2(dim // 2)}
    _rotary[(tokens,)](
        x, cos.contiguous(), sin.contiguous(), out, x.stride(0), HEADS=heads, HALF=dim // 2, BACK=back, **blocks
    )
    return out


def prepare_heads(
    x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, transform: HeadTransform
) -> torch.Tensor:
    """`train.nn.heads.prepare_heads` of [T, heads, dim]; tokens may be apart, as in a view of one wide projection."""
    x = _with_whole_heads(x)
    norm = transform.norm
    weight, bias, eps = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _prepare_heads[(len(x),)](
        x, *_whole_angles(x, cos, sin), weight, bias, out, x.stride(0), eps, **_constants(x, cos, transform)
    )
    return out


def prepare_heads_backward(
    gradient: torch.Tensor,
    x: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    transform: HeadTransform,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`train.nn.heads.prepare_heads_backward` of [T, heads, dim], in `out` if it is given, whose tokens may be apart."""
    gradient = _with_whole_heads(gradient)
    # Without a norm x is not read.
    x = gradient if x is None or transform.norm is None else _with_whole_heads(x)
    norm = transform.norm
    weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    out = torch.empty_like(gradient, memory_format=torch.contiguous_format) if out is None else out
    _prepare_heads_backward[(len(x),)](
        gradient, x, *_whole_angles(x, cos, sin), weight, out, gradient.stride(0), x.stride(0), out.stride(0), eps,
        **_constants(x, cos, transform),
    )  # fmt: skip
    return out


def _whole_angles(
    x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """cos and sin [T, R], contiguous."""
    if cos is None or sin is None:
        return None, None
    if cos.shape != sin.shape or len(cos) != len(x) or cos.shape[1] > x.shape[2] or cos.shape[1] % 2:
        raise ValueError(
            f"heads {tuple(x.shape)} cannot be rotated by cos {tuple(cos.shape)} and sin {tuple(sin.shape)}: the kernel takes both "
            "for an even number of features, no more than a head has"
        )
    return cos.contiguous(), sin.contiguous()


def _constants(x: torch.Tensor, cos: torch.Tensor | None, transform: HeadTransform) -> dict[str, int | bool]:
    """What a kernel is compiled for: the shape of the heads and the transform, with about 16 numbers for every thread."""
    _, heads, dim = x.shape
    norm = transform.norm
    is_own = norm is not None and norm.weight is not None and norm.weight.numel() > dim
    blocks = {"HEAD_BLOCK": triton.next_power_of_2(heads), "DIM_BLOCK": triton.next_power_of_2(dim)}
    return {
        "HEADS": heads,
        "DIM": dim,
        "ROTARY": 0 if cos is None else cos.shape[1],
        "INTERLEAVED": transform.interleaved,
        "ROTATE_FIRST": transform.rotate_first,
        "NORMED": norm is not None,
        "CENTERED": norm is not None and norm.centered,
        "OVER_ALL": transform.over_all_heads,
        "WEIGHT_HEAD": dim if is_own else 0,
        "num_warps": min(16, max(1, blocks["HEAD_BLOCK"] * blocks["DIM_BLOCK"] // 512)),
    } | blocks


def _with_whole_heads(x: torch.Tensor) -> torch.Tensor:
    """x [T, heads, dim] with each token's features contiguous; tokens may be apart."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
