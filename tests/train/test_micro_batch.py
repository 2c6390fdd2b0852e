"""The indices of micro-batches: padding, routes to adapters, targets."""

import re

import numpy as np
import torch

import packs
from train.data import micro_batch
from train.data.micro_batch import MicroBatch, Padding
from train.data.sampling import TokenSequence


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
