"""The kernels of the formulas against the formulas: on a GPU where there is one, else by Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import packs

if packs.LACKS_TRITON is not None:
    pytest.skip(packs.LACKS_TRITON, allow_module_level=True)

from train.nn import functional, loss
from train.nn.triton import functional as kernels
from train.trainer import optim

DEVICE = packs.DEVICES[-1]
# The formula rounds once and so does its kernel: a last bit apart. (Interpreted, bfloat16 is cut off instead of rounded.)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
# Of no block's size.
DIM = 136


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def matrices(dtype: torch.dtype, rows: int = 7) -> list[torch.Tensor]:
    return [numbers(rows, DIM, dtype=dtype, seed=seed) for seed in range(4)]


def assert_alike(found: Any, expected: Any, dtype: torch.dtype) -> None:
    pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
    for mine, other in pairs:
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def calls(dtype: torch.dtype, rows: int = 7) -> dict[str, tuple[Any, ...]]:
    """Every formula of the decoder with something to take."""
    x, up, gradient, passed = matrices(dtype, rows)
    weight = numbers(DIM, dtype=dtype)
    heads = numbers(rows, 3 * 24, dtype=dtype).view(rows, 3, 24)
    cos_sin = [numbers(rows, 24, dtype=dtype, seed=seed) for seed in (5, 6)]
    return {
        "rms_norm": (x, weight, 1e-5),
        "rms_norm_backward": (gradient, passed, x, weight, 1e-5),
        "swiglu": (x, up),
        "swiglu_backward": (gradient, x, up),
        "apply_rotary": (heads, *cos_sin),
        "apply_rotary_backward": (heads, *cos_sin),
    }


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", calls(torch.float32))
def test_a_kernel_gives_what_its_formula_gives(name: str, dtype: torch.dtype) -> None:
    arguments = calls(dtype)[name]
    assert_alike(getattr(kernels, name)(*arguments), getattr(functional, name)(*arguments), dtype)


@pytest.mark.parametrize("name", calls(torch.float32))
def test_other_rows_change_no_bit_and_a_nan_stays_in_its_own(name: str) -> None:
    def first_rows(found: Any) -> list[torch.Tensor]:
        return [x[:3] for x in (found if isinstance(found, tuple) else (found,))]

    many, kernel = calls(torch.float16, rows=7)[name], getattr(kernels, name)
    few = [x[:3] if isinstance(x, torch.Tensor) and x.dim() > 1 else x for x in many]
    alone = first_rows(kernel(*few))
    for x in many:
        if isinstance(x, torch.Tensor) and x.dim() > 1:
            x[4] = torch.nan
    assert all(torch.equal(*pair) for pair in zip(first_rows(kernel(*many)), alone, strict=True))


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "apply_rotary"])
def test_a_strided_input_is_taken_for_what_it_says(name: str) -> None:
    x, *others = calls(torch.float16)[name]
    strided = torch.stack([x, x], -1)[..., 0]
    assert not strided.is_contiguous()
    kernel = getattr(kernels, name)
    assert torch.equal(kernel(strided, *others), kernel(x, *others))


def test_heads_whose_rows_are_apart_are_rotated() -> None:
    heads, cos, sin = calls(torch.float16)["apply_rotary"]
    wide = torch.cat([heads.flatten(1), heads.flatten(1)], 1)
    assert torch.equal(
        kernels.apply_rotary(wide[:, : 3 * 24].view(7, 3, 24), cos, sin), kernels.apply_rotary(heads, cos, sin)
    )


def test_a_rotation_of_a_part_of_each_head_is_refused() -> None:
    heads, cos, sin = calls(torch.float16)["apply_rotary"]
    with pytest.raises(ValueError, match="cannot be rotated by cos"):
        kernels.apply_rotary(heads, cos[:, :8], sin[:, :8])


def test_the_autograd_functions_take_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def noting(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: taken.append(name) or kernel(*arguments)

    for name in calls(torch.float32):
        monkeypatch.setattr(kernels, name, noting(name, getattr(kernels, name)))
    x, up, *_ = (matrix.requires_grad_() for matrix in matrices(torch.float32))
    heads, cos, sin = calls(torch.float32)["apply_rotary"]
    weight = numbers(DIM, dtype=torch.float32)
    for takes_kernels in (True, False):
        normed, passed = functional.rms_norm_residual(x, weight, 1e-5, takes_kernels)
        gated = functional.swiglu_autograd(normed + passed, up, takes_kernels)
        rotated = functional.rotary_autograd(heads.requires_grad_(), cos, sin, takes_kernels)
        (gated.sum() + rotated.sum()).backward()
    assert sorted(taken) == sorted(calls(torch.float32))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("words", [40, 5000])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_the_loss_and_its_gradient(words: int, dtype: torch.dtype, cap: float | None) -> None:
    """Logits of the padding of a vocabulary are -inf; the target is the best word of the first row."""
    logits = 3 * numbers(9, words, dtype=dtype)
    logits[:, -3:] = -torch.inf
    targets = torch.arange(9, device=DEVICE) * (words // 10)
    targets[0] = logits[0].argmax()
    weights = torch.arange(9.0, device=DEVICE)
    expected = loss.cross_entropy(logits.clone(), targets, weights, cap)
    losses, correct, gradient = kernels.cross_entropy(logits, targets, weights, cap)
    torch.testing.assert_close(losses, expected[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(correct, expected[1])
    assert correct[0]
    assert_alike(gradient, expected[2], dtype)
    assert gradient.data_ptr() == logits.data_ptr()
    # Its weight is zero.
    assert not gradient[0].any()


def test_words_that_overflowed_leave_the_others_their_probability() -> None:
    logits = torch.zeros(1, 5000, device=DEVICE)
    # All of the first block.
    logits[0, :4500] = -torch.inf
    losses, _, _ = kernels.cross_entropy(logits, torch.tensor([4999], device=DEVICE), torch.ones(1, device=DEVICE))
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(500)))


def test_of_equal_logits_the_first_is_the_best() -> None:
    """As argmax has it; sixteen-bit logits are often equal."""
    logits = torch.zeros(2, 5000, device=DEVICE)
    targets = torch.tensor([0, 4999], device=DEVICE)
    assert kernels.cross_entropy(logits, targets, torch.ones(2, device=DEVICE))[1].tolist() == [True, False]


def test_adamw_moves_the_rows_it_applies_to_and_leaves_the_others_their_bits() -> None:
    """Columns of a wider matrix, as the optimizer gives them."""
    runs, columns = 3, slice(5, None)
    wide = [numbers(runs, 2500, dtype=torch.float32, seed=seed) for seed in range(4)]
    wide[2].abs_()
    wide[3][1] = torch.nan
    applies = torch.tensor([[True], [False], [True]], device=DEVICE)
    rate, decay, clip, beta1, beta2, correction1, root_correction2, eps = (
        0.1 + numbers(runs, 1, dtype=torch.float32, seed=seed).abs() / 10 for seed in range(4, 12)
    )
    given = [torch.where(applies, x, still) for x, still in ((rate, 0), (decay, 0))]
    betas = [torch.where(applies, beta, 1) for beta in (beta1, beta2)]
    factors = (applies, *given, clip, *betas, correction1, root_correction2, eps)
    before, expected = [x.clone() for x in wide], [x.clone() for x in wide]
    optim.adamw(*(x[:, columns] for x in expected), *factors)
    kernels.adamw(*(x[:, columns] for x in wide), *factors)
    for mine, other, old in list(zip(wide, expected, before, strict=True))[:3]:
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
        assert torch.equal(mine[1], old[1])
        assert torch.equal(mine[:, :5], old[:, :5])
        assert not torch.equal(mine[0], old[0])


def test_adamw_takes_more_numbers_than_a_grids_second_dimension_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 7B model's rank 64 in all linear layers: CUDA starts 65,535 blocks in the second dimension and 2^31 - 1 in the first."""
    grids: list[tuple[int, ...]] = []

    class Starts:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *_arguments, **_options: None

    monkeypatch.setattr(kernels, "_adamw", Starts())
    row = torch.empty(1, 1).expand(8, 90_000_000)
    kernels.adamw(row, row, row, row, torch.ones(8, 1, dtype=torch.bool))
    assert grids[0][0] > 65_535 >= max(grids[0][1:])
