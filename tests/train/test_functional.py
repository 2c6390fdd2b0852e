"""Written-out gradients against autograd's of the same formulas, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from train.nn.functional import (
    CHUNK_NUMEL,
    apply_rotary,
    dispatch,
    rms_norm,
    rms_norm_residual,
    rotary_autograd,
    swiglu,
    swiglu_autograd,
    swiglu_backward,
)


def numbers(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


WEIGHT, COS, SIN = numbers(8), numbers(5, 8), numbers(5, 8)
CASES = {
    "norm": (lambda x: rms_norm(x, WEIGHT, 1e-6) * 2 + x, lambda x: _sum(rms_norm_residual(x, WEIGHT, 1e-6, False)), 1),
    "swiglu": (swiglu, lambda gate, up: swiglu_autograd(gate, up, False), 2),
    "rotation": (
        lambda x: apply_rotary(x.view(5, 2, 4), COS[:, :4], SIN[:, :4]),
        lambda x: rotary_autograd(x.view(5, 2, 4), COS[:, :4], SIN[:, :4], False),
        1,
    ),
}


def _sum(pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return pair[0] * 2 + pair[1]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_autograds(case: str) -> None:
    formula, ours, inputs = CASES[case]
    given = [numbers(5, 8).mul(i + 1) for i in range(inputs)]
    results = [_value_and_gradients(f, given) for f in (formula, ours)]
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def _value_and_gradients(f: Callable[..., torch.Tensor], given: list[torch.Tensor]) -> list[torch.Tensor]:
    inputs = [x.clone().requires_grad_() for x in given]
    value = f(*inputs)
    value.backward(numbers(*value.shape))
    return [value.detach(), *(x.grad for x in inputs if x.grad is not None)]


def test_rows_at_a_time_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows in whole vectors: torch's sigmoid rounds what is left over of a vector in another way (2.13, on a CPU)."""
    x, up, gradient = (numbers(37, 64).float() * factor for factor in (1, 2, 3))
    cos, sin = numbers(37, 32).float(), numbers(37, 32).float() * 2
    calls = [
        (swiglu, x, up),
        (swiglu_backward, gradient, x, up),
        (rms_norm, x, up[0].contiguous(), 1e-6),
        (apply_rotary, x.view(37, 2, 32), cos, sin),
    ]
    whole = [dispatch(formula, False, *arguments) for formula, *arguments in calls]
    # Six rows of 64.
    monkeypatch.setitem(CHUNK_NUMEL, "cpu", 400)
    for (formula, *arguments), expected in zip(calls, whole, strict=True):
        seen: list[int] = []
        found = dispatch(_noting_rows(formula, seen), False, *arguments)
        assert seen == [6] * 6 + [1]
        assert all(torch.equal(*pair) for pair in zip(_tuple(found), _tuple(expected), strict=True))


def test_rows_at_a_time_are_changed_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK_NUMEL, "cpu", 50)
    matrix, rows = torch.ones(37, 8), torch.arange(37.0)[:, None]
    assert dispatch(torch.Tensor.mul_, False, matrix[:, 2:], rows) is not None
    assert torch.equal(matrix[:, 2:], rows.expand(37, 6))
    assert torch.equal(matrix[:, :2], torch.ones(37, 2))


def _noting_rows(formula: Callable[..., object], seen: list[int]) -> Callable[..., object]:
    def noting(first: torch.Tensor, *others: object) -> object:
        seen.append(len(first))
        return formula(first, *others)

    return noting


def _tuple(found: Any) -> tuple[torch.Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)
