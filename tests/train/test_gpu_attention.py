"""Attention's kernels against torch's, sequence by sequence: on a GPU where there is one, else by Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import packs

if packs.LACKS_TRITON is not None:
    pytest.skip(packs.LACKS_TRITON, allow_module_level=True)

from train.data.micro_batch import MicroBatch
from train.data.sampling import TokenSequence
from train.nn import attention, varlen
from train.nn.attention import attend
from train.nn.backends import EAGER, Kernels
from train.nn.forward_context import ForwardContext
from train.nn.functional import Norm
from train.nn.heads import HeadTransform, heads_autograd
from train.nn.triton import attention as kernels
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


def inputs(
    lengths: tuple[int, ...], heads: tuple[int, int, int], dtype: torch.dtype, seed: int = 0, of_values: int = 0
) -> Tensors:
    """q, k, v and the gradient of the result."""
    random = torch.Generator().manual_seed(seed)
    of_queries, of_keys, dim = heads
    return tuple(
        torch.randn(sum(lengths), count, size, generator=random).to(DEVICE, dtype)
        for count, size in zip(
            (of_queries, of_keys, of_keys, of_queries), (dim, dim, of_values or dim, of_values or dim), strict=True
        )
    )


def ours(
    given: Tensors,
    lengths: tuple[int, ...],
    longest: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensors:
    """The result and the gradients of q, k and v."""
    *qkv, gradient = given
    starts = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    longest = longest or max(lengths)
    out, log_sums = forward(*qkv, starts, longest, SCALE, window, softcap)
    return out, *backward(gradient, *qkv, out, log_sums, starts, longest, SCALE, window, softcap)


def torchs(
    given: Tensors, lengths: tuple[int, ...], window: int | None = None, softcap: float | None = None
) -> Tensors:
    """The same in float32, each sequence by itself."""
    *qkv, gradient = (x.float().split(lengths) for x in given)
    parts = []
    for q, k, v, of_out in zip(*qkv, gradient, strict=True):
        leaves = [x.transpose(0, 1).requires_grad_() for x in (q, k, v)]
        out = scored(*leaves, window, softcap)
        found = (out.detach(), *torch.autograd.grad(out, leaves, of_out.transpose(0, 1)))
        parts.append([x.transpose(0, 1) for x in found])
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def scored(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, softcap: float | None
) -> torch.Tensor:
    """Attention of one sequence [heads, L, dim], as the formulas have it."""
    group = len(q) // len(k)
    scores = SCALE * q @ k.repeat_interleave(group, 0).transpose(1, 2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    behind = torch.arange(q.shape[1], device=q.device)[:, None] - torch.arange(q.shape[1], device=q.device)
    is_seen = (behind >= 0) & (behind < (window or q.shape[1]))
    return scores.masked_fill(~is_seen, -torch.inf).softmax(-1) @ v.repeat_interleave(group, 0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attention_and_its_gradients(lengths: tuple[int, ...], heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    given = inputs(lengths, heads, dtype)
    for mine, other in zip(ours(given, lengths), torchs(given, lengths), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.float(), other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("lengths", "window", "softcap"),
    [
        ((5, 70), 1, None),
        ((140,), 64, None),
        ((3, 150), 65, None),
        ((70, 9), 30, 2.0),
        ((70,), 200, None),
        ((70,), None, 1.0),
    ],
    ids=str,
)
def test_windows_and_soft_caps(
    lengths: tuple[int, ...], window: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    """Windows of one key, of a block and one more, with and without the first block of the sequence."""
    given = inputs(lengths, (2, 1, 32), dtype)
    found = zip(ours(given, lengths, None, window, softcap), torchs(given, lengths, window, softcap), strict=True)
    for mine, other in found:
        torch.testing.assert_close(mine.float(), other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("dim", "of_values"), [(80, 80), (96, 64), (112, 112), (32, 192), (192, 128), (256, 256), (512, 512)], ids=str
)
def test_heads_of_every_size(dim: int, of_values: int, dtype: torch.dtype) -> None:
    """80, 96, 112 and 192 features are padded in registers; what is past them is another head's."""
    lengths = (3, 67) if dim < 512 else (3, 18)
    given = inputs(lengths, (2, 1, dim), dtype, of_values=of_values)
    given = (given[0] / 4, *given[1:])
    for mine, other in zip(ours(given, lengths), torchs(given, lengths), strict=True):
        torch.testing.assert_close(mine.float(), other, rtol=TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])


