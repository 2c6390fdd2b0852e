"""Clipping, AdamW, loss scale and failure of all runs at once: row i of every tensor is run i.

AdamW is torch's (decoupled weight decay, arXiv 1711.05101), clipping is `torch.nn.utils.clip_grad_norm_`'s, the schedules are
transformers', LoRA+ (arXiv 2402.12354) multiplies the learning rate of the B matrices. Nothing here waits for the GPU: what a run
should not do this step is done with a learning rate of zero and betas of one, or left out by the kernel, so that its row stays bit for
bit as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import get_scheduler

from train.config import LoraConfig, TrainConfig
from train.data.micro_batch import to_device
from train.lora.parameters import PackedAdapters
from train.nn.functional import map_row_chunks, triton_kernel

FIRST_LOSS_SCALE = 2.0**16
SMALLEST_LOSS_SCALE = 2.0**-8
GROWTH_INTERVAL_STEPS = 2000
# Numbers in float64 at once: they stay in a GPU's cache.
NORM_CHUNK = 2**21


def learning_rate_schedule(train: TrainConfig, total_steps: int) -> Callable[[int], float]:
    """The learning rate of each optimizer step (from 0) by transformers' scheduler: a function of the step alone."""
    # The scheduler reads its first rate from an optimizer; this one is never stepped.
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=train.learning_rate)
    factor = get_scheduler(
        train.lr_scheduler_type,
        optimizer,
        train.warmup(total_steps),
        # Where the steps before the decay are given, they count; transformers warns if it gets both.
        None if "num_stable_steps" in train.lr_scheduler_kwargs else total_steps,
        train.lr_scheduler_kwargs,
    ).lr_lambdas[0]
    return lambda step: train.learning_rate * float(factor(step))


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did, per run [runs], still on the device."""

    grad_norm: torch.Tensor
    alive: torch.Tensor
    loss_scale: torch.Tensor


def adamw(
    theta: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    gradient: torch.Tensor,
    applies: torch.Tensor,
    rate: torch.Tensor,
    decay: torch.Tensor,
    clip: torch.Tensor,
    beta1: torch.Tensor,
    beta2: torch.Tensor,
    correction1: torch.Tensor,
    root_correction2: torch.Tensor,
    eps: torch.Tensor,
) -> None:
    """One step of AdamW for the columns of all runs, in place; `gradient` is used up.

    `theta`, `exp_avg`, `exp_avg_sq` and `gradient` are [runs, columns], all that follows is [runs, 1]. With g the clipped gradient
    (arXiv 1711.05101, algorithm 2, as torch.optim.AdamW computes it):

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g²
        theta = theta * (1 - decay) - rate / correction1 * m / (sqrt(v) / root_correction2 + eps)

    where after t steps correction1 = 1 - beta1^t, root_correction2 = sqrt(1 - beta2^t), and decay = rate * weight_decay.

    Two runs of two numbers at their first step, with beta1 0.9, beta2 0.999 and rate 0.1. Run 0 clips at norm 1 and has weight_decay
    0.1, so decay 0.01; run 1 does neither:

        gradient   [[3, 4], [0.3, 0.4]]      norms 5 and 0.5
        clip       [[0.2], [1]]              max_norm / norm, at most 1
        g          [[0.6, 0.8], [0.3, 0.4]]
        m          [[0.06, 0.08], [0.03, 0.04]]
        v          [[0.00036, 0.00064], [0.00009, 0.00016]]
        theta      [[1, 2], [1, 2]] before, [[0.89, 1.88], [0.9, 1.9]] after

    At the first step m / correction1 is g and sqrt(v) / root_correction2 is |g|, so each number moves by its rate, whatever its
    gradient: 1 * 0.99 - 0.1 and 2 * 0.99 - 0.1 in run 0.
    """
    # A run that is left out may have a gradient of NaN; 0 keeps it out of the averages.
    gradient.mul_(clip).masked_fill_(~applies, 0)
    exp_avg.mul_(beta1).addcmul_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient * gradient, 1 - beta2)
    denominator = exp_avg_sq.sqrt().div_(root_correction2).add_(eps)
    theta.mul_(1 - decay).addcmul_(denominator.reciprocal_().mul_(exp_avg), -rate / correction1)


def row_norms(matrix: torch.Tensor) -> torch.Tensor:
    """The Euclidean norm of each row of [runs, P], in the matrix's dtype.

    Summed in float64, which leaves float32's last bit alone whatever the order: in a pack other zeros lie between a run's numbers
    than alone, and a clip that differs in its last bit moves every weight of the run.
    """
    columns = max(1, NORM_CHUNK // len(matrix))
    squares = torch.zeros(len(matrix), dtype=torch.float64, device=matrix.device)
    for part in torch.split(matrix, columns, dim=1):
        squares += torch.linalg.vector_norm(part, dim=1, dtype=torch.float64).square()
    return squares.sqrt().to(matrix.dtype)


class PackedAdamW:
    """The optimizers of all runs of a pack.

    Attributes:
        exp_avg, exp_avg_sq: [runs, P], laid out like `adapters.theta`.
        applied: [runs] steps that changed the weights; bias correction counts these.
        alive: [runs] False from the step on at which a run's loss or gradient was not finite.
        loss_scale, good_steps: [runs] of fp16's dynamic loss scale; the scale is 1 in other dtypes.
    """

    def __init__(
        self,
        adapters: PackedAdapters,
        configs: Sequence[tuple[TrainConfig, LoraConfig]],
        scale_losses: bool,
        fused: bool = False,
    ) -> None:
        self.adapters = adapters
        self._fused = fused
        self.exp_avg = torch.zeros_like(adapters.theta)
        self.exp_avg_sq = torch.zeros_like(adapters.theta)
        trains = [train for train, _ in configs]
        self._beta1 = self._per_run([train.adam_beta1 for train in trains])
        self._beta2 = self._per_run([train.adam_beta2 for train in trains])
        self._eps = self._per_run([train.adam_epsilon for train in trains])
        self._weight_decay = self._per_run([train.weight_decay for train in trains])
        self._max_norm = self._per_run([train.max_grad_norm or math.inf for train in trains])
        self._b_ratio = self._per_run([lora.loraplus_lr_ratio or 1.0 for _, lora in configs])
        self.scale_losses = scale_losses
        self.applied = self._per_run([0.0] * len(configs))
        self.good_steps = self._per_run([0.0] * len(configs))
        self.loss_scale = self._per_run([FIRST_LOSS_SCALE if scale_losses else 1.0] * len(configs))
        self.alive = torch.ones(len(configs), dtype=torch.bool, device=adapters.theta.device)

    def _per_run(self, values: Sequence[float]) -> torch.Tensor:
        return self._on_host(values).to(self.adapters.theta.device)

    def _on_host(self, values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=self.adapters.theta.dtype)

    @torch.no_grad()
    def step(self, learning_rates: Sequence[float], losses: torch.Tensor) -> StepOutcome:
        """Apply every run's gradient and clear all gradients.

        Args:
            learning_rates: [runs] of this step.
            losses: [runs] mean loss of this step.
        """
        gradient = self.adapters.gradient
        # With a loss scale s the backward gave s times the gradient, so its norm and its clip are divided by s.
        norm = row_norms(gradient) / self.loss_scale
        finite = torch.isfinite(norm)
        applies = self.alive & finite & torch.isfinite(losses)
        # As torch.nn.utils.clip_grad_norm_: max_norm / (norm + 1e-6), at most 1.
        clip = (self._max_norm / (norm + 1e-6)).clamp(max=1.0) / self.loss_scale
        self._move(to_device(self._on_host(learning_rates), gradient.device), clip, applies)
        gradient.zero_()
        outcome_scale = self.loss_scale.clone()
        self._note_failures(finite, losses)
        return StepOutcome(norm, self.alive.clone(), outcome_scale)

    def _move(self, learning_rate: torch.Tensor, clip: torch.Tensor, applies: torch.Tensor) -> None:
        """AdamW's update of the runs in `applies` [runs]; `learning_rate` and `clip` are [runs].

        A run that is left out gets rate 0 and betas 1, so that theta * 1 - 0 and 1 * m + 0 * g keep its numbers bit for bit.
        """
        self.applied += applies
        steps = self.applied.clamp(min=1)
        rate = torch.where(applies, learning_rate, 0)
        beta1, beta2 = (torch.where(applies, beta, 1) for beta in (self._beta1, self._beta2))
        corrections = 1 - self._beta1**steps, (1 - self._beta2**steps).sqrt()
        # theta holds all A first, then all B: only B learns at LoRA+'s multiple of the rate.
        split = self.adapters.b_columns_start
        matrices = (self.adapters.theta, self.exp_avg, self.exp_avg_sq, self.adapters.gradient)
        for columns, rates in ((slice(None, split), rate), (slice(split, None), rate * self._b_ratio)):
            factors = (rates, rates * self._weight_decay, clip, beta1, beta2, *corrections, self._eps)
            compute = triton_kernel(adamw) if self._fused else partial(map_row_chunks, adamw)
            compute(
                *(matrix[:, columns] for matrix in matrices),
                applies[:, None],
                *(factor[:, None] for factor in factors),
            )

    def _note_failures(self, finite: torch.Tensor, losses: torch.Tensor) -> None:
        """A run whose loss or gradient is not finite has diverged, for good.

        A gradient under a loss scale may overflow: then the scale halves, and only a run that still overflows at the smallest
        scale has diverged.
        """
        self.alive &= torch.isfinite(losses)
        if not self.scale_losses:
            self.alive &= finite
            return
        self.alive &= finite | (self.loss_scale > SMALLEST_LOSS_SCALE)
        self.good_steps = torch.where(finite, self.good_steps + 1, 0)
        grows = self.good_steps >= GROWTH_INTERVAL_STEPS
        kept = torch.where(grows, self.loss_scale * 2, self.loss_scale)
        self.loss_scale = torch.where(finite, kept, self.loss_scale / 2)
        self.good_steps = torch.where(grows, 0, self.good_steps)
