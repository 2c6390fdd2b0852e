"""Attention of flat sequences by kernels that take where the sequences start, and what is kept for their backward.

    Triton  kernels of our own (`train.nn.triton.attention`), from sm_80 on
    Flash   PyTorch's FlashAttention-2, from sm_80 on
    Efficient  PyTorch's memory-efficient attention, on every GPU
    WithSinks  either of them, with a sink per head

    autograd function   takes                                         kept per token
    attend_varlen       q, k, v as they meet                          q, k, v, out, log_sums
    attend_varlen_raw   the projections, before norms and rotation    the projections, out, log_sums

`attend_varlen_raw` norms and rotates q and k again in its backward: one pass over them, instead of as much memory again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from train.nn.functional import dispatch, triton_kernel
from train.nn.heads import CosSin, HeadTransform, prepare_heads, prepare_heads_backward

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True, eq=False)
class Scores:
    """Which keys a query sees, and how it scores them.

    Attributes:
        starts: [S + 1] int32, where each sequence begins; the last is T.
        longest: no sequence has more tokens.
        scale: the factor of the products of q and k.
        window: a query at position i sees keys j with i - window < j <= i; None for all up to i.
        softcap: scores s become softcap * tanh(s / softcap) (Gemma 2); None for s itself.
    """

    starts: torch.Tensor
    longest: int
    scale: float
    window: int | None
    softcap: float | None


class VarlenKernel(Protocol):
    """Attention of flat q [T, H, D] to k [T, K, D] and v [T, K, E].

    Attributes:
        log_unit: the second result of `forward` times this is the natural logarithm of the sums of exponentials, [H, T].
    """

    log_unit: float

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> Tensors:
        """The result [T, H, E], log_sums, and what else the backward needs."""

    def backward(
        self, gradient: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: Tensors, scores: Scores
    ) -> Tensors:
        """The gradients of q, k and v; `kept` is what `forward` returned."""


class Triton:
    """`train.nn.triton.attention`, imported where it is used, since Triton is not installed everywhere."""

    # It has logarithms to base 2.
    log_unit = math.log(2)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> Tensors:
        """As `VarlenKernel`."""
        from train.nn.triton import attention

        return attention.forward(q, k, v, scores.starts, scores.longest, scores.scale, scores.window, scores.softcap)

    def backward(
        self, gradient: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: Tensors, scores: Scores
    ) -> Tensors:
        """As `VarlenKernel`."""
        from train.nn.triton import attention

        out, log_sums = kept
        return attention.backward(
            gradient, q, k, v, out, log_sums, scores.starts, scores.longest, scores.scale, scores.window, scores.softcap
        )


class Flash:
    """FlashAttention-2 (arXiv 2307.08691); it has no soft cap.

    These are the operators behind `torch.nn.attention.varlen`, called here because the backward has to add up in a fixed order for
    a resumed run to repeat the same bits.
    """

    log_unit = 1.0

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> Tensors:
        """As `VarlenKernel`."""
        out, log_sums, random, unused, _ = torch.ops.aten._flash_attention_forward(
            # Bounds and longest sequence of queries, then of keys; no dropout, causal, no debug mask.
            q, k, v, scores.starts, scores.starts, scores.longest, scores.longest, 0.0, True, False,
            scale=scores.scale, **_flash_window(scores),
        )  # fmt: skip
        # log_sums [H, T] let the backward compute the softmax again, block by block; the random state is for a dropout that is off.
        return out, log_sums, random, unused

    def backward(
        self, gradient: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: Tensors, scores: Scores
    ) -> Tensors:
        """As `VarlenKernel`."""
        out, log_sums, random, unused = kept
        with deterministic_algorithms():
            found: Tensors = torch.ops.aten._flash_attention_backward(
                gradient.contiguous(), q, k, v, out, log_sums, scores.starts, scores.starts, scores.longest, scores.longest,
                0.0, True, random, unused, scale=scores.scale, **_flash_window(scores),
            )  # fmt: skip
        return found


class Efficient:
    """PyTorch's memory-efficient attention (arXiv 2112.05682) on flat tokens; it has no soft cap, and no window here.

    Its queries each have their own key, so heads that share one get copies of it, which only live as long as a call. Its log_sums are
    [S, H, longest], so it takes no sinks.
    """

    log_unit = 1.0

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> Tensors:
        """As `VarlenKernel`."""
        k, v = (_repeated(x, q.shape[1]) for x in (k, v))
        # The kernel refuses a longest sequence of more tokens than there are: 112 tokens, and 67 rounded up to 128.
        longest = min(scores.longest, len(q))
        out, log_sums, seed, offset, *_ = torch.ops.aten._efficient_attention_forward(
            # No bias; bounds and longest sequence of queries and keys; no dropout, causal, with log_sums.
            q[None], k[None], v[None], None, scores.starts, scores.starts, longest, longest, 0.0, 1, True, scale=scores.scale,
        )  # fmt: skip
        return out[0], log_sums, seed, offset

    def backward(
        self, gradient: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: Tensors, scores: Scores
    ) -> Tensors:
        """As `VarlenKernel`."""
        out, log_sums, seed, offset = kept
        of_keys = k.shape[1]
        k, v = (_repeated(x, q.shape[1]) for x in (k, v))
        longest = min(scores.longest, len(q))
        with deterministic_algorithms():
            q_grad, k_grad, v_grad, _ = torch.ops.aten._efficient_attention_backward(
                gradient.contiguous()[None], q[None], k[None], v[None], None, out[None], scores.starts, scores.starts,
                longest, longest, log_sums, 0.0, seed, offset, 1, False,
                # Keys that are split are added up in any order.
                scale=scores.scale, num_splits_key=1,
            )  # fmt: skip
        return q_grad[0], *(_summed(x[0], of_keys) for x in (k_grad, v_grad))


def _repeated(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values [T, K, D] again for each of the `heads` / K queries that share them: [T, heads, D]."""
    of_keys = x.shape[1]
    return x if of_keys == heads else x.unsqueeze(2).expand(-1, -1, heads // of_keys, -1).flatten(1, 2)


def _summed(gradient: torch.Tensor, of_keys: int) -> torch.Tensor:
    """The gradient [T, K, D] of what `_repeated` made [T, heads, D] of."""
    return gradient if gradient.shape[1] == of_keys else gradient.unflatten(1, (of_keys, -1)).sum(2)


class WithSinks:
    """A kernel of another, whose softmax has one score more per head, the sink's, that no value belongs to (GPT-OSS).

    With the sums l = sum(exp(scores)) of the other kernel, a sink of score s only makes the weights smaller, by f = l / (l + exp(s)):

        out       f * out
        log_sums  log(l + exp(s))

    The backward of a softmax needs its weights, exp(scores) / sums, and the sum of gradient * out. Both follow from these two, so the
    other kernel's backward is right as it is. Sinks are frozen.
    """

    def __init__(self, kernel: VarlenKernel, sinks: torch.Tensor) -> None:
        self.log_unit = kernel.log_unit
        self._kernel = kernel
        self._sinks = sinks

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> Tensors:
        """As `VarlenKernel`."""
        out, log_sums, *others = self._kernel.forward(q, k, v, scores)
        sums = log_sums * self.log_unit
        with_sink = torch.logaddexp(sums, self._sinks.to(sums.dtype)[:, None])
        factor = torch.exp(sums - with_sink).t().unsqueeze(-1)
        return (out * factor).to(out.dtype), with_sink / self.log_unit, *others

    def backward(
        self, gradient: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: Tensors, scores: Scores
    ) -> Tensors:
        """As `VarlenKernel`."""
        return self._kernel.backward(gradient, q, k, v, kept, scores)


def _flash_window(scores: Scores) -> dict[str, int]:
    """FlashAttention counts the keys to the left of the query's own: a window of 3 keys is 2 to the left."""
    return {} if scores.window is None else {"window_size_left": scores.window - 1, "window_size_right": 0}


class _AttendVarlen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: VarlenKernel, scores: Scores
    ) -> torch.Tensor:
        out, *kept = kernel.forward(q, k, v, scores)
        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.kernel = kernel
        ctx.scores = scores
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        return *ctx.kernel.backward(gradients[0], q, k, v, tuple(kept), ctx.scores), None, None


