"""From a trace of a small model to its description: whose output is whose input, and which formula joins them.

Nothing is decided by the name of a class or of a module. A norm whose input is what the output projection gave stands behind attention;
one whose input is the residual stream stands before. Where several formulas could be meant (activations, rotations, layouts of a fused
projection) each is computed from what the trace holds, and the one that gives what came next is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from train.errors import BadInput
from train.model.copies import small_model
from train.model.layer_kinds import layer_kinds, shortened
from train.model.linears import is_linear
from train.model.loading import plain_attention
from train.nn.activations import ACTIVATIONS
from train.nn.attention_reading import read_attention
from train.nn.description import (
    DecoderDescription,
    LayerDescription,
    MlpDescription,
    ModuleMlp,
    NormDescription,
    Scalar,
    Undescribable,
)
from train.nn.matching import coefficients, find_scalar, is_close, near, ratio, read_norm
from train.nn.tracing import Call, LayerTrace, ModelTrace, trace


def describe(model: Any) -> DecoderDescription:
    """The description of a small model, which is used up: its weights are replaced by random ones.

    Raises:
        Undescribable: the decoder computes something else; naming the module.
    """
    try:
        return _read(trace(model))
    except Undescribable:
        raise
    # Whatever the model's own code raises, and shapes that no formula here has.
    except Exception as exc:
        raise Undescribable(f"{type(exc).__name__}: {exc}") from exc


def _read(traced: ModelTrace) -> DecoderDescription:
    layers = tuple(_LayerReader(traced, layer).read() for layer in traced.layers)
    return DecoderDescription(layers, _last_norm(traced), _embedding_multiplier(traced))


def describe_model(model: Any) -> DecoderDescription:
    """The description of a model of any size, on any device, before its modules are exchanged: read off a small copy of it.

    Raises:
        Undescribable: the decoder computes something else, or no small copy can be made.
    """
    try:
        # A model with attention of its own calls PyTorch's only where it was made for it.
        small = small_model(model, attention=plain_attention(model.config))
        kinds = layer_kinds(model)
        # Which layers the copy has: of kinds A A B A A B the first three, so that a layer of kind B is described as the copy's third.
        _, copied = shortened(model)
    except BadInput as exc:
        raise Undescribable(str(exc)) from exc
    # Whatever the code of a configuration raises.
    except Exception as exc:
        raise Undescribable(f"no small copy can be made: {type(exc).__name__}: {exc}") from exc
    description = describe(small)
    place = {kinds[layer]: i for i, layer in reversed(list(enumerate(copied)))}
    return replace(description, layers=tuple(description.layers[place[kind]] for kind in kinds))


def _last_norm(traced: ModelTrace) -> NormDescription:
    for call in traced.calls:
        if near(call.input, traced.layers[-1].output) and near(call.output, traced.hidden):
            found = read_norm(call, traced.config)
            if found is not None:
                return found
    raise Undescribable("what comes after the last layer is no norm")


def _embedding_multiplier(traced: ModelTrace) -> Scalar:
    factor = ratio(traced.layers[0].input, traced.embedded)
    if factor is None:
        raise Undescribable("the first layer's input is no multiple of the embedding")
    return find_scalar(factor, [("config", traced.config)], "mult scale")


class _LayerReader:
    """Reads one layer."""

    def __init__(self, traced: ModelTrace, layer: LayerTrace) -> None:
        self._traced = traced
        self._layer = layer
        self._calls = layer.calls

    def read(self) -> LayerDescription:
        """The layer's description."""
        x, y = self._layer.input, self._layer.output
        attention = read_attention(self._traced, self._layer)
        attention_norm, source = self._norm_before(attention.input)
        if not near(source, x):
            raise Undescribable("attention does not read the layer's input")
        attention_out_norm, branch = self._norm_behind(attention.output)
        mlp, mlp_input, mlp_output = self._read_mlp(attention.name)
        mlp_norm, stream = self._norm_before(mlp_input)
        mlp_out_norm, mlp_branch = self._norm_behind(mlp_output)
        parallel = near(stream, x)
        if parallel:
            whole, first, second = coefficients(y, x, branch, mlp_branch)
            first /= whole
        else:
            unchanged, first = coefficients(stream, x, branch)
            if not is_close(unchanged, 1.0):
                raise Undescribable("the MLP does not read the sum of the layer's input and attention")
            whole, second = coefficients(y, stream, mlp_branch)
        multipliers = (self._multiplier(value) for value in (first, second / whole, whole))
        norms = attention_norm, attention_out_norm, mlp_norm, mlp_out_norm
        return LayerDescription(attention.description, mlp, *norms, parallel, *multipliers)

    def _multiplier(self, value: float) -> Scalar:
        return find_scalar(value, [("", self._layer.layer), ("config", self._traced.config)], "mult scal")

    def _norm_before(self, read: torch.Tensor) -> tuple[NormDescription | None, torch.Tensor]:
        """The norm whose output is `read`, and what it read itself."""
        for call in self._calls:
            if near(call.output, read) and not near(call.input, read):
                found = read_norm(call, self._traced.config)
                if found is not None:
                    return found, call.input
        return None, read

    def _norm_behind(self, branch: torch.Tensor) -> tuple[NormDescription | None, torch.Tensor]:
        """The norm that reads `branch`, and what it gave."""
        for call in self._calls:
            if near(call.input, branch) and not near(call.output, branch):
                found = read_norm(call, self._traced.config)
                if found is not None:
                    return found, call.output
        return None, branch

    def _read_mlp(self, attention: str) -> tuple[MlpDescription | ModuleMlp, torch.Tensor, torch.Tensor]:
        """Its description, what it reads and what it gives, both [T, hidden]."""
        outer = self._mlp_calls(attention)
        if not outer:
            raise Undescribable("a layer has no MLP")
        linears = [c for c in self._calls if is_linear(c.module) and any(_within(c.name, o.name) for o in outer)]
        found = _read_dense(linears)
        ends = outer[0].input, outer[-1].output
        if found is not None and near(linears[0].input, ends[0]) and near(linears[-1].output, ends[1]):
            return found, *ends
        if len(outer) != 1:
            raise Undescribable(f"{', '.join(c.name for c in outer)}: no MLP that we know")
        call = outer[0]
        return ModuleMlp(call.name), call.input, call.output

    def _mlp_calls(self, attention: str) -> list[Call]:
        """The outermost calls that are neither attention nor norms nor without effect."""
        outermost = [c for c in self._calls if not any(c.name.startswith(f"{o.name}.") for o in self._calls)]
        return [
            c
            for c in outermost
            if not _within(attention, c.name)
            and not _within(c.name, attention)
            and not near(c.input, c.output)
            and (is_linear(c.module) or list(c.module.children()) or read_norm(c, self._traced.config) is None)
        ]


def _within(name: str, owner: str) -> bool:
    return name == owner or name.startswith(f"{owner}.")


def _read_dense(linears: list[Call]) -> MlpDescription | None:
    """The description of an MLP of two or three linear layers; None for all others."""
    if len(linears) not in (2, 3):
        return None
    *inner, output = linears
    if not all(near(c.input, inner[0].input) for c in inner):
        return None
    names = tuple(c.name for c in inner)
    wide = [c.output.flatten(0, -2) for c in inner]
    for activation, formula in ACTIVATIONS.items():
        if len(inner) == 1 and near(formula(wide[0]), output.input):
            return MlpDescription(names, output.name, activation, gated=False)
        if len(inner) == 1 and near(_gated(formula, *wide[0].chunk(2, -1)), output.input):
            return MlpDescription(names, output.name, activation, gated=True)
        for gate, up in ((0, 1), (1, 0)) if len(inner) == 2 else ():
            if near(_gated(formula, wide[gate], wide[up]), output.input):
                return MlpDescription((names[gate], names[up]), output.name, activation, gated=True)
    return None


def _gated(formula: Callable[[torch.Tensor], torch.Tensor], gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return formula(gate) * up
