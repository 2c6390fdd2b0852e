"""Our decoder on flat tokens, written for packs, for every architecture that `train.nn.description` can say.

Layers that read the same input run together, residuals are added inside of the products, and nothing is kept for the backward that can
be computed from what is kept anyway. Of Llama's layer

    n    = rms_norm(x)                            x [T, hidden]: the residual stream
    x    = x + o_proj(attend(rotary(q_proj n), rotary(k_proj n), v_proj n))
    m    = rms_norm(x)
    x    = x + down_proj(silu(gate_proj m) * up_proj m)

each line is one to three calls below. What other architectures do differently is data: which norms there are and where, what becomes of
queries and keys, which multipliers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from train.data.micro_batch import MicroBatch
from train.model.anatomy import decoder_layers, text_decoder
from train.nn.activations import activate_autograd, gated_autograd
from train.nn.attention import attend_heads
from train.nn.description import (
    AttentionDescription,
    DecoderDescription,
    HeadsDescription,
    LayerDescription,
    MlpDescription,
    NormDescription,
    Rotation,
    Scalar,
)
from train.nn.forward_context import ForwardContext
from train.nn.functional import Norm, add_normed_autograd, norm_residual, renorm_autograd
from train.nn.heads import CosSin, HeadTransform, heads_autograd
from train.nn.linear import PackedLinear, apply_linears
from train.nn.matching import norm_parameters
from train.nn.rotation import RotaryTables, position_factors, split_fused

Tables = Mapping[Rotation, CosSin]


class OwnDecoder:
    """Embedding, layers and the last norm."""

    def __init__(self, description: DecoderDescription, model: Any, context: ForwardContext) -> None:
        config = model.config.get_text_config(decoder=True)
        decoder = text_decoder(model)
        self._embed = model.get_input_embeddings()
        self._embedding_multiplier = description.embedding_multiplier.read(model, config)
        self._tables = RotaryTables(description.rotations, decoder)
        self._norm = bind_norm(description.norm, decoder, config)
        self._context = context
        layers = zip(description.layers, decoder_layers(model), strict=True)
        self._layers: list[Callable[[torch.Tensor, Tables], torch.Tensor]] = [
            OwnLayer(each, _Binder(layer, config), context) for each, layer in layers
        ]
        self.calls_modules = description.calls_modules

    def __call__(self, batch: MicroBatch) -> torch.Tensor:
        """The last hidden state [T, hidden] of every token."""
        hidden = self._embed(batch.tokens)
        if self._embedding_multiplier != 1:
            # Rounded as the models do: 55.4 is 55.5 in bfloat16.
            hidden = hidden * torch.tensor(self._embedding_multiplier, dtype=hidden.dtype).item()
        tables = self._tables(hidden, batch)
        for layer in self._layers:
            hidden = layer(hidden, tables)
        return norm_residual(hidden, self._norm, self._context.kernels.fused_elementwise)[0]

    def checkpoint_activations(self) -> None:
        """Keep only the layers' inputs in the forward and compute the rest again in the backward (arXiv 1604.06174)."""
        self._layers = [
            partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False) for layer in self._layers
        ]


class _Binder:
    """Finds what a description names, in one layer of a model."""

    def __init__(self, layer: nn.Module, config: Any) -> None:
        self._layer = layer
        self._config = config

    def module(self, name: str) -> Any:
        return self._layer.get_submodule(name)

    def parameter(self, name: str) -> torch.Tensor:
        return self._layer.get_parameter(name).detach()

    def linears(self, names: tuple[str, ...]) -> list[PackedLinear]:
        return [self.module(name) for name in names]

    def number(self, scalar: Scalar) -> float:
        return scalar.read(self._layer, self._config)

    def optional(self, scalar: Scalar | None) -> float | None:
        return None if scalar is None else self.number(scalar)

    def norm(self, description: NormDescription | None) -> Norm | None:
        return None if description is None else bind_norm(description, self._layer, self._config)

    def heads(self, description: HeadsDescription) -> HeadTransform:
        return HeadTransform(
            self.norm(description.norm),
            over_all_heads=description.norm is not None and description.norm.over_all_heads,
            interleaved=description.rotation is not None and description.rotation.interleaved,
            rotate_first=description.rotate_first,
        )


