"""Mixtures of experts with frozen weights: every token goes through the experts that its router chose, all tokens of an expert at once.

For N tokens with k choices each, S = N k, every choice is a row:

    x [N, H] -- gather, by expert --> [S, H] -- up --> u [S, 2 I] -- gate --> h [S, I] -- down --> y [S, H] -- sum by token --> [N, H]
                                                                                                   each times its router's weight

Example: 3 tokens chose the experts (2, 0), (2, 1) and (0, 2). Their 6 choices in the order of experts are 1 4 | 3 | 0 2 5, so expert 0
multiplies the rows of tokens 0 and 2, expert 1 that of token 1, and expert 2 those of all three. Row s of the sorted choices belongs to
token order[s] // k.

With the gradient g [N, H] of the output, each choice's row g_s = g[token] and its weight w_s, the backward is

    t   = g_s down           [S, I]       dw_s = <t, h> + <g_s, bias of down>      so y is neither kept nor computed again
    dh  = w_s t              [S, I]       du   = gate'(u) dh
    dx  = sum over a token's choices of du up

The weights are frozen, so x is not kept either: only u, the weights and the order of the choices.

Rows never meet, not even as zeros: whatever is wrong in one token stays there. Sums over a token's choices are gathers, since atomics
would add in another order each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import nn

from train.nn.activations import split_gated, split_gated_backward
from train.nn.forward_context import ForwardContext
from train.nn.functional import dispatch, triton_kernel
from train.nn.padding import pad, unpad
from train.sizing import EXPERTS_CHUNK_BYTES

# Of dequantized experts that are held at once, per device: a chunk keeps a GPU busy for longer than its launches take.
CHUNK_BYTES = {"cpu": 2**26, "cuda": EXPERTS_CHUNK_BYTES}
# Of tokens times features whose sums are computed in float32 at once.
SUM_NUMEL = {"cpu": 2**20, "cuda": 2**25}

# Of both features of a grouped product, whose rows have to be whole 16 bytes apart.
GROUPED_MULTIPLE = 8
# Where transformers' modules keep the norm of an expert's output.
POST_NORM = "post_expert_norm"

Gate = Callable[[torch.Tensor], torch.Tensor]


class Activation(Protocol):
    """What stands between an expert's two products, with its gradient; `fused` where a Triton kernel may compute it."""

    def forward(self, u: torch.Tensor, fused: bool, /) -> torch.Tensor:
        """[S, 2 I] (or [S, I] without a gate) -> [S, I]."""

    def backward(self, gradient: torch.Tensor, u: torch.Tensor, fused: bool, /) -> torch.Tensor:
        """The gradient of u."""


@dataclass(frozen=True)
class SplitGate:
    """activation(gate) * up of the halves of u, by a name of `train.nn.functional.ACTIVATIONS`."""

    activation: str

    def forward(self, u: torch.Tensor, fused: bool) -> torch.Tensor:
        """[S, 2 I] -> [S, I]."""
        product: torch.Tensor = dispatch(split_gated, fused, u, self.activation)
        return product

    def backward(self, gradient: torch.Tensor, u: torch.Tensor, fused: bool) -> torch.Tensor:
        """The gradient of u [S, 2 I]."""
        both: torch.Tensor = dispatch(split_gated_backward, fused, gradient, u, self.activation)
        return both


@dataclass(frozen=True)
class OwnGate:
    """A module's own code, with autograd's gradient."""

    gate: Gate

    def forward(self, u: torch.Tensor, _fused: bool) -> torch.Tensor:
        """[S, 2 I] -> [S, I], or as the module has it."""
        return self.gate(u)

    def backward(self, gradient: torch.Tensor, u: torch.Tensor, _fused: bool) -> torch.Tensor:
        """The gradient of u."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            (u_grad,) = torch.autograd.grad(self.gate(u), u, gradient)
        return u_grad


class Stack(Protocol):
    """The matrices of E experts."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of each."""

    def __len__(self) -> int:
        """How many experts there are."""

    def dense(self, experts: slice | torch.Tensor) -> torch.Tensor:
        """The matrices [e, rows, columns] of some of them, in the compute dtype."""


