"""Which rows a run sees at which step, and how the rows of a pack lie in memory.

The order of a run's data is a pure function of (seed, epoch), so a cursor is one number: the step. A micro-batch holds the real
tokens of all runs flat, run after run and sequence after sequence; indices to and from right-padded layouts are made here, once
per micro-batch, on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from train.config import TrainConfig
from train.data.token_table import TokenTable

IGNORED_LABEL = -100
MAX_LENGTH = 1 << 16  # of a sequence in tokens; a counter holds sequence and position


@lru_cache(maxsize=64)
def epoch_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    """The permutation of `rows` rows in one epoch [rows]."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def rows_of_step(train: TrainConfig, rows: int, step: int) -> np.ndarray:
    """The rows of optimizer step `step` (from 0) of a run over `rows` rows; an epoch's last batch may be smaller."""
    epoch, index = divmod(step, train.steps_per_epoch(rows))
    return epoch_order(train.seed, epoch, rows)[index * train.batch_size : (index + 1) * train.batch_size]


@dataclass(frozen=True)
class Sequence:
    """One row of one run. `run` is the run's row in the pack, `index` its place in the run's batch (a dropout counter)."""

    run: int
    index: int
    tokens: np.ndarray
    labels: np.ndarray

    @property
    def targets(self) -> int:
        """How many tokens are predicted; the first never is."""
        return int((self.labels[1:] != IGNORED_LABEL).sum())


def sequences_of(run: int, table: TokenTable, rows: np.ndarray) -> list[Sequence]:
    """The sequences of `rows` of a table, for one run of the pack."""
    return [Sequence(run, index, *table.row(int(row))) for index, row in enumerate(rows)]


def cut(sequences: list[Sequence], max_tokens: int) -> Iterator[list[Sequence]]:
    """Cut one step's sequences into micro-batches of at most `max_tokens` tokens (but at least one sequence).

    Sequences are dealt in turn to the runs, so that every micro-batch holds all runs while they last.
    """
    batch: list[Sequence] = []
    tokens = 0
    for sequence in sorted(sequences, key=lambda s: (s.index, s.run)):
        if batch and tokens + len(sequence.tokens) > max_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append(sequence)
        tokens += len(sequence.tokens)
    if batch:
        yield batch


@dataclass(frozen=True)
class Padding:
    """Indices between flat tokens [T] and right-padded groups [G, L] of them.

    `gather` [G, L] holds the flat token of each place; places after a group's end point at the group's own first token, never
    at another group's, so that a NaN stays where it is. `real` [G, L] says which places are not such fillers, None if all are
    real. `places` [M] holds, for each of the M flat tokens covered, its place in the flattened [G * L]. `tokens` [M] names those
    flat tokens, None if they are all T in order.
    """

    gather: torch.Tensor
    real: torch.Tensor | None
    places: torch.Tensor
    tokens: torch.Tensor | None

    @staticmethod
    def of(starts: np.ndarray, lengths: np.ndarray, total: int, device: torch.device) -> Padding:
        """Padding for groups that begin at flat `starts` [G] and have `lengths` [G] tokens, of `total` flat tokens."""
        longest = int(lengths.max())
        offsets = np.arange(longest)
        real = offsets < lengths[:, None]
        gather = starts[:, None] + np.where(real, offsets, 0)
        places = np.flatnonzero(real)
        tokens = gather.reshape(-1)[places]
        everything = len(tokens) == total
        return Padding(
            _to(gather, device),
            None if real.all() else _to(real, device),
            _to(places, device),
            None if everything else _to(tokens, device),
        )

    def pad(self, flat: torch.Tensor) -> torch.Tensor:
        """[T, ...] -> [G, L, ...]; fillers repeat their group's first token."""
        if self.is_identity:
            return flat.unsqueeze(0)
        return flat.index_select(0, self.gather.view(-1)).view(*self.gather.shape, *flat.shape[1:])

    def pad_with_zeros(self, flat: torch.Tensor) -> torch.Tensor:
        """[T, ...] -> [G, L, ...]; fillers are zero, whatever their group holds."""
        padded = self.pad(flat)
        if self.real is None:
            return padded
        return padded.masked_fill(~self.real.view(*self.real.shape, *[1] * (flat.dim() - 1)), 0)

    def unpad(self, padded: torch.Tensor, total: int) -> torch.Tensor:
        """[G, L, ...] -> [T, ...]; flat tokens outside of all groups are zero."""
        if self.is_identity:
            return padded.squeeze(0)
        flat = padded.reshape(-1, *padded.shape[2:]).index_select(0, self.places)
        if self.tokens is None:
            return flat
        return flat.new_zeros(total, *flat.shape[1:]).index_copy_(0, self.tokens, flat)

    @cached_property
    def is_identity(self) -> bool:
        """Whether there is one group that is all tokens in order, so that padding is a view."""
        return self.gather.shape[0] == 1 and self.tokens is None


