"""The order of data, the cutting of steps and the indices of packs."""

import re

import numpy as np
import torch

import packs
from train.data import micro_batch, sampling
from train.data.micro_batch import MicroBatch, Padding
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


def test_padding_and_back() -> None:
    flat = torch.arange(10.0).view(10, 1)
    padding = Padding.of(np.array([0, 3, 4]), np.array([3, 1, 6]), 10, packs.CPU)
    padded = padding.pad(flat)
    assert padded.shape == (3, 6, 1)
    assert padded[1].flatten().tolist() == [3.0] * 6, "fillers repeat their own group's first token"
    assert padding.pad_with_zeros(flat)[1].flatten().tolist() == [3.0, 0, 0, 0, 0, 0]
    assert torch.equal(padding.unpad(padded, 10), flat)


def test_tokens_outside_of_all_groups_come_back_as_zero() -> None:
    flat = torch.arange(1.0, 11.0)
    padding = Padding.of(np.array([2, 6]), np.array([2, 3]), 10, packs.CPU)
    assert padding.unpad(padding.pad(flat), 10).tolist() == [0, 0, 3, 4, 0, 0, 7, 8, 9, 0]


def test_one_group_of_everything_is_a_view() -> None:
    flat = torch.arange(10.0)
    padding = Padding.of(np.array([0]), np.array([10]), 10, packs.CPU)
    assert padding.pad(flat).data_ptr() == flat.data_ptr()


def test_a_route_holds_the_members_that_have_tokens_here() -> None:
    tokens = np.arange(4, dtype=np.int32)
    batch = MicroBatch([TokenSequence(run, 0, tokens, tokens) for run in (0, 2, 3)], 4, packs.CPU)
    route = batch.route((1, 2, 3))
    assert route is not None
    assert route.runs is not None
    assert route.runs.tolist() == [2, 3]
    assert batch.route((1,)) is None
    everyone = MicroBatch([TokenSequence(run, 0, tokens, tokens) for run in range(4)], 4, packs.CPU).route((0, 1, 2, 3))
    assert everyone is not None
    assert everyone.runs is None


def shown(name: str, of: str = "") -> list[int]:
    """The numbers in the line `name` of the docstring of `train.data.micro_batch`, or in its first one from the line `of` on."""
    text = str(micro_batch.__doc__)
    text = text[text.index(f"\n    {of}") :]
    line = re.search(rf"^ +(?:{of} +)?{re.escape(name)} +(-?\d[-\d |/]*)", text, re.MULTILINE)
    assert line is not None, f"the docstring shows no {name}"
    return [int(number) for number in re.findall(r"-?\d+", line[1])]


def example(token_multiple: int = 1) -> MicroBatch:
    """The docstring's three sequences, read from its first table."""
    table = re.findall(r"^ {4}(\d) +(\d) +((?:\d+ )+) +((?:-?\d+ ?)+)$", str(micro_batch.__doc__), re.MULTILINE)
    assert len(table) == 3
    rows = [[np.array(list(map(int, column.split()))) for column in row] for row in table]
    sequences = [TokenSequence(int(run[0]), int(index[0]), tokens, labels) for run, index, tokens, labels in rows]
    # The last one first: a micro-batch sorts by run.
    return MicroBatch([sequences[2], *sequences[:2]], 2, packs.CPU, token_multiple)


def test_the_example_of_the_docstring_is_what_a_micro_batch_holds() -> None:
    batch = example()
    assert list(range(batch.total)) == shown("t")
    for name in ("tokens", "positions", "run_of_token", "counters", "sequence_starts"):
        assert getattr(batch, name).tolist() == shown(name), name
    for name in ("target_positions", "targets", "run_of_target"):
        assert getattr(batch, name).tolist() == shown(name), name
    route = batch.route((0, 1))
    assert route is not None
    assert route.bounds.flatten().tolist() == shown("route((0, 1)).bounds")
    assert (batch.num_real_tokens, batch.num_targets, batch.sequences, batch.longest) == (9, 5, 3, 4)


def test_the_padding_of_the_docstring_is_what_a_micro_batch_holds() -> None:
    batch = example()
    route = batch.route((0, 1))
    assert route is not None
    for of, padding in (
        ("attention", batch.attention),
        ("runs", route.padding),
        ("targets_by_run", batch.targets_by_run),
    ):
        assert padding.gather.flatten().tolist() == shown("gather", of), of
        assert padding.places.tolist() == shown("places", of), of
    assert batch.attention.real is not None
    assert batch.attention.real.int().flatten().tolist() == shown("real", "attention")
    assert batch.runs_with_targets.tolist() == [0, 1]


def test_the_fillers_of_the_docstring_are_what_a_micro_batch_adds() -> None:
    bare, filled = example(), example(token_multiple=12)
    names = ("tokens", "run_of_token", "sequence_starts", "target_positions", "targets", "run_of_target")
    for name in names:
        assert getattr(filled, name).tolist() == getattr(bare, name).tolist() + shown(name, "fillers"), name
    assert filled.num_targets == bare.num_targets
    assert filled.num_real_tokens == bare.num_real_tokens == 9