def attend_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: VarlenKernel, scores: Scores
) -> torch.Tensor:
    """The attention of a kernel with autograd."""
    out: torch.Tensor = _AttendVarlen.apply(q, k, v, kernel, scores)
    return out


@dataclass(frozen=True, eq=False)
class Preparation:
    """How q and k are normed and rotated, by kernels where `fused`."""

    q: HeadTransform
    k: HeadTransform
    cos_sin: CosSin | None
    fused: bool

    def forward(self, x: torch.Tensor, transform: HeadTransform) -> torch.Tensor:
        """The raw heads x [T, heads, dim] as they meet."""
        prepared: torch.Tensor = dispatch(prepare_heads, self.fused, x, *(self.cos_sin or (None, None)), transform)
        return prepared

    def backward(
        self, gradient: torch.Tensor, x: torch.Tensor, transform: HeadTransform, out: torch.Tensor
    ) -> torch.Tensor:
        """The gradient of the raw heads, in `out`, whose tokens may be apart."""
        cos, sin = self.cos_sin or (None, None)
        if self.fused:
            triton_kernel(prepare_heads_backward)(gradient, x, cos, sin, transform, out)
            return out
        return out.copy_(dispatch(prepare_heads_backward, False, gradient, x, cos, sin, transform))


class _AttendVarlenRaw(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        preparation: Preparation,
        heads: tuple[int, int],
        kernel: VarlenKernel,
        scores: Scores,
        *raw: torch.Tensor,
    ) -> torch.Tensor:
        q, k, v = split_heads(raw, heads)
        q, k = preparation.forward(q, preparation.q), preparation.forward(k, preparation.k)
        out, *kept = kernel.forward(q, k, v, scores)
        ctx.save_for_backward(out, *kept, *raw)
        ctx.of_raw = len(raw)
        ctx.arguments = preparation, heads, kernel, scores
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        preparation, heads, kernel, scores = ctx.arguments
        # Read once: activations that are computed again are given out once.
        saved = ctx.saved_tensors
        kept, raw = saved[: -ctx.of_raw], saved[-ctx.of_raw :]
        q, k, v = split_heads(raw, heads)
        prepared = preparation.forward(q, preparation.q), preparation.forward(k, preparation.k)
        q_grad, k_grad, v_grad = kernel.backward(gradients[0], *prepared, v, kept, scores)
        raw_grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in raw[:2])
        if len(raw) == 1:
            # All gradients go where they belong in one matrix.
            *outs, of_values = split_heads(raw_grads, heads)
            of_values.copy_(v_grad)
        else:
            outs = list(raw_grads)
            raw_grads = *raw_grads, v_grad
        preparation.backward(q_grad, q, preparation.q, outs[0])
        preparation.backward(k_grad, k, preparation.k, outs[1])
        return None, None, None, None, *raw_grads


