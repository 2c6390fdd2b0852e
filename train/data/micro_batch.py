"""The rows of a pack in memory: flat tokens, run after run, with the indices that attention, adapters and loss need.

A micro-batch holds real tokens only. All indices are made here, once per micro-batch, on the CPU. An example, which
tests/train/test_micro_batch.py builds: run 0 has two sequences, run 1 has one, and label -100 marks what is not learned.

    run  index  tokens       labels
    0    0      11 12 13 14  -100 -100 13 14
    0    1      21 22        -100 22
    1    0      31 32 33     -100 32 33

Flat, a column per token t (T = 9):

    t                     0     1     2     3     4     5     6     7     8
    tokens               11    12    13    14    21    22    31    32    33
    positions             0     1     2     3     0     1     0     1     2     within the sequence
    run_of_token          0     0     0     0     0     0     1     1     1
    counters              0     1     2     3 65536 65537     0     1     2     index * MAX_LENGTH + position

    sequence_starts       0 4 6 9                 sequence 1 is t = 4 and 5
    route((0, 1)).bounds  0 6 / 6 9               run 1 is t = 6, 7 and 8

Attention pads sequences (G = 3 groups, L = 4 places each), adapters pad runs (G = 2, L = 6):

    attention  gather  0 1 2 3 | 4 5 4 4 | 6 7 8 6          a filler repeats its own group's first token
               real    1 1 1 1 | 1 1 0 0 | 1 1 1 0
               places  0 1 2 3 4 5 8 9 10                   t = 6 is at place 8 of the 3 * 4
    runs       gather  0 1 2 3 4 5 | 6 7 8 6 6 6
               places  0 1 2 3 4 5 6 7 8

A token is predicted from the one before it, so the targets (N = 5, padded to G = 2 runs of L = 3) are

    target_positions  1  2  4  6  7
    targets          13 14 22 32 33
    run_of_target     0  0  0  1  1
    targets_by_run  gather  0 1 2 | 3 4 3
                    places  0 1 2 3 4

With `token_multiple` 12 three fillers follow, as a sequence of their own, and there are as many targets as tokens. Appended are:

    fillers  tokens            0 0 0
             run_of_token      1 1 1                the last run
             sequence_starts   12
             target_positions  11 11 11 11 11 11 11 the last token
             targets           0 0 0 0 0 0 0
             run_of_target     2 2 2 2 2 2 2        no run of the pack
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from train.data.buckets import length_buckets
from train.data.sampling import TokenSequence
from train.data.token_table import IGNORED_LABEL

# Tokens of a sequence: a counter holds the sequence in its upper bits and the position in its lower 16.
MAX_LENGTH = 1 << 16


@dataclass(frozen=True)
class Padding:
    """Indices between flat tokens [T] and right-padded groups [G, L] of them; see the module's example.

    Attributes:
        gather: [G, L] the flat token at each place. Places after a group's end repeat the group's own first token, never another
            group's, so that a NaN stays in its group.
        real: [G, L] False at those repeated places (fillers), None if there are none.
        places: [M] for each of the M tokens in groups, its place in the flattened [G * L].
        tokens: [M] which flat tokens those are, None if they are all T in order.
    """

    gather: torch.Tensor
    real: torch.Tensor | None
    places: torch.Tensor
    tokens: torch.Tensor | None

    @staticmethod
    def of(starts: np.ndarray, lengths: np.ndarray, total: int, device: torch.device) -> Padding:
        """Padding for groups that begin at flat `starts` [G] and have `lengths` [G] tokens, of `total` flat tokens."""
        longest = int(lengths.max(initial=0))
        # Lengths 4, 2, 3: offsets 0 1 2 3 in each group, real where smaller than the length.
        offsets = np.arange(longest)
        real = offsets < lengths[:, None]
        # Offset 0 instead of those past the end: starts 0, 4, 6 give 0 1 2 3 | 4 5 4 4 | 6 7 8 6.
        gather = starts[:, None] + np.where(real, offsets, 0)
        # The inverse, since groups ascend: where the m-th real place is, 0 1 2 3 4 5 8 9 10.
        places = np.flatnonzero(real)
        tokens = gather.reshape(-1)[places]
        # Groups do not overlap, so as many tokens as there are in all means each of them, in order.
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
        if self._fillers is None:
            return padded
        # In place: with fillers, `pad` has made a new tensor.
        return padded.masked_fill_(self._fillers.view(*self._fillers.shape, *[1] * (flat.dim() - 1)), 0)

    @cached_property
    def _fillers(self) -> torch.Tensor | None:
        """[G, L] True at fillers, None if there are none."""
        return None if self.real is None else ~self.real

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

    With `token_multiple` above 1, fillers complete the tokens to a multiple of it, so that few shapes occur (as CUDA graphs need):
    at least one filler, in a sequence of their own at the end, with the last run, and as many targets as tokens. A filler's weight
    in the loss is zero, so it changes no gradient.

    Attributes:
        total: T, fillers included; `num_real_tokens` leaves them out, and `sequences` counts the sequences, S.
        tokens, positions: [T] token ids, and positions within the sequence.
        run_of_token: [T] the run's index in the pack.
        counters: [T] the token's number within its run's whole step, whatever the micro-batch: sequence * MAX_LENGTH + position.
            Dropout depends on nothing else of the batch.
        runs: indices of the runs that have tokens here, ascending.
        sequence_starts: [S + 1] int32, where sequences begin; the last is T. `longest` is the longest sequence's length.
        target_positions: [N] flat tokens t whose next token is to be predicted; `targets` [N] are those next tokens.
        run_of_target: [N] the run's index, `pack_size` for fillers; `num_targets` counts the real ones.
        targets_by_run: the padding that groups the real targets by run; `runs_with_targets` [G] are its groups' runs.
    """

    def __init__(
        self, sequences: list[TokenSequence], pack_size: int, device: torch.device, token_multiple: int = 1
    ) -> None:
        # The sort is stable, so a run's sequences keep their order.
        ordered = sorted(sequences, key=lambda s: s.run_index)
        self.num_real_tokens = sum(len(s.tokens) for s in ordered)
        if token_multiple > 1:
            # 1 to token_multiple fillers: 9 tokens and a multiple of 12 take 3, 12 tokens take 12 more.
            ordered.append(_fillers(ordered[-1].run_index, token_multiple - self.num_real_tokens % token_multiple))
        self.device = device
        self.pack_size = pack_size
        self._ordered = ordered
        self._note_tokens(ordered)
        self._note_targets(ordered, with_fillers=token_multiple > 1)
        self._routes: dict[tuple[int, ...], AdapterRoute | None] = {}

    def _note_tokens(self, ordered: list[TokenSequence]) -> None:
        """The example's first two blocks: where tokens, sequences and runs are."""
        # [S] each: lengths 4 2 3, starts 0 4 6, runs 0 0 1.
        lengths = np.array([len(s.tokens) for s in ordered])
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        run_of_sequence = np.array([s.run_index for s in ordered])
        # A generated token's sequence starts where its cache ends, so positions begin at `start`.
        positions = np.concatenate([np.arange(s.start, s.start + len(s.tokens)) for s in ordered])
        self.total = int(lengths.sum())
        self.longest = int(lengths.max())
        self.sequences = len(lengths)
        self.tokens = _to(np.concatenate([s.tokens for s in ordered]).astype(np.int64), self.device)
        self.positions = _to(positions, self.device)
        # Repeating 0 0 1 by 4 2 3 gives 0 0 0 0 0 0 1 1 1; `index` 0 1 0 alike gives 0 0 0 0 1 1 0 0 0.
        self.run_of_token = _to(np.repeat(run_of_sequence, lengths), self.device)
        self.counters = _to(np.repeat([s.index for s in ordered], lengths) * MAX_LENGTH + positions, self.device)
        self.sequence_starts = _to(np.append(starts, self.total).astype(np.int32), self.device)
        self._starts = starts
        self._lengths = lengths
        self._run_of_sequence = run_of_sequence
        # Each run's first sequence, 0 and 2, tells where the run begins, 0 and 6; its length sums up to the next one's, 6 and 3.
        self.runs, first = np.unique(run_of_sequence, return_index=True)
        self._run_starts = starts[first]
        self._run_lengths = np.add.reduceat(lengths, first)

    def _note_targets(self, ordered: list[TokenSequence], *, with_fillers: bool) -> None:
        """The example's last block: which tokens are predicted, and from which."""
        # Labels shifted to the token before, and the last of a sequence predicts nothing: -100 13 14 -100 | 22 -100 | 32 33 -100.
        shifted = np.concatenate([np.append(s.labels[1:], IGNORED_LABEL) for s in ordered]).astype(np.int64)
        positions = np.flatnonzero(shifted != IGNORED_LABEL)
        # Of each token its sequence, 0 0 0 0 1 1 2 2 2, read at t = 1 2 4 6 7: 0 0 1 2 2. Their runs: 0 0 0 1 1.
        sequence_of_target = np.repeat(np.arange(len(ordered)), self._lengths)[positions]
        run_of_target = self._run_of_sequence[sequence_of_target]
        # Filler targets all point to the last token, itself a filler, and to a run past the pack, whose weight is zero.
        missing = self.total - len(positions) if with_fillers else 0
        self.num_targets = len(positions)
        self.target_positions = _to(np.append(positions, np.full(missing, self.total - 1)), self.device)
        self.targets = _to(np.append(shifted[positions], np.zeros(missing, positions.dtype)), self.device)
        self.run_of_target = _to(np.append(run_of_target, np.full(missing, self.pack_size)), self.device)
        self.targets_by_run, self.runs_with_targets = _grouped(run_of_target, self.device)
        self._sequence_of_target = sequence_of_target

    @cached_property
    def targets_by_sequence(self) -> tuple[Padding, torch.Tensor]:
        """The padding that groups the targets by sequence, and the run [G] of each sequence that has any."""
        padding, sequences = _grouped(self._sequence_of_target, self.device)
        return padding, _to(self._run_of_sequence, self.device)[sequences]

    @cached_property
    def attention(self) -> Padding:
        """The padding of the sequences, made when asked for: kernels that take `sequence_starts` never ask."""
        return Padding.of(self._starts, self._lengths, self.total, self.device)

    @cached_property
    def buckets(self) -> tuple[list[MicroBatch], torch.Tensor | None]:
        """Micro-batches of sequences of similar length, and where each token is among their tokens; None for this one alone."""
        buckets = length_buckets(self._lengths)
        if len(buckets) == 1:
            return [self], None
        parts = [MicroBatch([self._ordered[i] for i in bucket], self.pack_size, self.device) for bucket in buckets]
        # Sequences 0 and 2 in the first bucket, 1 in the second: tokens 0 1 2 3 6 7 8 | 4 5, of which token 4 is the eighth.
        tokens = [np.arange(self._starts[i], self._starts[i] + self._lengths[i]) for bucket in buckets for i in bucket]
        return parts, _to(np.argsort(np.concatenate(tokens)), self.device)

    def route(self, members: tuple[int, ...]) -> AdapterRoute | None:
        """Where the tokens of the runs `members` are, for the modules that just these runs adapt; None if they have none here."""
        if members not in self._routes:
            self._routes[members] = self._make_route(members)
        return self._routes[members]

    def prefetch_routes(self, groups: Iterable[tuple[int, ...]]) -> None:
        """Make the indices for these groups of members now: while a CUDA graph is captured, nothing may be copied from the host."""
        for members in groups:
            route = self.route(members)
            if route is not None:
                # Cached by the first access.
                _ = route.bounds

    def copy_indices_from(self, other: MicroBatch) -> None:
        """Become another micro-batch of the same shape (tokens, sequences and runs) in place: its indices replace these."""
        for mine, theirs in zip(self._static_inputs(), other._static_inputs(), strict=True):
            mine.copy_(theirs, non_blocking=True)
        for members, route in self._routes.items():
            source = other.route(members)
            if route is not None and source is not None:
                route.bounds.copy_(source.bounds, non_blocking=True)

    def _static_inputs(self) -> tuple[torch.Tensor, ...]:
        """Every tensor that a captured forward and backward read, but for the routes' bounds."""
        indices = (self.tokens, self.positions, self.run_of_token, self.counters, self.sequence_starts)
        return (*indices, self.target_positions, self.targets, self.run_of_target)

    def _make_route(self, members: tuple[int, ...]) -> AdapterRoute | None:
        # Members 1 2 3 of a batch with runs 0 2 3: entries 1 and 2 of `runs`, which are the runs 2 and 3.
        present = np.flatnonzero(np.isin(self.runs, members))
        if not len(present):
            return None
        runs = None if len(present) == self.pack_size else _to(self.runs[present], self.device)
        return AdapterRoute(self._run_starts[present], self._run_lengths[present], self.total, runs, self.device)


