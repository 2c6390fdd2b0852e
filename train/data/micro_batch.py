"""Which rows a run sees at which step, and how the rows of a pack lie in memory.

The order of a run's data is a pure function of (seed, epoch), so a cursor is one number: the step. A micro-batch holds the real
tokens of all runs flat, run after run and sequence after sequence; indices to and from right-padded layouts are made here, once
per micro-batch, on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from train.data.sampling import IGNORED_LABEL, TokenSequence

if TYPE_CHECKING:
    pass

MAX_LENGTH = 1 << 16  # of a sequence in tokens; a counter holds sequence and position


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
        longest = int(lengths.max(initial=0))
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

    With `token_multiple` above 1 fillers complete the tokens to a multiple of it, so that few shapes occur (CUDA graphs want
    that): at least one filler, in a sequence of their own at the end, with the last run, and as many learnt positions as
    tokens. A filler's weight in the loss is zero, so it changes no gradient.

    Attributes:
        tokens, positions: [T].
        run_of_token: [T] row of the pack; `counters` [T] number the tokens within their run's whole step, whatever the
            micro-batch: sequence * MAX_LENGTH + position.
        runs: the runs that have tokens here, ascending rows of the pack.
        attention: padding of the sequences; `sequence_starts` [S + 1] are the same bounds for kernels that take them, int32.
        longest: tokens of the longest sequence.
        learnt: [N] flat positions whose next token is to be predicted; `targets` [N] are those tokens.
        run_of_target: [N], `pack_size` for fillers; `by_run` groups the real ones of them, `num_targets` is their number.
    """

    def __init__(
        self, sequences: list[TokenSequence], pack_size: int, device: torch.device, token_multiple: int = 1
    ) -> None:
        ordered = sorted(sequences, key=lambda s: s.run)  # stable: a run's sequences keep their order
        self.real_total = sum(len(s.tokens) for s in ordered)
        if token_multiple > 1:
            ordered.append(_fillers(ordered[-1].run, token_multiple - self.real_total % token_multiple))
        lengths = np.array([len(s.tokens) for s in ordered])
        starts = _starts(lengths)
        run_of_sequence = np.array([s.run for s in ordered])
        positions = np.concatenate([np.arange(s.start, s.start + len(s.tokens)) for s in ordered])
        self.device, self.pack_size, self.total = device, pack_size, int(lengths.sum())
        self.longest, self.sequences = int(lengths.max()), len(lengths)
        self.tokens = _to(np.concatenate([s.tokens for s in ordered]).astype(np.int64), device)
        self.positions = _to(positions, device)
        self.run_of_token = _to(np.repeat(run_of_sequence, lengths), device)
        self.counters = _to(np.repeat([s.index for s in ordered], lengths) * MAX_LENGTH + positions, device)
        self.sequence_starts = _to(np.append(starts, self.total).astype(np.int32), device)
        self._starts, self._lengths = starts, lengths
        self.runs, first = np.unique(run_of_sequence, return_index=True)
        self._run_starts, self._run_lengths = starts[first], np.add.reduceat(lengths, first)
        self._routes: dict[tuple[int, ...], Route | None] = {}
        self._note_targets(ordered, lengths, run_of_sequence, with_fillers=token_multiple > 1)

    def _note_targets(
        self, ordered: list[TokenSequence], lengths: np.ndarray, run_of_sequence: np.ndarray, *, with_fillers: bool
    ) -> None:
        targets = np.concatenate([_shifted(s.labels) for s in ordered]).astype(np.int64)
        learnt = np.flatnonzero(targets != IGNORED_LABEL)
        sequence_of_target = np.repeat(np.arange(len(ordered)), lengths)[learnt]
        run_of_target = run_of_sequence[sequence_of_target]
        missing = self.total - len(learnt) if with_fillers else 0
        self.num_targets = len(learnt)
        self.learnt = _to(np.append(learnt, np.full(missing, self.total - 1)), self.device)
        self.targets = _to(np.append(targets[learnt], np.zeros(missing, learnt.dtype)), self.device)
        self.run_of_target = _to(np.append(run_of_target, np.full(missing, self.pack_size)), self.device)
        self.by_run, self.runs_with_targets = _grouped(run_of_target, self.device)
        self._sequence_of_target, self._run_of_sequence = sequence_of_target, run_of_sequence

    @cached_property
    def by_sequence(self) -> tuple[Padding, torch.Tensor]:
        """The padding of the targets by sequence, and the run [S] of each sequence that has any."""
        padding, sequences = _grouped(self._sequence_of_target, self.device)
        return padding, _to(self._run_of_sequence, self.device)[sequences]

    @cached_property
    def attention(self) -> Padding:
        """Made when asked for: kernels that take `sequence_starts` never do."""
        return Padding.of(self._starts, self._lengths, self.total, self.device)

    def route(self, members: tuple[int, ...]) -> Route | None:
        """Where the tokens of the runs `members` lie, for the modules that just these runs adapt; None if they have none here."""
        if members not in self._routes:
            self._routes[members] = self._make_route(members)
        return self._routes[members]

    def prefetch_routes(self, groups: Iterable[tuple[int, ...]]) -> None:
        """Make the indices for these groups of members now: a CUDA graph that is being captured must not fetch them from the host."""
        for members in groups:
            route = self.route(members)
            if route is not None:
                _ = route.bounds

    def copy_indices_from(self, other: MicroBatch) -> None:
        """Take over the indices of a micro-batch of the same shape, in place: same tokens, sequences and runs."""
        for mine, theirs in zip(self._static_inputs(), other._static_inputs(), strict=True):
            mine.copy_(theirs, non_blocking=True)
        for members, route in self._routes.items():
            source = other.route(members)
            if route is not None and source is not None:
                route.bounds.copy_(source.bounds, non_blocking=True)

    def _static_inputs(self) -> tuple[torch.Tensor, ...]:
        indices = (self.tokens, self.positions, self.run_of_token, self.counters, self.sequence_starts)
        return (*indices, self.learnt, self.targets, self.run_of_target)

    def _make_route(self, members: tuple[int, ...]) -> Route | None:
        present = np.flatnonzero(np.isin(self.runs, members))
        if not len(present):
            return None
        rows = None if len(present) == self.pack_size else _to(self.runs[present], self.device)
        return Route(self._run_starts[present], self._run_lengths[present], self.total, rows, self.device)