def attend_varlen_raw(
    raw: Tensors, heads: tuple[int, int], preparation: Preparation, kernel: VarlenKernel, scores: Scores
) -> torch.Tensor:
    """The attention of a kernel with autograd, of projections whose heads are still to be normed and rotated.

    Args:
        raw: q [T, H, D], k and v [T, K, D]; or one [T, H + 2 K, D], the output of one matrix.
        heads: H and K.
        preparation: of q and k.
    """
    out: torch.Tensor = _AttendVarlenRaw.apply(preparation, heads, kernel, scores, *raw)
    return out


def split_heads(raw: Tensors, heads: tuple[int, int]) -> Tensors:
    """q, k and v, as views of `raw` where it is one tensor [T, H + 2 K, D]."""
    return raw if len(raw) > 1 else raw[0].split([heads[0], heads[1], heads[1]], 1)


class deterministic_algorithms:  # noqa: N801 - used as a statement
    """Let PyTorch choose deterministic kernels within this block, and restore its settings afterwards.

    With `warn_only`, PyTorch's FlashAttention would still add up in any order, so it is off. PyTorch would also fill fresh memory,
    which no result needs since the kernels write all of it, so that is off too.
    """

    def __enter__(self) -> None:
        self._enabled = torch.are_deterministic_algorithms_enabled()
        self._warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        self._fill = torch._C._get_deterministic_fill_uninitialized_memory()
        torch._C._set_deterministic_algorithms(True, warn_only=False)
        torch._C._set_deterministic_fill_uninitialized_memory(False)

    def __exit__(self, *_exc: object) -> None:
        torch._C._set_deterministic_algorithms(self._enabled, warn_only=self._warn_only)
        torch._C._set_deterministic_fill_uninitialized_memory(self._fill)
