"""Between flat tokens and right-padded sequences, with gradients: gathers both ways, without atomics, so the same bits every time."""

from __future__ import annotations

from typing import Any, cast

import torch

from train.data.micro_batch import Padding


def pad(flat: torch.Tensor, padding: Padding) -> torch.Tensor:
    """[T, ...] -> [S, L, ...]; fillers repeat their own sequence's first token, and pass no gradient on."""
    return cast(torch.Tensor, _Pad.apply(flat, padding))  # type: ignore[no-untyped-call]


def unpad(padded: torch.Tensor, padding: Padding, total: int) -> torch.Tensor:
    """[S, L, ...] -> [T, ...] of `total` tokens; fillers get zeros for their gradient."""
    return cast(torch.Tensor, _Unpad.apply(padded, padding, total))  # type: ignore[no-untyped-call]


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat: torch.Tensor, padding: Padding) -> torch.Tensor:
        ctx.padding = padding
        ctx.total = flat.shape[0]
        return padding.pad(flat)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.padding.unpad(gradients[0], ctx.total), None


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, padded: torch.Tensor, padding: Padding, total: int) -> torch.Tensor:
        ctx.padding = padding
        return padding.unpad(padded, total)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.padding.pad_with_zeros(gradients[0]), None, None
