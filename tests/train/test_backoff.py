"""Pauses between tries."""

from itertools import islice

from train.runtime.backoff import backoff


def test_pauses_grow_to_the_longest_and_end_with_the_total() -> None:
    assert list(backoff(1, 16, total=60)) == [1, 2, 4, 8, 16, 16, 16]
    assert list(backoff(2, 20, total=30)) == [2, 4, 8, 16]
    assert list(islice(backoff(0.5, 60), 10)) == [0.5, 1, 2, 4, 8, 16, 32, 60, 60, 60]
