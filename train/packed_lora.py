"""Many LoRA adapters over one frozen linear layer: two batched products serve all runs of a pack.

Every trainable number of a pack lies in one matrix `theta` [runs, P]: a row per run, the A matrices of all modules first, the
B matrices after them, padded with zeros to the largest rank. Padding is exact: padded rows of A and columns of B are zero,
their gradients are zero, and AdamW moves zero by zero. Row i is run i and nothing else, so loss, norm, clip and step are row-wise
operations and no run can see another; one wide product with a mask could not promise that, since 0 x NaN is NaN.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from train.batches import CurrentBatch, Route
from train.dropout import Dropout
from train.targets import Target

AdapterTensors = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Slot:
    """One adapted module's place in the pack.

    `a` [runs, r, in] and `b` [runs, out, r] are views of `theta`, `grad_a` and `grad_b` views of the pack's gradient.
    `ranks` maps the rows of the runs that adapt the module to their rank; `scaling` and `dropout_p` are [runs, 1, 1].
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
    """The adapters of all runs of a pack: `theta` and its `gradient` [runs, P], and a `Slot` per adapted module.

    Columns before `b_columns_start` hold A matrices, the others B matrices.

    Args:
        targets: per run, the modules it adapts (`train.targets.adapted_modules`).
        shapes: (out, in) features of every linear module of the base.
        dropouts: per run, `lora_dropout`.
        dtype: of the masters: float32, or float64 over a float64 base.
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
        ranks = {name: max(adapted[name].r for adapted in targets if name in adapted) for name in names}
        self.b_columns_start = sum(ranks[name] * shapes[name][1] for name in names)
        columns = self.b_columns_start + sum(ranks[name] * shapes[name][0] for name in names)
        self.theta = torch.zeros(len(targets), columns, dtype=dtype, device=device)
        self.gradient = torch.zeros_like(self.theta)
        dropout_p = torch.tensor(dropouts, dtype=torch.float64, device=device).view(-1, 1, 1) if any(dropouts) else None
        self.slots: dict[str, Slot] = {}
        at_a, at_b = 0, self.b_columns_start
        for name in names:
            out_features, in_features = shapes[name]
            mine = {run: adapted[name] for run, adapted in enumerate(targets) if name in adapted}
            scaling = [mine[run].scaling if run in mine else 0.0 for run in range(len(targets))]
            place_a = (at_a, ranks[name], in_features)
            place_b = (at_b, out_features, ranks[name])
            self.slots[name] = Slot(
                {run: target.r for run, target in mine.items()},
                _view(self.theta, *place_a),
                _view(self.theta, *place_b),
                _view(self.gradient, *place_a),
                _view(self.gradient, *place_b),
                torch.tensor(scaling, dtype=dtype, device=device).view(-1, 1, 1),
                dropout_p,
                zlib.crc32(name.encode()),
            )
            at_a += ranks[name] * in_features
            at_b += ranks[name] * out_features

    @torch.no_grad()
    def initialise(self, run: int, seed: int) -> None:
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


class _PackedLoRA(torch.autograd.Function):
    """x [T, in] -> each token's own run's scaled B A dropout(x) [T, out].

    Only x and its product with A are kept for the backward; the padded copy of x and the dropout mask are made again there.
    The adapters' gradients go straight to their place in the pack's matrix: autograd knows them only through `anchor`, a scalar
    that asks for a backward where x needs no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, anchor: torch.Tensor, slot: Slot, route: Route, dropout: Dropout | None
    ) -> torch.Tensor:
        a, b, scaling = (route.pick(stack).to(x.dtype) for stack in (slot.a, slot.b, slot.scaling))
        h = torch.bmm(_padded(x, route, dropout), a.transpose(1, 2)).mul_(scaling)
        ctx.save_for_backward(x, h)
        ctx.slot, ctx.route, ctx.dropout = slot, route, dropout
        return route.padding.unpad(torch.bmm(h, b.transpose(1, 2)), len(x))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, h = ctx.saved_tensors
        slot, route, dropout = ctx.slot, ctx.route, ctx.dropout
        a, b, scaling = (route.pick(stack).to(x.dtype) for stack in (slot.a, slot.b, slot.scaling))
        gradient = route.padding.pad_with_zeros(gradients[0])
        grad_h = torch.bmm(gradient, b).mul_(scaling)
        route.add(slot.grad_b, torch.bmm(gradient.transpose(1, 2), h))
        route.add(slot.grad_a, torch.bmm(grad_h.transpose(1, 2), _padded(x, route, dropout)))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = route.padding.unpad(_dropped(torch.bmm(grad_h, a), route, dropout), len(x))
        return grad_x, None, None, None, None


def _padded(x: torch.Tensor, route: Route, dropout: Dropout | None) -> torch.Tensor:
    return _dropped(route.padding.pad(x), route, dropout)


def _dropped(padded: torch.Tensor, route: Route, dropout: Dropout | None) -> torch.Tensor:
    return padded if dropout is None else dropout.apply(padded, route)


def packed_lora(x: torch.Tensor, slot: Slot, current: CurrentBatch) -> torch.Tensor | None:
    """What the adapters of one module add to its output: x [T, in] -> [T, out], or None where no run with tokens here adapts it."""
    route = current.require().route(slot.members)
    if route is None:
        return None
    dropout = None
    if slot.dropout_p is not None and current.dropout_keys is not None:
        dropout = Dropout(slot.dropout_p, current.dropout_keys, slot.dropout_key)
    anchor = x.new_zeros((), requires_grad=True)
    delta: torch.Tensor = _PackedLoRA.apply(x, anchor, slot, route, dropout)
    return delta
