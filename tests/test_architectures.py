"""The tiny models that the conformance tests run over: each is causal, and no part of one is there without effect."""

import re

import pytest
import torch
from transformers import PreTrainedModel

from architectures import ARCHITECTURES, LONGEST, VOCABULARY, each, learned_buffers, tiny_model

TOKENS = torch.randint(0, VOCABULARY, (4, LONGEST), generator=torch.Generator().manual_seed(0))
# Float32 rounds to some 1e-6; a part that matters moves the logits by far more.
ROUNDING, EFFECT = 1e-5, 1e-4


def built(name: str) -> PreTrainedModel:
    if missing := ARCHITECTURES[name].missing:
        pytest.skip(missing)
    return tiny_model(name)


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    output: torch.Tensor = model(tokens, use_cache=False).logits
    return output


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_later_tokens_change_nothing_before_them(name: str) -> None:
    model = built(name)
    whole = logits(model)
    assert whole.isfinite().all()
    # Also in the middle of blocks, chunks and windows, which are of 8 tokens.
    differences = [relative_difference(logits(model, TOKENS[:, :n]), whole[:, :n]) for n in (5, 12, 16)]
    if ARCHITECTURES[name].causal:
        assert max(differences) < ROUNDING
    else:
        assert max(differences) > 100 * ROUNDING
    # Earlier ones do change what comes.
    assert relative_difference(logits(model, TOKENS.roll(1, dims=0)[:, :-1]), whole[:, :-1]) > 0.1


@pytest.mark.parametrize("name", each(ARCHITECTURES))
def test_every_parameter_matters(name: str) -> None:
    model = built(name)
    whole = logits(model)
    idle = ARCHITECTURES[name].idle
    ineffective = []
    for part, tensor in [*model.named_parameters(), *learned_buffers(model)]:
        before = tensor.detach().clone()
        tensor.data.mul_(1.1).add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
        if relative_difference(logits(model), whole) < EFFECT:
            ineffective.append(part)
        tensor.data.copy_(before)
    assert [part for part in ineffective if not (idle and re.search(idle, part))] == []


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3-moe", "falcon-h1"])
def test_a_model_is_the_same_every_time(name: str) -> None:
    first, second = built(name).state_dict(), built(name).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