def bind_norm(description: NormDescription, owner: nn.Module, config: Any) -> Norm:
    """A described norm with the weights of `owner`'s module. Weights with an offset stay wide: 1.0123 has few bits in bfloat16."""
    module = owner.get_submodule(description.name)
    weight, bias = norm_parameters(module)
    if weight is not None and description.offset:
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) + description.offset
    return Norm(weight, description.eps.read(owner, config), bias, description.centered)


class OwnLayer:
    """One decoder layer, around transformers' module of the same layer."""

    def __init__(self, description: LayerDescription, binder: _Binder, context: ForwardContext) -> None:
        self._context = context
        self._attention = _Attention(description.attention, binder, context)
        self._mlp = _Mlp(description.mlp, binder, context)
        self._attention_norm = binder.norm(description.attention_norm)
        self._mlp_norm = binder.norm(description.mlp_norm)
        self._after_attention = _Branch(
            description.attention_out_norm, description.attention_multiplier, binder, context
        )
        self._after_mlp = _Branch(description.mlp_out_norm, description.mlp_multiplier, binder, context)
        self._parallel = description.parallel
        self._shares_norm = description.shares_norm
        self._output_multiplier = binder.number(description.output_multiplier)

    def __call__(self, hidden: torch.Tensor, tables: Tables) -> torch.Tensor:
        """[T, hidden] -> [T, hidden]."""
        hidden = self._parallel_branches(hidden, tables) if self._parallel else self._serial_branches(hidden, tables)
        return hidden if self._output_multiplier == 1 else hidden * self._output_multiplier

    def _serial_branches(self, hidden: torch.Tensor, tables: Tables) -> torch.Tensor:
        normed, hidden = self._normed(hidden, self._attention_norm)
        attended = self._attention(normed, tables)
        if self._mlp_norm is None:
            normed = hidden = self._after_attention(attended, self._attention.output, hidden)
        else:
            normed, hidden = self._after_attention.normed(attended, self._attention.output, hidden, self._mlp_norm)
        return self._after_mlp(self._mlp(normed), self._mlp.output, hidden)

    def _parallel_branches(self, hidden: torch.Tensor, tables: Tables) -> torch.Tensor:
        """Attention and MLP both read the layer's input; their results are added one after the other."""
        normed, hidden = self._normed(hidden, self._attention_norm)
        for_mlp, hidden = (normed, hidden) if self._shares_norm else self._normed(hidden, self._mlp_norm)
        hidden = self._after_attention(self._attention(normed, tables), self._attention.output, hidden)
        return self._after_mlp(self._mlp(for_mlp), self._mlp.output, hidden)

    def _normed(self, hidden: torch.Tensor, norm: Norm | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of `hidden`, and `hidden` itself through autograd, so that its two gradients are added in the norm's backward."""
        if norm is None:
            return hidden, hidden
        return norm_residual(hidden, norm, self._context.kernels.fused_elementwise)


class _Branch:
    """Adds what attention or the MLP computed to the residual stream."""

    def __init__(
        self, norm: NormDescription | None, multiplier: Scalar, binder: _Binder, context: ForwardContext
    ) -> None:
        self._norm = binder.norm(norm)
        self._multiplier = binder.number(multiplier)
        self._context = context

    def __call__(self, x: torch.Tensor, output: PackedLinear | None, residual: torch.Tensor) -> torch.Tensor:
        """residual + multiplier * norm(output(x)), in one product where there is no norm; x itself without an `output`."""
        if output is not None and self._norm is None:
            return apply_linears(x, [output], residual, self._multiplier)[0]
        y = x if output is None else apply_linears(x, [output], None)[0]
        fused = self._context.kernels.fused_elementwise
        return add_normed_autograd(residual, y, self._norm, self._multiplier, fused)

    def normed(
        self, x: torch.Tensor, output: PackedLinear, residual: torch.Tensor, norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`norm` of what a call returns, and that itself."""
        fused = self._context.kernels.fused_elementwise
        if self._norm is None:
            return norm_residual(self(x, output, residual), norm, fused)
        y = apply_linears(x, [output], None)[0]
        return renorm_autograd(residual, y, self._norm, self._multiplier, norm, fused)


class _Attention:
    """From the layer's input to what its output projection reads."""

    def __init__(self, description: AttentionDescription, binder: _Binder, context: ForwardContext) -> None:
        self._projections = binder.linears(description.projections)
        self.output: PackedLinear = binder.module(description.output)
        self._dim = int(binder.number(description.head_dim))
        heads = self.output.in_features // self._dim
        features = sum(projection.out_features for projection in self._projections) // self._dim - heads
        # Keys and values, unless the values are projected as the keys.
        self._heads = heads, features // (1 if len(self._projections) == 2 else 2)
        self._layout = description.layout
        self._transforms = binder.heads(description.query), binder.heads(description.key)
        self._rotation = description.query.rotation
        value_norm = binder.norm(description.value_norm)
        self._value_transform = None if value_norm is None else HeadTransform(value_norm)
        scale = description.query.position_scale
        self._position_scale = None if scale is None else (binder.number(scale.beta), binder.number(scale.length))
        self._clip = binder.optional(description.clip)
        self._scale = binder.number(description.scale)
        window = binder.optional(description.window)
        self._window = None if window is None else int(window)
        self._softcap = binder.optional(description.softcap)
        self._sinks = None if description.sinks is None else binder.parameter(description.sinks)
        self._context = context

    def __call__(self, normed: torch.Tensor, tables: Tables) -> torch.Tensor:
        """[T, hidden] -> [T, heads * dim]."""
        cos_sin = None if self._rotation is None else tables[self._rotation]
        out = attend_heads(
            self._raw(normed), self._heads, self._transforms, cos_sin, self._context,
            self._scale, self._window, self._softcap, self._sinks,
        )  # fmt: skip
        return out.reshape(len(normed), -1)

    def _raw(self, normed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q [T, heads, dim], k and v [T, key-value heads, dim], or one of all."""
        projected = apply_linears(normed, self._projections, None)
        if self._clip is not None:
            projected = tuple(x.clamp(-self._clip, self._clip) for x in projected)
        # Each projection [T, heads * dim] as heads; with grouped-query attention k and v have fewer.
        raw = tuple(x.view(len(x), -1, self._dim) for x in projected)
        changes_one = self._value_transform is not None or self._position_scale is not None
        if self._layout == "groups" or (self._layout is not None and changes_one):
            raw = split_fused(raw[0].flatten(1), self._layout, *self._heads, self._dim)
        if len(raw) == 2:
            raw = *raw, raw[1]
        if self._value_transform is not None:
            value = heads_autograd(raw[2], None, self._value_transform, self._context.kernels.fused_elementwise)
            raw = *raw[:2], value
        return raw if self._position_scale is None else (self._scaled(raw[0]), *raw[1:])

    def _scaled(self, query: torch.Tensor) -> torch.Tensor:
        """Each token's query by its position's factor: before the rotation, which a factor passes through."""
        context, (beta, length) = self._context, self._position_scale or (0.0, 1.0)
        # No token of these sequences is that far; a cache's may be.
        if context.cache is None and context.batch.longest <= length:
            return query
        factors = context.cached(
            ("position factors", beta, length), lambda: position_factors(context.batch.positions, beta, length)
        )
        return query * factors[:, None, None].to(query.dtype)


class _Mlp:
    """From the layer's stream to what its output projection reads; or a module of the model that computes all of it."""

    def __init__(self, description: Any, binder: _Binder, context: ForwardContext) -> None:
        self._context = context
        self.output: PackedLinear | None = None
        if not isinstance(description, MlpDescription):
            self._module = binder.module(description.name)
            return
        self._module = None
        self.output = binder.module(description.output)
        self._projections = binder.linears(description.projections)
        self._activation = description.activation
        self._gated = description.gated

    def __call__(self, normed: torch.Tensor) -> torch.Tensor:
        """[T, hidden] -> [T, inner], or [T, hidden] by a module."""
        if self._module is not None:
            found = self._module(normed[None])
            result: torch.Tensor = found[0] if isinstance(found, tuple) else found
            return result.view(normed.shape)
        projected = apply_linears(normed, self._projections, None)
        fused = self._context.kernels.fused_elementwise
        if self._gated:
            return gated_autograd(projected, self._activation, fused)
        return activate_autograd(projected[0], self._activation, fused)
