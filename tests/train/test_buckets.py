"""Buckets of sequences of similar length."""

from itertools import combinations

import numpy as np
import pytest

import packs
from train.data.buckets import length_buckets
from train.data.micro_batch import MicroBatch
from train.data.sampling import TokenSequence


def price(buckets: list[np.ndarray], lengths: np.ndarray, per_bucket: int) -> int:
    return sum(len(bucket) * int(lengths[bucket].max()) + per_bucket for bucket in buckets)


@pytest.mark.parametrize("per_bucket", [0, 5, 30, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_no_other_cut_of_the_sorted_lengths_is_cheaper(per_bucket: int, seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 60, 9)
    buckets = length_buckets(lengths, per_bucket)
    assert sorted(np.concatenate(buckets)) == list(range(9))
    ascending = np.argsort(lengths, kind="stable")
    cuts = [cut for n in range(9) for cut in combinations(range(1, 9), n)]
    assert price(buckets, lengths, per_bucket) == min(
        price(np.split(ascending, cut), lengths, per_bucket) for cut in cuts
    )


def test_one_long_sequence_does_not_stretch_the_short_ones() -> None:
    lengths = np.array([50] * 20 + [2048] + [50] * 20)
    assert length_buckets(lengths)[0].tolist() == [20]
    assert len(length_buckets(np.array([50, 60, 70]))) == 1


def test_tokens_of_buckets_come_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.data.buckets.length_buckets.__defaults__", (0,))
    rows = [np.arange(10 * i, 10 * i + n, dtype=np.int32) for i, n in enumerate((4, 9, 2, 9, 1))]
    batch = MicroBatch([TokenSequence(i % 2, i, row, row) for i, row in enumerate(rows)], 2, packs.CPU)
    parts, places = batch.buckets
    assert len(parts) == 4
    assert places is not None
    for name in ("tokens", "positions", "run_of_token", "counters"):
        joined = np.concatenate([getattr(part, name).numpy() for part in parts])
        assert (joined[places.numpy()] == getattr(batch, name).numpy()).all()
