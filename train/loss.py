"""Cross-entropy of a pack's next tokens, in chunks, with its gradient made on the way.

Only positions whose next token is to be learnt reach the head. The head is frozen, so the gradient of the hidden states is all that
the backward needs, and the logits of a chunk are gone before the next chunk begins (as in Liger Kernel, arXiv 2410.10989).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from train.batches import MicroBatch

CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class TargetLosses:
    """Per target: `losses` [N] in nats, `correct` [N] whether it is the arg-max, `gradient` [N, dim] or None."""

    losses: torch.Tensor
    correct: torch.Tensor
    gradient: torch.Tensor | None


@torch.no_grad()
def target_losses(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None
) -> TargetLosses:
    """Cross-entropy of each target, in float32 (float64 for a float64 model).

    Args:
        hidden: [N, dim] states that predict the targets.
        head: [vocabulary, dim] frozen output embedding.
        targets: [N] token ids.
        weights: [N] factor of each target's loss in the sum whose gradient is wanted, None for no gradient.
    """
    precise = torch.promote_types(hidden.dtype, torch.float32)
    losses, correct, gradients = [], [], []
    for at in range(0, len(hidden), CHUNK_TOKENS):
        chunk = slice(at, at + CHUNK_TOKENS)
        logits = functional.linear(hidden[chunk], head).to(precise)
        log_normaliser = torch.logsumexp(logits, dim=-1)
        wanted = targets[chunk, None]
        losses.append(log_normaliser - logits.gather(1, wanted)[:, 0])
        correct.append(logits.argmax(dim=-1) == targets[chunk])
        if weights is not None:
            logits.sub_(log_normaliser[:, None]).exp_()  # the softmax, in place
            logits.scatter_add_(1, wanted, logits.new_full(wanted.shape, -1))
            gradients.append(_times_head(logits.mul_(weights[chunk, None]).to(hidden.dtype), head))
    return TargetLosses(torch.cat(losses), torch.cat(correct), torch.cat(gradients) if gradients else None)


def _times_head(gradient: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """[N, vocabulary] x [vocabulary, dim] -> [N, dim], where a row that is not finite stays alone.

    Measured with torch 2.11 on a CPU with AMX in bfloat16: with an odd inner dimension the last value of a row is taken together
    with the first one of the next row times zero, and a NaN there enters this row. So an odd vocabulary gives its last word apart.
    """
    even = len(head) // 2 * 2
    product = gradient[:, :even] @ head[:even]
    return product if even == len(head) else product.addcmul_(gradient[:, even:], head[even:])


def sums_per_run(values: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Sum values [N] of a micro-batch's targets over each run: [runs of the pack], zero for runs without targets here.

    Rows are summed apart and in a fixed order: the same bits every time, and a NaN stays in its run.
    """
    sums = batch.by_run.pad_with_zeros(values).sum(dim=1)
    return values.new_zeros(batch.pack_size).index_copy_(0, batch.runs_with_targets, sums)
