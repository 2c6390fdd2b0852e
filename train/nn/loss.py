"""Cross-entropy of a pack's next tokens, in chunks, with its gradient made on the way.

Only positions whose next token is to be learnt reach the head. The head is frozen, so the gradient of the hidden states is all that
the backward needs, and the logits of a chunk are gone before the next chunk begins (as in Liger Kernel, arXiv 2410.10989).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from train.data.micro_batch import MicroBatch
from train.nn.functional import kernel_of, some_rows_at_a_time

CHUNK_TOKENS = 1024


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
        fused: whether formulas have kernels.
    """
    formula = kernel_of(softmax) if fused and weights is not None else softmax
    losses, correct, gradients = [], [], []
    for at in range(0, len(hidden), CHUNK_TOKENS):
        chunk = slice(at, at + CHUNK_TOKENS)
        logits = head.logits(hidden[chunk])
        loss, right, gradient = formula(logits, targets[chunk], None if weights is None else weights[chunk])
        losses.append(loss)
        correct.append(right)
        if gradient is not None:
            gradients.append(head.gradient_of_hidden(gradient))
    return TargetLosses(torch.cat(losses), torch.cat(correct), torch.cat(gradients) if gradients else None)


def softmax(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Cross-entropy of logits [n, words] with targets [n]; with one copy of the logits in float32.

    Returns:
        Losses [n]; [n] whether the first of the largest logits is the target's; the gradient of the losses times `weights` [n] in
        the place of the logits, None without weights.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_normalizer = some_rows_at_a_time(
        partial(torch.logsumexp, dim=-1), wide
    )  # torch takes a copy of what it is given
    wanted = targets[:, None]
    losses, correct = log_normalizer - wide.gather(1, wanted)[:, 0], wide.argmax(dim=-1) == targets
    if weights is None:
        return losses, correct, None
    wide.sub_(log_normalizer[:, None]).exp_().scatter_add_(1, wanted, wide.new_full(wanted.shape, -1))
    return losses, correct, logits.copy_(wide.mul_(weights[:, None]))


def sums_per_run(values: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Sum values [N] of a micro-batch's targets over each run: [runs of the pack], zero for runs without targets here.

    Rows are summed apart, so a NaN stays in its run, and in float64: the order, which depends on the longest run of the pack, does
    not show in float32.
    """
    sums = batch.by_run.pad_with_zeros(values.double()).sum(dim=1)
    return sums.new_zeros(batch.pack_size).index_copy_(0, batch.runs_with_targets, sums)


VOCAB_MULTIPLE = 8  # 16 bytes of a half-precision row


class Head:
    """A frozen head [words, dim] in whole rows of 16 bytes.

    A vocabulary like GPT-2's 50,257, or 32,000 and a padding token, makes rows of logits that matrix units take slowly (NVIDIA's
    guide to matrix multiplication), and the rounding of such a product changed with the number of tokens (measured on an H200 with
    97 words: in three of eight runs one number in 5,000 of the gradient was another in a pack than alone, while forward, backward
    and optimizer were the same to the bit up to there). On CPUs with AMX an odd number of bfloat16 words takes the last one of a row
    together with the first of the next row times zero, and a NaN there enters this row (torch 2.11). So the head gets words that
    nobody says: zeros whose logits are -inf, which change no probability and no gradient.

    Attributes:
        words: the real ones; logits have columns for the others too.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        self.words = len(weight)
        missing = -self.words % VOCAB_MULTIPLE
        self._weight = functional.pad(weight.data, (0, 0, 0, missing)) if missing else weight.data
        weight.data = self._weight[: self.words]  # nothing is there twice, whatever else the parameter is tied to
        self.dtype, self.device = weight.dtype, weight.device

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, dim] -> [N, words and a few more]."""
        logits = functional.linear(hidden, self._weight)
        if len(self._weight) > self.words:
            logits[:, self.words :] = -math.inf
        return logits

    def gradient_of_hidden(self, gradient: torch.Tensor) -> torch.Tensor:
        """From the gradient of `logits` to that of the hidden states [N, dim]."""
        return gradient @ self._weight
