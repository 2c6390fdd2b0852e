"""From a trace to the description of a layer's attention: how the projections' outputs became what reached the products.

Candidates are few: which output is q, how a fused one is laid out, whether a norm of the trace read it, which of the decoder's tables
rotated it and in which way. Each is computed from the recorded numbers, and the first that gives the recorded q, k and v is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import permutations, product
from typing import Any

import torch

from train.model.linears import is_linear
from train.nn.description import (
    AttentionDescription,
    FusedLayout,
    HeadsDescription,
    NormDescription,
    PositionScale,
    Rotation,
    Scalar,
    TableLayout,
    Undescribable,
)
from train.nn.heads import apply_rotary
from train.nn.matching import as_heads, find_scalar, near, numbers, ratio, read_norm
from train.nn.rotation import position_factors, rotation_tables, split_fused
from train.nn.tracing import Call, LayerTrace, ModelTrace

# Which features turn together, and how the tables are laid out; the usual ones first.
ROTATIONS: tuple[tuple[bool, TableLayout], ...] = (
    (False, "halves"),
    (True, "pairs"),
    (True, "halves"),
    (False, "once"),
    (True, "once"),
)


@dataclass(frozen=True)
class AttentionFound:
    """A layer's attention: the name of its module, what its projections read and what its output projection gave, [T, hidden]."""

    description: AttentionDescription
    name: str
    input: torch.Tensor
    output: torch.Tensor


def read_attention(traced: ModelTrace, layer: LayerTrace) -> AttentionFound:
    """The attention of one layer.

    Raises:
        Undescribable: it is not called once, or computes something else.
    """
    if len(layer.attention) != 1:
        raise Undescribable(f"a layer calls transformers' or PyTorch's attention {len(layer.attention)} times")
    return _AttentionReader(traced, layer).read()


@dataclass(frozen=True)
class _Heads:
    """How projections become q, k and v; `factor` multiplies q and k on the way."""

    projections: tuple[str, ...]
    layout: FusedLayout | None
    query: HeadsDescription
    key: HeadsDescription
    value_norm: NormDescription | None
    clip: Scalar | None
    factor: float


# Names of projections, the layout of a fused one, and q, k and v [T, heads, dim] as they came out.
Split = tuple[tuple[str, ...], FusedLayout | None, tuple[torch.Tensor, ...]]


