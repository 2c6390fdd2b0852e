"""Frozen linear layers that add to every token the adapter of the run that the token belongs to.

For T flat tokens of G runs, with A and B padded to the largest rank r:

    x [T, in] --+------------------ W [out, in], frozen ------------------+--> + --> y [T, out]
                |                                                         |    ^
                +-- dropout --> A [G, r, in] --> h [T, r] --> B [G, out, r]    bias, residual
                                each token by its own run's matrices

    forward    h     = s * dropout(x) A^T             s: the run's scaling, alpha / r
               y     = x W^T + h B^T + bias + residual
    backward   dB    = g^T h                          g = dy [T, out]; sums over each run's own tokens
    (of g)     dh    = s * g B
               dA    = dh^T dropout(x)
               dx    = g W + dropout(dh A)            the same mask

as in LoRA (arXiv 2106.09685), where every line with A or B is one product per run (`train.nn.grouped_mm`).

Layers that read the same input (query, key and value; gate and up) are computed together. The input is kept once, and only if an
adapter learns from it, and the gradients of the input are summed inside of the matrix products. The same goes for what is added to
the output: delta, bias or residual stream are the accumulator that the frozen product starts from.

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

from train.data.micro_batch import AdapterRoute, MicroBatch, Padding
from train.errors import LorapackError
from train.lora.parameters import StackedLora
from train.model.nf4 import dequantize
from train.nn.dropout import Dropout
from train.nn.forward_context import ForwardContext
from train.nn.grouped_mm import RunMatmul, run_matmul
from train.nn.padding import pad, unpad


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
        self.packed = packed
        self.state = state

    def dense(self) -> torch.Tensor:
        """The dequantized weight [out, in] in the dtype that it was quantized from."""
        return dequantize(self.packed, self.state)


class UnknownRows(LorapackError):
    """An adapted layer got rows of which nobody knows the tokens, so not whose adapter they take."""


class PackedLinear(nn.Module):
    """A frozen linear layer of `shape` (out, in); `lora` holds its adapters, None where no run of the pack adapts it."""

    def __init__(
        self, frozen: Weight, bias: torch.Tensor | None, shape: tuple[int, int], context: ForwardContext
    ) -> None:
        super().__init__()
        self.frozen = frozen
        self.bias = bias
        self.out_features, self.in_features = shape
        self.context = context
        self.lora: StackedLora | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The frozen values [out, in], for models that multiply by them themselves (Mamba): past the adapter, as in PEFT."""
        return self.frozen.dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As transformers' decoders call it: [1, T, in] -> [1, T, out], or without the first dimension.

        While the context has padded sequences, x is [S, L, in], or the same without its first dimension, and only the real tokens are
        multiplied: pads come back as repeated real tokens. It may be [S, 1, in] too, something that each sequence begins with.

        Raises:
            UnknownRows: the layer is adapted and x has other rows, like those that a router chose.
        """
        padding = self.context.padding
        sequences, longest = (1, self.context.batch.total) if padding is None else padding.gather.shape
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) == sequences * longest:
            y = self._of_tokens(x, padding)
        elif self.lora is None:
            y = apply_linears(flat, [self], None)[0]
        elif padding is not None and x.shape[:-1] == (sequences, 1):
            # As the first token of sequences of zeros.
            whole = functional.pad(x, (0, 0, 0, longest - 1))
            return self.forward(whole)[:, :1]
        else:
            raise UnknownRows(
                f"a layer of {self.in_features} to {self.out_features} features got {len(flat)} rows that are not the "
                f"{sequences * longest} tokens, so no adapter can be added to it; leave it out of lora.target_modules."
            )
        return y.view(*x.shape[:-1], -1)

    def _of_tokens(self, x: torch.Tensor, padding: Padding | None) -> torch.Tensor:
        """[T, out] of flat tokens x [.., T, in], [S, L, out] of padded sequences x [S, L, in] or [S * L, in]."""
        if padding is None:
            return apply_linears(x.reshape(-1, x.shape[-1]), [self], None)[0]
        places = *padding.gather.shape, x.shape[-1]
        total = self.context.batch.total
        flat = self.context.cached_for(x, lambda: unpad(x.reshape(places), padding, total))
        return pad(apply_linears(flat, [self], None)[0], padding)


def apply_linears(
    x: torch.Tensor, layers: Sequence[PackedLinear], residual: torch.Tensor | None, multiplier: float = 1.0
) -> tuple[torch.Tensor, ...]:
    """The outputs [T, out] of layers that read the same x [T, in].

    Args:
        residual: [T, out], added to the output of a single layer.
        multiplier: of what the layers compute, adapters and biases too, but not of the residual (Granite's). It costs nothing: matrix
            products have a factor, and adapters one for each token.
    """
    context = layers[0].context
    batch = context.batch
    adapters = [_active_adapters(layer.lora, context, batch, multiplier) for layer in layers]
    # In the first decoder layer x comes from the frozen embedding and needs no gradient, but the adapters need this backward.
    anchor = context.anchor_like(x) if any(adapters) else None
    outputs: tuple[torch.Tensor, ...] = _PackedLinears.apply(x, residual, anchor, layers, adapters, batch, multiplier)
    return outputs


@dataclass(frozen=True)
class _ActiveAdapters:
    """One layer's adapters of the G runs that have tokens in a micro-batch.

    `a` [G, r, in] and `b` [G, out, r] are those runs' matrices; `scaling` is each token's factor [T, 1], the multiplier in it, in the
    grouped form of `mm`.
    """

    lora: StackedLora
    mm: RunMatmul
    route: AdapterRoute
    a: torch.Tensor
    b: torch.Tensor
    scaling: torch.Tensor
    dropout: Dropout | None

    def accumulate_grad(self, a_grad: torch.Tensor, b_grad: torch.Tensor) -> None:
        """Add gradients [G, r, in] and [G, out, r] to the pack's gradient, where the optimizer reads them."""
        self.route.index_add(self.lora.grad_a, a_grad)
        self.route.index_add(self.lora.grad_b, b_grad)


def _active_adapters(
    lora: StackedLora | None, context: ForwardContext, batch: MicroBatch, multiplier: float
) -> _ActiveAdapters | None:
    """The adapters of one layer in a micro-batch; None where no run with tokens in it adapts the layer."""
    route = None if lora is None else batch.route(lora.members)
    if lora is None or route is None:
        return None
    # While evaluating there are no keys, and nothing is dropped.
    dropout = None
    if lora.dropout_p is not None and context.dropout_keys is not None:
        dropout = Dropout(lora.dropout_p, context.dropout_keys, lora.dropout_key)
    mm = run_matmul(route, batch.total, grouped=context.kernels.grouped_lora)
    # Layers that the same runs adapt with the same scalings share the tensor `lora.scaling`, so a forward gathers it once.
    scaling = context.cached(
        (lora.members, id(lora.scaling), multiplier),
        lambda: mm.to_grouped(lora.scaling[batch.run_of_token][:, None] * multiplier),
    )
    return _ActiveAdapters(lora, mm, route, route.select(lora.lora_a), route.select(lora.lora_b), scaling, dropout)


class _PackedLinears(torch.autograd.Function):
    """The forward and backward of the module's docstring, for all layers that read x.

    Only x and its products h with A are kept for the backward, and x only if an adapter learns from it. Padded copies and dropout
    masks are computed again there. The adapters' gradients go straight into the pack's matrix: autograd does not know A and B, only
    `anchor`, a scalar that makes it call this backward even where x needs no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        anchor: torch.Tensor | None,
        layers: Sequence[PackedLinear],
        adapters: Sequence[_ActiveAdapters | None],
        batch: MicroBatch,
        multiplier: float,
    ) -> tuple[torch.Tensor, ...]:
        grouped = _GroupedInput(x, batch)
        outputs: list[torch.Tensor] = []
        kept: list[torch.Tensor] = []
        for layer, adapter in zip(layers, adapters, strict=True):
            delta = None
            if adapter is not None:
                # h = scaling * dropout(x) A^T [T, r], then delta = h B^T [T, out].
                h = adapter.mm.bmm(grouped.of(adapter), adapter.a.transpose(1, 2))
                h.mul_(adapter.scaling)
                # Kept with the scaling in it: dB = g^T h then needs no scaling of its own.
                kept.append(h)
                delta = adapter.mm.from_grouped(adapter.mm.bmm(h, adapter.b.transpose(1, 2)))
            # Of a single run the product is a view of its padded form. Models change projections in place, which autograd allows for no
            # view that a function made; `data` is the same memory, and no view.
            outputs.append(_add_frozen_product(x, layer, delta, residual, multiplier).data)
        ctx.save_for_backward(*([x] if kept else []), *kept)
        ctx.layers = layers
        ctx.adapters = adapters
        ctx.batch = batch
        ctx.multiplier = multiplier
        ctx.has_residual = residual is not None
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Nothing was saved where no layer has an active adapter; then only the frozen weights pass the gradient on.
        x, *kept = ctx.saved_tensors or (None,)
        grouped = _GroupedInput(x, ctx.batch)
        needs_x_grad = ctx.needs_input_grad[0]
        x_grad = None
        for layer, adapter, gradient in zip(ctx.layers, ctx.adapters, gradients, strict=True):
            if adapter is not None:
                # `kept` has an h for each adapted layer, in the layers' order.
                delta = _adapter_backward(adapter, grouped, kept.pop(0), gradient, needs_x_grad=needs_x_grad)
                # All layers' parts of dx add up in one tensor, the first adapter's own result.
                if delta is not None:
                    x_grad = delta if x_grad is None else x_grad.add_(delta)
            if needs_x_grad:
                x_grad = _add_input_grad(gradient, layer, x_grad, ctx.multiplier)
        residual_grad = gradients[0] if ctx.has_residual else None
        return x_grad, residual_grad, None, None, None, None, None


class _GroupedInput:
    """The input of some layers in the form that their adapters' products take; layers without dropout share it."""

    def __init__(self, x: Any, batch: MicroBatch) -> None:
        # x is None in a backward without adapters, where nobody asks for it.
        self._x = x
        self.batch = batch
        self._shared: dict[tuple[int, ...], torch.Tensor] = {}

    def of(self, adapter: _ActiveAdapters) -> torch.Tensor:
        """dropout(x), grouped."""
        # Every module drops other features, so only inputs without dropout can be shared.
        if adapter.dropout is not None:
            return adapter.mm.to_grouped(adapter.dropout.apply(self._x, self.batch))
        members = adapter.lora.members
        if members not in self._shared:
            self._shared[members] = adapter.mm.to_grouped(self._x)
        return self._shared[members]


def _adapter_backward(
    adapter: _ActiveAdapters,
    grouped: _GroupedInput,
    h: torch.Tensor,
    gradient: torch.Tensor,
    *,
    needs_x_grad: bool,
) -> torch.Tensor | None:
    """Accumulate the adapter's gradients from the gradient g [T, out] of its layer's output; its part of dx [T, in], if needed."""
    mm = adapter.mm
    # Both gradients are sums over tokens. Fillers of x and h repeat a real token; zeros on this side keep them out of the sums.
    g = mm.to_grouped_zeroed(gradient)
    # dh = s * g B [T, r]; the narrow side, so scaling costs little.
    h_grad = mm.bmm(g, adapter.b).mul_(adapter.scaling)
    adapter.accumulate_grad(mm.outer_grad(h_grad, grouped.of(adapter)), mm.outer_grad(g, h))
    if not needs_x_grad:
        return None
    delta = mm.from_grouped(mm.bmm(h_grad, adapter.a))
    # Dropout's gradient is the same mask and scale again: both follow from counters, so nothing was kept.
    return delta if adapter.dropout is None else adapter.dropout.apply(delta, grouped.batch)


def _add_input_grad(
    gradient: torch.Tensor, layer: PackedLinear, others: torch.Tensor | None, multiplier: float
) -> torch.Tensor:
    """multiplier * gradient W + others; `others` may be overwritten.

    A function of its own, so that one dequantized weight is freed before the next layer's is made.
    """
    weight = layer.frozen.dense()
    if others is not None:
        return others.addmm_(gradient, weight, alpha=multiplier)
    if multiplier == 1:
        return gradient @ weight
    # With beta 0 what is added is not read.
    return torch.addmm(gradient.new_empty(1), gradient, weight, beta=0, alpha=multiplier)


def _add_frozen_product(
    x: torch.Tensor, layer: PackedLinear, delta: torch.Tensor | None, residual: torch.Tensor | None, multiplier: float
) -> torch.Tensor:
    """multiplier * (x W^T + bias) + delta + residual; `delta` may be overwritten."""
    weight = layer.frozen.dense()
    bias = layer.bias if layer.bias is None or multiplier == 1 else layer.bias * multiplier
    # No adapter here: the residual stream, which others read, must not be overwritten, so `addmm` makes a new tensor.
    if delta is None:
        if residual is None and multiplier == 1:
            return functional.linear(x, weight, bias)
        addends = [addend for addend in (residual, bias) if addend is not None]
        if not addends:
            return torch.addmm(x.new_empty(1), x, weight.t(), beta=0, alpha=multiplier)
        return torch.addmm(sum(addends[1:], addends[0]), x, weight.t(), alpha=multiplier)
    # The small addends first: the product then starts from their sum, and no second [T, out] is needed.
    for addend in (residual, bias):
        if addend is not None:
            delta.add_(addend)
    return delta.addmm_(x, weight.t(), alpha=multiplier)