@pytest.mark.parametrize("window", [None, 20])
def test_blocks_that_are_met_in_smaller_steps(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for launches in (kernels.FORWARD, kernels.QUERIES, kernels.KEYS):
        monkeypatch.setitem(launches, 128, launches[128] | {"STEP": 16})
    given, lengths = inputs((70, 9), (2, 1, 32), torch.float16), (70, 9)
    for mine, other in zip(ours(given, lengths, None, window), torchs(given, lengths, window), strict=True):
        torch.testing.assert_close(mine.float(), other, rtol=4e-3, atol=4e-3)


def test_keys_outside_of_a_window_are_not_read() -> None:
    """A NaN there would reach every sum that its block is in."""
    given = inputs((200,), HEADS[0], torch.float16)
    for x in given:
        x[:64] = torch.nan
    assert not any(x[136:].isnan().any() for x in ours(given, (200,), window=8))


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


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, None), (20, 2.0)], ids=str)
def test_the_trainer_takes_the_kernels_for_heads_that_they_are_made_for(
    window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through `attend` and autograd, beside the padded way; in float16, where they round alike but not the same."""
    taken: list[str] = []
    for kernel in (varlen.Triton, varlen.Flash):
        right = kernel.forward
        monkeypatch.setattr(
            kernel,
            "forward",
            lambda self, *given, right=right: taken.append(type(self).__name__) or right(self, *given),
        )
    *qkv, gradient = inputs((5, 70, 9), HEADS[1], torch.float16)
    found = []
    for chosen in (Kernels(flash_varlen=True, triton_attention=True), EAGER):
        context = context_of((5, 70, 9), chosen)
        leaves = [x.clone().requires_grad_() for x in qkv]
        out = attend(*leaves, context, SCALE, window, softcap)
        found.append((out.detach(), *torch.autograd.grad(out, leaves, gradient)))
    assert taken == ["Triton"]
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x.float(), y.float(), rtol=4e-3, atol=4e-3)


def context_of(lengths: tuple[int, ...], kernels: Kernels) -> ForwardContext:
    """Of one run's sequences."""
    rows = [np.zeros(length, np.int32) for length in lengths]
    context = ForwardContext(kernels)
    context.set(MicroBatch([TokenSequence(0, i, row, row) for i, row in enumerate(rows)], 1, DEVICE), None)
    return context


@pytest.mark.parametrize(("joined", "fused"), [(False, True), (True, True), (True, False)])
def test_raw_heads_are_kept_instead_of_prepared_ones(joined: bool, fused: bool) -> None:
    """The result and the gradients are those of `attend` after `heads_autograd`, to the bit: the same kernels on the same numbers."""
    lengths, dtype = (2, 5), torch.float16
    *qkv, gradient = inputs(lengths, (4, 2, 32), dtype)
    random = torch.Generator().manual_seed(1)
    cos, sin, weight = (torch.randn(shape, generator=random).to(DEVICE, dtype) for shape in ((7, 32), (7, 32), (32,)))
    transforms = HeadTransform(Norm(weight, 1e-5)), HeadTransform()
    context = context_of(lengths, Kernels(flash_varlen=True, triton_attention=True, fused_elementwise=fused))
    leaves = [x.clone().requires_grad_() for x in qkv]
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        raw = (torch.cat(leaves, 1),) if joined else tuple(leaves)
        out = attention.attend_heads(raw, (4, 2), transforms, (cos, sin), context, SCALE)
    again = checkpoint(attention.attend_heads, raw, (4, 2), transforms, (cos, sin), context, SCALE, use_reentrant=False)
    assert torch.equal(
        torch.autograd.grad(again.sum(), leaves[0])[0], torch.autograd.grad(out.sum(), leaves[0], retain_graph=True)[0]
    )
    mine = out, *torch.autograd.grad(out, leaves, gradient)
    # The projections [7, 8, 32], out [7, 4, 32] and log_sums [4, 7].
    assert sum(x.numel() for x in kept) == 7 * (8 + 4) * 32 + 7 * 4
    prepared = [heads_autograd(x, (cos, sin), t, fused) for x, t in zip(leaves[:2], transforms, strict=True)]
    out = attend(*prepared, leaves[2], context, SCALE)
    others = out, *torch.autograd.grad(out, leaves, gradient)
    assert all(torch.equal(*pair) for pair in zip(mine, others, strict=True))


@pytest.mark.parametrize(
    ("dim", "of_values", "softcap", "expected"),
    [
        (64, 64, None, varlen.Triton),
        (192, 128, 30.0, varlen.Triton),
        (16, 16, None, varlen.Flash),
        (16, 16, 30.0, type(None)),
        (24, 32, None, type(None)),
        (512, 512, None, varlen.Triton),
        (576, 576, None, type(None)),
        (20, 20, None, type(None)),
    ],
)
def test_other_heads_are_left_to_flash_attention_or_padded(
    dim: int, of_values: int, softcap: float | None, expected: type
) -> None:
    """Which runs on GPUs alone: only the choice is looked at."""
    context = context_of((5,), Kernels(flash_varlen=True, triton_attention=True))
    q, v = torch.zeros(5, 2, dim), torch.zeros(5, 2, of_values)
    assert isinstance(attention._varlen_kernel(context, q, v, None, softcap, None), expected)


@pytest.mark.parametrize(
    ("window", "softcap", "expected"),
    [(None, None, varlen.Efficient), (5, None, varlen.Efficient), (4, None, type(None)), (None, 30.0, type(None))],
)
def test_a_gpu_without_flash_attention_pads_for_windows_and_soft_caps(
    window: int | None, softcap: float | None, expected: type
) -> None:
    context = context_of((5,), Kernels(efficient_varlen=True))
    q = torch.zeros(5, 2, 64)
    assert isinstance(attention._varlen_kernel(context, q, q, window, softcap, None), expected)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("kernel", [varlen.Triton(), varlen.Flash()], ids=["triton", "flash"])
def test_a_sink_takes_its_share_of_every_softmax(
    kernel: varlen.VarlenKernel, window: int | None, dtype: torch.dtype
) -> None:
    if isinstance(kernel, varlen.Flash) and DEVICE.type != "cuda":
        pytest.skip("NOT TESTED ON A GPU: FlashAttention needs one")
    lengths, heads = (5, 70), (4, 2, 64)
    *qkv, gradient = inputs(lengths, heads, dtype)
    sinks = torch.tensor([-2.0, 0.0, 1.0, 3.0], device=DEVICE)
    scores = varlen.Scores(torch.tensor([0, 5, 75], device=DEVICE).int(), 128, SCALE, window, None)
    leaves = [x.requires_grad_() for x in qkv]
    out = varlen.attend_varlen(*leaves, varlen.WithSinks(kernel, sinks), scores)
    found = [out, *torch.autograd.grad(out, leaves, gradient)]
    wide = [x.detach().float().requires_grad_() for x in qkv]
    parts = []
    for q, k, v in zip(*(x.split(lengths) for x in wide), strict=True):
        q, k, v = (x.transpose(0, 1) for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
        behind = torch.arange(q.shape[1], device=DEVICE)[:, None] - torch.arange(q.shape[1], device=DEVICE)
        is_seen = (behind >= 0) & (behind < (window or q.shape[1]))
        rows = (SCALE * q @ k.transpose(1, 2)).masked_fill(~is_seen, -torch.inf)
        rows = torch.cat([sinks[:, None, None].expand(-1, q.shape[1], 1), rows], 2)
        parts.append((rows.softmax(-1)[..., 1:] @ v).transpose(0, 1))
    expected = torch.cat(parts)
    for mine, other in zip(found, [expected, *torch.autograd.grad(expected, wide, gradient.float())], strict=True):
        torch.testing.assert_close(mine.float(), other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
