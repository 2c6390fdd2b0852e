"""What the exact equality of float64 (`test_equality`) leaves open: the precisions that people train in, by the device's own kernels.

On a machine with a GPU every test runs there too, with varlen attention, grouped products, fused formulas and CUDA graphs where the
GPU has them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import packs
from json_lines import read_lines
from train.config import QuantConfig, parse_run_config
from train.data.micro_batch import MicroBatch
from train.data.sampling import TokenSequence
from train.nn import attention
from train.nn.attention import attend
from train.nn.backends import EAGER, Kernels, choose_kernels
from train.nn.forward_context import ForwardContext
from train.nn.gradients import add_gradients
from train.nn.packed_model import DeviceSetup, PackedModel, pack_model

# At a usual learning rate and with batches that reach every element: where a gradient is zero but for rounding, AdamW divides noise
# by noise (measured: one sequence a step under dropout 0.5, 1.5e-5 in float32).
PEERS = [
    parse_run_config(
        config.model_dump()
        | {"train": config.train.model_dump() | {"learning_rate": 1e-3, "batch_size": max(4, config.train.batch_size)}}
    )
    for config in packs.DIVERSE
]


def base_as_in_training(
    dtype: torch.dtype, device: torch.device, quant: QuantConfig = packs.SIXTEEN_BIT
) -> PackedModel:
    kernels = choose_kernels(device, dtype)
    return pack_model(packs.tiny_llama(dtype), DeviceSetup(quant, device, "resident", longest=64, kernels=kernels))


def losses(folder: Path) -> list[list[float]]:
    """Per run the losses of its steps."""
    return [[line["loss"] for line in read_lines(run.journal) if "loss" in line] for run in packs.run_dirs(folder)]


def alone(folder: Path, base: PackedModel, **kwargs: int) -> tuple[list[list[float]], list[packs.Recording]]:
    """Every run in a pack of its own."""
    sessions = [packs.train(folder / f"{i:02d}", base, [config], **kwargs)[0] for i, config in enumerate(PEERS)]
    return [losses(folder / f"{i:02d}")[0] for i in range(len(PEERS))], sessions


def mean_gap(some: list[list[float]], others: list[list[float]]) -> float:
    """Mean over runs of the mean over steps of how far the losses are apart."""
    gaps = [
        sum(abs(a - b) for a, b in zip(mine, other, strict=True)) / len(mine)
        for mine, other in zip(some, others, strict=True)
    ]
    return sum(gaps) / len(gaps)


@pytest.mark.slow
@pytest.mark.parametrize("device", packs.DEVICES, ids=str)
def test_in_float32_each_run_equals_itself_alone(tmp_path: Path, device: torch.device) -> None:
    assert not torch.backends.cuda.matmul.allow_tf32
    base = base_as_in_training(torch.float32, device)
    pack = packs.train(tmp_path / "pack", base, PEERS)
    by_itself, sessions = alone(tmp_path / "alone", base)
    for mine, other in zip(losses(tmp_path / "pack"), by_itself, strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    for mine, other in zip(pack, sessions, strict=True):
        together = torch.cat([part.flatten() for pair in mine.final.values() for part in pair])
        apart = torch.cat([part.flatten() for pair in other.final.values() for part in pair])
        assert float((together - apart).norm() / apart.norm()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("device", packs.DEVICES, ids=str)
def test_in_bfloat16_a_pack_is_no_further_off_than_another_micro_batch(tmp_path: Path, device: torch.device) -> None:
    """Rounding depends on shapes, in any trainer: what a pack adds must not exceed what cutting a run's own batch adds."""
    base = base_as_in_training(torch.bfloat16, device, packs.NF4)
    packs.train(tmp_path / "pack", base, PEERS)
    whole, _ = alone(tmp_path / "whole", base)
    cut = [alone(tmp_path / f"cut{tokens}", base, micro_batch_tokens=tokens)[0] for tokens in (40, 1)]
    of_pack = mean_gap(losses(tmp_path / "pack"), whole)
    of_shapes = max(mean_gap(some, whole) for some in cut)
    assert of_shapes > 0
    assert of_pack <= of_shapes


@pytest.mark.slow
@pytest.mark.parametrize("device", packs.DEVICES, ids=str)
def test_in_float16_a_run_that_becomes_infinite_leaves_the_others_bit_for_bit(
    tmp_path: Path, device: torch.device
) -> None:
    base = base_as_in_training(torch.float16, device, packs.NF4)
    packs.train(tmp_path / "healthy", base, PEERS)
    loop = packs.make_loop(tmp_path / "ill", base, PEERS)
    ill = 2
    for _, b in loop.adapters.tensors(ill).values():
        b.fill_(float("inf"))
    loop.run()
    for row, (mine, other) in enumerate(
        zip(packs.run_dirs(tmp_path / "ill"), packs.run_dirs(tmp_path / "healthy"), strict=True)
    ):
        if row == ill:
            assert "diverged" in read_lines(mine.journal)[-1]
        else:
            assert mine.journal.read_bytes() == other.journal.read_bytes()


@pytest.mark.parametrize("device", packs.DEVICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("way", ["as in training", "without a compiler", "as on a T4"])
def test_attention_of_long_sequences_repeats_its_gradients_to_the_bit(
    device: torch.device, dtype: torch.dtype, way: str
) -> None:
    """Attention adds the parts of a long sequence up in any order unless it is told otherwise, and a resumed run has to repeat."""
    kernels = choose_kernels(device, dtype, compiles=way == "as in training")
    if way == "as on a T4":
        kernels = Kernels(efficient_varlen=kernels.efficient_varlen)
    tokens = np.zeros(512, np.int32)
    batch = MicroBatch([TokenSequence(0, index, tokens, tokens) for index in range(8)], 1, device)
    context = ForwardContext(kernels)
    context.set(batch, None)
    random = torch.Generator().manual_seed(0)
    q, k, v, gradient = (torch.randn(batch.total, 4, 64, generator=random).to(device, dtype) for _ in range(4))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    first, *others = (torch.autograd.grad(attend(q, k, v, context, scale=0.125), (q, k, v), gradient) for _ in range(6))
    assert all(torch.equal(*pair) for other in others for pair in zip(first, other, strict=True))


def test_a_kernel_that_splits_keys_keeps_an_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's own kernel stands in for the one that only GPUs have."""
    monkeypatch.setattr(attention, "UNORDERED_BACKWARDS", {"ScaledDotProductFlashAttentionForCpuBackward0"})
    tokens = np.zeros(9, np.int32)
    batch, context = MicroBatch([TokenSequence(0, 0, tokens, tokens)], 1, packs.CPU), ForwardContext(EAGER)
    context.set(batch, None)
    q, k, v = (torch.randn(batch.total, 4, 8, requires_grad=True) for _ in range(3))
    attended = attend(q, k, v, context, scale=0.5)
    with Orders() as orders:
        attended.sum().backward()
    assert orders.of_attention == [True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_attention_of_transformers_keeps_an_order_on_padded_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "UNORDERED_BACKWARDS", {"ScaledDotProductFlashAttentionForCpuBackward0"})
    base = packs.tiny_base(torch.float32, path="padded")
    tokens = np.arange(9, dtype=np.int32)
    batch = MicroBatch([TokenSequence(0, 0, tokens, tokens)], 1, packs.CPU)
    base.model.get_input_embeddings().weight.requires_grad_(True)
    with Orders() as orders:
        add_gradients(base, batch, torch.ones(2), None)
    assert orders.of_attention == [True, True]


class Orders(TorchDispatchMode):
    """Notes whether a fixed order is asked for whenever an attention goes backward."""

    def __init__(self) -> None:
        super().__init__()
        self.of_attention: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in str(func) and "backward" in str(func):
            self.of_attention.append(torch.are_deterministic_algorithms_enabled())
        return func(*args, **(kwargs or {}))
