"""Windows, soft caps and raw heads by the operations that every device has, and beside a generation's cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_functional import numbers
from torch.nn.functional import scaled_dot_product_attention

import packs
from train.data.micro_batch import MicroBatch
from train.data.sampling import TokenSequence
from train.nn.attention import _repeated, attend, attend_heads
from train.nn.backends import EAGER, Kernels
from train.nn.forward_context import ForwardContext, KeyValueCache
from train.nn.functional import Norm
from train.nn.heads import HeadTransform, prepare_heads

CUDA = torch.device("cuda")
LENGTHS = (5, 9, 2)
SCALE = 0.3
FORMS = [(None, None), (3, None), (1, None), (9, None), (None, 2.0), (4, 2.0)]


def context_of(lengths: tuple[int, ...], cache: KeyValueCache | None = None) -> ForwardContext:
    rows = [np.zeros(length, np.int32) for length in lengths]
    context = ForwardContext(EAGER)
    context.set(MicroBatch([TokenSequence(0, i, row, row) for i, row in enumerate(rows)], 1, packs.CPU), None, cache)
    return context


def inputs(total: int) -> list[torch.Tensor]:
    """q of four heads, k and v of two, and v's heads have other features."""
    return [numbers(total, 4, 8), numbers(total, 2, 8) * 2, numbers(total, 2, 6)]


def one_by_one(
    qkv: list[torch.Tensor], window: int | None, softcap: float | None, lengths: tuple[int, ...] = LENGTHS
) -> torch.Tensor:
    """Each query of each sequence by itself."""
    outs = []
    for q, k, v in zip(*(x.split(lengths) for x in qkv), strict=True):
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        for i, query in enumerate(q):
            keys = slice(0 if window is None else max(0, i - window + 1), i + 1)
            scores = SCALE * torch.einsum("hd,jhd->hj", query, k[keys])
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            outs.append(torch.einsum("hj,jhd->hd", scores.softmax(-1), v[keys]))
    return torch.stack(outs)


@pytest.mark.parametrize(("window", "softcap"), FORMS)
def test_padded_sequences_attend_within_windows_and_soft_caps(window: int | None, softcap: float | None) -> None:
    leaves = [x.requires_grad_() for x in inputs(sum(LENGTHS))]
    outs = attend(*leaves, context_of(LENGTHS), SCALE, window, softcap), one_by_one(leaves, window, softcap)
    torch.testing.assert_close(*outs)
    gradients = [torch.autograd.grad(out, leaves, numbers(*out.shape)) for out in outs]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_the_memory_efficient_kernel_attends_within_sequences(dim: int) -> None:
    """Heads that share a key, in float16 on flat tokens, against float32 on padded ones."""
    lengths = (5, 70, 1, 300)
    batch = MicroBatch(
        [TokenSequence(0, i, np.zeros(n, np.int32), np.zeros(n, np.int32)) for i, n in enumerate(lengths)], 1, CUDA
    )
    found = []
    for kernels, dtype in ((Kernels(efficient_varlen=True), torch.float16), (EAGER, torch.float32)):
        context = ForwardContext(kernels)
        context.set(batch, None)
        leaves = [numbers(batch.total, heads, dim).half().to(CUDA, dtype).requires_grad_() for heads in (4, 2, 2)]
        out = attend(*leaves, context, dim**-0.5)
        of_out = numbers(*out.shape).half().to(CUDA, dtype)
        found.append((out, *torch.autograd.grad(out, leaves, of_out)))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine.float(), other, rtol=1e-2, atol=1e-2)


def test_repeated_heads_are_those_of_grouped_attention() -> None:
    """GPUs without FlashAttention take them, of which there is none here."""
    q, k, v = (x.transpose(0, 1)[None] for x in inputs(7))
    expected = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    found = scaled_dot_product_attention(q, *(_repeated(x, 4) for x in (k, v)), is_causal=True)
    torch.testing.assert_close(found, expected)
    assert _repeated(k, 2) is k


@pytest.mark.parametrize(("window", "softcap"), FORMS)
def test_a_cache_attends_within_windows_and_soft_caps(window: int | None, softcap: float | None) -> None:
    """All tokens at once, and the last two of each sequence one after the other."""
    lengths, new = (4, 7), 2
    qkv = inputs(sum(lengths) + 2 * new)
    whole = [length + new for length in lengths]
    expected = [x[-new:] for x in one_by_one(qkv, window, softcap, tuple(whole)).split(whole)]
    by_sequence = [x.split(whole) for x in qkv]
    cache = KeyValueCache(torch.tensor(lengths), room=new)
    context = context_of(lengths, cache)
    prompts = [torch.cat([x[:-new] for x in parts]) for parts in by_sequence]
    found = [attend(*prompts, context, SCALE, window, softcap)]
    for step in range(new):
        cache.advance()
        found.append(
            attend(
                *(torch.stack([x[step - new] for x in parts]) for parts in by_sequence), context, SCALE, window, softcap
            )
        )
    torch.testing.assert_close(torch.stack(found[1:], 1), torch.stack(expected))


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("rotated", [True, False])
def test_raw_heads_are_normed_and_rotated(joined: bool, rotated: bool) -> None:
    total = sum(LENGTHS)
    q, k, v = leaves = [
        x.requires_grad_() for x in (numbers(total, 4, 8), numbers(total, 2, 8), numbers(total, 2, 8) + 1)
    ]
    transforms = HeadTransform(Norm(numbers(8), 1e-6)), HeadTransform(Norm(numbers(16), 1e-6), over_all_heads=True)
    cos_sin = (numbers(total, 4), numbers(total, 4) + 1) if rotated else None
    context = context_of(LENGTHS)
    raw = (torch.cat(leaves, 1),) if joined else tuple(leaves)
    prepared = [prepare_heads(x, *(cos_sin or (None, None)), t) for x, t in zip((q, k), transforms, strict=True)]
    outs = (
        attend_heads(raw, (4, 2), transforms, cos_sin, context, SCALE, window=3),
        attend(*prepared, v, context, SCALE, window=3),
    )
    torch.testing.assert_close(*outs)
    gradients = [torch.autograd.grad(out, leaves, numbers(*out.shape)) for out in outs]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other)
