"""The cross-entropy of a pack's targets, in chunks, with its gradient computed in the forward.

Only the hidden states that predict a target reach the head. With p = softmax(logits), target t and the target's weight w,

    loss      = log(sum(exp(logits))) - logits[t]
    dlogits   = w * (p - onehot(t))
    dz        = dlogits * (1 - (logits / cap)^2)       where the head has a soft cap, else dlogits
    dhidden   = scale * dz W                           W [vocab, dim], frozen, so it has no gradient of its own

so dhidden is all that the backward needs, and the logits of a chunk are freed before the next chunk begins (as in Liger Kernel,
arXiv 2410.10989). With 32,000 words a chunk of 1,024 targets has 125 MiB of logits in float32, whatever the micro-batch's size
(`train.sizing.logit_rows`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from train.data.micro_batch import MicroBatch
from train.nn.functional import map_row_chunks, triton_kernel
from train.nn.head import Head, soft_cap
from train.sizing import logit_rows


@dataclass(frozen=True)
class TargetLosses:
    """Per target: `losses` [N] in nats, `correct` [N] whether it is the arg-max, `gradient` [N, dim] or None."""

    losses: torch.Tensor
    correct: torch.Tensor
    gradient: torch.Tensor | None


@torch.no_grad()
def target_losses(
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    weights: torch.Tensor | None,
    fused: bool = False,
) -> TargetLosses:
    """Cross-entropy of each target, in float32 (float64 for a float64 model).

    Args:
        hidden: [N, dim] states that predict the targets.
        head: the base's, frozen.
        targets: [N] token ids.
        weights: [N] factor of each target's loss in the sum whose gradient is wanted, None for no gradient.
        fused: whether to use the Triton kernel.
    """
    formula = triton_kernel(cross_entropy) if fused and weights is not None else cross_entropy
    losses: list[torch.Tensor] = []
    correct: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    rows = logit_rows(head.vocab_size, copied=not fused)
    for start in range(0, len(hidden), rows):
        chunk = slice(start, start + rows)
        z = head.uncapped(hidden[chunk])
        loss, right, gradient = formula(z, targets[chunk], None if weights is None else weights[chunk], head.cap)
        losses.append(loss)
        correct.append(right)
        if gradient is not None:
            gradients.append(head.hidden_grad(gradient))
    return TargetLosses(torch.cat(losses), torch.cat(correct), torch.cat(gradients) if gradients else None)


def cross_entropy(
    z: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None, cap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Cross-entropy of logits [n, vocab] with targets [n]; uses one copy of the logits in float32.

    Args:
        z: the logits, before the soft `cap` where there is one.

    Returns:
        Losses [n]; [n] whether the first of the largest logits is the target's; the gradient by z of the losses times `weights` [n],
        which overwrites z, None without weights.
    """
    # z is needed again for the cap's gradient, so the copy that is overwritten must be another tensor even in float32.
    wide = z.to(torch.promote_types(z.dtype, torch.float32), copy=cap is not None)
    if cap is not None:
        map_row_chunks(_cap_in_place, wide, cap)
    # A few rows at a time, since torch's logsumexp copies what it is given.
    log_normalizer = map_row_chunks(partial(torch.logsumexp, dim=-1), wide)
    index = targets[:, None]
    losses = log_normalizer - wide.gather(1, index)[:, 0]
    correct = wide.argmax(dim=-1) == targets
    if weights is None:
        return losses, correct, None
    # In place: logits -> p = exp(logits - log_normalizer) -> p - onehot(target) -> times the weight, rounded to the logits' dtype.
    wide.sub_(log_normalizer[:, None]).exp_().scatter_add_(1, index, wide.new_full(index.shape, -1))
    if cap is not None:
        map_row_chunks(_cap_backward_in_place, wide, z, cap)
    return losses, correct, z.copy_(wide.mul_(weights[:, None]))


def _cap_in_place(z: torch.Tensor, cap: float) -> None:
    z.copy_(soft_cap(z, cap))


def _cap_backward_in_place(gradient: torch.Tensor, z: torch.Tensor, cap: float) -> None:
    """The gradient by capped logits becomes that by z: d cap * tanh(z / cap) / dz = 1 - tanh(z / cap)^2."""
    gradient.mul_(1 - torch.tanh(z.to(gradient.dtype) / cap).square())


def sums_per_run(values: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Sum values [N] of a micro-batch's targets over each run: [runs of the pack], zero for runs without targets here.

    Each run is a row of a padded matrix, so a NaN stays in its run. The sum is in float64: its order depends on the longest run of
    the micro-batch, and in float64 that does not show in float32's last bit.
    """
    sums = batch.targets_by_run.pad_with_zeros(values.double()).sum(dim=1)
    return sums.new_zeros(batch.pack_size).index_copy_(0, batch.runs_with_targets, sums)
