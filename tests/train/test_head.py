"""Output heads: what a model does to its logits is measured, and computed with its exact gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear
from transformers import PreTrainedModel

from architectures import ARCHITECTURES, VOCABULARY, tiny_model
from train.nn.head import Head, LogitFormula, UnknownLogits, measure_logits, model_head
from train.nn.loss import target_losses

TOKENS = torch.randint(0, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(0))


def built(name: str) -> PreTrainedModel:
    if missing := ARCHITECTURES[name].missing:
        pytest.skip(missing)
    return tiny_model(name)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_the_model(name: str) -> None:
    model, seen = built(name), []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        expected = model(TOKENS, use_cache=False).logits[0]
    handle.remove()
    formula = measure_logits(model)
    # The hook saw the hidden states after whatever factor comes before the output embedding.
    before = formula.scale if name == "minicpm3" else 1.0
    found = model_head(model).logits(seen[0][0] / before)[:, :VOCABULARY]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "plain", "capped"),
    [
        ("llama", True, False),
        ("phi", True, False),
        ("granite", False, False),
        ("cohere", False, False),
        ("minicpm3", False, False),
        ("gemma2", True, True),
        ("gemma3n", True, True),
        ("nanochat", True, True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_factor_and_cap_are_measured(name: str, plain: bool, capped: bool, dtype: torch.dtype) -> None:
    formula = measure_logits(built(name).to(dtype))
    assert (formula.scale == 1) is plain
    assert (formula.cap is not None) is capped


def test_measuring_needs_no_weights_and_leaves_the_model_as_it_was() -> None:
    model = built("gemma2")
    forwards = [type(module).forward for module in model.modules()]
    measured = measure_logits(model)
    model.model.layers.to("meta")
    assert measure_logits(model) == measured
    assert [module.forward.__func__ for module in model.modules()] == forwards


def change_logits(model: PreTrainedModel, change: Any) -> None:
    """Put something else behind a model's output embedding."""
    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    model.forward = forward


@pytest.mark.parametrize(
    "change",
    [
        torch.square,
        torch.relu,
        torch.zeros_like,
        lambda z: z + 1,
        lambda z: z.clamp(-50, 50),
        lambda z: z / (1 + z.abs() / 9),
        lambda z: z * (1 + torch.arange(z.shape[-1])),
        lambda z: z[..., :-1],
    ],
)
def test_any_other_formula_is_refused(change: Any) -> None:
    model = built("llama")
    change_logits(model, change)
    with pytest.raises(UnknownLogits, match="'llama'"):
        measure_logits(model)


@pytest.mark.parametrize("words", [31, 32])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("cap", [None, 2.5])
def test_losses_and_gradient_are_those_of_torch(words: int, scale: float, cap: float | None) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(words, 8, dtype=torch.float64), torch.randn(words, dtype=torch.float64)
    targets, weights = torch.randint(words, (7,)), torch.rand(7, dtype=torch.float64)
    head = Head(nn.Parameter(weight.clone(), requires_grad=False), bias, LogitFormula(scale, cap))
    found = target_losses(hidden.detach(), head, targets, weights)
    logits = linear(hidden, weight, bias) * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = cross_entropy(logits, targets, reduction="none")
    (expected * weights).sum().backward()
    torch.testing.assert_close(head.logits(hidden.detach())[:, :words], logits.detach())
    torch.testing.assert_close(found.losses, expected.detach())
    torch.testing.assert_close(found.gradient, hidden.grad)
    assert torch.equal(found.correct, logits.argmax(1) == targets)


def test_words_of_the_padding_are_never_predicted_below_a_cap() -> None:
    head = Head(nn.Parameter(torch.randn(31, 8), requires_grad=False), formula=LogitFormula(cap=2.0))
    assert head.logits(torch.randn(3, 8))[:, 31:].isneginf().all()
    found = target_losses(torch.zeros(1, 8), head, torch.tensor([0]), None)
    torch.testing.assert_close(found.losses, torch.tensor([31.0]).log())


def test_a_plain_head_keeps_its_bits() -> None:
    weight, hidden = torch.randn(32, 8), torch.randn(5, 8)
    head = Head(nn.Parameter(weight.clone(), requires_grad=False), formula=LogitFormula())
    assert torch.equal(head.logits(hidden), linear(hidden, weight))