class _AttentionReader:
    """Reads the attention of one layer."""

    def __init__(self, traced: ModelTrace, layer: LayerTrace) -> None:
        self._traced = traced
        self._calls = layer.calls
        self._attention = layer.attention[0]
        self._name = next(name for name, module in layer.layer.named_modules() if module is self._attention.module)

    def read(self) -> AttentionFound:
        """The description, with what is before and behind."""
        unknown = [name for name, other in self._attention.others.items() if _acts(other)]
        if unknown:
            raise Undescribable(f"{self._name}: attention takes {', '.join(unknown)}")
        linears = [c for c in self._calls if is_linear(c.module) and c.name.startswith(f"{self._name}.")]
        output = next((c for c in linears if near(c.input, self._attention.output)), None)
        if output is None:
            raise Undescribable(f"{self._name}: no linear layer reads what attention gave")
        inputs = [c for c in linears if c is not output]
        if not inputs or not all(near(c.input, inputs[0].input) for c in inputs):
            raise Undescribable(f"{self._name}: its projections do not read the same")
        return AttentionFound(
            self._described(self._heads_found(inputs), output), self._name, inputs[0].input, output.output
        )

    def _described(self, found: _Heads, output: Call) -> AttentionDescription:
        """The description around what became of the projections."""
        call = self._attention
        owners = [(self._name, call.module), ("config", self._traced.config)]
        return AttentionDescription(
            found.projections,
            output.name,
            find_scalar(call.query.shape[-1], owners, "head_dim head_size"),
            found.query,
            found.key,
            find_scalar(call.scale * found.factor, owners, "scal"),
            found.layout,
            found.value_norm,
            found.clip,
            self._window(owners),
            None if call.softcap is None else find_scalar(call.softcap, owners, "cap"),
            self._sinks(),
        )

    def _heads_found(self, inputs: list[Call]) -> _Heads:
        """How the projections' outputs became what reached attention."""
        call = self._attention
        for clip, (names, layout, raw) in product(self._clips(), self._splits(inputs)):
            if clip is not None:
                raw = tuple(x.clamp(-clip.value, clip.value) for x in raw)
            query, key = self._prepared(raw[0], call.query), self._prepared(raw[1], call.key)
            value_norm, value = self._head_norm(raw[2], given=True, reaches=call.value)
            if query is None or key is None or not near(value, call.value):
                continue
            if query[0].rotation != key[0].rotation:
                raise Undescribable(f"{self._name}: queries and keys rotate differently")
            return _Heads(names, layout, query[0], key[0], value_norm, clip, query[1] * key[1])
        raise Undescribable(f"{self._name}: what reaches attention is no rotation of its projections")

    def _clips(self) -> Iterator[Scalar | None]:
        """At what the projections' outputs may be cut: what the configuration calls so, else nowhere."""
        kept = numbers(self._traced.config)
        yield from (Scalar(kept[name], "config", name) for name in kept if "clip" in name)
        yield None

    def _splits(self, inputs: list[Call]) -> Iterator[Split]:
        """Ways to take q, k and v [T, heads, dim] from the projections' outputs."""
        call = self._attention
        heads, kv_heads, dim = call.query.shape[1], call.key.shape[1], call.query.shape[2]
        outputs = [c.output.reshape(len(call.query), -1) for c in inputs]
        if len(inputs) == 1 and outputs[0].shape[1] == (heads + 2 * kv_heads) * dim:
            layouts: tuple[FusedLayout, ...] = ("blocks", "groups")
            for layout in layouts:
                yield (inputs[0].name,), layout, split_fused(outputs[0], layout, heads, kv_heads, dim)
        if len(inputs) in (2, 3):
            widths = [x.shape[1] for x in outputs]
            for order in permutations(range(len(inputs))):
                if [widths[i] for i in order] == [heads * dim, kv_heads * dim, kv_heads * dim][: len(inputs)]:
                    raw = tuple(outputs[i].view(len(call.query), -1, dim) for i in order)
                    # Values projected as the keys (Gemma 4).
                    yield tuple(inputs[i].name for i in order), None, (*raw, raw[-1]) if len(raw) == 2 else raw

    def _prepared(self, raw: torch.Tensor, target: torch.Tensor) -> tuple[HeadsDescription, float] | None:
        """How `raw` became `target`, both [T, heads, dim], and a factor that it was multiplied by."""
        norm, normed = self._head_norm(raw, given=True)
        for rotation, rotated in self._rotations(normed):
            factor = ratio(target, rotated)
            if factor is not None:
                return HeadsDescription(norm, rotation), factor
            # Our decoder multiplies before the rotation, and a norm in between would undo that.
            scale = self._position_scale(target, rotated) if norm is None else None
            if scale is not None:
                return HeadsDescription(norm, rotation, position_scale=scale), 1.0
        norm, given = self._head_norm(target, given=False)
        for rotation, rotated in self._rotations(raw):
            if norm is not None and near(rotated, given):
                return HeadsDescription(norm, rotation, rotate_first=True), 1.0
        return None

    def _position_scale(self, target: torch.Tensor, rotated: torch.Tensor) -> PositionScale | None:
        """The factor of each token by its position, from two numbers of the configuration."""
        factors = (target * rotated).sum((1, 2)) / rotated.square().sum((1, 2))
        if not near(target, rotated * factors[:, None, None]):
            return None
        kept = numbers(self._traced.config)
        for beta, length in permutations(kept, 2):
            if kept[length] >= 1 and near(position_factors(self._traced.positions, kept[beta], kept[length]), factors):
                return PositionScale(Scalar(kept[beta], "config", beta), Scalar(kept[length], "config", length))
        return None

    def _head_norm(
        self, x: torch.Tensor, *, given: bool, reaches: torch.Tensor | None = None
    ) -> tuple[NormDescription | None, torch.Tensor]:
        """The norm that read x [T, heads, dim] (`given`) or gave it, and what is on its other side."""
        for call in self._calls:
            known, other = (call.input, call.output) if given else (call.output, call.input)
            mine, others = as_heads(known, x), as_heads(other, x)
            if mine is None or others is None or not near(mine, x) or near(others, x):
                continue
            if reaches is not None and not near(others, reaches):
                continue
            norm = read_norm(call, self._traced.config)
            if norm is not None:
                return replace(norm, over_all_heads=call.input.shape[-1] != x.shape[-1]), others
        return None, x

    def _rotations(self, x: torch.Tensor) -> Iterator[tuple[Rotation | None, torch.Tensor]]:
        """x [T, heads, dim] by every rotation that the decoder's tables allow, and as it is."""
        yield None, x
        for call in self._traced.rotaries:
            for interleaved, tables in ROTATIONS:
                rotation = Rotation(call.name, call.layer_type, interleaved, tables)
                cos, sin = rotation_tables(call.cos, call.sin, rotation)
                if cos.shape[-1] <= x.shape[-1]:
                    yield rotation, apply_rotary(x, cos, sin, interleaved)

    def _sinks(self) -> str | None:
        """The parameter of attention's module that its scores end with."""
        sinks = self._attention.sinks
        if sinks is None:
            return None
        for name, parameter in self._attention.module.named_parameters():
            if near(parameter, sinks):
                return f"{self._name}.{name}"
        raise Undescribable(f"{self._name}: its sinks are no parameter")

    def _window(self, owners: list[tuple[str, Any]]) -> Scalar | None:
        visible = self._attention.visible
        causal = torch.ones_like(visible).tril()
        if torch.equal(visible, causal):
            return None
        window = int(visible[-1].sum())
        if not torch.equal(visible, causal.triu(1 - window)):
            raise Undescribable(f"{self._name}: its mask is neither causal nor a window")
        return find_scalar(window, owners, "window")


def _acts(other: Any) -> bool:
    """Whether a further argument of attention holds numbers, as sinks do; positions and lengths are integers."""
    return isinstance(other, torch.Tensor) and other.is_floating_point()
