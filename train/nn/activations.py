"""Activations of a decoder's MLP, alone or times a second projection, each with its gradient written out.

    formula       kept for its backward   autograd function
    activate      x                       activate_autograd
    gated         gate, up                gated_autograd
    split_gated   gate and up as one      gated_autograd

Kernels of the same names are in `train.nn.triton.activations`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from train.nn.functional import dispatch, widened


def _silu_slope(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x * sigmoid(x), of slope sigmoid + silu * (1 - sigmoid)."""
    sigmoid = torch.sigmoid(x)
    silu = x * sigmoid
    return silu, (1 - sigmoid).mul_(silu).add_(sigmoid)


def _gelu_slope(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x * Phi(x) of the normal distribution (arXiv 1606.08415), of slope Phi + x * phi."""
    below = torch.erf(x * math.sqrt(0.5)).add_(1).mul_(0.5)
    density = torch.exp(-0.5 * x.square()).mul_(1 / math.sqrt(2 * math.pi))
    return x * below, density.mul_(x).add_(below)


def _gelu_tanh_slope(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x * h with h = (1 + tanh(u)) / 2 and u = sqrt(2 / pi) * (x + 0.044715 x^3); its slope is h + x * 2 h (1 - h) u'."""
    root = math.sqrt(2 / math.pi)
    square = x.square()
    # (1 + tanh(u)) / 2 = sigmoid(2 u).
    h = torch.sigmoid(2 * root * x * (1 + 0.044715 * square))
    value = x * h
    return value, (2 * root * (1 + 3 * 0.044715 * square)).mul_(1 - h).mul_(value).add_(h)


def _relu_slope(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """max(x, 0), of slope 1 where x > 0."""
    return x.clamp_min(0), (x > 0).to(x.dtype)


def _relu2_slope(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """max(x, 0)^2 (arXiv 2109.08668), of slope 2 max(x, 0)."""
    positive = x.clamp_min(0)
    return positive.square(), 2 * positive


# Each activation by the name that `train.nn.triton.activations` knows too, and its value and slope together. They take wide numbers.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}
SLOPES = {
    "silu": _silu_slope, "gelu": _gelu_slope, "gelu_tanh": _gelu_tanh_slope, "relu": _relu_slope, "relu2": _relu2_slope
}  # fmt: skip


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """One of `ACTIVATIONS` of [T, dim]."""
    return ACTIVATIONS[activation](widened(x)).to(x.dtype)


def activate_backward(gradient: torch.Tensor, x: torch.Tensor, activation: str) -> torch.Tensor:
    """The gradient of x."""
    slope = SLOPES[activation](widened(x))[1]
    return slope.mul_(widened(gradient)).to(x.dtype)


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) * up (arXiv 2002.05202) of [T, dim]."""
    return (ACTIVATIONS[activation](widened(gate)) * widened(up)).to(gate.dtype)


def gated_backward(
    gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up: activation'(gate) * up * gradient, and activation(gate) * gradient.

    Copies in float32 are several times the inputs' size, so each is reused in place or freed as soon as it can be.
    """
    wide_gradient = widened(gradient)
    value, slope = SLOPES[activation](widened(gate))
    up_grad = value.mul_(wide_gradient).to(up.dtype)
    del value
    return slope.mul_(wide_gradient * up).to(gate.dtype), up_grad


def split_gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """`gated` of the halves of [T, 2 dim], gate first: the outputs of one matrix."""
    gate, up = gate_up.chunk(2, -1)
    return gated(gate, up, activation)


def split_gated_backward(gradient: torch.Tensor, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """The gradient of `gate_up`, as one again."""
    gate, up = gate_up.chunk(2, -1)
    return torch.cat(gated_backward(gradient, gate, up, activation), -1)


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, activation: str, fused: bool) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.activation = activation
        ctx.fused = fused
        active: torch.Tensor = dispatch(activate, fused, x, activation)
        return active

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return dispatch(activate_backward, ctx.fused, gradients[0], *ctx.saved_tensors, ctx.activation), None, None


def activate_autograd(x: torch.Tensor, activation: str, fused: bool) -> torch.Tensor:
    """`activate` with autograd."""
    active: torch.Tensor = _Activate.apply(x, activation, fused)
    return active


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: str, fused: bool, *projections: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*projections)
        ctx.activation = activation
        ctx.fused = fused
        formula = gated if len(projections) == 2 else split_gated
        product: torch.Tensor = dispatch(formula, fused, *projections, activation)
        return product

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Read once: activations that are computed again are given out once.
        projections = ctx.saved_tensors
        formula = gated_backward if len(projections) == 2 else split_gated_backward
        found = dispatch(formula, ctx.fused, gradients[0], *projections, ctx.activation)
        return None, None, *(found if isinstance(found, tuple) else (found,))


def gated_autograd(projections: tuple[torch.Tensor, ...], activation: str, fused: bool) -> torch.Tensor:
    """`gated` with autograd of (gate, up), both [T, dim], or of one [T, 2 dim] with gate first."""
    product: torch.Tensor = _Gated.apply(activation, fused, *projections)
    return product
