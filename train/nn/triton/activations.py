"""The kernels of `train.nn.activations`, by the same names: a program takes a block of a row, computes in float32 and rounds once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Numbers of a row that a program computes.
BLOCK = 1024


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    """One of `train.nn.activations.ACTIVATIONS` of float32 numbers."""
    if ACTIVATION == "silu":
        value = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        value = x * (0.5 + 0.5 * tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u), and 1.5957691216057308 is 2 sqrt(2 / pi).
        value = x * tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))
    else:
        value = tl.maximum(x, 0.0)
        if ACTIVATION == "relu2":
            value *= value
    return value


@triton.jit
def _activated_slope(x, ACTIVATION: tl.constexpr):
    """The value of an activation and its slope, by the formulas in `train.nn.activations`."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(x)
        value = x * sigmoid
        slope = sigmoid + value * (1 - sigmoid)
    elif ACTIVATION == "gelu":
        below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        value = x * below
        # 0.3989422804014327 is 1 / sqrt(2 pi).
        slope = below + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
    elif ACTIVATION == "gelu_tanh":
        h = tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))
        value = x * h
        slope = h + value * (1 - h) * (1.5957691216057308 * (1 + 0.134145 * x * x))
    else:
        value = tl.maximum(x, 0.0)
        slope = (x > 0).to(tl.float32)
        if ACTIVATION == "relu2":
            slope = 2 * value
            value *= value
    return value, slope


@triton.jit
def _gated(gate, up, out, gate_row, up_row, ACTIVATION: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """One block of a row; `up` may be None. The rows of gate and up may be apart: halves of wider ones."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < DIM
    # 64 bits, since rows * DIM may exceed 32.
    row = tl.program_id(0).to(tl.int64)
    wide = tl.load(gate + row * gate_row + columns, mask=is_column, other=0.0).to(tl.float32)
    found = _activated(wide, ACTIVATION)
    if up is not None:
        found *= tl.load(up + row * up_row + columns, mask=is_column, other=0.0).to(tl.float32)
    tl.store(out + row * DIM + columns, found.to(out.dtype.element_ty), mask=is_column)


@triton.jit
def _gated_backward(
    gradient, gate, up, gate_grad, up_grad, gate_row, up_row, grad_row,
    ACTIVATION: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of a row; `up` and `up_grad` may be None, and the rows of both gradients are `grad_row` apart."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < DIM
    # 64 bits, since rows * DIM may exceed 32.
    row = tl.program_id(0).to(tl.int64)
    wide = tl.load(gate + row * gate_row + columns, mask=is_column, other=0.0).to(tl.float32)
    given = tl.load(gradient + row * DIM + columns, mask=is_column, other=0.0).to(tl.float32)
    value, slope = _activated_slope(wide, ACTIVATION)
    found = given * slope
    if up is not None:
        factor = tl.load(up + row * up_row + columns, mask=is_column, other=0.0).to(tl.float32)
        found = given * factor * slope
        tl.store(up_grad + row * grad_row + columns, (given * value).to(up_grad.dtype.element_ty), mask=is_column)
    tl.store(gate_grad + row * grad_row + columns, found.to(gate_grad.dtype.element_ty), mask=is_column)


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """`train.nn.activations.activate` of [T, dim]."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _gated[_blocks(x)](x, None, out, x.stride(0), 0, ACTIVATION=activation, DIM=x.shape[1], BLOCK=BLOCK)
    return out


def activate_backward(gradient: torch.Tensor, x: torch.Tensor, activation: str) -> torch.Tensor:
    """`train.nn.activations.activate_backward` of [T, dim]."""
    gradient = gradient.contiguous()
    x = x.contiguous()
    x_grad = torch.empty_like(x)
    _gated_backward[_blocks(x)](
        gradient,
        x,
        None,
        x_grad,
        None,
        x.stride(0),
        0,
        x_grad.stride(0),
        ACTIVATION=activation,
        DIM=x.shape[1],
        BLOCK=BLOCK,
    )
    return x_grad


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """`train.nn.activations.gated` of [T, dim]."""
    gate, up = _with_whole_rows(gate), _with_whole_rows(up)
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    _gated[_blocks(gate)](
        gate, up, out, gate.stride(0), up.stride(0), ACTIVATION=activation, DIM=gate.shape[1], BLOCK=BLOCK
    )
    return out


def gated_backward(
    gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`train.nn.activations.gated_backward` of [T, dim]."""
    gate_grad, up_grad = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, up))
    _launch_gated_backward(gradient, gate, up, gate_grad, up_grad, activation)
    return gate_grad, up_grad


def split_gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """`train.nn.activations.split_gated` of [T, 2 dim]."""
    gate, up = gate_up.chunk(2, -1)
    return gated(gate, up, activation)


def split_gated_backward(gradient: torch.Tensor, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """`train.nn.activations.split_gated_backward` of [T, 2 dim]: both gradients go where they belong in one matrix."""
    joined = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    (gate, up), (gate_grad, up_grad) = gate_up.chunk(2, -1), joined.chunk(2, -1)
    _launch_gated_backward(gradient, gate, up, gate_grad, up_grad, activation)
    return joined


def _launch_gated_backward(
    gradient: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    gate_grad: torch.Tensor,
    up_grad: torch.Tensor,
    activation: str,
) -> None:
    gate, up = _with_whole_rows(gate), _with_whole_rows(up)
    _gated_backward[_blocks(gate)](
        gradient.contiguous(), gate, up, gate_grad, up_grad, gate.stride(0), up.stride(0), gate_grad.stride(0),
        ACTIVATION=activation, DIM=gate.shape[1], BLOCK=BLOCK,
    )  # fmt: skip


def _blocks(matrix: torch.Tensor) -> tuple[int, int]:
    """The grid of a program per block of each row."""
    rows, dim = matrix.shape
    return rows, triton.cdiv(dim, BLOCK)


def _with_whole_rows(matrix: torch.Tensor) -> torch.Tensor:
    """[T, dim] with each row's numbers contiguous; rows may be apart, as in a half of one wide projection."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
