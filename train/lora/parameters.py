"""The LoRA adapters of all runs of a pack, as one matrix with a row per run.

Every trainable number of a pack is in one matrix `theta` [runs, P]: a row per run, the A matrices of all modules first, the B
matrices after them, padded with zeros to the module's largest rank. Two runs over modules q (in 64, out 32) and v (in 64, out 16),
where run 0 has rank 4 on both and run 1 has rank 10 on q alone:

    module  padded rank  A [r, in]  columns of A   B [out, r]  columns of B
    q       16           [16, 64]      0 .. 1024   [32, 16]    1536 .. 2048
    v       8            [8, 64]    1024 .. 1536   [16, 8]     2048 .. 2176

    b_columns_start = 1536, P = 2176; q's stack lora_a [2, 16, 64] has run 0's A in rows 0 to 3 of its first entry, zeros below

Padding is exact: padded rows of A and columns of B are zero, their gradients are zero, and AdamW moves zero by zero. Row i is run i
and nothing else, so loss, norm, clip and step are row-wise operations and no run can see another (`train.nn.grouped_mm` keeps that
in the products).
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from train.lora.targets import Target

# Rows of 16 bytes, which GPUs read at once; a rank of 10 becomes 16.
RANK_MULTIPLE = 8

AdapterTensors = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class StackedLora:
    """The adapters of one module, of all runs of the pack; entries of runs that do not adapt the module are zero.

    Attributes:
        ranks: the rank of each run that adapts the module, by the run's index in the pack.
        lora_a, lora_b: [runs, r, in] and [runs, out, r], views of the pack's weights in the base's dtype.
        grad_a, grad_b: views of the pack's gradient, of the same shapes.
        scaling: [runs] the factor of B A x.
        dropout_p: [runs] in float64, None if no run of the pack drops anything.
        dropout_key: the module's random key.
    """

    ranks: dict[int, int]
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    grad_a: torch.Tensor
    grad_b: torch.Tensor
    scaling: torch.Tensor
    dropout_p: torch.Tensor | None
    dropout_key: int

    @property
    def members(self) -> tuple[int, ...]:
        """The indices of the runs that adapt the module."""
        return tuple(self.ranks)


@dataclass(frozen=True)
class _Columns:
    """Where a module's A [rank, in] and B [out, rank] are in a row of `theta`; a line of the table in the module's docstring."""

    rank: int
    in_features: int
    out_features: int
    a_start: int
    b_start: int

    def a(self, matrix: torch.Tensor) -> torch.Tensor:
        """All runs' A [runs, rank, in] in a matrix [runs, P]; a view, no copy."""
        end = self.a_start + self.rank * self.in_features
        return matrix[:, self.a_start : end].view(-1, self.rank, self.in_features)

    def b(self, matrix: torch.Tensor) -> torch.Tensor:
        """All runs' B [runs, out, rank]."""
        end = self.b_start + self.rank * self.out_features
        return matrix[:, self.b_start : end].view(-1, self.out_features, self.rank)


