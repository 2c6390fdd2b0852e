"""Which earlier tokens each attention module of transformers' decoder sees: its whole sequence or a sliding window, read off its mask.

On flat tokens attention is ours, and no mask is made: [T, T] numbers would cost more than the attention itself. What a mask would have
hidden is found out beforehand, once. A forward of a few tokens shows which mask each module is given, and the mask's formula is then
evaluated at distances up to the longest sequence, which no short forward would reach:

    causal             key <= query                                    None
    sliding window w   key <= query and key > query - w                w
    chunks, additive masks, biases and whatever else                   UnknownAttention, so that another path is taken
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from train.errors import LorapackError

PROBE = "lorapack_windows"
PROBE_TOKENS = 4
# Queries at which a mask's formula is evaluated, against all keys.
PROBE_QUERIES = 64
# Numbers among the arguments of transformers' attention functions that change nothing, or that we compute.
KNOWN_NUMBERS = {"dropout", "scaling", "softcap", "sliding_window"}
KNOWN_TENSORS = {"position_ids", "cache_position", "s_aux"}


class UnknownAttention(LorapackError):
    """A model's attention takes something that the attention of packs would leave out."""


class _MaskFormulas:
    """Stands in for transformers' masks: remembers the formula of each mask that is asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made: list[tuple[torch.Tensor, Callable[..., torch.Tensor]]] = []

    def make(self, *_: Any, mask_function: Callable[..., torch.Tensor], **_others: Any) -> torch.Tensor:
        """A mask by which its formula is found again; as transformers asks for one."""
        mask = torch.ones((1, 1, PROBE_TOKENS, PROBE_TOKENS), dtype=torch.bool, device=self._device)
        self._made.append((mask, mask_function))
        return mask

    def of(self, mask: torch.Tensor) -> Callable[..., torch.Tensor] | None:
        """The formula of a mask, None if it is another mask, or was changed on its way."""
        # By its memory: a view of the whole is the same mask.
        return next(
            (f for made, f in self._made if made.data_ptr() == mask.data_ptr() and made.shape == mask.shape), None
        )


@torch.no_grad()
def measure_windows(
    model: PreTrainedModel, decode: Callable[[torch.Tensor], Any], longest: int
) -> dict[nn.Module, int | None]:
    """The window of each module of `model` that calls the attention function; None where it sees all of a sequence.

    Args:
        decode: runs the decoder on tokens [1, n] of one sequence.
        longest: no sequence has more tokens; a window of as many is none.

    Raises:
        UnknownAttention: a module takes a mask of another kind, or something beside it.
    """
    device = model.get_input_embeddings().weight.device
    formulas = _MaskFormulas(device)
    windows: dict[nn.Module, int | None] = {}

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        _key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        *_: Any,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        name = type(module).__name__
        _refuse_others(name, others)
        if getattr(module, "is_causal", True) is False and attention_mask is None:
            raise UnknownAttention(f"{name} sees tokens that come later")
        window = None if attention_mask is None else _window(name, formulas.of(attention_mask), longest, device)
        if windows.setdefault(module, window) != window:
            raise UnknownAttention(f"{name} sees different tokens in different calls")
        # Zeros of the output's shape: what comes of them does not matter.
        return query.new_zeros(*query.shape[:1], *query.shape[2:0:-1], value.shape[-1]), None

    with _attention_as(model, attention, formulas.make):
        decode(torch.ones((1, PROBE_TOKENS), dtype=torch.long, device=device))
    # transformers would keep sequences apart by a mask [T, T] of all tokens; a cache of answers would stay empty.
    if not windows:
        raise UnknownAttention(f"{type(model).__name__} computes attention by code of its own")
    return windows


@contextmanager
def _attention_as(model: PreTrainedModel, attention: Callable[..., Any], mask: Callable[..., Any]) -> Iterator[None]:
    """Let a model call these for attention and masks."""
    before = model.config._attn_implementation
    AttentionInterface.register(PROBE, attention)
    AttentionMaskInterface.register(PROBE, mask)
    model.set_attn_implementation(PROBE)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        # The registries live as long as the process, and these hold the model.
        AttentionInterface.register(PROBE, _refuse_call)
        AttentionMaskInterface.register(PROBE, _refuse_call)


def _refuse_call(*_: Any, **_others: Any) -> None:
    raise RuntimeError(f"the attention {PROBE!r} is for probing alone")


def _refuse_others(name: str, others: dict[str, Any]) -> None:
    """Refuse arguments of an attention function that ours would not honour."""
    for key, value in others.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and key not in KNOWN_NUMBERS
        if is_number or (isinstance(value, torch.Tensor) and key not in KNOWN_TENSORS):
            raise UnknownAttention(f"{name} gives its attention {key}, which packs do not compute on flat tokens")
    if others.get("dropout"):
        raise UnknownAttention(f"{name} drops attention weights out, which packs do not")


def _window(name: str, formula: Callable[..., torch.Tensor] | None, longest: int, device: torch.device) -> int | None:
    """The window of a mask's formula, None without one."""
    if formula is None:
        raise UnknownAttention(f"{name} makes its own attention mask")
    zero = torch.zeros((), dtype=torch.long, device=device)
    # 64 of 1,000 queries: 0, 15, 31, ... 983, 999.
    queries = torch.linspace(0, longest - 1, min(longest, PROBE_QUERIES), device=device).long()[:, None]
    keys = torch.arange(longest, device=device)
    try:
        seen = formula(zero, zero, queries, keys).expand(len(queries), longest)
    # Formulas of a model's own may take no more than single numbers.
    except (RuntimeError, TypeError, IndexError) as exc:
        raise UnknownAttention(f"{name} makes its own attention mask ({exc})") from exc
    # The last query sees as many tokens as fit into the window.
    window = int(seen[-1].sum())
    if not torch.equal(seen, (keys <= queries) & (keys > queries - window)):
        raise UnknownAttention(f"{name} sees other tokens than those before it or a sliding window of them")
    return window if window < longest else None
