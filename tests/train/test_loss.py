"""Chunked cross-entropy against torch's, values and gradient, and sums that keep runs apart."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

import packs
from train.data.micro_batch import MicroBatch
from train.data.sampling import TokenSequence
from train.nn.head import Head
from train.nn.loss import sums_per_run, target_losses
from train.sizing import LOGIT_ROWS


def head_of(weight: torch.Tensor) -> Head:
    return Head(nn.Parameter(weight.clone(), requires_grad=False))


@pytest.mark.parametrize("tokens", [1, 7, LOGIT_ROWS + 3])
@pytest.mark.parametrize("words", [5, 31, 32])
def test_losses_and_gradient_are_those_of_torch(tokens: int, words: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 8, dtype=torch.float64, requires_grad=True)
    head = torch.randn(words, 8, dtype=torch.float64)
    targets, weights = torch.randint(words, (tokens,)), torch.rand(tokens, dtype=torch.float64)
    found = target_losses(hidden.detach(), head_of(head), targets, weights)
    logits = linear(hidden, head)
    expected = cross_entropy(logits, targets, reduction="none")
    (expected * weights).sum().backward()
    torch.testing.assert_close(found.losses, expected.detach())
    torch.testing.assert_close(found.gradient, hidden.grad)
    assert torch.equal(found.correct, logits.argmax(1) == targets)


def test_without_weights_no_gradient_is_made() -> None:
    assert target_losses(torch.randn(3, 8), head_of(torch.randn(5, 8)), torch.tensor([0, 1, 2]), None).gradient is None


def test_half_precision_is_summed_in_float32() -> None:
    hidden, head = torch.randn(5, 8), torch.randn(31, 8)
    found = target_losses(hidden.bfloat16(), head_of(head.bfloat16()), torch.arange(5), torch.ones(5))
    assert found.losses.dtype == torch.float32
    assert found.gradient is not None
    assert found.gradient.dtype == torch.bfloat16


def test_a_head_of_any_number_of_words_has_whole_rows_and_is_there_once() -> None:
    weight = nn.Parameter(torch.randn(31, 8), requires_grad=False)
    before, embedding = weight.data.clone(), nn.Embedding(31, 8)
    embedding.weight = weight
    head, hidden = Head(weight), torch.randn(3, 8)
    logits = head.logits(hidden)
    assert logits.shape == (3, 32)
    torch.testing.assert_close(logits[:, :31], linear(hidden, before))
    assert torch.equal(embedding(torch.arange(31)), before)
    assert weight.data_ptr() == head._weight.data_ptr()
    assert logits[:, 31].isneginf().all()


def sequence(run: int, length: int) -> TokenSequence:
    tokens = np.arange(length, dtype=np.int32)
    return TokenSequence(run, 0, tokens, tokens)


@pytest.mark.parametrize(
    ("dtype", "columns"), [(torch.float32, 104), (torch.bfloat16, 128), (torch.float16, 128)], ids=str
)
def test_on_a_cpu_a_nan_meets_no_row_of_another_run(dtype: torch.dtype, columns: int) -> None:
    """CPUs with 16-bit matrix units read 16-bit rows in blocks of 32: the gradient's rows, of 97 words, are made of whole blocks."""
    head = head_of(torch.randn(97, 64).to(dtype))
    gradient = torch.randn(33, columns).to(dtype)
    expected = head.hidden_grad(gradient)
    assert head.logits(torch.randn(33, 64).to(dtype)).shape == gradient.shape
    gradient[16] = torch.nan
    found = head.hidden_grad(gradient)
    others = torch.arange(33) != 16
    assert torch.equal(found[others], expected[others])


def test_sums_stay_in_their_run() -> None:
    batch = MicroBatch([sequence(0, 5), sequence(2, 3), sequence(3, 9)], 4, packs.CPU)
    values = torch.arange(len(batch.targets), dtype=torch.float64)
    # The second target of run 2.
    values[5] = float("nan")
    sums = sums_per_run(values, batch)
    assert sums[[0, 1, 3]].tolist() == [0 + 1 + 2 + 3, 0, sum(range(6, 14))]
    assert sums[2].isnan()


def test_a_runs_sum_is_the_same_bits_in_any_pack() -> None:
    """In a pack a run's losses are padded to the longest run's."""
    random = torch.Generator().manual_seed(0)
    values = torch.rand(100_000, generator=random)
    for mine in range(20, 2_000, 37):
        alone, beside = (
            MicroBatch(sequences, 2, packs.CPU)
            for sequences in ([sequence(0, mine)], [sequence(0, mine), sequence(1, 3_001)])
        )
        sums = [sums_per_run(values[: len(batch.targets)], batch).float()[0] for batch in (alone, beside)]
        assert torch.equal(*sums)
