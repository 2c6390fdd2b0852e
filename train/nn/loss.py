"""The frozen output head, and the cross-entropy of a pack's targets, in chunks, with its gradient computed in the forward.

Only the hidden states that predict a target reach the head. With p = softmax(logits), target t and the target's weight w,

    loss      = log(sum(exp(logits))) - logits[t]
    dlogits   = w * (p - onehot(t))
    dhidden   = dlogits W                              W [vocab, dim], frozen, so it has no gradient of its own

so dhidden is all that the backward needs, and the logits of a chunk are freed before the next chunk begins (as in Liger Kernel,
arXiv 2410.10989). With 32,000 words a chunk of 1,024 targets has 125 MiB of logits in float32, whatever the micro-batch's size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from train.data.micro_batch import MicroBatch
from train.nn.functional import map_row_chunks, triton_kernel

CHUNK_TOKENS = 1024
# Rows of logits in whole 16 bytes, in half precision.
VOCAB_MULTIPLE = 8
# CPUs with AMX take the inner size of a 16-bit product in blocks of 32 (torch 2.11). The last block of a row reaches into the next row,
# whose numbers meet zeros there, and 0 x NaN is NaN. Of inner sizes from 8 to 232, each above 32 that is not a multiple of 32 let a NaN
# of row i into row i - 1 (40, 104, 200...); 64, 96, 128 and 160 did not. Without a NaN every bit repeated from call to call.
CPU_VOCAB_MULTIPLE = 32


class Head:
    """A frozen output head [vocab, dim] whose vocabulary is padded with entries whose logits are -inf.

    These entries are never predicted, and change no probability and no gradient. They are there because of vocabularies like GPT-2's
    50,257, or 32,000 and a padding token:

    - Matrix units are slow with rows of logits that are not a multiple of 16 bytes (NVIDIA's guide to matrix multiplication).
    - The rounding of such a product changed with the number of tokens. Measured on an H200 with 97 words: in three of eight runs
      one number in 5,000 of the gradient differed between the pack and the same run alone, while all that came before was
      bit-identical.
    - On CPUs with AMX a NaN would spread to the row before it (`CPU_VOCAB_MULTIPLE`), and so to another run.

    Attributes:
        vocab_size: without the padding; logits have columns for the padding too.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        self.vocab_size = len(weight)
        self.dtype = weight.dtype
        self.device = weight.device
        half_on_cpu = weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16)
        # 97 words need 7 more: -97 % 8 = 7; in half precision on a CPU 31 more.
        missing = -self.vocab_size % (CPU_VOCAB_MULTIPLE if half_on_cpu else VOCAB_MULTIPLE)
        self._weight = functional.pad(weight.data, (0, 0, 0, missing)) if missing else weight.data
        # The parameter becomes a view of the padded copy, so nothing is in memory twice, whatever else it is tied to.
        weight.data = self._weight[: self.vocab_size]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, dim] -> [N, vocab and padding]."""
        logits = functional.linear(hidden, self._weight)
        if len(self._weight) > self.vocab_size:
            logits[:, self.vocab_size :] = -math.inf
        return logits

    def hidden_grad(self, gradient: torch.Tensor) -> torch.Tensor:
        """From the gradient of `logits` to that of the hidden states [N, dim]."""
        return gradient @ self._weight


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
    for start in range(0, len(hidden), CHUNK_TOKENS):
        chunk = slice(start, start + CHUNK_TOKENS)
        logits = head.logits(hidden[chunk])
        loss, right, gradient = formula(logits, targets[chunk], None if weights is None else weights[chunk])
        losses.append(loss)
        correct.append(right)
        if gradient is not None:
            gradients.append(head.hidden_grad(gradient))
    return TargetLosses(torch.cat(losses), torch.cat(correct), torch.cat(gradients) if gradients else None)


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Cross-entropy of logits [n, vocab] with targets [n]; uses one copy of the logits in float32.

    Returns:
        Losses [n]; [n] whether the first of the largest logits is the target's; the gradient of the losses times `weights` [n],
        which overwrites the logits, None without weights.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # A few rows at a time, since torch's logsumexp copies what it is given.
    log_normalizer = map_row_chunks(partial(torch.logsumexp, dim=-1), wide)
    index = targets[:, None]
    losses = log_normalizer - wide.gather(1, index)[:, 0]
    correct = wide.argmax(dim=-1) == targets
    if weights is None:
        return losses, correct, None
    # In place: logits -> p = exp(logits - log_normalizer) -> p - onehot(target) -> times the weight, rounded to the logits' dtype.
    wide.sub_(log_normalizer[:, None]).exp_().scatter_add_(1, index, wide.new_full(index.shape, -1))
    return losses, correct, logits.copy_(wide.mul_(weights[:, None]))


def sums_per_run(values: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Sum values [N] of a micro-batch's targets over each run: [runs of the pack], zero for runs without targets here.

    Each run is a row of a padded matrix, so a NaN stays in its run. The sum is in float64: its order depends on the longest run of
    the micro-batch, and in float64 that does not show in float32's last bit.
    """
    sums = batch.targets_by_run.pad_with_zeros(values.double()).sum(dim=1)
    return sums.new_zeros(batch.pack_size).index_copy_(0, batch.runs_with_targets, sums)
