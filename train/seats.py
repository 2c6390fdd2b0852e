"""Seats of a pack: which row of the adapters and the optimizer is which run's, new or restored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from train.base import PackedBase
from train.checkpoint import Checkpoint, restore_run
from train.optim import PackedAdamW
from train.packed_lora import PackedAdapters
from train.session import RunSession


@dataclass(frozen=True)
class Seats:
    """The trainable side of a pack."""

    adapters: PackedAdapters
    optimizer: PackedAdamW


def take_seats(base: PackedBase, sessions: Sequence[RunSession], states: Sequence[Checkpoint | None]) -> Seats:
    """Give each session the row of its place in the list, and its state; None is the beginning.

    What a pack of runs computes depends on these runs and their states alone: whether others sat here before leaves no trace.
    """
    configs = [session.config for session in sessions]
    adapters = PackedAdapters(
        [s.targets for s in sessions], base.shapes, [c.lora.lora_dropout for c in configs], base.dtype, base.device
    )
    optimizer = PackedAdamW(
        adapters, [(c.train, c.lora) for c in configs], base.dtype == torch.float16, base.current.kernels.fused
    )
    for row, (session, state) in enumerate(zip(sessions, states, strict=True)):
        session.row = row
        if state is None or not state.tensors:
            adapters.initialise(row, session.config.train.seed)
        if state is not None:
            restore_run(row, state, adapters, optimizer)
    return Seats(adapters, optimizer)