class MicroBatch:
    """Flat tokens of several runs on a device, with the indices that attention, adapters and loss need.

    Attributes:
        tokens, positions: [T].
        runs: the runs that have tokens here, ascending rows of the pack.
        attention: padding of the sequences.
        learnt: [N] flat positions whose next token is to be predicted; `targets` [N] are those tokens.
        run_of_target: [N]; `by_run` and `by_sequence` group the N targets, `run_of_sequence` [S] names the sequences' runs.
    """

    def __init__(self, sequences: list[Sequence], pack_size: int, device: torch.device) -> None:
        ordered = sorted(sequences, key=lambda s: s.run)  # stable: a run's sequences keep their order
        lengths = np.array([len(s.tokens) for s in ordered])
        starts = _starts(lengths)
        run_of_sequence = np.array([s.run for s in ordered])
        positions = np.concatenate([np.arange(length) for length in lengths])
        self.device, self.pack_size, self.total = device, pack_size, int(lengths.sum())
        self.tokens = _to(np.concatenate([s.tokens for s in ordered]), device)
        self.positions = _to(positions, device)
        self.attention = Padding.of(starts, lengths, self.total, device)
        self.runs, first = np.unique(run_of_sequence, return_index=True)
        self._run_starts, self._run_lengths = starts[first], np.add.reduceat(lengths, first)
        self._counters = _to(np.repeat([s.index for s in ordered], lengths) * MAX_LENGTH + positions, device)
        self._routes: dict[tuple[int, ...], Route | None] = {}
        self._note_targets(ordered, lengths, run_of_sequence)

    def _note_targets(self, ordered: list[Sequence], lengths: np.ndarray, run_of_sequence: np.ndarray) -> None:
        targets = np.concatenate([_shifted(s.labels) for s in ordered])
        learnt = np.flatnonzero(targets != IGNORED_LABEL)
        sequence_of_target = np.repeat(np.arange(len(ordered)), lengths)[learnt]
        run_of_target = run_of_sequence[sequence_of_target]
        self.learnt, self.targets = _to(learnt, self.device), _to(targets[learnt], self.device)
        self.run_of_target = _to(run_of_target, self.device)
        self.by_run, self.runs_with_targets = _grouped(run_of_target, self.device)
        self.by_sequence, sequences = _grouped(sequence_of_target, self.device)
        self.run_of_sequence = _to(run_of_sequence, self.device)[sequences]

    def route(self, members: tuple[int, ...]) -> Route | None:
        """Where the tokens of the runs `members` lie, for the modules that just these runs adapt; None if they have none here."""
        if members not in self._routes:
            self._routes[members] = self._make_route(members)
        return self._routes[members]

    def _make_route(self, members: tuple[int, ...]) -> Route | None:
        present = np.flatnonzero(np.isin(self.runs, members))
        if not len(present):
            return None
        padding = Padding.of(self._run_starts[present], self._run_lengths[present], self.total, self.device)
        rows = None if len(present) == self.pack_size else _to(self.runs[present], self.device)
        return Route(padding, rows, padding.pad(self._counters))


@dataclass(frozen=True)
class Route:
    """How one group of runs meets its adapters in one micro-batch.

    `rows` [G] are the runs' rows in the pack, None for all of them in order. `counters` [G, L] number the tokens within the
    run's whole step, whatever the micro-batch: sequence * MAX_LENGTH + position.
    """

    padding: Padding
    rows: torch.Tensor | None
    counters: torch.Tensor

    def pick(self, stack: torch.Tensor) -> torch.Tensor:
        """The rows [G, ...] of a stack [runs, ...] over the whole pack."""
        return stack if self.rows is None else stack.index_select(0, self.rows)

    def add(self, stack: torch.Tensor, picked: torch.Tensor) -> None:
        """Add [G, ...] to these rows of a stack [runs, ...], in place and in its precision."""
        if self.rows is None:
            stack.add_(picked)
        else:
            stack.index_add_(0, self.rows, picked.to(stack.dtype))


class CurrentBatch:
    """The micro-batch that flows through the base now; attention and adapters look here for their indices.

    `dropout_keys` [runs] are the runs' random keys of this step, None while evaluating.
    """

    def __init__(self) -> None:
        self.batch: MicroBatch | None = None
        self.dropout_keys: torch.Tensor | None = None

    def require(self) -> MicroBatch:
        """The micro-batch in flight."""
        if self.batch is None:
            raise RuntimeError("the packed base was called outside of PackedBase.hidden_states")
        return self.batch


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Where groups of `lengths` begin when they lie one after another."""
    return np.concatenate([[0], np.cumsum(lengths)[:-1]])


def _grouped(labels: np.ndarray, device: torch.device) -> tuple[Padding, torch.Tensor]:
    """The padding of runs of equal, ascending `labels` [N], and the distinct labels [G]."""
    distinct, starts, lengths = np.unique(labels, return_index=True, return_counts=True)
    return Padding.of(starts, lengths, len(labels), device), _to(distinct, device)


def _shifted(labels: np.ndarray) -> np.ndarray:
    """Labels of the next token: position t predicts t + 1, the last position predicts nothing."""
    return np.append(labels[1:], IGNORED_LABEL)


def _to(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A numpy array on `device`; integers become int64."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return (tensor if tensor.dtype == torch.bool else tensor.long()).to(device, non_blocking=True)