class AdapterRoute:
    """Which tokens of a micro-batch go to which adapters: the G runs that adapt a module and have tokens here.

    `runs` [G] are their indices in the pack, None for all of the pack's runs in order.
    """

    def __init__(
        self, starts: np.ndarray, lengths: np.ndarray, total: int, runs: torch.Tensor | None, device: torch.device
    ) -> None:
        self.runs = runs
        self._starts = starts
        self._lengths = lengths
        self._total = total
        self._device = device

    @cached_property
    def padding(self) -> Padding:
        """The runs' tokens as the rows of a padded batch [G, L]."""
        return Padding.of(self._starts, self._lengths, self._total, self._device)

    @cached_property
    def bounds(self) -> torch.Tensor:
        """[2, G] int32: where each run's flat tokens begin, and where they end."""
        return _to(np.stack([self._starts, self._starts + self._lengths]).astype(np.int32), self._device)

    @cached_property
    def covers_all(self) -> bool:
        """Whether these runs own all tokens of the micro-batch."""
        return int(self._lengths.sum()) == self._total

    def select(self, stack: torch.Tensor) -> torch.Tensor:
        """These runs' entries [G, ...] of a stack [runs, ...] over the whole pack."""
        return stack if self.runs is None else stack.index_select(0, self.runs)

    def index_add(self, stack: torch.Tensor, values: torch.Tensor) -> None:
        """Add values [G, ...] to these runs' entries of a stack [runs, ...], in place and in its dtype."""
        if self.runs is None:
            stack.add_(values)
        else:
            stack.index_add_(0, self.runs, values.to(stack.dtype))


def _grouped(labels: np.ndarray, device: torch.device) -> tuple[Padding, torch.Tensor]:
    """The padding that groups equal, ascending `labels` [N], and the distinct labels [G]: 0 0 0 1 1 gives groups of 3 and 2."""
    distinct, starts, lengths = np.unique(labels, return_index=True, return_counts=True)
    return Padding.of(starts, lengths, len(labels), device), _to(distinct, device)


def _fillers(run: int, count: int) -> TokenSequence:
    """A sequence of `count` tokens of which none is learned."""
    return TokenSequence(run, 0, np.zeros(count, np.int32), np.full(count, IGNORED_LABEL))


def _to(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A numpy array on `device`; integers keep their width."""
    return to_device(torch.from_numpy(np.ascontiguousarray(values)), device)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on `device`, without waiting: from pageable memory a copy would wait for the kernels before it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
