"""Activations of a decoder's MLP, alone or times a second projection, each with its gradient written out.

    formula       kept for its backward   autograd function
    activate      x                       activate_autograd
    gated         gate, up                gated_autograd
    split_gated   gate and up as one      gated_autograd

Kernels of the same names are in `train.nn.triton.activations`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from train.nn.functional import dispatch

# Each activation by the name that `train.nn.triton.activations` knows too. PyTorch's kernels compute in no less than float32 and round
# once, without a copy in float32.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}


def _relu2_backward(gradient: torch.Tensor, x: torch.Tensor, grad_input: torch.Tensor) -> torch.Tensor:
    """max(x, 0)^2 (arXiv 2109.08668) has the slope 2 max(x, 0)."""
    return torch.mul(gradient, functional.relu(x).mul_(2), out=grad_input)


# From the gradient of each activation and its input to the gradient of the input, written to `grad_input`, which may be the first.
BACKWARDS: dict[str, Callable[..., torch.Tensor]] = {
    "silu": torch.ops.aten.silu_backward.grad_input,
    "gelu": torch.ops.aten.gelu_backward.grad_input,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward.grad_input, approximate="tanh"),
    "relu": partial(torch.ops.aten.threshold_backward.grad_input, threshold=0),
    "relu2": _relu2_backward,
}


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """One of `ACTIVATIONS` of [T, dim]."""
    return ACTIVATIONS[activation](x)


def activate_backward(gradient: torch.Tensor, x: torch.Tensor, activation: str) -> torch.Tensor:
    """The gradient of x."""
    return BACKWARDS[activation](gradient, x, grad_input=torch.empty_like(gradient))


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) * up (arXiv 2002.05202) of [T, dim]."""
    return ACTIVATIONS[activation](gate) * up


def gated_backward(
    gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up: activation'(gate) * up * gradient, and activation(gate) * gradient.

    These are the widest tensors of a layer, so nothing else of their size is made.
    """
    up_grad = ACTIVATIONS[activation](gate).mul_(gradient)
    gate_grad = gradient * up
    return BACKWARDS[activation](gate_grad, gate, grad_input=gate_grad), up_grad


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
