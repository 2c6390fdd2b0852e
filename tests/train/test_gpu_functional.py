"""The kernels of the formulas against the formulas: on a GPU where there is one, else by Triton's interpreter."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import packs

if packs.LACKS_TRITON is not None:
    pytest.skip(packs.LACKS_TRITON, allow_module_level=True)

from train.nn import activations, functional, heads, loss
from train.nn.triton import activations as activation_kernels
from train.nn.triton import functional as kernels
from train.nn.triton import heads as head_kernels
from train.trainer import optim

DEVICE = packs.DEVICES[-1]
# A kernel rounds once, so it is a last bit apart from its formula in float32. (Interpreted, bfloat16 is cut off instead of rounded.)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
# Of no block's size.
DIM = 136


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def matrices(dtype: torch.dtype, rows: int = 7) -> list[torch.Tensor]:
    return [numbers(rows, DIM, dtype=dtype, seed=seed) for seed in range(4)]


def assert_alike(found: Any, expected: Any, dtype: torch.dtype, roundings: int = 1) -> None:
    pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
    for mine, other in pairs:
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=roundings * TOLERANCE[dtype], atol=roundings * TOLERANCE[dtype])


Call = tuple[Callable[..., Any], tuple[Any, ...]]
HEADS, HEAD_DIM = 3, 24


def calls(dtype: torch.dtype, rows: int = 7) -> dict[str, Call]:
    """Every formula of the decoder in every form, with something to take."""
    x, up, gradient, passed = matrices(dtype, rows)
    found: dict[str, Call] = {}
    # Norms, by a weight that is wider than x, as Gemma's.
    for name, norm in norms(DIM, torch.float32).items():
        found[f"normalize {name}"] = functional.normalize, (x, norm)
        found[f"normalize_backward {name}"] = functional.normalize_backward, (gradient, passed, x, norm)
        found[f"add_normed {name}"] = functional.add_normed, (passed, x, norm, 0.3)
        found[f"add_normed_backward {name}"] = functional.add_normed_backward, (gradient, x, norm, 0.3)
        other = norms(DIM, dtype)["layer" if name == "rms" else "rms"]
        found[f"renorm {name}"] = functional.renorm, (passed, x, norm, 0.3, other)
        found[f"renorm_backward {name}"] = functional.renorm_backward, (gradient, passed, x, up, norm, 0.3, other)
    found["add_normed without a norm"] = functional.add_normed, (passed, x, None, 0.3)
    for name in activations.ACTIVATIONS:
        found[f"gated {name}"] = activations.gated, (x, up, name)
        found[f"gated_backward {name}"] = activations.gated_backward, (gradient, x, up, name)
    found["activate"] = activations.activate, (x, "relu2")
    found["activate_backward"] = activations.activate_backward, (gradient, x, "relu2")
    found["split_gated"] = activations.split_gated, (torch.cat([x, up], 1), "silu")
    found["split_gated_backward"] = activations.split_gated_backward, (gradient, torch.cat([x, up], 1), "silu")
    return found | calls_of_heads(dtype, rows)


def norms(dim: int, dtype: torch.dtype) -> dict[str, functional.Norm]:
    weight, bias = numbers(dim, dtype=dtype), numbers(dim, dtype=dtype, seed=1)
    return {
        "rms": functional.Norm(weight, 1e-5),
        "layer": functional.Norm(weight, 1e-5, bias, centered=True),
        "rms without weight": functional.Norm(None, 1e-5),
    }


def calls_of_heads(dtype: torch.dtype, rows: int = 7) -> dict[str, Call]:
    """Rotations of a half of each head and of all of it, by neighbours and halves, before and behind norms."""
    x, gradient = (numbers(rows, HEADS, HEAD_DIM, dtype=dtype, seed=seed) for seed in (3, 4))
    whole, part = ([numbers(rows, size, dtype=dtype, seed=seed) for seed in (5, 6)] for size in (HEAD_DIM, 12))
    weight = numbers(HEADS, HEAD_DIM, dtype=dtype)
    rms, layer = functional.Norm(weight[0], 1e-5), functional.Norm(weight, 1e-5, weight, centered=True)
    full = functional.Norm(weight.flatten(), 1e-5)
    found: dict[str, Call] = {
        "apply_rotary": (heads.apply_rotary, (x, *whole)),
        "apply_rotary_backward": (heads.apply_rotary_backward, (gradient, *whole)),
    }
    for name, angles, transform in (
        ("as Qwen3", whole, heads.HeadTransform(rms)),
        ("as OLMo 2", whole, heads.HeadTransform(full, over_all_heads=True)),
        ("as Phi-3", part, heads.HeadTransform()),
        ("as Cohere", whole, heads.HeadTransform(layer, interleaved=True)),
        ("as GLM", part, heads.HeadTransform(interleaved=True)),
        ("as Hunyuan", whole, heads.HeadTransform(rms, rotate_first=True)),
        ("rotated by neighbours before a layer norm", part, heads.HeadTransform(layer, False, True, True)),
        ("not rotated", (None, None), heads.HeadTransform(rms)),
    ):
        found[f"heads {name}"] = heads.prepare_heads, (x, *angles, transform)
        found[f"heads backward {name}"] = heads.prepare_heads_backward, (gradient, x, *angles, transform)
    return found


def wide_result(formula: Callable[..., Any], arguments: tuple[Any, ...], dtype: torch.dtype) -> Any:
    """A formula in float32, rounded at its end: plain ones round on their way."""
    found = formula(*(x.float() if isinstance(x, torch.Tensor) else x for x in arguments))
    return tuple(x.to(dtype) for x in found) if isinstance(found, tuple) else found.to(dtype)


def kernel_of(formula: Callable[..., Any]) -> Callable[..., Any]:
    return functional.triton_kernel(formula)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", calls(torch.float32))
def test_a_kernel_gives_what_its_formula_gives(name: str, dtype: torch.dtype) -> None:
    formula, arguments = calls(dtype)[name]
    roundings = 2 if name.startswith("renorm") else 1
    assert_alike(kernel_of(formula)(*arguments), wide_result(formula, arguments, dtype), dtype, roundings)


@pytest.mark.parametrize("name", ["renorm rms", "renorm layer"])
def test_two_norms_in_one_kernel_give_the_bits_of_two_kernels(name: str) -> None:
    _, (residual, y, behind, multiplier, before) = calls(torch.float16)[name]
    hidden = kernels.add_normed(residual, y, behind, multiplier)
    normed = kernels.normalize(hidden, before)
    assert all(map(torch.equal, kernels.renorm(residual, y, behind, multiplier, before), (normed, hidden)))
    hidden_grad = kernels.normalize_backward(normed, residual, hidden, before)
    y_grad = kernels.add_normed_backward(hidden_grad, y, behind, multiplier)
    found = kernels.renorm_backward(normed, residual, hidden, y, behind, multiplier, before)
    assert all(map(torch.equal, found, (hidden_grad, y_grad)))


@pytest.mark.parametrize("name", calls(torch.float32))
def test_other_rows_change_no_bit_and_a_nan_stays_in_its_own(name: str) -> None:
    def first_rows(found: Any) -> list[torch.Tensor]:
        return [x[:3] for x in (found if isinstance(found, tuple) else (found,))]

    formula, many = calls(torch.float16, rows=7)[name]
    kernel = kernel_of(formula)
    few = [x[:3] if isinstance(x, torch.Tensor) else x for x in many]
    alone = first_rows(kernel(*few))
    for x in many:
        if isinstance(x, torch.Tensor):
            x[4] = torch.nan
    assert all(torch.equal(*pair) for pair in zip(first_rows(kernel(*many)), alone, strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "normalize rms",
        "add_normed layer",
        "gated silu",
        "gated_backward silu",
        "split_gated",
        "apply_rotary",
        "heads as Qwen3",
    ],
)
def test_a_strided_input_is_taken_for_what_it_says(name: str) -> None:
    formula, (x, *others) = calls(torch.float16)[name]
    strided = torch.stack([x, x], -1)[..., 0]
    assert not strided.is_contiguous()
    kernel = kernel_of(formula)
    mine, other = kernel(strided, *others), kernel(x, *others)
    assert all(torch.equal(*pair) for pair in zip(mine, other, strict=True))


@pytest.mark.parametrize("name", [name for name in calls_of_heads(torch.float32) if "backward" not in name])
def test_heads_whose_rows_are_apart_are_rotated(name: str) -> None:
    formula, (x, *others) = calls(torch.float16)[name]
    wide = torch.cat([x, x], 1)
    kernel = kernel_of(formula)
    assert torch.equal(kernel(wide[:, :HEADS], *others), kernel(x, *others))


def test_a_rotation_of_a_part_of_each_head_is_refused() -> None:
    """By the kernel that rotates whole heads; the other one takes parts, but not of more than a head."""
    x, cos, sin = calls(torch.float16)["apply_rotary"][1]
    with pytest.raises(ValueError, match="cannot be rotated by cos"):
        head_kernels.apply_rotary(x, cos[:, :8], sin[:, :8])
    with pytest.raises(ValueError, match="cannot be rotated by cos"):
        head_kernels.prepare_heads(x[..., :8], cos, sin, heads.HeadTransform())


def test_the_autograd_functions_take_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def noting(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: taken.append(name) or kernel(*arguments)

    for formula, _ in calls(torch.float32).values():
        module = {heads: head_kernels, activations: activation_kernels}.get(sys.modules[formula.__module__], kernels)
        if (name := formula.__name__) not in taken:
            taken.append(name)
            monkeypatch.setattr(module, name, noting(name, getattr(module, name)))
    expected, taken[:] = sorted(taken), []
    x, up, *_ = (matrix.requires_grad_() for matrix in matrices(torch.float32))
    of_heads, cos, sin = calls(torch.float32)["apply_rotary"][1]
    norm = norms(DIM, torch.float32)["rms"]
    for takes_kernels in (True, False):
        normed, passed = functional.norm_residual(x, norm, takes_kernels)
        added = functional.add_normed_autograd(passed, normed, norm, 1.0, takes_kernels)
        added, passed = functional.renorm_autograd(passed, added, norm, 1.0, norm, takes_kernels)
        added = added + passed
        product = activations.gated_autograd((added, up), "silu", takes_kernels)
        joined = activations.gated_autograd((torch.cat([product, up], 1),), "silu", takes_kernels)
        active = activations.activate_autograd(joined, "relu2", takes_kernels)
        rotated = heads.heads_autograd(of_heads.requires_grad_(), (cos, sin), heads.HeadTransform(), takes_kernels)
        prepared = heads.heads_autograd(rotated, (cos, sin), heads.HeadTransform(interleaved=True), takes_kernels)
        (active.sum() + prepared.sum()).backward()
    # `split_gated` calls `gated` by its name.
    assert sorted(set(taken)) == expected


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
