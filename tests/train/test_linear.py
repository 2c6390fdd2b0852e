"""A factor of what linear layers compute, beside the same layers without it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_functional import numbers

import packs
from train.data.micro_batch import MicroBatch
from train.data.sampling import TokenSequence
from train.lora.parameters import StackedLora
from train.nn.backends import EAGER
from train.nn.forward_context import ForwardContext
from train.nn.linear import DenseWeight, PackedLinear, apply_linears

TOTAL, FROM, TO = 7, 6, 5


def layer_in(context: ForwardContext, bias: torch.Tensor | None, adapted: bool) -> PackedLinear:
    layer = PackedLinear(DenseWeight(numbers(TO, FROM)), bias, (TO, FROM), context)
    if adapted:
        a, b = numbers(2, 3, FROM), numbers(2, TO, 3)
        scaling = torch.tensor([0.5, 2.0]).double()
        layer.lora = StackedLora({0: 3, 1: 3}, a, b, torch.zeros_like(a), torch.zeros_like(b), scaling, None, 0)
    return layer


@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("adapted", [True, False])
def test_a_multiplier_reaches_all_but_the_residual(adapted: bool, has_bias: bool, has_residual: bool) -> None:
    rows = [np.zeros(4, np.int32), np.zeros(3, np.int32)]
    context = ForwardContext(EAGER)
    context.set(MicroBatch([TokenSequence(i, 0, row, row) for i, row in enumerate(rows)], 2, packs.CPU), None)
    x, residual = (numbers(TOTAL, size).requires_grad_() for size in (FROM, TO))
    found = []
    for multiplied in (True, False):
        layer = layer_in(context, numbers(TO) if has_bias else None, adapted)
        if multiplied:
            out = apply_linears(x, [layer], residual if has_residual else None, multiplier=0.25)[0]
        else:
            out = 0.25 * apply_linears(x, [layer], None)[0] + (residual if has_residual else 0)
        leaves = [x, residual] if has_residual else [x]
        gradients = torch.autograd.grad(out, leaves, numbers(TOTAL, TO))
        of_adapters = [] if layer.lora is None else [layer.lora.grad_a, layer.lora.grad_b]
        found.append([out, *gradients, *of_adapters])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
