"""Experts by grouped products in bf16, as on a GPU: against float64, bit by bit again, and a NaN in its place."""

from __future__ import annotations

import pytest
import torch

import packs
from train.config import QuantConfig
from train.model.nf4 import NF4Stack, dequantize, quantize, quantize_stack
from train.nn.experts import CHUNK_BYTES, DenseStack, ExpertWeights, SplitGate, mixture, sum_by_token
from train.nn.functional import triton_kernel

DEVICE = packs.DEVICES[-1]
EXPERTS, HIDDEN, WIDTH, CHOSEN = 16, 256, 96, 4
TOKENS = [2, 70, 700]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def weights(dtype: torch.dtype, *, transposed: bool, in_four_bits: bool) -> ExpertWeights:
    """The same values in any dtype: those that NF4 holds, quantized from bf16."""
    shapes = {"up": (EXPERTS, 2 * WIDTH, HIDDEN), "down": (EXPERTS, HIDDEN, WIDTH)}
    stacks: dict[str, NF4Stack | DenseStack] = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        dense = 0.1 * numbers(*shape, seed=seed).bfloat16()
        packed = quantize_stack(dense.transpose(1, 2).contiguous() if transposed else dense, packs.NF4)
        stacks[name] = packed if in_four_bits else DenseStack(packed.dense(slice(None)).to(dtype))
    biases = (0.1 * numbers(EXPERTS, rows, seed=rows).to(dtype) for rows in (2 * WIDTH, HIDDEN))
    return ExpertWeights(stacks["up"], stacks["down"], *biases, transposed, SplitGate("silu"))


def inputs(tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    x, g = (numbers(tokens, HIDDEN, seed=seed).bfloat16().to(dtype) for seed in (3, 4))
    scores = numbers(tokens, EXPERTS, seed=5)
    router, chosen = scores.softmax(1).bfloat16().to(dtype).topk(CHOSEN)
    return x, chosen, router, g


def computed(
    mixed: ExpertWeights, x: torch.Tensor, chosen: torch.Tensor, router: torch.Tensor, g: torch.Tensor, *, grouped: bool
) -> list[torch.Tensor]:
    """The output, and the gradients of tokens and of the router's weights."""
    x, router = x.clone().requires_grad_(), router.clone().requires_grad_()
    # Kernels that are interpreted round bfloat16 otherwise.
    y = mixture(x, chosen, router, mixed, grouped=grouped, fused=DEVICE.type == "cuda" and x.dtype != torch.float64)
    return [y.detach(), *torch.autograd.grad(y, (x, router), g)]


@pytest.mark.parametrize("chunk", [2**30, 2**17], ids=["at-once", "in-chunks"])
@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_grouped_products_are_those_of_each_expert(
    tokens: int, transposed: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = computed(
        weights(torch.float64, transposed=transposed, in_four_bits=False), *inputs(tokens, torch.float64), grouped=False
    )
    packed = weights(torch.bfloat16, transposed=transposed, in_four_bits=True)
    monkeypatch.setitem(CHUNK_BYTES, DEVICE.type, chunk)
    found = computed(packed, *inputs(tokens, torch.bfloat16), grouped=True)
    again = computed(packed, *inputs(tokens, torch.bfloat16), grouped=True)
    for a, b, c in zip(found, exact, again, strict=True):
        assert float((a.double() - b).norm() / b.norm()) < 1e-2
        assert torch.equal(a, c)


@pytest.mark.skipif(packs.LACKS_TRITON is not None, reason=str(packs.LACKS_TRITON))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("weighted", [True, False])
def test_the_kernel_of_sums_is_the_formula(dtype: torch.dtype, weighted: bool) -> None:
    # Of no block's size, and of several blocks.
    for columns in (136, 2056):
        rows = numbers(7 * CHOSEN, columns).to(dtype)
        inverse = torch.randperm(7 * CHOSEN, generator=torch.Generator().manual_seed(1)).view(7, CHOSEN).to(DEVICE)
        factors = numbers(7, CHOSEN, seed=2) if weighted else None
        found = triton_kernel(sum_by_token)(rows, inverse, factors)
        torch.testing.assert_close(found, sum_by_token(rows, inverse, factors), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "one-by-one"])
def test_a_nan_stays_in_its_token(grouped: bool) -> None:
    packed = weights(torch.bfloat16, transposed=False, in_four_bits=True)
    x, chosen, router, g = inputs(70, torch.bfloat16)
    clean = computed(packed, x, chosen, router, g, grouped=grouped)
    x[3], g[5] = torch.nan, torch.nan
    found = computed(packed, x, chosen, router, g, grouped=grouped)
    assert found[0][3].isnan().all()
    assert found[1][5].isnan().all()
    others = [token for token in range(70) if token not in (3, 5)]
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a[others], b[others])


@pytest.mark.parametrize("quant", [packs.NF4, packs.NF4.model_copy(update={"bnb_4bit_use_double_quant": False})])
def test_the_device_unpacks_each_expert_as_bitsandbytes_does(quant: QuantConfig) -> None:
    dense = numbers(3, 64, 320).bfloat16() * torch.tensor([1.0, 100.0, 0.01], device=DEVICE).view(3, 1, 1).bfloat16()
    stack = quantize_stack(dense, quant)
    for expert, matrix in enumerate(dense):
        found = stack.dense(torch.tensor([expert], device=DEVICE))[0]
        torch.testing.assert_close(found, dequantize(*quantize(matrix, quant)), rtol=1e-2, atol=0)


@pytest.mark.gpu
def test_the_host_does_not_wait_where_a_chunk_holds_all_experts() -> None:
    packed = weights(torch.bfloat16, transposed=False, in_four_bits=True)
    given = inputs(70, torch.bfloat16)
    computed(packed, *given, grouped=True)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        computed(packed, *given, grouped=True)
    finally:
        torch.cuda.set_sync_debug_mode(before)
