"""Frozen linear layers that add to every token the adapter of the run that the token belongs to.

Layers that read the same input (query, key and value; gate and up) are computed together: the input is kept once and only if an
adapter learns from it, and their gradients of it are summed inside of the matrix products. The same goes for what is added to the
output: delta, bias or residual stream are the accumulator that the frozen product starts from.

Weights are kept and multiplied here, never by bitsandbytes' `Linear4bit`: on CPUs with AVX512-BF16 its forward without gradient
repacks the weight for a kernel without autograd, and every later gradient is silently missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from train.data.micro_batch import MicroBatch, Route
from train.lora.parameters import StackedLora
from train.model.nf4 import dequantize
from train.nn.dropout import Dropout
from train.nn.forward_context import ForwardContext
from train.nn.grouped_mm import RunMatmul, run_matmul


class Weight(Protocol):
    """A frozen matrix [out, in]."""

    def dense(self) -> torch.Tensor:
        """Its values [out, in] in the compute dtype."""


class DenseWeight:
    """A weight [out, in] held in the compute dtype."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def dense(self) -> torch.Tensor:
        """The weight itself."""
        return self.weight


class NF4Weight:
    """A weight [out, in] in 4-bit NormalFloat (QLoRA, arXiv 2305.14314), dequantized at each use, forward and backward."""

    def __init__(self, packed: torch.Tensor, state: Any) -> None:
        self.packed, self.state = packed, state

    def dense(self) -> torch.Tensor:
        """The dequantized weight [out, in] in the dtype that it was quantized from."""
        return dequantize(self.packed, self.state)


class PackedLinear(nn.Module):
    """A frozen linear layer with a place for the adapters of a pack (`slot`)."""

    def __init__(self, weight: Weight, bias: torch.Tensor | None, current: ForwardContext) -> None:
        super().__init__()
        self.weight, self.bias, self.current = weight, bias, current
        self.slot: StackedLora | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[1, T, in] -> [1, T, out], or without the first dimension: as a decoder that knows nothing of packs calls it."""
        return linears(x.reshape(-1, x.shape[-1]), [self], None)[0].view(*x.shape[:-1], -1)


def linears(x: torch.Tensor, layers: Sequence[PackedLinear], residual: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """The outputs [T, out] of layers that read x [T, in]; `residual` [T, out] is added to the output of a single one."""
    current = layers[0].current
    batch = current.require()
    adapters = [_adapter(layer.slot, current, batch) for layer in layers]
    anchor = current.anchor_like(x) if any(adapters) else None
    outputs: tuple[torch.Tensor, ...] = _Linears.apply(x, residual, anchor, layers, adapters, batch)
    return outputs


@dataclass(frozen=True)
class _Adapter:
    """What one layer's adapters need in one micro-batch: `a` [G, r, in], `b` [G, out, r], and each token's `scaling`, laid out."""

    slot: StackedLora
    products: RunMatmul
    route: Route
    a: torch.Tensor
    b: torch.Tensor
    scaling: torch.Tensor
    dropout: Dropout | None

    def learn(self, gradient_a: torch.Tensor, gradient_b: torch.Tensor) -> None:
        """Add gradients [G, r, in] and [G, out, r] where the optimizer looks for them."""
        self.route.add(self.slot.grad_a, gradient_a)
        self.route.add(self.slot.grad_b, gradient_b)


def _adapter(slot: StackedLora | None, current: ForwardContext, batch: MicroBatch) -> _Adapter | None:
    """The adapters of one layer, None where no run with tokens here has one."""
    route = None if slot is None else batch.route(slot.members)
    if slot is None or route is None:
        return None
    dropout = None
    if slot.dropout_p is not None and current.dropout_keys is not None:
        dropout = Dropout(slot.dropout_p, current.dropout_keys, slot.dropout_key)
    products = run_matmul(route, batch.total, grouped=current.kernels.grouped)
    scaling = current.once(
        (slot.members, id(slot.scaling)), lambda: products.to_grouped(slot.scaling[batch.run_of_token][:, None])
    )
    return _Adapter(slot, products, route, route.pick(slot.a), route.pick(slot.b), scaling, dropout)


class _Linears(torch.autograd.Function):
    """x [T, in] -> each layer's output, with each token's own run's scaled B A dropout(x) in it.

    Only x and its products with A are kept for the backward, and x only if something learns from it; padded copies and dropout
    masks are made again there. The adapters' gradients go straight to their place in the pack's matrix: autograd knows them only
    through `anchor`, a scalar that asks for a backward where x needs no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        anchor: torch.Tensor | None,
        layers: Sequence[PackedLinear],
        adapters: Sequence[_Adapter | None],
        batch: MicroBatch,
    ) -> tuple[torch.Tensor, ...]:
        laid = _GroupedInput(x, batch)
        outputs, kept = [], []
        for layer, adapter in zip(layers, adapters, strict=True):
            delta = None
            if adapter is not None:
                h = adapter.products.times(laid.of(adapter), adapter.a.transpose(1, 2))
                h.mul_(adapter.scaling)
                kept.append(h)
                delta = adapter.products.from_grouped(adapter.products.times(h, adapter.b.transpose(1, 2)))
            outputs.append(_product(x, layer, delta, residual))
        ctx.save_for_backward(*([x] if kept else []), *kept)
        ctx.layers, ctx.adapters, ctx.batch, ctx.has_residual = layers, adapters, batch, residual is not None
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *kept = ctx.saved_tensors or (None,)
        laid = _GroupedInput(x, ctx.batch)
        wants_x = ctx.needs_input_grad[0]
        gradient_x = None
        for layer, adapter, gradient in zip(ctx.layers, ctx.adapters, gradients, strict=True):
            if adapter is not None:
                delta = _adapter_backward(adapter, laid, kept.pop(0), gradient, ctx.batch, wants_x=wants_x)
                if delta is not None:
                    gradient_x = delta if gradient_x is None else gradient_x.add_(delta)
            if wants_x:
                gradient_x = _gradient_of_input(gradient, layer, gradient_x)
        residual = gradients[0] if ctx.has_residual else None
        return gradient_x, residual, None, None, None, None


