"""Written-out gradients against autograd's of the same formulas, in float64."""

from collections.abc import Callable

import pytest
import torch

import packs
from train.elementwise import gated, norm_and_pass, rms_norm, rotate, rotated, swiglu


def numbers(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


WEIGHT, COS, SIN = numbers(8), numbers(5, 8), numbers(5, 8)
CASES = {
    "norm": (lambda x: rms_norm(x, WEIGHT, 1e-6) * 2 + x, lambda x: _sum(norm_and_pass(x, WEIGHT, 1e-6, False)), 1),
    "swiglu": (swiglu, lambda gate, up: gated(gate, up, False), 2),
    "rotation": (
        lambda x: rotate(x.view(5, 2, 4), COS[:, :4], SIN[:, :4]),
        lambda x: rotated(x.view(5, 2, 4), COS[:, :4], SIN[:, :4], False),
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


@pytest.mark.parametrize("device", packs.DEVICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compiled_formulas_give_the_same(device: torch.device, dtype: torch.dtype) -> None:
    """On GPUs only they are compiled; on the CPU the same call has to take the formula itself."""
    fused = device.type == "cuda"
    for tokens in (7, 33):
        x, up = (numbers(tokens, 64).to(device, dtype) * factor for factor in (1, 2))
        for mine, other in (
            (gated(x, up, fused), swiglu(x, up)),
            (norm_and_pass(x, up[0].contiguous(), 1e-5, fused)[0], rms_norm(x, up[0], 1e-5)),
        ):
            torch.testing.assert_close(mine, other, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
