"""Between flat tokens and right-padded sequences, with gradients: gathers both ways, without atomics, so the same bits every time."""

from __future__ import annotations

from typing import Any

import torch

from train.data.micro_batch import Padding


def pad(flat: torch.Tensor, padding: Padding) -> torch.Tensor:
    """[T, ...] -> [S, L, ...]; fillers repeat their own sequence's first token, and pass no gradient on."""
    if padding.is_identity:
        return flat.unsqueeze(0)
    places: torch.Tensor = _Pad.apply(flat, padding)  # type: ignore[no-untyped-call]
    # Here and not in the function: a view that a function returns may not be changed in place, as models do with projections.
    return places.view(*padding.gather.shape, *flat.shape[1:])


def unpad(padded: torch.Tensor, padding: Padding, total: int) -> torch.Tensor:
    """[S, L, ...] -> [T, ...] of `total` tokens; fillers get zeros for their gradient."""
    if padding.is_identity:
        return padded.squeeze(0)
    flat: torch.Tensor = _Unpad.apply(padded, padding, total)  # type: ignore[no-untyped-call]
    return flat


class _Pad(torch.autograd.Function):
    """[T, ...] -> [S * L, ...]."""

    @staticmethod
    def forward(ctx: Any, flat: torch.Tensor, padding: Padding) -> torch.Tensor:
        ctx.padding = padding
        ctx.total = flat.shape[0]
        return flat.index_select(0, padding.gather.view(-1))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        padded = gradients[0].view(*ctx.padding.gather.shape, *gradients[0].shape[1:])
        return ctx.padding.unpad(padded, ctx.total), None


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, padded: torch.Tensor, padding: Padding, total: int) -> torch.Tensor:
        ctx.padding = padding
        return padding.unpad(padded, total)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.padding.pad_with_zeros(gradients[0]), None, None