class DenseStack:
    """Matrices [E, rows, columns] held in the compute dtype."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.shape = (weight.shape[1], weight.shape[2])

    def __len__(self) -> int:
        return len(self.weight)

    def dense(self, experts: slice | torch.Tensor) -> torch.Tensor:
        """The matrices [e, rows, columns] of some experts."""
        return self.weight[experts]


@dataclass(frozen=True)
class ExpertWeights:
    """What a mixture of experts computes with.

    Attributes:
        up: [E, 2 I, H], or [E, I, H] without a gate.
        down: [E, H, I].
        up_bias, down_bias: [E, out], or None.
        transposed: both stacks are [E, in, out] instead.
        gate: what stands between both.
        norm: what the output of each expert goes through before it is weighted, or None.
    """

    up: Stack
    down: Stack
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    transposed: bool
    gate: Activation
    norm: Gate | None = None


@dataclass(frozen=True)
class ExpertsForm:
    """How a module of transformers keeps what `ExpertWeights` names: the name of its stack `up`, and the rest as there."""

    up: str
    transposed: bool
    gate: Activation

    def weights(self, own: nn.Module, held: Mapping[str, Stack]) -> ExpertWeights:
        """The weights of a module `own` whose stacks are `held`, by their names."""
        up_bias, down_bias = (getattr(own, f"{name}_bias", None) for name in (self.up, "down_proj"))
        norm = getattr(own, POST_NORM, None)
        return ExpertWeights(held[self.up], held["down_proj"], up_bias, down_bias, self.transposed, self.gate, norm)


class PackedExperts(nn.Module):
    """The frozen experts of one layer, in place of a module of transformers.

    Args:
        own: that module, without its stacks; its biases and its activation are still used.
        form: what it computes.
        held: its stacks by their names.
    """

    def __init__(self, own: nn.Module, form: ExpertsForm, held: Mapping[str, Stack], context: ForwardContext) -> None:
        super().__init__()
        self.own = own
        self.form = form
        self.held = dict(held)
        self.context = context

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, router_weights: torch.Tensor) -> torch.Tensor:
        """[N, H], with the experts [N, k] that each token chose and their weights [N, k] -> [N, H].

        While the context has padded sequences only the real tokens are multiplied, as in `PackedLinear`.
        """
        weights, kernels = self.form.weights(self.own, self.held), self.context.kernels
        grouped, fused = kernels.grouped_experts, kernels.fused_elementwise
        padding = self.context.padding
        if padding is None or len(x) != padding.gather.numel():
            return mixture(x, chosen, router_weights, weights, grouped=grouped, fused=fused)
        total = self.context.batch.total
        # Of S x L rows those of real tokens.
        x, router_weights = (
            unpad(rows.view(*padding.gather.shape, -1), padding, total) for rows in (x, router_weights)
        )
        chosen = padding.unpad(chosen.view(*padding.gather.shape, -1), total)
        y = mixture(x, chosen, router_weights, weights, grouped=grouped, fused=fused)
        return pad(y, padding).flatten(0, 1)


def mixture(
    x: torch.Tensor,
    chosen: torch.Tensor,
    router_weights: torch.Tensor,
    weights: ExpertWeights,
    *,
    grouped: bool,
    fused: bool = False,
) -> torch.Tensor:
    """The module's docstring: tokens [N, H], choices [N, k] and their weights [N, k] -> [N, H].

    Args:
        grouped: whether one launch multiplies all experts (bf16 on sm_90 and sm_100), else one product per expert.
        fused: whether activation and sums are Triton kernels.
    """
    return cast(torch.Tensor, _Mixture.apply(x, router_weights, chosen, weights, grouped, fused))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Choices:
    """The choices [N, k] of a layer's tokens in the order of experts.

    Attributes:
        order: [S] which choice each row is.
        inverse: [N, k] the row of each choice.
        experts: [S] the expert of each row.
        ends: [E] the row after the last one of each expert, int32.
        host_bounds: `ends` behind a first 0 on the host, once something has asked for `bounds`.
    """

    order: torch.Tensor
    inverse: torch.Tensor
    experts: torch.Tensor
    ends: torch.Tensor
    host_bounds: list[int] = field(default_factory=list)

    @staticmethod
    def of(chosen: torch.Tensor, experts: int) -> _Choices:
        """The choices [N, k] among so many experts."""
        sorted_experts, order = torch.sort(chosen.reshape(-1), stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        ids = torch.arange(experts, device=order.device)
        ends = torch.searchsorted(sorted_experts, ids, right=True).int()
        return _Choices(order, inverse.view(chosen.shape), sorted_experts, ends)

    @property
    def tokens(self) -> torch.Tensor:
        """[S] the token of each row."""
        return self.order // self.inverse.shape[1]

    def bounds(self) -> list[int]:
        """`host_bounds`: the only time that the host waits for the device, and not where a chunk holds all experts."""
        if not self.host_bounds:
            self.host_bounds.extend([0, *self.ends.tolist()])
        return self.host_bounds


def sum_by_token(rows: torch.Tensor, inverse: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
    """Rows [S, H] -> [N, H]: the sum of each token's rows `inverse` [N, k], times `factors` [N, k], rounded once.

    In no less than float32.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    out = rows.new_empty(len(inverse), rows.shape[1])
    step = max(1, SUM_NUMEL[rows.device.type] // rows.shape[1])
    for start in range(0, len(out), step):
        part = inverse[start : start + step]
        total = torch.zeros(len(part), rows.shape[1], dtype=wide, device=rows.device)
        for choice in range(part.shape[1]):
            row = rows[part[:, choice]]
            if factors is None:
                total += row
            else:
                total.addcmul_(row, factors[start : start + step, choice, None].to(wide))
        out[start : start + step] = total
    return out


def _sum(rows: torch.Tensor, inverse: torch.Tensor, factors: torch.Tensor | None, fused: bool) -> torch.Tensor:
    return triton_kernel(sum_by_token)(rows, inverse, factors) if fused else sum_by_token(rows, inverse, factors)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        router_weights: torch.Tensor,
        chosen: torch.Tensor,
        weights: ExpertWeights,
        grouped: bool,
        fused: bool,
    ) -> torch.Tensor:
        choices = _Choices.of(chosen, len(weights.up))
        products = _Products(choices, weights.transposed, grouped)
        u = products.of(x[choices.tokens], weights.up, weights.up_bias)
        y = products.of(weights.gate.forward(u, fused), weights.down, weights.down_bias)
        if weights.norm is not None:
            y = weights.norm(y)
        ctx.save_for_backward(u, router_weights, choices.order, choices.inverse, choices.experts, choices.ends)
        # The host learns the bounds at most once.
        ctx.bounds, ctx.weights, ctx.grouped, ctx.fused = choices.host_bounds, weights, grouped, fused
        return _sum(y, choices.inverse, router_weights, fused)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        u, router_weights, order, inverse, experts, ends = ctx.saved_tensors
        weights = ctx.weights
        choices = _Choices(order, inverse, experts, ends, ctx.bounds)
        products = _Products(choices, weights.transposed, ctx.grouped)
        g = gradients[0][choices.tokens]
        w = router_weights.reshape(-1)[choices.order][:, None]
        h_grad, w_grad = _down_backward(g, w, weights.gate.forward(u, ctx.fused), weights, products)
        u_grad = weights.gate.backward(h_grad, u, ctx.fused)
        del g, u, h_grad
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = _sum(products.back(u_grad, weights.up), choices.inverse, None, ctx.fused)
        return x_grad, w_grad[choices.inverse].to(router_weights.dtype), None, None, None, None


