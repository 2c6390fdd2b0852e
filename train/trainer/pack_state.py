"""What a pack trains: the adapters and the optimizer of its runs, built from checkpoints and copied out to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from train.lora.parameters import AdapterTensors, PackedAdapters
from train.nn.packed_model import PackedModel
from train.trainer.checkpoint import Checkpoint, OptimizerNumbers
from train.trainer.optim import PackedAdamW
from train.trainer.session import RunSession


@dataclass(frozen=True)
class PackState:
    """The trainable side of a pack."""

    adapters: PackedAdapters
    optimizer: PackedAdamW


def build_pack_state(
    base: PackedModel, sessions: Sequence[RunSession], states: Sequence[Checkpoint | None]
) -> PackState:
    """Give each session its place in the list as run index, and its state; None is the beginning.

    What a pack computes depends on these runs and their states alone: runs that were in the pack before leave no trace.
    """
    configs = [session.config for session in sessions]
    adapters = PackedAdapters(
        [s.targets for s in sessions], base.shapes, [c.lora.lora_dropout for c in configs], base.dtype, base.device
    )
    optimizer = PackedAdamW(
        adapters,
        [(c.train, c.lora) for c in configs],
        base.dtype == torch.float16,
        base.context.kernels.fused_elementwise,
    )
    for run, (session, state) in enumerate(zip(sessions, states, strict=True)):
        session.run_index = run
        if state is None or not state.tensors:
            adapters.initialize(run, session.config.train.seed)
        if state is not None:
            restore_run(run, state, adapters, optimizer)
    return PackState(adapters, optimizer)


def run_tensors(run: int, adapters: PackedAdapters, optimizer: PackedAdamW) -> dict[str, torch.Tensor]:
    """Copies of everything that a run needs to continue: its weights and AdamW's averages, unpadded."""
    matrices = {"theta": adapters.theta, "exp_avg": optimizer.exp_avg, "exp_avg_sq": optimizer.exp_avg_sq}
    return {
        f"{kind}/{name}/{part}": tensor.cpu().clone(memory_format=torch.contiguous_format)
        for kind, matrix in matrices.items()
        for name, pair in adapters.tensors(run, matrix).items()
        for part, tensor in zip("AB", pair, strict=True)
    }


def optimizer_numbers(run: int, optimizer: PackedAdamW) -> OptimizerNumbers:
    """A run's entries of the optimizer's tensors [runs]."""
    return {
        "applied": float(optimizer.applied[run]),
        "good_steps": float(optimizer.good_steps[run]),
        "loss_scale": float(optimizer.loss_scale[run]),
        "alive": bool(optimizer.alive[run]),
    }


@torch.no_grad()
def restore_run(run: int, checkpoint: Checkpoint, adapters: PackedAdapters, optimizer: PackedAdamW) -> None:
    """The inverse of `run_tensors`, with the optimizer's numbers; a checkpoint of step 0 has no tensors to restore."""
    matrices = {"theta": adapters.theta, "exp_avg": optimizer.exp_avg, "exp_avg_sq": optimizer.exp_avg_sq}
    if checkpoint.tensors:
        for kind, matrix in matrices.items():
            _copy_into(adapters.tensors(run, matrix), checkpoint.tensors, kind)
    optimizer.applied[run] = checkpoint.progress.applied
    optimizer.good_steps[run] = checkpoint.progress.good_steps
    optimizer.loss_scale[run] = checkpoint.progress.loss_scale
    optimizer.alive[run] = checkpoint.progress.alive


def _copy_into(places: AdapterTensors, tensors: dict[str, torch.Tensor], kind: str) -> None:
    for name, pair in places.items():
        for part, place in zip("AB", pair, strict=True):
            place.copy_(tensors[f"{kind}/{name}/{part}"])