class _GroupedInput:
    """The input of some layers as their adapters take it; without dropout they share it."""

    def __init__(self, x: Any, batch: MicroBatch) -> None:
        self._x, self._batch = x, batch  # x is None where there is no adapter to ask for it
        self._shared: dict[tuple[int, ...], torch.Tensor] = {}

    def of(self, adapter: _Adapter) -> torch.Tensor:
        """x, dropped and laid out."""
        if adapter.dropout is not None:
            return adapter.products.to_grouped(adapter.dropout.apply(self._x, self._batch))
        members = adapter.slot.members
        if members not in self._shared:
            self._shared[members] = adapter.products.to_grouped(self._x)
        return self._shared[members]


def _adapter_backward(
    adapter: _Adapter, laid: _GroupedInput, h: torch.Tensor, gradient: torch.Tensor, batch: MicroBatch, *, wants_x: bool
) -> torch.Tensor | None:
    """Let the adapter learn from the gradient [T, out] of its layer's output; its part of the gradient of x, if wanted."""
    products = adapter.products
    laid_gradient = products.to_grouped_zeroed(gradient)
    gradient_h = products.times(laid_gradient, adapter.b).mul_(adapter.scaling)
    adapter.learn(products.outer(gradient_h, laid.of(adapter)), products.outer(laid_gradient, h))
    if not wants_x:
        return None
    delta = products.from_grouped(products.times(gradient_h, adapter.a))
    return delta if adapter.dropout is None else adapter.dropout.apply(delta, batch)


def _gradient_of_input(gradient: torch.Tensor, layer: PackedLinear, others: torch.Tensor | None) -> torch.Tensor:
    """gradient W + others; `others` may be overwritten. As a function it lets go of one weight before the next is unpacked."""
    weight = layer.weight.dense()
    return gradient @ weight if others is None else others.addmm_(gradient, weight)


def _product(
    x: torch.Tensor, layer: PackedLinear, delta: torch.Tensor | None, residual: torch.Tensor | None
) -> torch.Tensor:
    """x W^T + bias + delta + residual; `delta` may be overwritten."""
    weight = layer.weight.dense()
    if delta is None:
        if residual is None:
            return functional.linear(x, weight, layer.bias)
        return torch.addmm(residual if layer.bias is None else residual + layer.bias, x, weight.t())
    for addend in (residual, layer.bias):
        if addend is not None:
            delta.add_(addend)
    return delta.addmm_(x, weight.t())
