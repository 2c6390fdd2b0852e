"""The adapters' kernels against torch's own products, run by run: on a GPU where there is one, else by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

import packs

if packs.LACKS_TRITON is not None:
    pytest.skip(packs.LACKS_TRITON, allow_module_level=True)

from train.nn.triton.grouped_mm import LEAST_TOKENS_OF_A_PART, bmm, outer_grad

DEVICE = packs.DEVICES[-1]
TOLERANCE = {torch.float16: 2e-3}
if DEVICE.type == "cuda":
    # Whose products are interpreted wrongly, by Triton 3.7 and 3.9.
    TOLERANCE[torch.bfloat16] = 1.6e-2
LENGTHS = [(5, 70, 1), (200,), (33, 64, 0, 7), (1,) * 9]
# Of no block's size.
WIDE = 136


def numbers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def bounds_of(lengths: tuple[int, ...]) -> torch.Tensor:
    ends = torch.tensor(lengths, device=DEVICE).cumsum(0)
    return torch.stack([ends - torch.tensor(lengths, device=DEVICE), ends]).int()


def assert_close(found: torch.Tensor, expected: list[torch.Tensor], dtype: torch.dtype) -> None:
    together = torch.stack(expected) if found.dim() == 3 else torch.cat(expected)
    torch.testing.assert_close(found.float(), together, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("rank", [8, 16, 144])
def test_products_are_those_of_each_run_alone(lengths: tuple[int, ...], rank: int, dtype: torch.dtype) -> None:
    total, groups, bounds = sum(lengths), len(lengths), bounds_of(lengths)
    x, h = numbers(total, WIDE, dtype=dtype), numbers(total, rank, dtype=dtype)
    down, up = numbers(groups, rank, WIDE, dtype=dtype), numbers(groups, WIDE, rank, dtype=dtype)
    xs, hs = ([part.float() for part in flat.split(lengths)] for flat in (x, h))
    assert_close(
        bmm(x, down.transpose(1, 2), bounds, covers_all=True),
        [a @ b.float().t() for a, b in zip(xs, down, strict=True)],
        dtype,
    )
    assert_close(bmm(x, up, bounds, covers_all=True), [a @ b.float() for a, b in zip(xs, up, strict=True)], dtype)
    assert_close(bmm(h, down, bounds, covers_all=True), [a @ b.float() for a, b in zip(hs, down, strict=True)], dtype)
    assert_close(
        bmm(h, up.transpose(1, 2), bounds, covers_all=True),
        [a @ b.float().t() for a, b in zip(hs, up, strict=True)],
        dtype,
    )
    assert_close(outer_grad(h, x, bounds), [a.t() @ b for a, b in zip(hs, xs, strict=True)], dtype)
    assert_close(outer_grad(x, h, bounds), [b.t() @ a for a, b in zip(hs, xs, strict=True)], dtype)


def test_sums_over_many_tokens_are_made_in_parts() -> None:
    lengths = (2 * LEAST_TOKENS_OF_A_PART + 40, 100)
    x, h = numbers(sum(lengths), 64, dtype=torch.float16) / 8, numbers(sum(lengths), 8, dtype=torch.float16) / 8
    stack, bounds = numbers(2, 64, 8, dtype=torch.float16), bounds_of(lengths)
    parts = [(a.float(), b.float()) for a, b in zip(x.split(lengths), h.split(lengths), strict=True)]
    assert_close(
        bmm(x, stack, bounds, covers_all=True),
        [a @ b.float() for (a, _), b in zip(parts, stack, strict=True)],
        torch.float16,
    )
    assert_close(outer_grad(x, h, bounds), [a.t() @ b for a, b in parts], torch.float16)


def test_a_nan_stays_in_its_run() -> None:
    """Runs meet within a block of tokens; one of them must not look like the other."""
    lengths, dtype = (5, 70, 1), torch.float16
    x, h, bounds = numbers(76, WIDE, dtype=dtype), numbers(76, 16, dtype=dtype), bounds_of(lengths)
    stack = numbers(3, WIDE, 16, dtype=dtype)
    clean = bmm(x, stack, bounds, covers_all=True), outer_grad(x, h, bounds)
    for poisoned in (x, h, stack):
        poisoned[1 if poisoned is stack else 10] = torch.nan
    dirty = bmm(x, stack, bounds, covers_all=True), outer_grad(x, h, bounds)
    for others in (slice(0, 5), slice(75, 76)):
        assert torch.equal(dirty[0][others], clean[0][others])
    assert torch.equal(dirty[1][[0, 2]], clean[1][[0, 2]])
    assert dirty[0][10].isnan().all()
    assert dirty[1][1].isnan().all()


def test_a_strided_input_is_taken_for_what_it_says() -> None:
    dtype = torch.float16
    x, h, bounds = numbers(WIDE, 20, dtype=dtype).t(), numbers(20, 32, dtype=dtype)[:, ::2], bounds_of((9, 11))
    stack = numbers(2, WIDE, 16, dtype=dtype)
    assert torch.equal(bmm(x, stack, bounds, covers_all=True), bmm(x.contiguous(), stack, bounds, covers_all=True))
    assert torch.equal(outer_grad(h, x, bounds), outer_grad(h.contiguous(), x.contiguous(), bounds))


def test_tokens_of_other_runs_are_left_alone() -> None:
    dtype, lengths = torch.float16, (4, 30, 7, 19, 3)
    x, h = numbers(63, WIDE, dtype=dtype), numbers(63, 16, dtype=dtype)
    stack, bounds = numbers(5, WIDE, 16, dtype=dtype), bounds_of(lengths)
    some = torch.tensor([1, 3], device=DEVICE)
    picked, parts = bounds[:, some].contiguous(), x.split(lengths)
    expected = torch.zeros(63, 16, device=DEVICE)
    expected[4:34], expected[41:60] = parts[1].float() @ stack[1].float(), parts[3].float() @ stack[3].float()
    x[:4] = x[34:41] = x[60:] = torch.nan
    found = bmm(x, stack[some], picked, covers_all=False)
    torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=2e-3)
    assert torch.equal(outer_grad(x, h, picked), outer_grad(x, h, bounds)[some])