def _down_backward(
    g: torch.Tensor, w: torch.Tensor, h: torch.Tensor, weights: ExpertWeights, products: _Products
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of h [S, I] and of the router's weights [S], from the rows g [S, H] of the output's gradient."""
    if weights.norm is not None:
        with torch.enable_grad():
            y = products.of(h, weights.down, weights.down_bias).requires_grad_()
            normed = weights.norm(y)
        (y_grad,) = torch.autograd.grad(normed, y, (w * g).to(y.dtype))
        return products.back(y_grad, weights.down), _dot(g, normed.detach())
    t = products.back(g, weights.down)
    w_grad = _dot(t, h)
    if weights.down_bias is not None:
        w_grad += _dot(g, weights.down_bias[products.choices.experts])
    return (w * t).to(t.dtype), w_grad


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Rows [S, n] times rows [S, n] -> [S], summed in no less than float32."""
    return (a * b).sum(1, dtype=torch.promote_types(a.dtype, torch.float32))


class _Products:
    """Products of sorted rows with their experts' matrices; a chunk of experts is dequantized at a time."""

    def __init__(self, choices: _Choices, transposed: bool, grouped: bool) -> None:
        self.choices = choices
        self._transposed = transposed
        self._grouped = grouped

    def of(self, rows: torch.Tensor, stack: Stack, bias: torch.Tensor | None) -> torch.Tensor:
        """Rows [S, in] -> [S, out]."""
        y = self._multiply(rows, stack, transpose=not self._transposed)
        return y if bias is None else y.add_(bias[self.choices.experts])

    def back(self, gradient: torch.Tensor, stack: Stack) -> torch.Tensor:
        """The gradient of the rows [S, in] from that of the products [S, out]."""
        return self._multiply(gradient, stack, transpose=self._transposed)

    def _multiply(self, rows: torch.Tensor, stack: Stack, *, transpose: bool) -> torch.Tensor:
        """Rows times the matrices as they are kept [E, rows, columns], or transposed."""
        matrix_bytes = stack.shape[0] * stack.shape[1] * rows.element_size()
        chunk = max(1, CHUNK_BYTES[rows.device.type] // matrix_bytes)
        if not self._grouped or any(side % GROUPED_MULTIPLE for side in stack.shape):
            return self._one_by_one(rows, stack, chunk, transpose)
        if min(len(stack), len(rows)) <= chunk:
            return self._at_once(rows, stack, transpose)
        return self._in_chunks(rows, stack, chunk, transpose)

    def _at_once(self, rows: torch.Tensor, stack: Stack, transpose: bool) -> torch.Tensor:
        """One grouped product, and the host learns nothing about the choices."""
        if len(rows) >= len(stack):
            return _grouped_mm(rows, stack.dense(slice(None)), self.choices.ends, transpose)
        experts, ends = _compact(self.choices.experts)
        return _grouped_mm(rows, stack.dense(experts), ends, transpose)

    def _in_chunks(self, rows: torch.Tensor, stack: Stack, chunk: int, transpose: bool) -> torch.Tensor:
        bounds = self.choices.bounds()
        out = rows.new_empty(len(rows), stack.shape[0 if transpose else 1])
        for first in range(0, len(stack), chunk):
            last = min(first + chunk, len(stack))
            begin, end = bounds[first], bounds[last]
            if begin < end:
                ends = self.choices.ends[first:last] - begin
                out[begin:end] = _grouped_mm(rows[begin:end], stack.dense(slice(first, last)), ends, transpose)
        return out

    def _one_by_one(self, rows: torch.Tensor, stack: Stack, chunk: int, transpose: bool) -> torch.Tensor:
        """One product per chosen expert."""
        bounds = self.choices.bounds()
        out = rows.new_empty(len(rows), stack.shape[0 if transpose else 1])
        chosen = [expert for expert in range(len(stack)) if bounds[expert] < bounds[expert + 1]]
        for part in _parts(chosen, chunk):
            # Neighbors are read in place, others are gathered first.
            neighbors = part[-1] - part[0] + 1 == len(part)
            ids = slice(part[0], part[-1] + 1) if neighbors else torch.tensor(part, device=rows.device)
            for expert, matrix in zip(part, stack.dense(ids), strict=True):
                own = slice(bounds[expert], bounds[expert + 1])
                torch.mm(rows[own], matrix.t() if transpose else matrix, out=out[own])
        return out


def _parts(items: list[int], most: int) -> Iterator[list[int]]:
    for start in range(0, len(items), most):
        yield items[start : start + most]


def _grouped_mm(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor, transpose: bool) -> torch.Tensor:
    """Rows [S, in], sorted by group, times one matrix per group; `ends` [groups] are int32."""
    return torch.nn.functional.grouped_mm(rows, matrices.transpose(1, 2) if transpose else matrices, offs=ends)


def _compact(experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted experts [S] -> those that occur, once each [S], and the ends [S] of their rows; empty groups fill up the end.

    For fewer choices than experts, so that only chosen ones are dequantized. Experts 4 4 7 give 4 7 0 and the ends 2 3 3.
    """
    begins = torch.ones_like(experts)
    begins[1:] = (experts[1:] != experts[:-1]).to(experts.dtype)
    group = begins.cumsum(0) - 1
    found = torch.zeros_like(experts).scatter_(0, group, experts)
    ends = torch.searchsorted(group, torch.arange(len(experts), device=experts.device), right=True).int()
    return found, ends
