"""Attention's kernels against torch's, sequence by sequence: on a GPU where there is one, else by Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import packs

if packs.LACKS_TRITON is not None:
    pytest.skip(packs.LACKS_TRITON, allow_module_level=True)

from train.data.micro_batch import MicroBatch
from train.data.sampling import TokenSequence
from train.nn import attention
from train.nn.attention import attend
from train.nn.backends import EAGER, Kernels
from train.nn.forward_context import ForwardContext
from train.nn.triton.attention import backward, forward

DEVICE = packs.DEVICES[-1]
TOLERANCE = {torch.float16: 4e-3}
if DEVICE.type == "cuda":
    # Whose products are interpreted wrongly, by Triton 3.7 and 3.9.
    TOLERANCE[torch.bfloat16] = 3e-2
LENGTHS = [(5, 70, 64, 1), (129,), (1, 1, 1)]
# Of queries, of keys, features.
HEADS = [(2, 2, 32), (4, 1, 64)]
SCALE = 0.2

Tensors = tuple[torch.Tensor, ...]


def inputs(lengths: tuple[int, ...], heads: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> Tensors:
    """q, k, v and the gradient of the result."""
    random = torch.Generator().manual_seed(seed)
    of_queries, of_keys, dim = heads
    return tuple(
        torch.randn(sum(lengths), count, dim, generator=random).to(DEVICE, dtype)
        for count in (of_queries, of_keys, of_keys, of_queries)
    )


def ours(given: Tensors, lengths: tuple[int, ...], longest: int | None = None) -> Tensors:
    """The result and the gradients of q, k and v."""
    *qkv, gradient = given
    starts = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    longest = longest or max(lengths)
    out, log_sums = forward(*qkv, starts, longest, SCALE)
    return out, *backward(gradient, *qkv, out, log_sums, starts, longest, SCALE)


def torchs(given: Tensors, lengths: tuple[int, ...]) -> Tensors:
    """The same in float32, each sequence by itself."""
    *qkv, gradient = (x.float().split(lengths) for x in given)
    parts = []
    for q, k, v, of_out in zip(*qkv, gradient, strict=True):
        leaves = [x.transpose(0, 1).requires_grad_() for x in (q, k, v)]
        out = scaled_dot_product_attention(*leaves, is_causal=True, scale=SCALE, enable_gqa=True)
        found = (out.detach(), *torch.autograd.grad(out, leaves, of_out.transpose(0, 1)))
        parts.append([x.transpose(0, 1) for x in found])
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attention_and_its_gradients(lengths: tuple[int, ...], heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    given = inputs(lengths, heads, dtype)
    for mine, other in zip(ours(given, lengths), torchs(given, lengths), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.float(), other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


# NumPy's warning, from the interpreter.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_other_sequences_change_no_bit_and_a_nan_stays_in_its_own() -> None:
    lengths, heads, mine = (5, 70, 9), HEADS[1], slice(5, 75)
    given = inputs(lengths, heads, torch.float16)
    alone = ours(tuple(x[mine] for x in given), (70,))
    for others in (slice(0, 5), slice(75, 84)):
        for x in given:
            x[others] = torch.nan
    # A bound for sequences that are elsewhere.
    beside = ours(given, lengths, longest=300)
    assert all(torch.equal(x[mine], y) for x, y in zip(beside, alone, strict=True))
    assert all(x[:5].isnan().all() for x in beside)


def test_what_comes_later_is_not_seen() -> None:
    given = inputs((70,), HEADS[0], torch.float16)
    before = ours(given, (70,))[0]
    for x in given[1:3]:
        x[40:] = 7
    assert torch.equal(ours(given, (70,))[0][:40], before[:40])


def test_a_strided_input_is_taken_for_what_it_says() -> None:
    lengths = (9, 70)
    given = inputs(lengths, HEADS[0], torch.float16)
    expected = ours(given, lengths)
    rows_apart = tuple(torch.cat([x, x], 1)[:, : x.shape[1]] for x in given)
    heads_apart = tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in given)
    for strided in (rows_apart, heads_apart):
        assert not any(x.is_contiguous() for x in strided)
        assert all(torch.equal(*pair) for pair in zip(ours(strided, lengths), expected, strict=True))


def test_the_trainer_takes_the_kernels_for_heads_that_they_are_made_for() -> None:
    """Through `attend` and autograd, beside the padded way; in float16, where they round alike but not the same."""
    rows = [np.zeros(length, np.int32) for length in (5, 70, 9)]
    batch = MicroBatch([TokenSequence(0, index, row, row) for index, row in enumerate(rows)], 1, DEVICE)
    *qkv, gradient = inputs((5, 70, 9), HEADS[1], torch.float16)
    found = []
    for kernels in (Kernels(flash_varlen=True, triton_attention=True), EAGER):
        context = ForwardContext(kernels)
        context.set(batch, None)
        leaves = [x.clone().requires_grad_() for x in qkv]
        out = attend(*leaves, context, SCALE)
        found.append((out.grad_fn.name(), out.detach(), *torch.autograd.grad(out, leaves, gradient)))
    (way, *mine), (other_way, *others) = found
    assert ("_TritonAttention" in way, "_TritonAttention" in other_way) == (True, False)
    for x, y in zip(mine, others, strict=True):
        torch.testing.assert_close(x.float(), y.float(), rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize(
    ("dim", "of_values", "use_triton"), [(64, 64, True), (16, 16, False), (96, 96, False), (64, 32, False)]
)
def test_other_heads_are_left_to_flash_attention(
    dim: int, of_values: int, use_triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which runs on GPUs alone: only the choice is looked at."""
    taken: list[str] = []
    for name in ("_TritonAttention", "_FlashVarlen"):
        monkeypatch.setattr(getattr(attention, name), "apply", lambda q, *_others, name=name: taken.append(name) or q)
    row = np.zeros(5, np.int32)
    context = ForwardContext(Kernels(flash_varlen=True, triton_attention=True))
    context.set(MicroBatch([TokenSequence(0, 0, row, row)], 1, packs.CPU), None)
    attend(torch.zeros(5, 2, dim), torch.zeros(5, 2, dim), torch.zeros(5, 2, of_values), context, SCALE)
    assert taken == ["_TritonAttention" if use_triton else "_FlashVarlen"]
