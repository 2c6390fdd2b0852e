"""Tiny random models with the true structure of every family that people tune: what the conformance tests run over.

An entry makes a family's configuration small without losing a kind of layer: windows shorter than the sequences of the
tests, dense beside expert layers, every mixer of a hybrid, grouped heads, and no multiplier, cap or bias at a neutral
value, since a part that does nothing is computed right by any code.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from architectures import dense, hybrids, mixtures, others
from architectures.entry import LONGEST, VOCABULARY, WINDOW, Architecture, PathName

__all__ = [
    "ARCHITECTURES",
    "LONGEST",
    "VOCABULARY",
    "WINDOW",
    "Architecture",
    "PathName",
    "each",
    "learned_buffers",
    "tiny_model",
]

ARCHITECTURES = {entry.name: entry for rows in (dense, others, mixtures, hybrids) for entry in rows.ARCHITECTURES}

# The whole list is for `make test-all`; a few architectures of each kind are for every run.
EXHAUSTIVE = (pytest.mark.slow, pytest.mark.exhaustive)


def each(names: Iterable[str], quick: Collection[str] = ()) -> list[Any]:
    """Parameters for a test over architectures: `quick` ones always run, the others with the whole list."""
    return [pytest.param(name, marks=() if name in quick else EXHAUSTIVE) for name in names]


def tiny_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The architecture `name` with random weights of which each matters; the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(ARCHITECTURES[name].config())
        _stir(model)
    return model.to(dtype).eval()


def _stir(model: nn.Module) -> None:
    """Replace initial values, which leave most parts near zero or one, by random ones."""
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        if parameter.dim() > 1:
            # Wide enough that attention chooses and gradients are far from zero; short kernels of convolutions wider.
            parameter.data.copy_(noise * (0.15 if parameter.shape[-1] > 8 else 0.4))
        else:
            parameter.data.add_(noise * 0.2)
    # Such as a router's correction of its scores, which starts at zero.
    for _, buffer in learned_buffers(model):
        buffer.add_(0.2 * torch.randn_like(buffer))


def learned_buffers(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Saved buffers that a checkpoint fills: they start as one value, where computed ones, such as decays, do not."""
    saved = model.state_dict()
    return [
        (name, buffer)
        for name, buffer in model.named_buffers()
        if name in saved and buffer.is_floating_point() and buffer.dim() and buffer.min() == buffer.max()
    ]
