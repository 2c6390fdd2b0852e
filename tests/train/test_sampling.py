"""The order of examples, and how a step is split into micro-batches."""

import re

import numpy as np

import packs
from train.data import sampling
from train.data.sampling import TokenSequence, epoch_order, examples_of_step, sequences_of, split_by_tokens


def test_an_epoch_sees_every_row_once_in_an_order_of_its_own() -> None:
    train = packs.run_config(train={"batch_size": 7, "seed": 3}).train
    steps = train.steps_per_epoch(50)
    epochs = [np.concatenate([examples_of_step(train, 50, e * steps + s) for s in range(steps)]) for e in range(2)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert not np.array_equal(*epochs)
    assert not np.array_equal(epochs[0], epoch_order(4, 0, 50))


def test_the_order_is_the_same_today_as_when_it_was_written() -> None:
    """A resume under another version of numpy has to see the same rows."""
    assert epoch_order(0, 0, 10).tolist() == [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]


def test_cutting_keeps_every_sequence_and_the_limit() -> None:
    table = packs.random_table(30, 0)
    sequences = [s for run in range(3) for s in sequences_of(run, table, np.arange(10 * run, 10 * run + 4 + run))]
    chunks = list(split_by_tokens(sequences, 60))
    assert sorted((s.run_index, s.index) for chunk in chunks for s in chunk) == sorted(
        (s.run_index, s.index) for s in sequences
    )
    assert all(sum(len(s.tokens) for s in chunk) <= 60 for chunk in chunks)
    assert [len(chunk) for chunk in split_by_tokens(sequences, 1)] == [1] * len(sequences)
    assert list(split_by_tokens([], 60)) == []


def test_cutting_leaves_no_small_remainder() -> None:
    tokens = np.arange(10, dtype=np.int32)
    assert [len(chunk) for chunk in split_by_tokens([TokenSequence(0, i, tokens, tokens) for i in range(11)], 109)] == [
        6,
        5,
    ]
    assert [len(chunk) for chunk in split_by_tokens([TokenSequence(0, i, tokens, tokens) for i in range(11)], 110)] == [
        11
    ]


def test_the_example_of_the_docstring_is_how_a_step_is_split() -> None:
    lengths = [5, 4, 3, 3]
    filled = {
        limit: [lengths[start:end] for start, end in sampling._fill_in_order(lengths, limit)] for limit in (8, 6, 5)
    }
    assert filled == {8: [[5], [4, 3], [3]], 6: [[5], [4], [3, 3]], 5: [[5], [4], [3], [3]]}
    shown_lines = re.findall(r"filled up to (\d) tokens +([\d |]+\d)", str(sampling.split_by_tokens.__doc__))
    assert {
        int(limit): [list(map(int, part.split())) for part in parts.split("|")] for limit, parts in shown_lines
    } == filled
    tokens = [np.zeros(length, np.int32) for length in lengths]
    sequences = [TokenSequence(0, i, part, part) for i, part in enumerate(tokens)]
    assert [[len(s.tokens) for s in chunk] for chunk in split_by_tokens(sequences, 8)] == filled[6]