class PackedAdapters:
    """The adapters of all runs of a pack.

    Attributes:
        theta, gradient: [runs, P]; columns before `b_columns_start` hold A matrices, the others B matrices.
        stacks: a `StackedLora` per adapted module. The base computes with these: `theta` rounded to the base's dtype, as of the
            last `refresh`.

    Args:
        targets: per run, the modules it adapts (`train.lora.targets.adapted_modules`).
        shapes: (out, in) features of every linear module of the base.
        dropouts: per run, `lora_dropout`.
        dtype: of the base; `theta` is float32, or float64 over a float64 base.
    """

    def __init__(
        self,
        targets: Sequence[Mapping[str, Target]],
        shapes: Mapping[str, tuple[int, int]],
        dropouts: Sequence[float],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._columns, self.b_columns_start = _place_columns(targets, shapes)
        columns = self.b_columns_start + sum(place.rank * place.out_features for place in self._columns.values())
        # bfloat16 has 8 significant bits: added to a weight of 0.1, an optimizer's step of 1e-5 would vanish.
        master_dtype = torch.promote_types(dtype, torch.float32)
        self.theta = torch.zeros(len(targets), columns, dtype=master_dtype, device=device)
        self.gradient = torch.zeros_like(self.theta)
        # So over a base in 16 bits the adapters exist twice; over others this is the same tensor.
        self._compute_weights = self.theta if dtype == master_dtype else self.theta.to(dtype)
        # float64: the kept features' factor 1 / (1 - p) is rounded once, at the end.
        dropout_p = torch.tensor(dropouts, dtype=torch.float64, device=device) if any(dropouts) else None
        # Few modules differ in their scalings; those that do not share one tensor, and what a forward makes of it.
        scalings: dict[tuple[float, ...], torch.Tensor] = {}
        self.stacks: dict[str, StackedLora] = {}
        for name, place in self._columns.items():
            mine = {run: adapted[name] for run, adapted in enumerate(targets) if name in adapted}
            # Zero for runs that do not adapt the module: their tokens are not in its route, so it is never read.
            scaling = tuple(mine[run].scaling if run in mine else 0.0 for run in range(len(targets)))
            self.stacks[name] = StackedLora(
                ranks={run: target.r for run, target in mine.items()},
                lora_a=place.a(self._compute_weights),
                lora_b=place.b(self._compute_weights),
                grad_a=place.a(self.gradient),
                grad_b=place.b(self.gradient),
                scaling=scalings.setdefault(scaling, torch.tensor(scaling, dtype=dtype, device=device)),
                dropout_p=dropout_p,
                # By the name alone, so that masks do not depend on the pack's other modules.
                dropout_key=zlib.crc32(name.encode()),
            )

    def refresh(self) -> None:
        """Let the base compute with the current `theta`."""
        if self._compute_weights is not self.theta:
            self._compute_weights.copy_(self.theta)

    @torch.no_grad()
    def initialize(self, run: int, seed: int) -> None:
        """Set one run's A as PEFT does: uniform within 1/sqrt(in) (Kaiming with a = sqrt 5); B stays zero.

        Each module draws from its own stream of random numbers, so that other targets or ranks change nothing here.
        """
        for name, (a, _b) in self.tensors(run).items():
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            # On the CPU and in float32, whatever the pack computes with: the same numbers on every device and in every dtype.
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            bound = 1 / math.sqrt(a.shape[1])
            a.copy_(torch.empty(a.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))

    def tensors(self, run: int, matrix: torch.Tensor | None = None) -> AdapterTensors:
        """Views of one run's unpadded A [r, in] and B [out, r] per module, in `theta` or in a `matrix` with the same columns."""
        matrix = self.theta if matrix is None else matrix
        found: AdapterTensors = {}
        for name, place in self._columns.items():
            rank = self.stacks[name].ranks.get(run)
            if rank is not None:
                # In the example q's padded A is [16, 64], of which run 0's own part is its first 4 rows.
                found[name] = (place.a(matrix)[run, :rank], place.b(matrix)[run, :, :rank])
        return found


def _place_columns(
    targets: Sequence[Mapping[str, Target]], shapes: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, _Columns], int]:
    """The columns of every module that some run adapts, in the base's order, and where the B matrices start."""
    names = [name for name in shapes if any(name in adapted for adapted in targets)]
    # The largest rank of any run on the module: 4 and 10 give 10, padded to 16.
    ranks = {name: _pad_to_multiple(max(own[name].r for own in targets if name in own)) for name in names}
    # A's and B's apart, since LoRA+ gives all B columns a learning rate of their own: two slices, not one per module.
    b_columns_start = sum(ranks[name] * shapes[name][1] for name in names)
    columns: dict[str, _Columns] = {}
    a_start = 0
    b_start = b_columns_start
    for name in names:
        out_features, in_features = shapes[name]
        columns[name] = _Columns(ranks[name], in_features, out_features, a_start, b_start)
        a_start += ranks[name] * in_features
        b_start += ranks[name] * out_features
    return columns, b_columns_start


def _pad_to_multiple(rank: int) -> int:
    """The next multiple of `RANK_MULTIPLE`: 8 for 4, 16 for 10."""
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE
