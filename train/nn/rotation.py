"""The rotary tables of a forward, and the heads in a fused projection's output.

Tables come from the model's own modules, except where those look at the longest position of the whole batch: LongRoPE (arXiv
2402.13753) takes other frequencies beyond a length, and dynamic scaling takes others for each length. A pack's sequences would then
turn by each other's lengths, and the host would wait for the device. Those frequencies are chosen here per sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from train.data.micro_batch import MicroBatch
from train.nn.description import FusedLayout, Rotation
from train.nn.heads import CosSin

# cos and sin [T, R] for the tokens of a micro-batch; the first argument gives dtype and device.
Table = Callable[[torch.Tensor, MicroBatch], CosSin]


class RotaryTables:
    """cos and sin of every token, for each kind of rotation that a decoder's layers use."""

    def __init__(self, rotations: Iterable[Rotation], decoder: nn.Module) -> None:
        self._tables = {rotation: _table(rotation, decoder.get_submodule(rotation.module)) for rotation in rotations}

    def __call__(self, hidden: torch.Tensor, batch: MicroBatch) -> Mapping[Rotation, CosSin]:
        """cos and sin [T, R] with a column for each feature, as `train.nn.heads.apply_rotary` takes them."""
        return {rotation: rotation_tables(*table(hidden, batch), rotation) for rotation, table in self._tables.items()}


def _table(rotation: Rotation, module: Any) -> Table:
    kind = getattr(module, "rope_type", "default")
    if isinstance(kind, dict):
        kind = kind.get(rotation.layer_type, "default")
    if kind == "longrope":
        return _LongRope(rotation, module)
    if kind == "dynamic":
        return _DynamicRope(rotation, module)
    return _ModuleTable(rotation, module)


class _ModuleTable:
    """Tables that a token's position alone decides: from the model's module."""

    def __init__(self, rotation: Rotation, module: Any) -> None:
        self._arguments = () if rotation.layer_type is None else (rotation.layer_type,)
        self._module = module

    def __call__(self, hidden: torch.Tensor, batch: MicroBatch) -> CosSin:
        cos, sin = self._module(hidden[None], batch.positions[None], *self._arguments)
        return cos[0], sin[0]


class _LongRope:
    """LongRoPE: a sequence beyond the original length turns by other frequencies than a shorter one."""

    def __init__(self, rotation: Rotation, module: Any) -> None:
        self._original_length = _settings(rotation, module)["original_max_position_embeddings"]
        arguments = {} if rotation.layer_type is None else {"layer_type": rotation.layer_type}
        # On the device now: while a CUDA graph is captured, nothing may be copied from the host.
        device = next(module.buffers()).device
        make = partial(ROPE_INIT_FUNCTIONS["longrope"], module.config, device, **arguments)
        self._short, self._factor = make(seq_len=self._original_length)
        self._long, _ = make(seq_len=self._original_length + 1)

    def __call__(self, hidden: torch.Tensor, batch: MicroBatch) -> CosSin:
        is_long = sequence_lengths(batch) > self._original_length
        frequencies = torch.where(is_long[:, None], self._long, self._short)
        return _cos_sin(frequencies, batch.positions, self._factor, hidden.dtype)


def _settings(rotation: Rotation, module: Any) -> Mapping[str, Any]:
    """The configuration of one kind of layer's rotation."""
    parameters: Mapping[str, Any] = module.config.rope_parameters
    return parameters if rotation.layer_type is None else parameters[rotation.layer_type]


class _DynamicRope:
    """Dynamic NTK scaling: the base grows with the length of the sequence, once it is longer than trained lengths.

    base * (factor * length / trained - (factor - 1)) ^ (dim / (dim - 2)), as in transformers' `dynamic` rotation.
    """

    def __init__(self, rotation: Rotation, module: Any) -> None:
        settings = _settings(rotation, module)
        self._base, self._factor = float(settings["rope_theta"]), float(settings["factor"])
        self._trained = int(module.config.max_position_embeddings)
        self._dim = 2 * len(next(module.buffers()))

    def __call__(self, hidden: torch.Tensor, batch: MicroBatch) -> CosSin:
        length = sequence_lengths(batch).clamp_min(self._trained).float()
        growth = self._factor * length / self._trained - (self._factor - 1)
        base = self._base * growth ** (self._dim / (self._dim - 2))
        exponents = torch.arange(0, self._dim, 2, device=hidden.device) / self._dim
        return _cos_sin(1 / base[:, None] ** exponents, batch.positions, 1.0, hidden.dtype)


def _cos_sin(frequencies: torch.Tensor, positions: torch.Tensor, factor: float, dtype: torch.dtype) -> CosSin:
    """cos and sin [T, R] of angles that repeat as halves, from frequencies [T, R / 2]."""
    angles = positions[:, None].float() * frequencies
    angles = torch.cat((angles, angles), -1)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def sequence_lengths(batch: MicroBatch) -> torch.Tensor:
    """[T] the length of each token's own sequence, tokens in a key-value cache included; without asking the host.

    Sequences that start at 0, 4, 6 with 9 tokens, positions 0 1 2 3 0 1 0 1 2: their last positions are 3 1 2, their lengths 4 2 3.
    """
    last = batch.positions[batch.sequence_starts[1:].long() - 1] + 1
    tokens = torch.arange(batch.total, device=batch.positions.device, dtype=batch.sequence_starts.dtype)
    return last[torch.searchsorted(batch.sequence_starts, tokens, right=True) - 1]


def position_factors(positions: torch.Tensor, beta: float, length: float) -> torch.Tensor:
    """1 + beta * log(1 + floor(p / length)): by what Ministral 3 multiplies the query at each position p."""
    return 1 + beta * torch.log1p(torch.floor(positions / length))


def rotation_tables(cos: torch.Tensor, sin: torch.Tensor, rotation: Rotation) -> CosSin:
    """cos and sin [T, R] with a column for each feature: GLM's halves a b a b become a a b b, since it turns features in pairs."""
    if rotation.tables == ("pairs" if rotation.interleaved else "halves"):
        return cos, sin
    return _per_feature(cos, rotation), _per_feature(sin, rotation)


def _per_feature(table: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """A table with each angle once, then repeated as the features are rotated."""
    pairs = table.shape[-1] // 2
    once = {"halves": table[:, :pairs], "pairs": table[:, ::2], "once": table}[rotation.tables]
    return once.repeat_interleave(2, -1) if rotation.interleaved else torch.cat((once, once), -1)


def split_fused(
    fused: torch.Tensor, layout: FusedLayout, heads: int, kv_heads: int, dim: int
) -> tuple[torch.Tensor, ...]:
    """q [T, heads, dim], k and v [T, key-value heads, dim] of one projection's output [T, features]."""
    if layout == "blocks":
        return torch.split(fused.view(len(fused), -1, dim), [heads, kv_heads, kv_heads], 1)
    q, k, v = torch.split(fused.view(len(fused), kv_heads, -1, dim), [heads // kv_heads, 1, 1], 2)
    # Apart, so that what is kept of one does not hold the memory of all.
    return q.reshape(len(fused), heads, dim), k.squeeze(2).contiguous(), v.squeeze(2).contiguous()
