"""The LoRA adapters of all runs of a pack, as one matrix with a row per run.

Every trainable number of a pack lies in one matrix `theta` [runs, P]: a row per run, the A matrices of all modules first, the
B matrices after them, padded with zeros to the largest rank. Padding is exact: padded rows of A and columns of B are zero,
their gradients are zero, and AdamW moves zero by zero. Row i is run i and nothing else, so loss, norm, clip and step are row-wise
operations and no run can see another (`train.nn.grouped_mm` keeps that in the products).
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from train.lora.targets import Target

RANK_MULTIPLE = 8  # rows of 16 bytes, which GPUs read at once; zeros fill up

AdapterTensors = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class StackedLora:
    """One adapted module's place in the pack.

    `a` [runs, r, in] and `b` [runs, out, r] are views of the pack's weights in the base's precision, `grad_a` and `grad_b` views
    of its gradient. `ranks` maps the rows of the runs that adapt the module to their rank; `scaling` and `dropout_p` are [runs].
    """

    ranks: dict[int, int]
    a: torch.Tensor
    b: torch.Tensor
    grad_a: torch.Tensor
    grad_b: torch.Tensor
    scaling: torch.Tensor
    dropout_p: torch.Tensor | None
    dropout_key: int

    @property
    def members(self) -> tuple[int, ...]:
        """The rows of the runs that adapt the module."""
        return tuple(self.ranks)


class PackedAdapters:
    """The adapters of all runs of a pack: `theta` and its `gradient` [runs, P], and a `StackedLora` per adapted module.

    Columns before `b_columns_start` hold A matrices, the others B matrices. The base computes with `theta` rounded to its own
    precision as of the last `refresh`.

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
        names = [name for name in shapes if any(name in adapted for adapted in targets)]
        ranks = {name: _rounded(max(adapted[name].r for adapted in targets if name in adapted)) for name in names}
        self.b_columns_start = sum(ranks[name] * shapes[name][1] for name in names)
        columns = self.b_columns_start + sum(ranks[name] * shapes[name][0] for name in names)
        precise = torch.promote_types(dtype, torch.float32)
        self.theta = torch.zeros(len(targets), columns, dtype=precise, device=device)
        self.gradient = torch.zeros_like(self.theta)
        self._rounded = self.theta if dtype == precise else self.theta.to(dtype)
        dropout_p = torch.tensor(dropouts, dtype=torch.float64, device=device) if any(dropouts) else None
        scalings: dict[tuple[float, ...], torch.Tensor] = {}  # few differ, and what follows from one is made once
        self.slots: dict[str, StackedLora] = {}
        at_a, at_b = 0, self.b_columns_start
        for name in names:
            out_features, in_features = shapes[name]
            mine = {run: adapted[name] for run, adapted in enumerate(targets) if name in adapted}
            scaling = tuple(mine[run].scaling if run in mine else 0.0 for run in range(len(targets)))
            place_a = (at_a, ranks[name], in_features)
            place_b = (at_b, out_features, ranks[name])
            self.slots[name] = StackedLora(
                {run: target.r for run, target in mine.items()},
                _view(self._rounded, *place_a),
                _view(self._rounded, *place_b),
                _view(self.gradient, *place_a),
                _view(self.gradient, *place_b),
                scalings.setdefault(scaling, torch.tensor(scaling, dtype=dtype, device=device)),
                dropout_p,
                zlib.crc32(name.encode()),
            )
            at_a += ranks[name] * in_features
            at_b += ranks[name] * out_features

    def refresh(self) -> None:
        """Let the base see what `theta` is now."""
        if self._rounded is not self.theta:
            self._rounded.copy_(self.theta)

    @torch.no_grad()
    def initialize(self, run: int, seed: int) -> None:
        """PEFT's default: A uniform within 1/sqrt(in) (Kaiming with a = sqrt 5), B zero.

        Each module draws from a stream of its own, so that other targets or ranks change nothing here.
        """
        for name, (a, _b) in self.tensors(run).items():
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            bound = 1 / math.sqrt(a.shape[1])
            a.copy_(torch.empty(a.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))

    def tensors(self, run: int, matrix: torch.Tensor | None = None) -> AdapterTensors:
        """Views of one run's unpadded A [r, in] and B [out, r] per module, in `theta` or in a `matrix` laid out like it."""
        matrix = self.theta if matrix is None else matrix
        found: AdapterTensors = {}
        at_a, at_b = 0, self.b_columns_start
        for name, slot in self.slots.items():
            (_, rank, in_features), out_features = slot.a.shape, slot.b.shape[1]
            if run in slot.ranks:
                a = matrix[run, at_a : at_a + rank * in_features].view(rank, in_features)
                b = matrix[run, at_b : at_b + rank * out_features].view(out_features, rank)
                found[name] = (a[: slot.ranks[run]], b[:, : slot.ranks[run]])
            at_a += rank * in_features
            at_b += rank * out_features
        return found


def _view(matrix: torch.Tensor, at: int, rows: int, columns: int) -> torch.Tensor:
    """Columns of a matrix [runs, P] as a stack [runs, rows, columns]."""
    return matrix[:, at : at + rows * columns].view(-1, rows, columns)


def _rounded(rank: int) -> int:
    """The next multiple of `RANK_MULTIPLE`."""
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE
