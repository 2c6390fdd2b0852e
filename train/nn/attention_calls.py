"""The calls of attention in a trace: what reached the products, whichever way a model's own code calls them.

- Most models call what is registered with transformers' `AttentionInterface`: there, `TRACED_ATTENTION` notes its arguments.
- Some have attention of their own, which calls PyTorch's `scaled_dot_product_attention` (Falcon): `FusedAttention` watches for that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from train.nn.functional import masked_attention

TRACED_ATTENTION = "lorapack_traced"
# A mask adds less than this to the scores of keys that a query does not see; what is added to others is no mask (ALiBi).
HIDDEN = -1e4


@dataclass(frozen=True)
class AttentionCall:
    """One call of attention: q [T, heads, dim], k and v [T, key-value heads, dim], what came out [T, heads * dim].

    `visible` [T, T] says which key each query sees; `sinks` [heads] has scores without values; `others` are further arguments.
    """

    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    scale: float
    softcap: float | None
    visible: torch.Tensor
    sinks: torch.Tensor | None
    others: Mapping[str, Any]


def _traced_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Plain attention, as transformers calls it, that gives its call to the tracer of its module."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    if attention_mask is not None:
        visible = attention_mask[0, 0] > -1
    groups = query.shape[1] // key.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (key, value))
    out = masked_attention(query, k, v, visible, scale, softcap, s_aux)[0].transpose(0, 1)
    given = {name: other for name, other in others.items() if other is not None}
    note = cast(Callable[[AttentionCall], None], module.note_attention)
    q, k, v = _tokens_first(query, key, value)
    note(AttentionCall(module, q, k, v, out.flatten(1).clone(), scale, softcap, visible, s_aux, given))
    return out[None], None


AttentionInterface.register(TRACED_ATTENTION, _traced_attention)
AttentionMaskInterface.register(TRACED_ATTENTION, eager_mask)


class FusedAttention(TorchFunctionMode):
    """While it is entered, gives every call of PyTorch's fused attention to `note`, as one of the module that is `running`, if any."""

    def __init__(self, running: Callable[[], nn.Module | None], note: Callable[[AttentionCall], None]) -> None:
        super().__init__()
        self._running = running
        self._note = note

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs or {})
        module = self._running()
        if func is scaled_dot_product_attention and module is not None:
            self._note(_fused_call(module, result, *args, **kwargs or {}))
        return result


def _fused_call(
    module: nn.Module,
    attended: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    """A call of `scaled_dot_product_attention` with its result [1, heads, T, dim]; no dropout acts in a trace."""
    del dropout_p, enable_gqa
    seen = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool)
    if is_causal:
        seen = seen.tril()
    others = {}
    if attn_mask is not None:
        mask = attn_mask.expand(1, query.shape[1], *seen.shape[2:])
        seen = mask if mask.dtype == torch.bool else mask > HIDDEN
        others = _biases(mask, seen)
    q, k, v = _tokens_first(query, key, value)
    k, v = _without_repeated_heads(k, v)
    out = attended[0].transpose(0, 1).flatten(1).clone()
    return AttentionCall(
        module, q, k, v, out, q.shape[-1] ** -0.5 if scale is None else scale, None, seen[0, 0], None, others
    )


def _biases(mask: torch.Tensor, seen: torch.Tensor) -> dict[str, torch.Tensor]:
    """`mask` where it does more than to hide the same keys from all heads."""
    differs = not torch.equal(seen, seen[:1, :1].expand_as(seen))
    adds = mask.is_floating_point() and bool(mask[seen].any())
    return {"attn_mask": mask.double()} if differs or adds else {}


def _tokens_first(*heads: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[1, heads, T, dim] -> [T, heads, dim], as copies."""
    return tuple(x[0].transpose(0, 1).clone() for x in heads)


def _without_repeated_heads(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v [T, key-value heads, dim] of heads that were repeated for each query of a group: a a b b -> a b."""
    heads = key.shape[1]
    for group in (size for size in range(heads, 1, -1) if heads % size == 0):
        once = key[:, ::group], value[:, ::group]
        if all(torch.equal(x.repeat_interleave(group, 1), whole) for x, whole in zip(once, (key, value), strict=True)):
            return once
    return key, value
