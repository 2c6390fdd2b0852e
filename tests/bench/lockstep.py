"""Shows where a run's numbers in a pack first differ from the same run alone.

Eight runs that differ in everything train as one pack, and each of them in a pack of its own, step by step. For each run the first
result is named that is not bit-identical.

    PYTHONPATH=.:tests python -m bench.lockstep --dtype bfloat16

Rounding depends on shapes, so some results may differ. What differs first should be a matrix product of another shape, not one of this
project's formulas. CUDA graphs are off, since the operations that they replay cannot be watched.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import packs
from train.config import RunConfig
from train.nn import decoder
from train.nn.backends import choose_kernels
from train.nn.packed_model import DeviceSetup, PackedModel, pack_model
from train.trainer.loop import PackLoop
from train.trainer.optim import PackedAdamW, StepOutcome

OPERATIONS = ("norm_residual", "apply_linears", "attend_heads", "gated_autograd")


@dataclass
class Operation:
    """One result [T, ...] of the forward pass, and its gradient if it got one."""

    name: str
    out: torch.Tensor
    gradient: torch.Tensor | None = None


@dataclass
class Watched:
    """What one step computed, in order. `optimizer` holds values [runs] or matrices laid out like the pack's `theta`."""

    operations: list[Operation] = field(default_factory=list)
    optimizer: dict[str, torch.Tensor] = field(default_factory=dict)


def watch_step(loop: PackLoop) -> Watched:
    """Do one training step and keep every result."""
    seen = Watched()
    loop.base.attach(loop.adapters)
    with watched_operations(seen), watched_optimizer(seen):
        loop._train_step()
    return seen


@contextmanager
def watched_operations(seen: Watched) -> Iterator[None]:
    """Keep the results of the decoder's operations and their gradients."""

    def watched(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            result = operation(*arguments)
            for out in result if isinstance(result, tuple) else (result,):
                seen.operations.append(
                    kept := Operation(f"{name} (operation {len(seen.operations)})", out.detach().clone())
                )
                if out.requires_grad:
                    out.register_hook(lambda gradient, kept=kept: _keep(kept, gradient))
            return result

        return call

    with mock.patch.multiple(decoder, **{name: watched(name, getattr(decoder, name)) for name in OPERATIONS}):
        yield


def _keep(kept: Operation, gradient: torch.Tensor | None) -> None:
    kept.gradient = None if gradient is None else gradient.clone()


@contextmanager
def watched_optimizer(seen: Watched) -> Iterator[None]:
    """Keep what goes into the optimizer and what comes out."""
    step = PackedAdamW.step

    def watched(optimizer: PackedAdamW, rates: list[float], losses: torch.Tensor) -> StepOutcome:
        kept = {"loss": losses, "gradient": optimizer.adapters.gradient.clone()}
        outcome = step(optimizer, rates, losses)
        moved = {"exp_avg": optimizer.exp_avg, "exp_avg_sq": optimizer.exp_avg_sq, "theta": optimizer.adapters.theta}
        seen.optimizer = kept | {"norm": outcome.grad_norm} | {name: matrix.clone() for name, matrix in moved.items()}
        return outcome

    with mock.patch.object(PackedAdamW, "step", watched):
        yield


def first_difference(
    run_index: int, pack: PackLoop, of_pack: Watched, alone: PackLoop, by_itself: Watched, tokens: slice
) -> str | None:
    """Describes the first result of a run that differs, None if there is none.

    Args:
        run_index: the run's index in the pack.
        pack: the loop of the whole pack, and `of_pack` what its step computed.
        alone: the loop of the run alone, and `by_itself` what its step computed.
        tokens: where the run's tokens are among the pack's flat tokens.
    """
    pairs = list(zip(of_pack.operations, by_itself.operations, strict=True))
    for mine, other in pairs:
        if count := _differing(mine.out[tokens], other.out):
            return f"{mine.name}: {count} of {other.out.numel():,} numbers"
    of_pack_values = of_pack.optimizer
    alone_values = by_itself.optimizer
    if _differing(of_pack_values["loss"][run_index], alone_values["loss"][0]):
        return "the loss"
    for mine, other in reversed(pairs):
        if mine.gradient is None or other.gradient is None:
            continue
        if count := _differing(mine.gradient[tokens], other.gradient):
            return f"the gradient of {mine.name}: {count} of {other.gradient.numel():,} numbers"
    for name in ("gradient", "norm", "exp_avg", "exp_avg_sq", "theta"):
        mine = of_pack_values[name]
        other = alone_values[name]
        if mine.dim() == 1:
            count = _differing(mine[run_index], other[0])
        else:
            views = pack.adapters.tensors(run_index, mine), alone.adapters.tensors(0, other)
            count = sum(_differing(x, y) for key in views[0] for x, y in zip(views[0][key], views[1][key], strict=True))
        if count:
            return f"the optimizer's {name}: {count} numbers"
    return None


def _differing(mine: torch.Tensor, other: torch.Tensor) -> int:
    return int((mine != other).sum())


def march(base: PackedModel, configs: list[RunConfig], seed: int, steps: int, folder: Path) -> list[str | None]:
    """For each run what differed first within `steps` steps over random rows, None if nothing did."""
    data = packs.random_data(seed=seed)
    pack = packs.make_loop(folder / "pack", base, configs, data=data)
    alone = [packs.make_loop(folder / f"{i}", base, [config], data=data) for i, config in enumerate(configs)]
    differences: list[str | None] = [None] * len(configs)
    for step in range(steps):
        lengths = [sum(len(s.tokens) for s in pack._sequences(session)) for session in pack.sessions]
        of_pack = watch_step(pack)
        # A micro-batch holds runs one after the other: 40, 25 and 30 tokens are 0:40, 40:65 and 65:95.
        for i, (start, end) in enumerate(pairwise(accumulate(lengths, initial=0))):
            if differences[i] is None:
                by_itself = watch_step(alone[i])
                what = first_difference(i, pack, of_pack, alone[i], by_itself, slice(start, end))
                differences[i] = None if what is None else f"step {step + 1}: {what}"
    return differences


def main(given: list[str] | None = None) -> None:
    """March and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the rows")
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args(given)
    device, dtype = packs.DEVICES[-1], getattr(torch, arguments.dtype)
    kernels = choose_kernels(device, dtype, graphs=False)
    base = pack_model(packs.tiny_llama(dtype), DeviceSetup(packs.NF4, device, "resident", longest=64, kernels=kernels))
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            differences = march(base, packs.DIVERSE, seed, arguments.steps, Path(folder))
        print(f"{device.type}, {arguments.dtype}, rows {seed}, {arguments.steps} steps:")
        for i, what in enumerate(differences):
            print(f"  run {i}: {what or 'the same bits'}", flush=True)


if __name__ == "__main__":
    main()
