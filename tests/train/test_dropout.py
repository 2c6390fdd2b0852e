"""Dropout by counters: the right share, no visible pattern, and the same mask wherever a token lies."""

import numpy as np
import pytest
import torch

import packs
from train.data.micro_batch import MicroBatch
from train.data.sampling import TokenSequence
from train.nn.dropout import Dropout, step_key

FEATURES = 256


def sequence(run: int, index: int, length: int) -> TokenSequence:
    tokens = np.arange(length, dtype=np.int32)
    return TokenSequence(run, index, tokens, tokens)


def masks(
    sequences: list[TokenSequence], pack_size: int, p: list[float], module_key: int = 7, step: int = 3
) -> torch.Tensor:
    """What ones [T, FEATURES] become, flat."""
    batch = MicroBatch(sequences, pack_size, packs.CPU)
    keys = torch.tensor([step_key(run, step) for run in range(pack_size)], dtype=torch.int32)
    dropout = Dropout(torch.tensor(p, dtype=torch.float64), keys, module_key)
    ones = torch.ones(batch.total, FEATURES, dtype=torch.float64)
    return dropout.apply(ones, batch)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_share_and_mean(p: float) -> None:
    out = masks([sequence(0, i, 100) for i in range(20)], 1, [p])
    assert float((out == 0).double().mean()) == pytest.approx(p, abs=0.005)
    assert float(out.mean()) == pytest.approx(1, abs=0.02 if p < 0.9 else 0.05)
    assert out.unique().tolist() == pytest.approx([0, 1 / (1 - p)])


def test_neighbours_are_uncorrelated() -> None:
    """Between features, tokens, modules and steps alike."""
    kept = [
        masks([sequence(0, i, 100) for i in range(20)], 1, [0.5], key, step) > 0
        for key, step in ((7, 3), (8, 3), (7, 4))
    ]
    pairs = [(kept[0][1:], kept[0][:-1]), (kept[0][:, 1:], kept[0][:, :-1]), (kept[0], kept[1]), (kept[0], kept[2])]
    for a, b in pairs:
        assert float((a == b).double().mean()) == pytest.approx(0.5, abs=0.01)


def test_a_token_keeps_its_mask_in_any_company() -> None:
    mine = [sequence(0, 0, 9), sequence(0, 1, 5)]
    alone = masks(mine, 1, [0.3])
    packed = masks([*mine, sequence(1, 0, 12), sequence(1, 1, 3)], 2, [0.3, 0.7])
    second_only = masks(mine[1:], 1, [0.3])
    assert torch.equal(packed[:14], alone)
    assert torch.equal(second_only, alone[9:])


def test_no_dropout_beside_a_run_with_dropout_is_exact() -> None:
    out = masks([sequence(0, 0, 9), sequence(1, 0, 9)], 2, [0.0, 0.5])
    assert torch.equal(out[:9], torch.ones(9, FEATURES, dtype=torch.float64))
