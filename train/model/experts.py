"""The weights of a mixture of experts that are no linear layers: stacks, with an expert's matrix at each index.

    Qwen3-MoE   mlp.experts.gate_up_proj   [experts, 2 x width, hidden]
    GPT-OSS     mlp.experts.down_proj      [experts, width, hidden], multiplied from the other side
    DBRX        ffn.experts.mlp.w1         [experts x width, hidden]

A module counts its experts in a number of its own (`num_experts`, `moe_num_experts`...). Its parameters of that length are stacks where
an index gives a matrix. A router's weight [experts, hidden] and biases [experts, width] give vectors, and stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from train.model.linears import is_linear


@dataclass(frozen=True)
class ExpertStack:
    """A parameter `attribute` of a module, which stacks the matrices of `experts` experts."""

    module: nn.Module
    attribute: str
    experts: int

    @property
    def weight(self) -> torch.Tensor:
        """The parameter's values, of the module's own shape."""
        return cast(torch.Tensor, getattr(self.module, self.attribute)).detach()

    @property
    def matrices(self) -> torch.Tensor:
        """The same as [experts, rows, columns]."""
        return self.weight.reshape(self.experts, -1, self.weight.shape[-1])

    def drop_weight(self) -> None:
        """Free the module's weight."""
        setattr(self.module, self.attribute, None)


def expert_stacks(model: nn.Module) -> dict[str, ExpertStack]:
    """Every stack of a model by its parameter's name: model.layers.0.mlp.experts.gate_up_proj."""
    return {
        f"{name}.{attribute}" if name else attribute: ExpertStack(module, attribute, experts)
        for name, module in model.named_modules()
        for attribute, experts in _own_stacks(module).items()
    }


def expert_counts(module: nn.Module) -> set[int]:
    """The numbers of experts that a module knows by its own attributes."""
    return {
        value for name, value in vars(module).items() if "expert" in name.lower() and type(value) is int and value > 1
    }


def _own_stacks(module: nn.Module) -> dict[str, int]:
    counts = expert_counts(module)
    # A router in the form of a linear layer knows the number of experts as well.
    if not counts or is_linear(module):
        return {}
    stacks = {name: _stacked(parameter, counts) for name, parameter in module._parameters.items()}
    return {name: experts for name, experts in stacks.items() if experts is not None}


def _stacked(parameter: nn.Parameter | None, counts: set[int]) -> int | None:
    """How many matrices a parameter stacks; None if it is no stack."""
    if parameter is None or not parameter.is_floating_point():
        return None
    rows = parameter.shape[0] if parameter.dim() else 0
    if parameter.dim() == 3:
        return rows if rows in counts and min(parameter.shape[1:]) > 1 else None
    if parameter.dim() == 2:
        return next((count for count in sorted(counts, reverse=True) if rows % count == 0 and rows > count), None)
    return None
