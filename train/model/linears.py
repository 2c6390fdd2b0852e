"""Which modules of a model are linear layers, y = x W^T + b and nothing else: those that can be adapted, quantized and exchanged.

A router is none, even one that subclasses `nn.Linear` (PhiMoE's returns its choice of experts too). transformers' `Conv1D` (GPT-2) is
one, with its weight kept as [in, out].
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from train.model.anatomy import text_decoder

# (out, in) features of a probe, and its tokens.
PROBE_SHAPE = (5, 3)
PROBE_TOKENS = 2


@dataclass(frozen=True)
class FrozenLinear:
    """A linear layer of a model; `transposed` says that its module keeps the weight as [in, out]."""

    module: nn.Module
    transposed: bool

    @property
    def weight(self) -> torch.Tensor:
        """[out, in]."""
        weight = cast(torch.Tensor, self.module.weight).detach()
        return weight.t() if self.transposed else weight

    @property
    def bias(self) -> torch.Tensor | None:
        """[out]."""
        bias = cast("torch.Tensor | None", self.module.bias)
        return None if bias is None else bias.detach()

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) features."""
        rows, columns = self.weight.shape
        return rows, columns

    def drop_weight(self) -> None:
        """Free the module's weight."""
        self.module.weight = None  # type: ignore[assignment]


def frozen_linears(model: PreTrainedModel) -> dict[str, FrozenLinear]:
    """Every linear layer that can be adapted, by name: all of the text decoder, and no output embedding."""
    head = model.get_output_embeddings()
    text = set(text_decoder(model).modules())
    return {
        name: FrozenLinear(module, isinstance(module, Conv1D))
        for name, module in model.named_modules()
        if module in text and module is not head and is_linear(module)
    }


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes x W^T + b: by the code that it runs, and a subclass with code of its own by its numbers."""
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    return isinstance(module, nn.Linear) and _computes_linear(module)


def _computes_linear(module: nn.Linear) -> bool:
    """Compare a small copy of `module`, with random weights, with the formula."""
    out_features, in_features = PROBE_SHAPE
    probe = copy.copy(module)
    weight, bias = torch.rand(PROBE_SHAPE), None if module.bias is None else torch.rand(out_features)
    # Copies share their dictionaries of parameters, so the probe gets one of its own.
    probe._parameters = dict(module._parameters) | {
        "weight": nn.Parameter(weight),
        "bias": None if bias is None else nn.Parameter(bias),
    }
    probe.in_features, probe.out_features = in_features, out_features
    x = torch.rand(PROBE_TOKENS, in_features)
    try:
        with torch.no_grad():
            y = probe(x)
    # Whatever a module of another kind raises on such weights.
    except Exception:
        return False
    expected = functional.linear(x, weight, bias)
    return isinstance(y, torch.Tensor) and y.shape == expected.shape and torch.allclose(y, expected)