class Route:
    """How one group of runs meets its adapters in one micro-batch.

    `rows` [G] are the runs' rows in the pack, None for all of them in order.
    """

    def __init__(
        self, starts: np.ndarray, lengths: np.ndarray, total: int, rows: torch.Tensor | None, device: torch.device
    ) -> None:
        self.rows = rows
        self._starts, self._lengths, self._total, self._device = starts, lengths, total, device

    @cached_property
    def padding(self) -> Padding:
        """Groups of tokens as the rows of a padded batch."""
        return Padding.of(self._starts, self._lengths, self._total, self._device)

    @cached_property
    def bounds(self) -> torch.Tensor:
        """Where each group begins in the flat tokens, and where it ends [2, G], int32."""
        return _to(np.stack([self._starts, self._starts + self._lengths]).astype(np.int32), self._device)

    @cached_property
    def is_everything(self) -> bool:
        """Whether the groups are all tokens."""
        return int(self._lengths.sum()) == self._total

    def pick(self, stack: torch.Tensor) -> torch.Tensor:
        """The rows [G, ...] of a stack [runs, ...] over the whole pack."""
        return stack if self.rows is None else stack.index_select(0, self.rows)

    def add(self, stack: torch.Tensor, picked: torch.Tensor) -> None:
        """Add [G, ...] to these rows of a stack [runs, ...], in place and in its precision."""
        if self.rows is None:
            stack.add_(picked)
        else:
            stack.index_add_(0, self.rows, picked.to(stack.dtype))


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


def _fillers(run: int, count: int) -> TokenSequence:
    """A sequence of `count` tokens of which nothing is learnt."""
    return TokenSequence(run, 0, np.zeros(count, np.int32), np.full(count, IGNORED_LABEL))


def _to(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A numpy array on `device`; integers keep their width."""
    return to_device(torch.from_numpy(np.ascontiguousarray(values)), device)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on `device`, without waiting: from ordinary memory a copy would wait for the kernels before it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
